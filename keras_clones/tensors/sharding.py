"""Split a global batch into shards by rows, and join outputs again."""

import itertools
from typing import Any, NamedTuple, TypeAlias

import keras
import tensorflow as tf

# A number of rows: known from the shapes, or a scalar int32 tensor.
Rows: TypeAlias = "int | tf.Tensor"

_DISAGREE = (
    "Expected every input, target and sample weight to have the same number "
    "of rows (first axis)."
)
_REMEDY = (
    "A value that is the same for every row must have rank 0, or be repeated "
    "for each row."
)


def count_rows(batch: Any) -> Rows:
    """Return how many rows the leaves of a batch have, which must agree.

    Leaves of rank 0 and `None` leaves have no rows. A row of a ragged or
    sparse tensor is an entry of its first axis.

    Args:
        batch: A nest of tensors, ragged and sparse ones among them.

    Returns:
        An integer where the shapes tell it, else a scalar int32 tensor.

    Raises:
        ValueError: If the shapes tell that the leaves disagree, or that no
            leaf has rows.
        tf.errors.InvalidArgumentError: If the leaves disagree when the step
            runs, with the same message.
    """
    leaves = {
        _path_name(path): leaf
        for path, leaf in keras.tree.flatten_with_path(batch)
        if has_rows(leaf)
    }
    if not leaves:
        raise ValueError(
            "Expected at least one input with a batch axis, to split over the "
            f"clones. Received: {keras.tree.map_structure(type, batch)}"
        )
    known = [leaf.shape[0] for leaf in leaves.values()]
    if len({rows for rows in known if rows is not None}) > 1:
        shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        raise ValueError(f"{_DISAGREE} Received: {shapes}. {_REMEDY}")
    if None not in known:
        return known[0]
    rows = {name: leaf_rows(leaf) for name, leaf in leaves.items()}
    first, *others = rows.values()
    agree = tf.reduce_all([first == other for other in others])
    received = [part for pair in rows.items() for part in pair]
    check = tf.debugging.Assert(
        agree, [f"{_DISAGREE} Received rows:", *received, _REMEDY]
    )
    with tf.control_dependencies([check]):
        return tf.identity(first)


def first_rows(batch: Any) -> Rows:
    """Return how many rows the first leaf of a batch has that has any."""
    first = next(x for x in keras.tree.flatten(batch) if has_rows(x))
    rows = None if first.shape.rank is None else first.shape[0]
    return leaf_rows(first) if rows is None else rows


class Shards(NamedTuple):
    """How rows are divided over clones.

    `sizes` has the rows of each shard. Where they are not known before a step
    runs, there may be fewer rows than clones: a clone without rows of its own
    then gets a copy of another's row, from `starts`, of which nothing counts.
    """

    rows: Rows
    sizes: list[Rows]
    starts: list[Rows]

    @property
    def may_be_idle(self) -> bool:
        """Say whether a shard may have no row of its own."""
        return len(self.sizes) > 1 and not isinstance(self.rows, int)


def divide(rows: Rows, num_shards: int, fractions: Any = None) -> Shards:
    """Divide rows over shards.

    Args:
        rows: Integer, at least `num_shards`, or scalar int32 tensor.
        num_shards: Integer, how many shards to make.
        fractions: As for `shard_sizes`.
    """
    sizes = shard_sizes(rows, num_shards, fractions)
    starts: list[Rows] = list(itertools.accumulate(sizes[:-1], initial=0))
    if not isinstance(rows, int):
        last = tf.maximum(rows - 1, 0)
        starts = [0, *(tf.minimum(start, last) for start in starts[1:])]
    return Shards(rows, sizes, starts)


def enough(rows: Rows, num_clones: int) -> int:
    """Return how many of the clones run: the first ones, if rows are few."""
    if isinstance(rows, int):
        return min(num_clones, max(rows, 1))
    return num_clones


def shares(shards: Shards) -> tf.Tensor:
    """Return each shard's share of the rows, as a float64 vector.

    Where there are no rows at all, the first shard stands for the whole.
    """
    sizes = tf.cast(tf.stack(shards.sizes), tf.float64)
    found = tf.math.divide_no_nan(sizes, tf.cast(shards.rows, tf.float64))
    if not shards.may_be_idle:
        return found
    first = tf.one_hot(0, len(shards.sizes), dtype=tf.float64)
    return tf.where(tf.equal(shards.rows, 0), first, found)


