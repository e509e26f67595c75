"""BatchNormalization over the global batch: sums that all clones share."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.exchange import meeting


def synchronized_layers(
    model: keras.Model, batch_norm: str
) -> list[keras.layers.BatchNormalization]:
    """Return the layers that normalize over the global batch.

    Args:
        model: A `keras.Model`.
        batch_norm: String. `"sync"` takes every `BatchNormalization`, any
            other those made with `synchronized=True`.
    """
    return [
        layer
        for layer in _keras.layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        and (batch_norm == "sync" or layer.synchronized)
    ]


@contextlib.contextmanager
def over_clones(
    layers: Sequence[keras.layers.BatchNormalization],
    shares: Sequence[tf.Tensor] | None = None,
) -> Iterator[None]:
    """Let layers take their moments over the shards of all clones.

    Args:
        layers: Sequence of `BatchNormalization` layers.
        shares: Sequence of scalar tensors, one a clone: nothing counts of a
            clone whose share is 0. Defaults to `None`: all have rows.
    """
    for layer in layers:
        _keras.set_moments(layer, _moments(layer, shares))
    try:
        yield
    finally:
        for layer in layers:
            _keras.unset_moments(layer)


@tf.custom_gradient
def _sum_over_clones(value: tf.Tensor) -> Any:
    """Add a tensor up over all clones, and its gradient too.

    Reference:

    - Ioffe and Szegedy, Batch Normalization, 2015: the moments are those of
        the batch; the gradient flows through them to every row.
    """

    def add_up(values: list[tf.Tensor]) -> list[tf.Tensor]:
        return [tf.add_n(values)] * len(values)

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return meeting.meet("a sum of gradients", upstream, add_up)

    return meeting.meet("a sum over clones", value, add_up), gradient


def _moments(
    layer: keras.layers.BatchNormalization,
    shares: Sequence[tf.Tensor] | None,
) -> Any:
    def moments(inputs: tf.Tensor, mask: Any) -> tuple[tf.Tensor, tf.Tensor]:
        rank = inputs.shape.rank
        axes = [axis for axis in range(rank) if axis != layer.axis % rank]
        shape = [-1 if axis == layer.axis % rank else 1 for axis in range(rank)]

        def total(values: tf.Tensor) -> tf.Tensor:
            if mask is not None:
                values = tf.where(mask[..., None], values, 0)
            part = tf.reduce_sum(values, axes)
            if shares is not None:
                share = shares[meeting.current_clone() or 0]
                part *= tf.cast(share > 0, part.dtype)
            return _sum_over_clones(part)

        count = total(tf.ones_like(inputs))
        if mask is not None:
            # Keras keeps from dividing by no entries in this way.
            count += keras.config.epsilon()
        mean = total(inputs) / count
        centered = inputs - tf.reshape(mean, shape)
        return mean, total(tf.square(centered)) / count

    return moments
