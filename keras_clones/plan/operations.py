"""Operations of functional models that mix the rows of a batch.

`ops.mean(x, axis=0)` between two layers is an operation of the model's graph,
not a layer. Whether one mixes rows is tried out, on small data of its own:
an operation has no variables and draws nothing.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras
from keras_clones.tensors import sharding, traced

_ROWS = 3
_SHARDS = sharding.divide(_ROWS, 2)
# Stands for a size that is not known: unlike the numbers of rows, and enough
# for the windows of most convolutions.
_SIZE = 8
_TOLERANCE = 1e-2

_found: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()


def mixing(model: keras.Layer) -> list[str]:
    """Return the names of a functional model's operations that mix rows.

    They are looked for once a model: its graph stays what it is. What comes
    after one that mixes rows may have no rows, so the search ends there.

    Args:
        model: A `keras.Layer`. One that is no functional model has none.
    """
    if not isinstance(model, keras.Function):
        return []
    if model not in _found:
        nodes = _keras.operation_nodes(model)
        batch = _fixed_batch(model)
        names = (node.operation.name for node in nodes if _mixes(node, batch))
        _found[model] = [name for name in [next(names, None)] if name]
    return _found[model]


def names(model: keras.Layer) -> list[str]:
    """Return the names of all operations of a functional model."""
    if not isinstance(model, keras.Function):
        return []
    return [node.operation.name for node in _keras.operation_nodes(model)]


def _fixed_batch(model: Any) -> int | None:
    """Return the batch size that the inputs fix, `None` if they fix none."""
    sizes = {x.shape[0] for x in model.inputs if x.shape}
    return sizes.pop() if len(sizes) == 1 else None


def _mixes(node: Any, batch: int | None) -> bool:
    """Say whether a node of a graph does not come to the same by shards."""
    # Nothing that happens here is part of a step that may be traced just now.
    with tf.init_scope(), tf.device("/device:CPU:0"):
        made = _make(node, batch)
        try:
            whole = _run(node, made, None)
            parts = [_run(node, made, i) for i in range(len(_SHARDS.sizes))]
            columns = zip(whole, *parts, strict=True)
            return not all(_joins(one, some) for one, *some in columns)
        except Exception:
            # It cannot run on shards. Whole, it does what it does.
            return True


def _make(node: Any, batch: int | None) -> dict[int, Any]:
    """Make data for the inputs of a node."""
    random = np.random.default_rng(0)
    return {
        id(spec): _sample(spec, batch, random) for spec in node.input_tensors
    }


def _sample(spec: Any, batch: int | None, random: np.random.Generator) -> Any:
    rows = spec.shape[:1]
    shape = [_SIZE if size is None else size for size in spec.shape]
    if rows in ((None,), (batch,)):
        shape[0] = _ROWS
    dtype = tf.as_dtype(spec.dtype)
    if dtype == tf.string:
        return tf.fill(shape, "a")
    value: Any = random.integers(0, 2, shape)
    if dtype.is_floating:
        value = random.uniform(0.1, 0.9, shape)
    tensor = tf.cast(tf.constant(value), dtype)
    if getattr(spec, "sparse", False):
        return tf.sparse.from_dense(tensor)
    if getattr(spec, "ragged", False):
        return tf.RaggedTensor.from_tensor(tensor)
    return tensor


def _run(node: Any, made: dict[int, Any], shard: int | None) -> list[Any]:
    """Run an operation on its data, or on one shard of the rows."""
    values = made
    if shard is not None:
        values = {
            key: sharding.split_leaf(value, _SHARDS)[shard]
            if value.shape[:1] == [_ROWS]
            else value
            for key, value in made.items()
        }
    args, kwargs = node.arguments.fill_in(values)
    return keras.tree.flatten(node.operation(*args, **kwargs))


def _joins(whole: Any, parts: Sequence[Any]) -> bool:
    """Say whether the rows of parts are those of the whole."""
    if not sharding.has_rows(whole):
        return False
    joined = sharding.join_leaf(tuple(parts))
    pairs = zip(
        tf.nest.flatten(whole, expand_composites=True),
        tf.nest.flatten(joined, expand_composites=True),
        strict=True,
    )
    return all(_same(one, other) for one, other in pairs)


def _same(one: tf.Tensor, other: tf.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not traced.is_continuous(one):
        return bool(tf.reduce_all(one == other))
    wide = tf.complex128 if one.dtype.is_complex else tf.float64
    a, b = (tf.cast(value, wide).numpy() for value in (one, other))
    return np.allclose(a, b, _TOLERANCE, 1e-6, equal_nan=True)
