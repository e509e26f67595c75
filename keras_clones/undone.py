"""Calls of layers that leave nothing behind, or go through other calls."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
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
    undo = remember(_keras.layers(layer))
    streams = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])
        undo()


def remember(owners: Sequence[Any]) -> Callable[[], None]:
    """Return a function that gives objects back the attributes they have.

    Lists, dicts and sets among them get back their entries, variables of
    TensorFlow's their values.

    Args:
        owners: Sequence of objects, such as layers.
    """
    attributes = [dict(vars(one)) for one in owners]
    values = [value for found in attributes for value in found.values()]
    # TensorFlow puts some into wrappers, which only pass for what they hold.
    held = [getattr(value, "__wrapped__", value) for value in values]
    inside: list[tuple[Any, Any, Any]] = [
        (value, kind, kind(value))
        for value in held
        for kind in (list, dict, set)
        if issubclass(type(value), kind)
    ]
    variables = [
        (value, value.read_value())
        for value in values
        if isinstance(value, tf.Variable)
    ]

    def undo() -> None:
        for one, found in zip(owners, attributes, strict=True):
            vars(one).clear()
            vars(one).update(found)
        for value, kind, before in inside:
            # As plain ones: Keras's own keep track of what they are given.
            kind.clear(value)
            getattr(kind, "extend" if kind is list else "update")(value, before)
        for variable, before in variables:
            variable.assign(before)

    return undo
