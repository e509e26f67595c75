"""BatchNormalization over the global batch: sums that all clones share."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, rendezvous

Sum = Callable[[tf.Tensor], tf.Tensor]


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
        shares: Sequence of scalar tensors, one a clone, that the gradients
            of the clones will be multiplied by. Defaults to `None`: they are
            gradients of one global loss already.
    """
    sum_over_clones = _make_sum(shares)
    for layer in layers:
        _keras.set_moments(layer, _moments(layer, sum_over_clones))
    try:
        yield
    finally:
        for layer in layers:
            _keras.unset_moments(layer)


def _make_sum(shares: Sequence[tf.Tensor] | None) -> Sum:
    """Return what adds a tensor up over all clones, and its gradient too.

    Reference:

    - Ioffe and Szegedy, Batch Normalization, 2015: the moments are those of
        the batch; the gradient flows through them to every row.
    """

    def add_up(values: list[tf.Tensor]) -> list[tf.Tensor]:
        return [tf.add_n(values)] * len(values)

    def add_up_gradients(values: list[tf.Tensor]) -> list[tf.Tensor]:
        if shares is None:
            return add_up(values)
        factors = [tf.cast(share, values[0].dtype) for share in shares]
        pairs = zip(values, factors, strict=True)
        total = tf.add_n([value * factor for value, factor in pairs])
        return [total / factor for factor in factors]

    @tf.custom_gradient
    def sum_over_clones(value: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            return rendezvous.meet(
                "a sum of gradients", upstream, add_up_gradients
            )

        return rendezvous.meet("a sum over clones", value, add_up), gradient

    return sum_over_clones


def _moments(
    layer: keras.layers.BatchNormalization, sum_over_clones: Sum
) -> Any:
    def moments(inputs: tf.Tensor, mask: Any) -> tuple[tf.Tensor, tf.Tensor]:
        rank = inputs.shape.rank
        axes = [axis for axis in range(rank) if axis != layer.axis % rank]
        shape = [-1 if axis == layer.axis % rank else 1 for axis in range(rank)]

        def total(values: tf.Tensor) -> tf.Tensor:
            if mask is not None:
                values = tf.where(mask[..., None], values, 0)
            return sum_over_clones(tf.reduce_sum(values, axes))

        count = total(tf.ones_like(inputs))
        if mask is not None:
            # Keras keeps from dividing by no entries in this way.
            count += keras.config.epsilon()
        mean = total(inputs) / count
        centered = inputs - tf.reshape(mean, shape)
        return mean, total(tf.square(centered)) / count

    return moments
