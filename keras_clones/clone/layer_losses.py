"""What the losses that layers add are of the rows: means, sums or by row."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.warn import warn_or_refuse

# What `clone_model(layer_losses=...)` takes: for all layers, or by name.
Kinds: TypeAlias = "str | Mapping[str, str] | None"


@contextlib.contextmanager
def marking(layer: keras.Layer) -> Iterator[set[int]]:
    """Mark the losses that come from activity regularizers.

    Keras says what they are over the rows, whatever else a layer adds.

    Yields:
        A set that fills with the ids of these losses.
    """
    marks: set[int] = set()
    swapped = []
    for one in _keras.layers(layer):
        if one.activity_regularizer is not None:
            swapped.append((one, one.activity_regularizer))
            _mark(one, marks)
    try:
        yield marks
    finally:
        for one, regularizer in swapped:
            vars(one)["activity_regularizer"] = regularizer
            vars(one).pop("add_loss", None)


def _mark(layer: keras.Layer, marks: set[int]) -> None:
    add_loss: Callable[[Any], None] = layer.add_loss
    regularizer = layer.activity_regularizer
    pending = []

    def regularize(output: Any) -> Any:
        pending.append(True)
        return regularizer(output)

    def add(loss: Any) -> None:
        if pending:
            pending.clear()
            marks.add(id(loss))
        add_loss(loss)

    vars(layer)["activity_regularizer"] = regularize
    vars(layer)["add_loss"] = add


@contextlib.contextmanager
def adding(layer: keras.Layer) -> Iterator[None]:
    """Let a call on the clones add to the losses that there are.

    A layer that a whole layer calls twice adds a loss each time.
    """
    layers = _keras.layers(layer)
    held = [_keras.own_losses(one) for one in layers]
    if any(held):
        _keras.clear_losses(layer)
    yield
    if any(held):
        added = [_keras.own_losses(one) for one in layers]
        _keras.clear_losses(layer)
        for one, before, after in zip(layers, held, added, strict=True):
            for loss in (*before, *after):
                _keras.add_own_loss(one, loss)


def kind(
    layer: keras.Layer, loss: tf.Tensor, marks: set[int], kinds: Kinds
) -> str | None:
    """Say what a loss is: `"rows"`, `"mean"`, `"sum"`, or `None`: not known."""
    if loss.shape.rank != 0:
        return "rows"
    if id(loss) in marks:
        return _keras.kind_of_activity_losses()
    if isinstance(kinds, Mapping):
        return kinds.get(layer.name)
    return kinds


def _tell_of_scalars(names: list[str], exact: bool) -> None:
    """Tell of scalars passed to `add_loss` that are taken for means."""
    warn_or_refuse(
        f"Layers {names} pass scalars to `add_loss`, which are taken for "
        "means over the rows of the batch. Say "
        "`clone_model(..., layer_losses='mean')` if they are, or 'sum' if "
        "they are sums, or which is what: `layer_losses={'name': 'sum'}`.",
        exact,
    )


def own(
    layer: keras.Layer, marks: set[int], kinds: Kinds, exact: bool
) -> list[tuple[keras.Layer, tf.Tensor, str]]:
    """Return the losses that layers added: whose, what, and of which kind."""
    found, unknown = [], []
    for one in _keras.layers(layer):
        for loss in _keras.own_losses(one):
            what = kind(one, loss, marks, kinds)
            if what is None:
                unknown.append(one.name)
            found.append((one, loss, what or "mean"))
    if unknown:
        _tell_of_scalars(sorted(set(unknown)), exact)
    return found


def local(
    model: keras.Model,
    marks: set[int],
    kinds: Kinds,
    weights: Any,
    exact: bool,
) -> list[tf.Tensor]:
    """Return `model.losses` so that their average by rows is the global one.

    The entries of a loss that is no scalar are added up, as Keras does. A
    weight regularizer is the same in every clone.

    Args:
        model: A `keras.Model`, called before.
        marks: Set of the ids of losses of activity regularizers.
        kinds: What scalars are.
        weights: `Weights` of the clone.
        exact: Boolean, whether to refuse scalars of which nothing is said.
    """
    losses = []
    for _, loss, what in own(model, marks, kinds, exact):
        loss = tf.reduce_sum(_keras.as_loss(loss))
        if what != "mean":
            loss = tf.math.divide_no_nan(loss, weights.share(loss.dtype))
        losses.append(loss)
    return [
        *losses,
        *(_keras.as_loss(r) for r in _keras.weight_regularizers(model)),
    ]
