"""One graph out of the parts that TensorFlow cut it into, one a device."""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_clones import _tf
from keras_clones.devices.hosts import cluster, host_of

SENDS = ("_Send", "_HostSend")
RECEIVES = ("_Recv", "_HostRecv")
_CONVOLUTION = {
    *("T", "strides", "padding", "explicit_paddings", "data_format"),
    "dilations",
}


class Crossing(NamedTuple):
    """A tensor of a graph that goes from one device to another."""

    source: str
    target: str
    tensor: str


def join(graphs: Any) -> tuple[tf.Graph, list[Crossing]]:
    """Return one graph of all devices' parts, and what crosses devices.

    Each receive becomes an identity of what its send gets, so that shapes are
    inferred across devices. The graph is not for running.

    Args:
        graphs: `FunctionGraphs` as TensorFlow reports them for a function.
    """
    parts = [node for part in graphs.partition_graphs for node in part.node]
    library = _library(graphs)
    nodes, inner = _unfold(parts, library)
    outer = [
        Crossing(
            _short(_text(node, "send_device")),
            _short(_text(node, "recv_device")),
            node.input[0],
        )
        for node in parts
        if node.op in SENDS
    ]
    crossings = [c for c in (*outer, *inner) if c.source != c.target]
    if not crossings:
        return tf.Graph(), []
    return _imported(graphs, nodes, library), crossings


def _short(device: str) -> str:
    spec = tf.DeviceSpec.from_string(device)
    host = "" if cluster() is None else host_of(device)
    return f"{host}/device:{spec.device_type}:{spec.device_index}"


def _text(node: Any, name: str) -> str:
    return node.attr[name].s.decode()


def _imported(
    graphs: Any, nodes: list[Any], library: dict[str, Any]
) -> tf.Graph:
    """Return a graph of nodes and the functions that they call."""
    whole = tf.compat.v1.GraphDef()
    whole.versions.CopyFrom(graphs.partition_graphs[0].versions)
    whole.library.function.extend(library.values())
    sources = {
        _text(node, "tensor_name"): node.input[0]
        for node in nodes
        if node.op in SENDS
    }
    for node in nodes:
        if node.op.endswith("BackpropFilterWithBias"):
            whole.node.extend(_two_gradients(node))
        elif node.op not in (*SENDS, "_Retval"):
            whole.node.append(_importable(node, sources))
    for node in whole.node:
        # A part of another machine's device must be importable here, and so
        # must what stood beside a node that is no longer there.
        node.ClearField("device")
        if "_class" in node.attr:
            del node.attr["_class"]
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(whole, name="")
    return graph


def _two_gradients(node: Any) -> list[Any]:
    """Return a fused gradient of a convolution as the two that it is.

    TensorFlow infers a wrong shape for the fused one's second result.
    """
    filters = tf.compat.v1.NodeDef(
        name=f"{node.name}/filters", op="Conv2DBackpropFilter"
    )
    filters.input.extend(node.input[:3])
    for name in _CONVOLUTION & set(node.attr):
        filters.attr[name].CopyFrom(node.attr[name])
    bias = tf.compat.v1.NodeDef(name=f"{node.name}/bias", op="BiasAddGrad")
    bias.input.append(node.input[2])
    for name in ("T", "data_format"):
        bias.attr[name].CopyFrom(node.attr[name])
    both = tf.compat.v1.NodeDef(name=node.name, op="IdentityN")
    both.input.extend([filters.name, bias.name])
    both.attr["T"].list.type.extend([node.attr["T"].type] * 2)
    return [filters, bias, both]


def _importable(node: Any, sources: dict[str, str]) -> Any:
    """Return a node that means the same in a graph that is never run."""
    new = tf.compat.v1.NodeDef(name=node.name)
    if node.op in RECEIVES:
        new.op = "Identity"
        new.input.append(sources[_text(node, "tensor_name")])
        new.attr["T"].type = node.attr["tensor_type"].type
    elif node.op == "_Arg" and node.attr["_handle_shapes"].list.shape:
        new.op = "VarHandleOp"
        new.attr["dtype"].type = node.attr["_handle_dtypes"].list.type[0]
        new.attr["shape"].shape.CopyFrom(
            node.attr["_handle_shapes"].list.shape[0]
        )
    elif node.op == "_Arg":
        new.op = "Placeholder"
        new.attr["dtype"].type = node.attr["T"].type
        shapes = node.attr["_output_shapes"].list.shape
        if shapes:
            new.attr["shape"].shape.CopyFrom(shapes[0])
    else:
        new.CopyFrom(node)
    return new


def _unfold(
    nodes: list[Any], library: dict[str, Any]
) -> tuple[list[Any], list[Crossing]]:
    """Put functions that use several devices in the place of their calls.

    TensorFlow cuts these up too, but does not report the parts.

    Returns:
        All nodes, and the tensors inside the functions that cross devices.
    """
    unfolded, todo = [], list(nodes)
    crossings: dict[Crossing, None] = {}
    while todo:
        node = todo.pop()
        function = library.get(_callee(node))
        if function is None or not any(
            _asks_for(inner.device, node.device) for inner in function.node_def
        ):
            unfolded.append(node)
            continue
        body = _body(node, function)
        device = {inner.name: inner.device for inner in body}
        for inner in body:
            for tensor in inner.input:
                source = device.get(tensor.partition(":")[0], inner.device)
                ends = _short(source), _short(inner.device)
                if tensor[0] != "^":
                    crossings[Crossing(*ends, tensor)] = None
        todo += body
    return unfolded, list(crossings)


def _callee(node: Any) -> str:
    """Return the name of the function that a node calls, else nothing."""
    # Asking a proto for an attribute that is not there makes it.
    return node.attr["f"].func.name if "f" in node.attr else ""


def _asks_for(device: str, caller: str) -> bool:
    """Say whether a device is named, and not the caller's."""
    return bool(device) and _short(device) != _short(caller)


def _body(call: Any, function: Any) -> list[Any]:
    """Return a function's nodes, linked to what its call gets and gives."""
    graph, flat = _tf.function_def_to_graph_def(function)
    arguments = dict(
        zip(
            (argument.name for argument in function.signature.input_arg),
            zip(call.input, call.attr["Tin"].list.type, strict=False),
            strict=True,
        )
    )
    body = []
    for node in graph.node:
        new = tf.compat.v1.NodeDef(name=f"{call.name}/{node.name}")
        if node.name in arguments:
            new.op = "Identity"
            source, new.attr["T"].type = arguments[node.name]
            new.input.append(source)
        else:
            new.op = node.op
            for name, value in node.attr.items():
                new.attr[name].CopyFrom(value)
            for name in node.input:
                order, name = ("^", name[1:]) if name[0] == "^" else ("", name)
                new.input.append(f"{order}{call.name}/{name}")
        asked = _asks_for(node.device, call.device)
        new.device = node.device if asked else call.device
        body.append(new)
    result = tf.compat.v1.NodeDef(
        name=call.name, op="IdentityN", device=call.device
    )
    result.attr["T"].CopyFrom(call.attr["Tout"])
    for output in function.signature.output_arg:
        returned = flat[function.ret[output.name]]
        result.input.append(f"{call.name}/{returned}")
    return [*body, result]


def _library(graphs: Any) -> dict[str, Any]:
    """Return the functions that nodes call, by name."""
    parts = [*graphs.partition_graphs, graphs.pre_optimization_graph]
    return {f.signature.name: f for g in parts for f in g.library.function}
