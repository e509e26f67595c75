"""Tensors of a step that it has set on layers, which a call gets by them.

A call gets them as it gets its arguments: by rows where they have the rows of
the call, and with a gradient.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.clone.leftovers import kept_by_layers, with_tensors


class Held(NamedTuple):
    """An attribute of a layer with tensors of the step in it.

    `is_of_step` says which of the tensors in `value` these are.
    """

    layer: keras.Layer
    name: str
    value: Any
    is_of_step: tuple[bool, ...]


class UsesLeftError(Exception):
    """A call uses tensors that an earlier one has left on layers."""

    def __init__(self, tensors: Sequence[tf.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors


def find(
    layer: keras.Layer, but: Collection[int]
) -> tuple[list[Held], list[tf.Tensor]]:
    """Return what layers hold of the step, and the tensors in it.

    Args:
        layer: Layer that is called.
        but: Collection of the ids of tensors that are left out.
    """
    is_of_step = _of_step()
    places: list[Held] = []
    tensors: list[tf.Tensor] = []
    for owner, name, found in kept_by_layers(layer):
        which = tuple(id(t) not in but and is_of_step(t) for t in found)
        if any(which):
            places.append(Held(owner, name, vars(owner)[name], which))
            tensors += itertools.compress(found, which)
    return places, tensors


def holding(
    places: Sequence[Held], tensors: Sequence[tf.Tensor]
) -> AbstractContextManager[None]:
    """Let layers hold other tensors in the same places for a time."""
    rest = iter(tensors)

    def filled(place: Held) -> Any:
        which = iter(place.is_of_step)
        return with_tensors(
            place.value, lambda tensor: next(rest) if next(which) else tensor
        )

    return _keras.all_replaced(
        [(place.layer, place.name, filled(place)) for place in places]
    )


def left_by_call(layer: keras.Layer, given: Sequence[Any]) -> dict[int, Any]:
    """Return the tensors on layers that a call was not given, by their ids."""
    known = {id(tensor) for tensor in given}
    return {
        id(tensor): tensor
        for _, _, tensors in kept_by_layers(layer)
        for tensor in tensors
        if id(tensor) not in known
    }


def key(places: Sequence[Held]) -> Any:
    """Return what two calls have in common whose layers hold the same."""
    return tuple(
        (id(one.layer), one.name, one.is_of_step, _form(one.value))
        for one in places
    )


def _form(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((repr(k), _form(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    return type(value)


def _of_step() -> Callable[[Any], bool]:
    """Return what says whether a step that runs just now made a tensor.

    Outside of a graph, that is only known of what a tape watches.
    """
    if tf.executing_eagerly():
        return lambda x: isinstance(x, tf.Tensor) and _tf.num_watching([x]) > 0
    graphs, graph = set(), tf.compat.v1.get_default_graph()
    while graph is not None:
        graphs.add(id(graph))
        graph = getattr(graph, "outer_graph", None)
    return lambda x: (
        isinstance(x, tf.Tensor)
        and tf.is_symbolic_tensor(x)
        and id(x.graph) in graphs
    )
