"""Count what crosses devices, from the graphs that TensorFlow ran."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_clones import _tf
from keras_clones.benchmark.joined_graph import join


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


def count_transfers(
    function: Callable[[], Any],
    unknown: int | Callable[[tf.Tensor], int] | None = None,
) -> list[Transfer]:
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
        unknown: Integer, the bytes that a tensor without a static size counts
            for, or a function of the tensor that returns them. Defaults to
            `None`: it is refused.

    Returns:
        List of `Transfer`s.

    Raises:
        ValueError: If no graph ran for the first time, or a tensor that
            crosses devices has no static size.
    """
    _tf.ensure_initialized()
    options = tf.config.optimizer.get_experimental_options()
    # The function optimizer makes functions that the report lacks.
    tf.config.optimizer.set_experimental_options(
        {**options, "function_optimization": False}
    )
    _tf.enable_graph_collection()
    try:
        function()
        report = _tf.export_run_metadata()
    finally:
        _tf.disable_graph_collection()
        tf.config.optimizer.set_experimental_options(
            {"function_optimization": True, **options}
        )
    if not report.function_graphs:
        raise ValueError(
            "Expected a function that runs a `tf.function` for the first "
            "time. TensorFlow reported no graph. Make a new `tf.function` to "
            f"count its transfers. Received: function={function!r}"
        )
    return [
        transfer
        for graphs in report.function_graphs
        for transfer in _transfers(graphs, unknown)
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


def _transfers(graphs: Any, unknown: Any) -> list[Transfer]:
    """Return the transfers of one function, cut into a graph a device."""
    graph, crossings = join(graphs)
    return [
        Transfer(source, target, size, tensor)
        for source, target, tensor in crossings
        if (size := _size(graph, tensor, unknown)) is not None
    ]


def _size(graph: tf.Graph, name: str, unknown: Any) -> int | None:
    """Return the bytes of a tensor by its inferred shape, `None` of a handle.

    A handle only says where a variable is.
    """
    tensor = graph.get_tensor_by_name(name if ":" in name else f"{name}:0")
    elements = tensor.shape.num_elements()
    if tensor.dtype == tf.resource:
        return None
    if elements is None or tensor.dtype in (tf.string, tf.variant):
        if unknown is not None:
            return unknown(tensor) if callable(unknown) else unknown
        raise ValueError(
            "Expected tensors of a static size to cross devices. "
            f"Received: tensor={name}, shape={tensor.shape}, "
            f"dtype={tensor.dtype.name}. Batches have a static shape with "
            "`dataset.batch(size, drop_remainder=True)`."
        )
    return elements * tensor.dtype.size