def shard_sizes(
    rows: Rows, num_shards: int, fractions: Any = None
) -> list[Rows]:
    """Return the rows of each shard, at least one while there are any left.

    Args:
        rows: Integer or scalar int32 tensor.
        num_shards: Integer, how many shards to make.
        fractions: Sequence of floats or float64 tensor, the share of each
            shard; they add up to 1. Defaults to `None`: even shards, the
            first ones larger by one row.
    """
    if fractions is None:
        return [
            (rows + num_shards - 1 - index) // num_shards
            for index in range(num_shards)
        ]
    known = isinstance(rows, int) and not tf.is_tensor(fractions)
    least_of, most_of = (min, max) if known else (tf.minimum, tf.maximum)
    ends: list[Rows] = [0]
    for index in range(num_shards - 1):
        share = sum(fractions[i] for i in range(index + 1))
        least = least_of(ends[-1] + 1, rows)
        most = most_of(rows - (num_shards - 1 - index), least)
        if known:
            end = round(share * rows)
        else:
            end = tf.round(share * tf.cast(rows, tf.float64))
            end = tf.cast(end, tf.int32)
        ends.append(least_of(most_of(end, least), most))
    return [end - start for start, end in itertools.pairwise([*ends, rows])]


def split(batch: Any, sizes: list[Rows]) -> list[Any]:
    """Split the leaves of a batch into one batch a shard, each with rows.

    Args:
        batch: A nest of tensors. A leaf of rank 0 is copied to every shard,
            and a `None` leaf stays `None`.
        sizes: List of integers or scalar int32 tensors, the rows of each
            shard.

    Returns:
        A list of nests, one a shard.
    """
    starts = list(itertools.accumulate(sizes[:-1], initial=0))
    return split_rows(batch, Shards(1, sizes, starts))


def split_rows(batch: Any, shards: Shards) -> list[Any]:
    """Split the leaves of a batch into one batch a shard.

    Args:
        batch: A nest of tensors, as for `split`.
        shards: `Shards`, how the rows are divided.

    Returns:
        A list of nests, one a shard.
    """
    if len(shards.sizes) == 1:
        return [batch]
    leaves = keras.tree.flatten(batch)
    parts = [split_leaf(leaf, shards) for leaf in leaves]
    return [
        keras.tree.pack_sequence_as(batch, list(shard))
        for shard in zip(*parts, strict=True)
    ]


def join(shards: list[Any]) -> Any:
    """Join one nest a shard into one, along the rows.

    Raises:
        ValueError: If an output has no batch axis.
    """
    if len(shards) == 1:
        return shards[0]
    return keras.tree.map_structure(lambda *leaves: join_leaf(leaves), *shards)


def is_composite(leaf: Any) -> bool:
    """Say whether a leaf is a ragged or a sparse tensor."""
    return isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor))


def split_leaf(leaf: Any, shards: Shards) -> list[Any]:
    """Return the rows of one leaf that each shard gets."""
    if not has_rows(leaf):
        return [leaf] * len(shards.sizes)
    if not is_composite(leaf) and not shards.may_be_idle:
        return tf.split(leaf, shards.sizes, num=len(shards.sizes))
    return [
        slice_rows(
            leaf,
            start,
            tf.maximum(size, 1) if shards.may_be_idle else size,
        )
        for start, size in zip(shards.starts, shards.sizes, strict=True)
    ]


def slice_rows(leaf: Any, start: Rows, size: Rows) -> Any:
    """Return some of the rows of a leaf."""
    if not isinstance(leaf, tf.SparseTensor):
        return leaf[start : start + size]
    shape = tf.shape(leaf, out_type=tf.int64)
    begin = tf.cast(tf.one_hot(0, leaf.shape.rank), tf.int64)
    rows = begin * tf.cast(size, tf.int64)
    return tf.sparse.slice(
        leaf, begin * tf.cast(start, tf.int64), rows + (1 - begin) * shape
    )


def join_leaf(leaves: tuple[Any, ...]) -> Any:
    """Join one leaf of each shard along the rows."""
    if leaves[0] is None:
        return None
    if isinstance(leaves[0], tf.SparseTensor):
        return tf.sparse.concat(axis=0, sp_inputs=list(leaves))
    if leaves[0].shape.rank == 0:
        raise ValueError(
            "Expected every output of the model to have a batch axis, so that "
            "the outputs of the clones can be joined. Received: an output of "
            f"shape {leaves[0].shape}. Give it a batch axis, or use one clone."
        )
    return tf.concat(leaves, axis=0)


def has_rows(leaf: Any) -> bool:
    """Say whether a leaf has a first axis."""
    return leaf is not None and leaf.shape.rank != 0


def leaf_rows(leaf: Any) -> tf.Tensor:
    """Return how many rows a leaf has when the step runs."""
    if isinstance(leaf, tf.RaggedTensor):
        return tf.cast(leaf.nrows(), tf.int32)
    return tf.shape(leaf)[0]


def _path_name(path: tuple[Any, ...]) -> str:
    return "".join(
        str(key) if depth == 0 else f"[{key!r}]"
        for depth, key in enumerate(path)
    )


def disagreement(error: Exception) -> str | None:
    """Return the message of `count_rows` in an error of a step."""
    if isinstance(error, ValueError) and str(error).startswith(_DISAGREE):
        return str(error)
    if not isinstance(error, tf.errors.InvalidArgumentError):
        return None
    _, found, rest = str(error).partition(_DISAGREE)
    received = rest.partition(_REMEDY)[0].replace("] [", " ")
    return f"{found}{received}{_REMEDY}" if found else None
