"""Layers whose `call` is a `tf.function`: clones call what is inside of it.

Such a function keeps its trace, and with it the mirrors of the clone that it
was traced for. What it assigns in a clone would be out of reach outside of it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras


def undecorated(layer: keras.Layer) -> AbstractContextManager[None]:
    """Let the calls of a layer and those inside of it be no functions."""
    return _keras.all_replaced(
        (one, "call", inside(one.call))
        for one in _keras.layers(layer)
        if _is_function(one.call)
    )


def inside(method: Any) -> Callable[..., Any]:
    """Return what a `tf.function` runs, and any other method as it is."""
    if not _is_function(method):
        return method
    python = method.python_function
    if tf.executing_eagerly():
        return python
    # Its branches and loops may be Python's.
    return tf.autograph.to_graph(python)


def _is_function(method: Any) -> bool:
    return isinstance(method, tf.types.experimental.PolymorphicFunction)
