"""Updates of divided tables: each part is a variable of its own, at its home.

What Keras's own optimizers do with a number goes by this number alone, and by
norms of gradients where they clip, so parts come to what the whole comes to.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.devices.divided import parts_of
from keras_clones.tensors import parted


def by_parts(
    optimizers: Iterable[keras.optimizers.Optimizer | None],
) -> contextlib.AbstractContextManager[None]:
    """Let optimizers update divided tables part by part.

    Args:
        optimizers: Iterable of optimizers, also wrapped ones.
    """
    return _keras.all_replaced(
        (one, "apply", functools.partial(_apply, one, one.apply))
        for one in optimizers
        if one is not None
    )


def _apply(
    optimizer: keras.optimizers.Optimizer,
    own: Callable[..., Any],
    gradients: Sequence[Any],
    variables: Sequence[Any] | None = None,
) -> Any:
    if variables is None:
        if not optimizer.built:
            return own(gradients)
        variables = _keras.optimized_variables(optimizer)
    parts = [_parts(variable) for variable in variables]
    if not any(parts):
        return own(gradients, variables)
    if not optimizer.built:
        with keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(list(variables))
    every: list[tuple[Any, Any, int]] = []
    for i, (gradient, variable, found) in enumerate(
        zip(gradients, variables, parts, strict=True)
    ):
        if not found:
            every.append((gradient, variable, i))
            continue
        shape = tf.TensorShape(variable.shape)
        split = parted.split(gradient, len(found), shape)
        every += [(g, v, i) for g, v in zip(split, found, strict=True)]
    groups = [
        i
        for gradient, variable, i in every
        if gradient is not None
        and not _keras.overwrites_with_gradient(variable)
    ]
    with _keras.in_parts(optimizer, _parts), _clipping(optimizer, groups):
        return own([g for g, _, _ in every], [v for _, v, _ in every])


def _parts(variable: Any) -> list[keras.Variable] | None:
    return parts_of(variable) if isinstance(variable, keras.Variable) else None


def _clipping(
    optimizer: keras.optimizers.Optimizer, groups: list[int]
) -> contextlib.AbstractContextManager[None]:
    """Let a norm that gradients are clipped by be that of the whole.

    Args:
        optimizer: The `keras.optimizers.Optimizer`.
        groups: List with a number for each gradient, the same for parts of
            one.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return _clipping(inner, groups)
    limit = optimizer.clipnorm
    if not limit or limit <= 0:
        return contextlib.nullcontext()

    def clip(gradients: Sequence[Any]) -> list[Any]:
        sums: dict[int, Any] = {}
        for group, one in zip(groups, gradients, strict=True):
            total = tf.reduce_sum(tf.square(_values(one)))
            sums[group] = sums[group] + total if group in sums else total
        return [
            _scale(one, limit, tf.sqrt(sums[group]))
            for group, one in zip(groups, gradients, strict=True)
        ]

    return _keras.replaced(optimizer, "_clip_gradients", clip)


def _values(gradient: Any) -> tf.Tensor:
    if isinstance(gradient, tf.IndexedSlices):
        return gradient.values
    return tf.convert_to_tensor(gradient)


def _scale(gradient: Any, limit: float, norm: tf.Tensor) -> Any:
    """Make a gradient smaller where its norm is above a limit."""
    values = _values(gradient)
    values = values * limit / tf.maximum(norm, tf.constant(limit, norm.dtype))
    if not isinstance(gradient, tf.IndexedSlices):
        return values
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
