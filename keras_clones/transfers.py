"""Count what crosses devices, from the graphs that TensorFlow ran."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2

# Private, since no public name tells which graphs ran on which device.
from tensorflow.python.eager import context
from tensorflow.python.framework import function_def_to_graph
from tensorflow.python.grappler import tf_optimizer

_SENDS = ("_Send", "_HostSend")
_RECEIVES = ("_Recv", "_HostRecv")


class Transfer(NamedTuple):
    """A tensor that goes from one device to another.

    `source` and `target` are device strings such as `"/device:CPU:0"`, and
    `name` is that of the tensor in the graph.
    """

    source: str
    target: str
    bytes: int
    name: str


class Traffic(NamedTuple):
    """What a device sent and received: bytes, and number of transfers."""

    bytes_sent: int = 0
    bytes_received: int = 0
    sent: int = 0
    received: int = 0


def count_transfers(function: Callable[[], Any]) -> list[Transfer]:
    """Run a function once, and return what its graphs send across devices.

    TensorFlow reports a graph when it is run for the first time. So what is
    in a `tf.function` is counted if that never ran before, and each transfer
    of a graph once, however often the graph runs: pass what runs one step.
    Collective operations and `tf.data` move data by ways of their own, which
    are not counted, and neither are the handles of variables. A transfer that
    only orders two operations has 0 bytes. In a function that is kept out of
    line, an operation counts as on the device it asks for, else its caller's.

    Args:
        function: Callable without arguments, which runs a `tf.function` for
            the first time.

    Returns:
        List of `Transfer`s.

    Raises:
        ValueError: If no graph ran for the first time, or a tensor that
            crosses devices has no static size.
    """
    context.ensure_initialized()
    context.enable_graph_collection()
    try:
        function()
        report = context.export_run_metadata()
    finally:
        context.disable_graph_collection()
    if not report.function_graphs:
        raise ValueError(
            "Expected a function that runs a `tf.function` for the first "
            "time. TensorFlow reported no graph. Make a new `tf.function` to "
            f"count its transfers. Received: function={function!r}"
        )
    return [
        transfer
        for graphs in report.function_graphs
        for transfer in _transfers(graphs)
    ]


def traffic(transfers: Iterable[Transfer]) -> dict[str, Traffic]:
    """Return what each device sent and received, by device string."""
    found: dict[str, Traffic] = {}
    for source, target, size, _ in transfers:
        one = found.get(source, Traffic())
        found[source] = one._replace(
            bytes_sent=one.bytes_sent + size, sent=one.sent + 1
        )
        other = found.get(target, Traffic())
        found[target] = other._replace(
            bytes_received=other.bytes_received + size,
            received=other.received + 1,
        )
    return found


class _Crossing(NamedTuple):
    """A tensor of the joined graph that crosses, by device strings."""

    source: str
    target: str
    tensor: str


def _transfers(graphs: Any) -> list[Transfer]:
    """Return the transfers of one function, cut into a graph a device."""
    parts = [node for part in graphs.partition_graphs for node in part.node]
    library = _library(graphs, parts)
    nodes, inner = _unfold(parts, library)
    outer = [
        _Crossing(_attr(node, "send_device"), _target(node), node.input[0])
        for node in parts
        if node.op in _SENDS and _attr(node, "send_device") != _target(node)
    ]
    if not outer and not inner:
        return []
    joined = _join(graphs, nodes, library)
    return [
        Transfer(_short(source), _short(target), size, tensor)
        for source, target, tensor in (*outer, *inner)
        if (size := _size(joined, tensor)) is not None
    ]


def _attr(node: Any, name: str) -> str:
    return node.attr[name].s.decode()


def _target(node: Any) -> str:
    return _attr(node, "recv_device")


def _short(device: str) -> str:
    spec = tf.DeviceSpec.from_string(device)
    return f"/device:{spec.device_type}:{spec.device_index}"


def _size(graph: tf.Graph, name: str) -> int | None:
    """Return the bytes of a tensor by its inferred shape, `None` of a handle.

    A handle only says where a variable is.
    """
    tensor = graph.get_tensor_by_name(name if ":" in name else f"{name}:0")
    elements = tensor.shape.num_elements()
    if tensor.dtype == tf.resource:
        return None
    if elements is None or tensor.dtype in (tf.string, tf.variant):
        raise ValueError(
            "Expected tensors of a static size to cross devices. "
            f"Received: tensor={name}, shape={tensor.shape}, "
            f"dtype={tensor.dtype.name}. Batches have a static shape with "
            "`dataset.batch(size, drop_remainder=True)`."
        )
    return elements * tensor.dtype.size


def _join(graphs: Any, nodes: list[Any], library: dict[str, Any]) -> tf.Graph:
    """Return one graph of all devices' parts, which knows its shapes.

    Each receive becomes an identity of what its send gets, so that shapes are
    inferred across devices.
    """
    whole = tf.compat.v1.GraphDef()
    whole.versions.CopyFrom(graphs.partition_graphs[0].versions)
    whole.library.function.extend(library.values())
    sources = {
        _attr(node, "tensor_name"): node.input[0]
        for node in nodes
        if node.op in _SENDS
    }
    for node in nodes:
        if node.op not in (*_SENDS, "_Retval"):
            whole.node.append(_importable(node, sources))
            # A part of another machine's device must be importable here.
            whole.node[-1].ClearField("device")
    with tf.Graph().as_default() as graph:
        tf.graph_util.import_graph_def(whole, name="")
    return graph


def _importable(node: Any, sources: dict[str, str]) -> Any:
    """Return a node that means the same in a graph that is never run."""
    new = tf.compat.v1.NodeDef(name=node.name)
    if node.op in _RECEIVES:
        new.op = "Identity"
        new.input.append(sources[_attr(node, "tensor_name")])
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
) -> tuple[list[Any], list[_Crossing]]:
    """Put functions that use several devices in the place of their calls.

    TensorFlow cuts these up too, but does not report the parts.

    Returns:
        All nodes, and the tensors inside the functions that cross devices.
    """
    unfolded, todo = [], list(nodes)
    crossings: dict[_Crossing, None] = {}
    while todo:
        node = todo.pop()
        function = library.get(node.attr["f"].func.name)
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
                if tensor[0] != "^" and _asks_for(source, inner.device):
                    crossing = _Crossing(source, inner.device, tensor)
                    crossings[crossing] = None
        todo += body
    return unfolded, list(crossings)


def _asks_for(device: str, caller: str) -> bool:
    """Say whether a device is named, and not the caller's."""
    return bool(device) and _short(device) != _short(caller)


