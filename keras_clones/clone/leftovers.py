"""Tensors that layers keep on themselves: what a call leaves behind."""

from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras

# What Keras itself keeps on a layer.
_NOT_KEPT = ("_losses", "_losses_override")


def kept_tensors(layer: keras.Layer) -> dict[tuple[int, str], Any]:
    """Return the tensors that layers keep on themselves, by their place.

    The values of the dict are lists of the ids of tensors.
    """
    return {
        (id(one), name): [id(leaf) for leaf in leaves]
        for one in _keras.layers(layer)
        for name, value in list(vars(one).items())
        if name not in _NOT_KEPT and (leaves := tensors_in(value))
    }


def tensors_in(value: Any) -> list[Any]:
    """Return the tensors in lists, tuples and dicts, without variables."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    known = tf.is_tensor(value) and not isinstance(
        value, (keras.Variable, tf.Variable)
    )
    return [value] if known else []
