"""Count what crosses devices, from the graphs that TensorFlow ran."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2

# Private, since no public name tells which graphs ran on which device.
from tensorflow.python.eager import context
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
    are not counted. A transfer that only orders two operations has 0 bytes.

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


def _transfers(graphs: Any) -> list[Transfer]:
    """Return the transfers of one function, cut into a graph a device."""
    nodes = [node for part in graphs.partition_graphs for node in part.node]
    sends = [
        node
        for node in nodes
        if node.op in _SENDS and _attr(node, "send_device") != _target(node)
    ]
    if not sends:
        return []
    joined = _join(graphs, nodes)
    return [
        Transfer(
            _short(_attr(node, "send_device")),
            _short(_target(node)),
            _size(joined, node),
            node.input[0],
        )
        for node in sends
    ]


def _attr(node: Any, name: str) -> str:
    return node.attr[name].s.decode()


def _target(node: Any) -> str:
    return _attr(node, "recv_device")


def _short(device: str) -> str:
    spec = tf.DeviceSpec.from_string(device)
    return f"/device:{spec.device_type}:{spec.device_index}"


def _size(graph: tf.Graph, send: Any) -> int:
    """Return the bytes of what a send gets, from its inferred shape."""
    name = send.input[0]
    tensor = graph.get_tensor_by_name(name if ":" in name else f"{name}:0")
    elements = tensor.shape.num_elements()
    if elements is None or tensor.dtype in (tf.string, tf.variant, tf.resource):
        raise ValueError(
            "Expected tensors of a static size to cross devices. "
            f"Received: tensor={name}, shape={tensor.shape}, "
            f"dtype={tensor.dtype.name}. Batches have a static shape with "
            "`dataset.batch(size, drop_remainder=True)`."
        )
    return elements * tensor.dtype.size


def _join(graphs: Any, nodes: list[Any]) -> tf.Graph:
    """Return one graph of all devices' parts, which knows its shapes.

    Each receive becomes an identity of what its send gets, so that shapes are
    inferred across devices.
    """
    whole = tf.compat.v1.GraphDef()
    whole.versions.CopyFrom(graphs.partition_graphs[0].versions)
    whole.library.function.extend(_library(graphs, nodes))
    sources = {
        _attr(node, "tensor_name"): node.input[0]
        for node in nodes
        if node.op in _SENDS
    }
    for node in nodes:
        if node.op not in (*_SENDS, "_Retval"):
            whole.node.append(_importable(node, sources))
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
    # All devices' parts must be imported on a machine of any kind.
    new.ClearField("device")
    return new


def _library(graphs: Any, nodes: list[Any]) -> list[Any]:
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
    return list(known.values())
