"""Calls of layers that leave nothing behind, or go through other calls."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras


@contextlib.contextmanager
def through(
    layer: keras.Layer,
    wrap: Callable[..., Callable[..., Any] | None],
    is_meant: Callable[[keras.Layer], bool] = lambda layer: True,
) -> Iterator[None]:
    """Let the calls of layers go through others."""
    held = []
    for one in filter(is_meant, _keras.layers(layer)):
        wrapped = wrap(one, one.call)
        if wrapped is not None:
            held.append((one, vars(one).get("call")))
            # `vars` passes by the layer's own tracking of what it is given.
            vars(one)["call"] = wrapped
    try:
        yield
    finally:
        for one, own in held:
            del vars(one)["call"]
            if own is not None:
                vars(one)["call"] = own


@contextlib.contextmanager
def left_as_it_is(layer: keras.Layer) -> Iterator[None]:
    """Undo what calls of a layer leave: on layers, and in random streams.

    What they assign to variables of Keras is not assigned in the first place.
    """
    layers = _keras.layers(layer)
    attributes = [dict(vars(one)) for one in layers]
    inside = [
        (value, copy.copy(value))
        for found in attributes
        for value in found.values()
        if type(value) in (list, dict, set)
    ]
    values = [
        (value, value.read_value())
        for found in attributes
        for value in found.values()
        if isinstance(value, tf.Variable)
    ]
    streams = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])
        for one, found in zip(layers, attributes, strict=True):
            _put_back(vars(one), found)
        for value, before in inside:
            _put_back(value, before)
        for variable, before in values:
            variable.assign(before)


def _put_back(value: Any, before: Any) -> None:
    """Give a list, dict or set the entries that it had."""
    if isinstance(value, list):
        value[:] = before
        return
    value.clear()
    value.update(before)
