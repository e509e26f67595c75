"""Calls of layers that leave nothing behind, or go through other calls."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls import streams


def through(
    layer: keras.Layer,
    wrap: Callable[..., Callable[..., Any] | None],
    is_meant: Callable[[keras.Layer], bool] = lambda layer: True,
) -> contextlib.AbstractContextManager[None]:
    """Let the calls of layers go through others."""
    layers = list(filter(is_meant, _keras.layers(layer)))
    wrapped = [(one, "call", wrap(one, one.call)) for one in layers]
    return _keras.all_replaced(one for one in wrapped if one[-1] is not None)


@contextlib.contextmanager
def left_as_it_is(
    layer: keras.Layer, draws: streams.Draws | None = None
) -> Iterator[None]:
    """Undo what calls of a layer leave: on layers, and in random streams.

    What they assign to variables of Keras is not assigned in the first place,
    and no summary is written.

    Args:
        layer: The layer.
        draws: `Draws` of its calls, where threads that read data may draw
            meanwhile. Defaults to none, which leaves no draw.
    """
    undo = remember(_keras.layers(layer))
    before = streams.now()
    # Without TensorBoard installed there is nothing to write with.
    silent = getattr(tf.summary, "record_if", contextlib.nullcontext)(False)
    try:
        with silent:
            yield
    finally:
        if draws is None:
            streams.put(before)
        else:
            draws.undo()
        undo()


def remember(
    owners: Sequence[Any], variables: bool = True
) -> Callable[[], None]:
    """Return a function that gives objects back the attributes they have.

    Lists, dicts and sets among them get back their entries, variables of
    TensorFlow's their values.

    Args:
        owners: Sequence of objects, such as layers.
        variables: Boolean, whether variables are given back their values.
            Defaults to `True`.
    """
    attributes = [dict(vars(one)) for one in owners]
    values = [value for found in attributes for value in found.values()]
    inside = [
        (value, kind(value))
        for value in values
        for kind in (list, dict, set)
        if isinstance(value, kind)
    ]
    assigned = [
        (value, value.read_value())
        for value in values
        if variables and isinstance(value, tf.Variable)
    ]

    def undo() -> None:
        for one, found in zip(owners, attributes, strict=True):
            vars(one).clear()
            vars(one).update(found)
        for value, before in inside:
            _put_back(value, before)
        for variable, before in assigned:
            variable.assign(before)

    return undo


def _put_back(value: Any, before: Any) -> None:
    """Give a list, dict or set the entries that it had, if they are others.

    Keras and TensorFlow have kinds of their own, which keep track of changes.
    """
    if isinstance(value, dict):
        same = [*map(id, value.values())] == [*map(id, before.values())]
        same = same and list(value) == list(before)
    else:
        same = [*map(id, value)] == [*map(id, before)]
    if same:
        return
    value.clear()
    if isinstance(value, list):
        value.extend(before)
    else:
        value.update(before)
