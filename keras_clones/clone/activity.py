"""What activity regularizers of one's own are of the rows: sums, or means.

Those of Keras are sums, and Keras divides them by the rows. Others are tried
out, on small data of their own: all rows of it at once, and shard by shard.
"""

import weakref
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_SUMS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)
_ROWS, _FIRST = 3, 2
# Stands for a size that is not known.
_SIZE = 8
# What differs over the larger one by rounding alone, by bytes of a float.
_ROUNDING = {8: 1e-8, 4: 1e-4}

# By layers, and by the shape and type of their rows.
_found: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = (
    weakref.WeakKeyDictionary()
)


def kind(layer: keras.Layer, regularizer: Any, output: Any) -> str:
    """Say what a layer's activity regularizer is of the rows of an output.

    Args:
        layer: A `keras.Layer`.
        regularizer: Function of a tensor, its activity regularizer.
        output: Tensor that it returns.

    Returns:
        `"sum"`, `"mean"`, or `"mixed"`: shards come to neither.
    """
    if type(regularizer) in _SUMS or not output.shape.rank:
        return "sum"
    shape, dtype = tuple(output.shape[1:]), output.dtype
    known = _found.setdefault(layer, {})
    same, what = known.get((shape, dtype), (lambda: None, ""))
    if same() is not regularizer:
        what = _try(regularizer, shape, dtype)
        known[shape, dtype] = weakref.ref(regularizer), what
    return what


def _try(regularizer: Any, shape: tuple[Any, ...], dtype: tf.DType) -> str:
    """Compare what a regularizer comes to with what it does by shards."""
    random = np.random.default_rng(0)
    sizes = [_ROWS, *(_SIZE if size is None else size for size in shape)]
    # What is zero for small numbers may not be for others.
    samples = random.uniform(0.1, 0.9, sizes), random.normal(0, 9, sizes)
    # Nothing that happens here is part of a step that may be traced just now,
    # and what clones have of variables is not here.
    with tf.init_scope(), tf.device("/device:CPU:0"), keras.StatelessScope():
        try:
            found = [_of(regularizer, tf.cast(one, dtype)) for one in samples]
        except Exception:
            return "mixed"
    return next((one for one in found if one is not None), "sum")


def _of(regularizer: Any, sample: tf.Tensor) -> str | None:
    """Say what a regularizer is of some rows, `None` if they do not tell."""
    parts = sample, sample[:_FIRST], sample[_FIRST:]
    whole, first, last = (
        float(tf.reduce_sum(tf.cast(regularizer(part), tf.float64)))
        for part in parts
    )
    rounding = _ROUNDING.get(sample.dtype.size, 5e-2)
    share = _FIRST / _ROWS
    is_sum, is_mean = (
        np.isclose(whole, one, rounding, 0, equal_nan=True)
        for one in (first + last, share * first + (1 - share) * last)
    )
    if is_sum and is_mean:
        return None
    return "sum" if is_sum else "mean" if is_mean else "mixed"
