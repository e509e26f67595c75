"""The batches that all copies of a model train on, read once and kept."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

# Bytes of batches that are kept in memory.
LIMIT = 2 << 30


class Batches(NamedTuple):
    """Batches as nests of arrays, in order.

    `fixed` says whether all have a number of rows that is known beforehand.
    `note` says what had to be done to read them, empty if it was nothing.
    """

    parts: list[Any]
    fixed: bool = False
    note: str = ""

    @property
    def rows(self) -> int:
        """The rows of the first batch."""
        leaves = keras.tree.flatten(self.parts[0])
        return next(
            int(x.shape[0]) for x in leaves if x is not None and len(x.shape)
        )


def read(
    x: Any, y: Any, batch_size: int | None, steps: int, limit: int = LIMIT
) -> Batches:
    """Read the first batches of what `fit` takes, and keep them.

    Args:
        x: Nest of arrays, `tf.data.Dataset`, `keras.utils.PyDataset`, or an
            iterable of batches, such as a generator.
        y: Nest of arrays, or `None`.
        batch_size: Integer, the rows of a batch of arrays, or `None` for 32.
        steps: Integer, how many batches to read.
        limit: Integer, the bytes of batches that may be kept.

    Raises:
        ValueError: If there are fewer batches, they are larger than the
            limit, or arguments contradict each other.
    """
    made = _makes_batches(x)
    if made and (y is not None or batch_size is not None):
        raise ValueError(
            "Arguments `y` and `batch_size` go with arrays: a dataset has its "
            "targets and its batches. Leave them out. Received: x of type "
            f"{type(x).__name__}, y of type {type(y).__name__}, "
            f"batch_size={batch_size}"
        )
    source = _batches(x) if made else _slices(x, y, batch_size or 32)
    parts = _keep(source, steps, limit)
    if not made:
        return Batches(parts)
    once = not isinstance(x, keras.utils.PyDataset) and iter(x) is x
    note = (
        f"The data can be read only once: its next {steps} batches were read "
        "and kept in memory for all copies, and it goes on after them."
    )
    return Batches(parts, _is_fixed(x), note if once else "")


def serve(batches: Batches) -> tf.data.Dataset:
    """Return a dataset of the batches, in order, each with its own rows."""
    flat = [keras.tree.flatten(part) for part in batches.parts]
    used = [i for i, leaf in enumerate(flat[0]) if leaf is not None]
    specs = [_spec([leaves[i] for leaves in flat], batches) for i in used]

    def generate() -> Iterator[tuple[Any, ...]]:
        for leaves in flat:
            yield tuple(leaves[i] for i in used)

    def pack(*leaves: Any) -> Any:
        whole: list[Any] = [None] * len(flat[0])
        for i, leaf in zip(used, leaves, strict=True):
            whole[i] = leaf
        return keras.tree.pack_sequence_as(batches.parts[0], whole)

    count = tf.data.experimental.assert_cardinality(len(flat))
    data = tf.data.Dataset.from_generator(
        generate, output_signature=tuple(specs)
    )
    return data.map(pack).apply(count)


def permuted(batches: Batches, seed: int) -> Batches | None:
    """Return the batches with the rows of each in another order.

    `None` where a leaf is no array with rows.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for part in batches.parts:
        leaves = [x for x in keras.tree.flatten(part) if x is not None]
        if not all(isinstance(x, np.ndarray) and x.ndim for x in leaves):
            return None
        order = rng.permutation(len(leaves[0]))

        def shuffle(leaf: Any, order: Any = order) -> Any:
            return None if leaf is None else leaf[order]

        parts.append(keras.tree.map_structure(shuffle, part))
    return batches._replace(parts=parts)


def cast(batches: Batches, dtype: str | None) -> Batches:
    """Return the batches with floating point numbers of another type."""
    if dtype is None:
        return batches

    def change(leaf: Any) -> Any:
        if leaf is None or not tf.as_dtype(leaf.dtype).is_floating:
            return leaf
        if isinstance(leaf, np.ndarray):
            return leaf.astype(dtype)
        return tf.cast(leaf, dtype)

    parts = keras.tree.map_structure(change, batches.parts)
    return batches._replace(parts=parts)


def _makes_batches(x: Any) -> bool:
    """Say whether something gives batches, rather than rows."""
    if isinstance(x, (keras.utils.PyDataset, tf.data.Dataset)):
        return True
    arrays = isinstance(x, (np.ndarray, list, tuple, dict)) or tf.is_tensor(x)
    return isinstance(x, Iterable) and not (arrays or hasattr(x, "__array__"))