def _body(call: Any, function: Any) -> list[Any]:
    """Return a function's nodes, linked to what its call gets and gives."""
    graph, flat = function_def_to_graph.function_def_to_graph_def(function)
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


def _library(graphs: Any, nodes: list[Any]) -> dict[str, Any]:
    """Return the functions that nodes call.

    What TensorFlow reports lacks the functions that its optimizer made for
    one call, whose results may be fewer than the original's. Optimizing the
    same graph once more makes them again, under the same names.
    """
    parts = [*graphs.partition_graphs, graphs.pre_optimization_graph]
    known = {f.signature.name: f for g in parts for f in g.library.function}
    missing = [
        name
        for name in (node.attr["f"].func.name for node in nodes)
        if name and name not in known
    ]
    if missing:
        group = meta_graph_pb2.MetaGraphDef()
        group.graph_def.CopyFrom(graphs.pre_optimization_graph)
        group.collection_def["train_op"].node_list.value.extend(
            node.name for node in group.graph_def.node if node.op != "_Arg"
        )
        config = config_pb2.ConfigProto()
        config.CopyFrom(context.context().config)
        optimized = tf_optimizer.OptimizeGraph(
            config, group, graph_id=missing[0].rpartition("_at_")[2].encode()
        )
        for function in optimized.library.function:
            known.setdefault(function.signature.name, function)
    return known
