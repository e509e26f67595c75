"""Layers that see the global batch, and what holds such layers."""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from keras_clones import _keras
from keras_clones.plan import operations

Named = Sequence["str | keras.Layer | type"]


class Whole(NamedTuple):
    """Which layers of a model are not called on shards.

    Attributes:
        layers: List of the layers whose `call` sees the global batch.
        holders: List of the layers around these, and of the functional models
            with an operation that mixes rows. They are not called on shards
            either: what they call is.
        reason: String, what makes it so, or `None` if there is no such layer.
    """

    layers: list[keras.Layer]
    holders: list[keras.Layer]
    reason: str | None

    def is_apart(self, layer: keras.Layer) -> bool:
        """Say whether a layer is not called on shards."""
        both = (*self.layers, *self.holders)
        return any(layer is one for one in both)

    def is_whole(self, layer: keras.Layer) -> bool:
        """Say whether a layer sees the global batch by itself."""
        return any(layer is one for one in self.layers)


def find(model: keras.Layer, named: Named, num_clones: int) -> Whole:
    """Find the layers of a model that are not called on shards.

    Args:
        model: A `keras.Model`.
        named: What `clone_model` got as `whole`.
        num_clones: Integer. A single clone has the global batch anyway.
    """
    if num_clones == 1:
        return Whole([], [], None)
    known = _keras.layers(model)
    layers = [
        inside
        for one in known
        if _keeps_rows(one) or any(_fits(one, name) for name in named)
        for inside in _together(one)
    ]
    reasons = [f"layer {layers[0].name!r} is called whole"] if layers else []
    starts = list(layers)
    for one in known:
        mixing = _operations(one, named)
        if mixing:
            starts.append(one)
            reasons.append(
                f"operation {mixing[0]!r} of {one.name!r} mixes the rows"
            )
    ids = {id(one) for one in starts}
    holders = [
        one
        for one in (known if ids else [])
        if any(id(below) in ids for below in _keras.layers(one))
    ]
    return Whole(layers, holders, reasons[0] if reasons else None)


def _keeps_rows(layer: keras.Layer) -> bool:
    """Say whether a layer's state has a row for each row of the batch."""
    return isinstance(layer, keras.layers.RNN) and layer.stateful


def _together(layer: keras.Layer) -> list[keras.Layer]:
    """Return a layer and what is called whole with it.

    Splitting and joining at every time step would take longer than a cell.
    """
    if not isinstance(layer, keras.layers.RNN):
        return [layer]
    return [layer, *_keras.layers(layer.cell)]


def _operations(model: keras.Layer, named: Named) -> list[str]:
    """Return the operations of a functional model that run whole."""
    known = operations.names(model)
    return [n for n in known if n in named] or operations.mixing(model)


def _fits(layer: keras.Layer, name: Any) -> bool:
    if isinstance(name, str):
        return layer.name == name
    if isinstance(name, type):
        return isinstance(layer, name)
    return layer is name


def missing(model: keras.Layer, named: Named) -> list[Any]:
    """Return what of the named is not there, or not yet."""
    if not named:
        return []
    known = _keras.layers(model)
    below = {name for one in known for name in operations.names(one)}
    return [
        name
        for name in named
        if not any(_fits(one, name) for one in known)
        and not (isinstance(name, str) and name in below)
    ]


def check(model: keras.Layer, named: Named) -> None:
    """Check that a model has the layers that are named.

    Args:
        model: A `keras.Model` whose layers are all there.
        named: List of names, layers and classes.

    Raises:
        ValueError: If it has not.
    """
    for name in missing(model, named):
        known = _keras.layers(model)
        names = [one.name for one in known]
        names += [name for one in known for name in operations.names(one)]
        raise ValueError(
            f"Argument `whole` must have layers of the model. {_hint(name)} "
            f"{_known(names, name)} Received: whole={list(named)!r}"
        )


def _hint(name: Any) -> str:
    if isinstance(name, str):
        return f"It has no layer or operation named {name!r}."
    if isinstance(name, type):
        return f"It has no layer of class `{name.__name__}`."
    return f"Layer {name.name!r} is not one of them: pass one of its own."


def _known(names: list[str], name: Any) -> str:
    wanted = name if isinstance(name, str) else getattr(name, "name", "")
    close = difflib.get_close_matches(wanted, names, 5)
    if isinstance(name, str) and close:
        return f"Names that are close: {close}."
    shown = list(dict.fromkeys(names))
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return f"Its layers are {shown[:20]}{more}."