def _is_fixed(x: Any) -> bool:
    """Say whether a dataset knows the rows of all of its batches."""
    if not isinstance(x, tf.data.Dataset):
        return False
    specs = tf.nest.flatten(x.element_spec)
    shapes = [spec.shape for spec in specs if hasattr(spec, "shape")]
    return all(s.rank is not None and (not s.rank or s[0]) for s in shapes)


def _batches(x: Any) -> Iterator[Any]:
    if not isinstance(x, keras.utils.PyDataset):
        # `yield from` would close a generator that is not read to its end.
        for batch in x:  # noqa: UP028
            yield batch
        return
    i = 0
    while x.num_batches is None or i < x.num_batches:
        yield x[i]
        i += 1


def _slices(x: Any, y: Any, batch_size: int) -> Iterator[Any]:
    """Give the batches that `fit` makes of arrays, in their order."""
    data: Any = (x, y)
    if y is None:
        # As `fit` packs it.
        data = (x,) if isinstance(x, (list, tuple)) else x
    data = keras.tree.map_structure(_as_array, data)
    rows = {len(leaf) for leaf in keras.tree.flatten(data)}
    if len(rows) != 1:
        raise ValueError(
            "Expected arrays with as many rows as each other. "
            f"Received: arrays with {sorted(rows)} rows."
        )
    for start in range(0, rows.pop(), batch_size):
        end = start + batch_size
        yield keras.tree.map_structure(lambda a, s=start, e=end: a[s:e], data)


def _as_array(leaf: Any) -> Any:
    """Return an array as `fit` takes it: floating numbers of Keras's type."""
    if tf.is_tensor(leaf) and not isinstance(leaf, tf.Tensor):
        return leaf
    array = np.asarray(leaf)
    if tf.as_dtype(array.dtype).is_floating:
        return array.astype(keras.config.floatx())
    return array


def _keep(source: Iterator[Any], steps: int, limit: int) -> list[Any]:
    """Read and keep so many batches, within a limit of bytes."""
    parts: list[Any] = []
    size = 0
    for batch in source if steps else ():
        parts.append(keras.tree.map_structure(_kept, _tupled(batch)))
        size += sum(_num_bytes(leaf) for leaf in keras.tree.flatten(parts[-1]))
        if size > limit:
            raise ValueError(
                f"Expected {steps} batches of at most {limit >> 20} MiB in "
                "all, since they are kept in memory for all copies to train "
                f"on. Received: {size >> 20} MiB in {len(parts)} batches. "
                "Pass a smaller `steps` or smaller batches."
            )
        if len(parts) == steps:
            break
    if len(parts) < steps:
        raise ValueError(
            f"Expected data of at least {steps} batches, one a step. "
            f"Received: {len(parts)} batches. Pass "
            f"`steps={max(1, len(parts))}`, a smaller `batch_size`, or more "
            "data."
        )
    return parts


def _tupled(nest: Any) -> Any:
    """Return a nest without lists: of a list, `tf.data` makes one tensor."""
    if isinstance(nest, (list, tuple)) and not hasattr(nest, "_fields"):
        return tuple(_tupled(entry) for entry in nest)
    if isinstance(nest, dict):
        return {key: _tupled(value) for key, value in nest.items()}
    return nest


def _kept(leaf: Any) -> Any:
    """Return what a leaf of a batch is kept as: ragged ones as they are."""
    if leaf is None or isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
        return leaf
    if hasattr(leaf, "numpy"):
        leaf = leaf.numpy()
    array = np.asarray(leaf)
    return array.astype(object) if array.dtype.kind in "US" else array


def _num_bytes(leaf: Any) -> int:
    if leaf is None:
        return 0
    return sum(
        part.numpy().nbytes if tf.is_tensor(part) else part.nbytes
        for part in tf.nest.flatten(leaf, expand_composites=True)
    )


def _spec(leaves: Sequence[Any], batches: Batches) -> tf.TypeSpec:
    """Return the type of what stands in one place of all batches."""
    first = leaves[0]
    shapes = [tuple(leaf.shape) for leaf in leaves]
    shape: list[int | None] = [
        sizes[0] if len(set(sizes)) == 1 else None
        for sizes in zip(*shapes, strict=True)
    ]
    if shape and not batches.fixed:
        shape[0] = None
    if isinstance(first, tf.SparseTensor):
        return tf.SparseTensorSpec(shape, first.dtype)
    if isinstance(first, tf.RaggedTensor):
        return tf.RaggedTensorSpec(
            shape, first.dtype, first.ragged_rank, first.row_splits.dtype
        )
    return tf.TensorSpec(shape, tf.as_dtype(first.dtype))
