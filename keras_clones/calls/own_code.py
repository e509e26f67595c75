"""Layers that are not known to keep rows apart, by their code."""

from typing import Any

import keras

from keras_clones import _keras

# Layers of Keras that run what is not of Keras, or that mix rows.
_NOT_KNOWN = (
    keras.layers.MixUp,
    keras.layers.CutMix,
    keras.layers.Lambda,
    keras.layers.TFSMLayer,
    keras.layers.JaxLayer,
    keras.layers.FlaxLayer,
    keras.layers.TorchModuleWrapper,
)


def has_own_code(layer: keras.Layer) -> bool:
    """Say whether a layer is not known to keep rows apart.

    It is if its `call` is not Keras's, or runs a function that is not, or
    works along the first axis.
    """
    functions = [
        getattr(layer, "activation", None),
        getattr(layer, "recurrent_activation", None),
    ]
    if isinstance(layer, _NOT_KNOWN):
        return True
    if not _is_of_keras(type(layer).call):
        return True
    if any(callable(f) and not _is_of_keras(f) for f in functions):
        return True
    axis = getattr(layer, "axis", None)
    axes = axis if isinstance(axis, (list, tuple)) else [axis]
    # Counted from the last axis, too, where there are that few.
    return any(one in (0, -2, -3) for one in axes)


def _is_of_keras(function: Any) -> bool:
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.startswith(("keras.", "tensorflow."))


def candidates(layer: keras.Layer) -> list[keras.Layer]:
    """Return a layer and those inside of it that are to be looked at."""
    return [one for one in _keras.layers(layer) if has_own_code(one)]


def runs_own_code(layer: keras.Layer) -> bool:
    """Say whether a call of a layer runs code that is not known."""
    return any(
        has_own_code(one) or not _is_known(one.activity_regularizer)
        for one in _keras.layers(layer)
    )


def _is_known(regularizer: Any) -> bool:
    return regularizer is None or _is_of_keras(regularizer)
