"""Where a clone's rows are among those of the global batch, and their draws."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones.clone.axes import MIXED, OTHER, ROWS, UNKNOWN
from keras_clones.clone.leading import Sizes
from keras_clones.tensors import sharding
from keras_clones.warn import warn_or_refuse


class GlobalRows(NamedTuple):
    """Where the rows of a clone are among those of the global batch.

    Attributes:
        rows: Integer or scalar int32 tensor, how many the clone has.
        begin: Scalar int32 tensor, which of all rows its first one is.
        total: Integer or scalar int32 tensor, how many there are in all.
        graph: The `tf.Graph` that the clone is traced in, or `None`.
        mark: Object that is of this clone alone, or of this trace.
        sizes: `Sizes` of that graph, or `None`.
        exact: Boolean, whether to refuse what cannot be had.
        named: Set of the messages that have been given.
    """

    rows: Any
    begin: tf.Tensor
    total: Any
    graph: Any
    mark: Any
    sizes: Sizes | None
    exact: bool
    named: set[str]


def locate(
    leaves: Sequence[Any], total: tf.Tensor, begin: tf.Tensor, exact: bool
) -> GlobalRows:
    """Return where a clone is that gets tensors with rows."""
    first, graph, sizes = leaves[0], None, None
    rows = first.shape[0]
    if not tf.executing_eagerly():
        graph = tf.compat.v1.get_default_graph()
        ragged = [t for t in leaves if isinstance(t, tf.RaggedTensor)]
        sparse = [t for t in leaves if isinstance(t, tf.SparseTensor)]
        dense = [t for t in leaves if not sharding.is_composite(t)]
        sizes = Sizes(
            dense,
            [t.flat_values for t in ragged],
            [t.dense_shape for t in sparse],
        )
    if isinstance(first, tf.SparseTensor) and rows is None:
        rows = tf.cast(first.dense_shape[0], tf.int32)
    if rows is None:
        rows = sharding.leaf_rows(first)
    known = total.shape[0]
    return GlobalRows(
        rows=rows,
        begin=tf.cast(begin, tf.int32),
        total=tf.shape(total)[0] if known is None else known,
        graph=graph,
        mark=object() if graph is None else graph,
        sizes=sizes,
        exact=exact,
        named=set(),
    )


def is_inside(where: GlobalRows) -> bool:
    """Say whether what is made now is made by a clone.

    What a layer makes once, such as the state of a `SeedGenerator`, is made
    outside of the graph that the clone is traced in.
    """
    if where.graph is None:
        return True
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph is not where.graph:
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def draw_rows(
    where: GlobalRows,
    function: Callable[..., Any],
    given: dict[str, Any],
    by_row: Sequence[str],
) -> tf.Tensor:
    """Draw for the rows of the global batch, and return those of a clone."""
    for name in by_row:
        # What is no tensor yet has no rows.
        if tf.is_tensor(given[name]) or name == "logits":
            given[name] = tf.convert_to_tensor(given[name])
    if "shape" in given:
        given["shape"] = shape = tf.convert_to_tensor(given["shape"])
        rank, size = shape.shape[0], _first_entry(shape)
    else:
        shape = tf.shape(given["logits"])
        rank, size = 2, given["logits"].shape[0]
    kind = _kind(where, shape, rank, size)
    if kind == OTHER:
        return function(**given)
    lead = tf.cast(shape[0], tf.int32)
    all_rows, begin = _span(where, lead, kind)
    for name in by_row:
        if tf.is_tensor(given[name]) and given[name].shape.rank == rank:
            given[name] = _spread(given[name], all_rows, begin)
    if "shape" in given:
        given["shape"] = tf.concat(
            [tf.cast(all_rows, shape.dtype)[None], shape[1:]], 0
        )
    drawn = function(**given)
    start = tf.concat([begin[None], tf.zeros_like(shape[1:], tf.int32)], 0)
    # A multinomial draws as many numbers a row as it is asked for.
    found = tf.slice(
        drawn, start, tf.concat([lead[None], tf.shape(drawn)[1:]], 0)
    )
    found.set_shape([size, *drawn.shape[1:]])
    return found


def _first_entry(shape: tf.Tensor) -> int | None:
    """Return the first size of a shape, if it is known before it is drawn."""
    known = tf.get_static_value(shape, partial=True)
    if known is None or not len(known) or known[0] is None:
        return None
    return int(known[0])


def _kind(where: GlobalRows, shape: Any, rank: Any, size: int | None) -> str:
    """Say whether what is drawn has the rows of the batch first."""
    if not rank:
        return OTHER
    if size is not None:
        # A number that no trace knows is not this one.
        known = isinstance(where.rows, int)
        return ROWS if known and size == where.rows else OTHER
    if where.sizes is None:
        return UNKNOWN
    kind = where.sizes.of_entry(shape, 0)
    if kind == MIXED:
        tell(
            where,
            "draws for rows that are not in the order of the batch, or for "
            "ragged ones",
            "Draw for the batch axis first, or before rows are put together.",
        )
        return OTHER
    return kind


def _span(where: GlobalRows, lead: tf.Tensor, kind: str) -> tuple[Any, Any]:
    """Return how many rows to draw, and which of them the clone's are.

    There may be several for each row of the batch, side by side.
    """
    rows = tf.maximum(where.rows, 1)
    times = lead // rows
    all_rows, begin = times * where.total, times * where.begin
    if kind == UNKNOWN:
        # Only the sizes tell, once there are any.
        fits = tf.equal(lead % rows, 0)
        all_rows = tf.where(fits, all_rows, lead)
        begin = tf.where(fits, begin, 0)
    return all_rows, begin


def _spread(value: tf.Tensor, all_rows: tf.Tensor, begin: Any) -> tf.Tensor:
    """Put a clone's rows where they are in the global batch.

    The rows of others get copies: what is drawn for them is not kept.
    """
    if value.shape[0] == 1:
        return value
    own = tf.range(all_rows) - begin
    return tf.gather(value, tf.clip_by_value(own, 0, tf.shape(value)[0] - 1))


def tell(where: GlobalRows, what: str, remedy: str) -> None:
    """Name a layer whose draws cannot be those of the global batch, once."""
    layer = _running_layer()
    who = "A layer" if layer is None else f"{type(layer).__name__} "
    who += "" if layer is None else repr(layer.name)
    message = (
        f"{who} {what}. With `random='global'`, expected draws that a clone "
        f"can make for the rows of the global batch: these differ from those "
        f"of one device. {remedy}"
    )
    if message not in where.named:
        where.named.add(message)
        warn_or_refuse(message, where.exact)


def _running_layer() -> keras.Layer | None:
    """Return the layer whose code runs just now."""
    frame: Any = sys._getframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, keras.Layer):
            return found
        frame = frame.f_back
    return None
