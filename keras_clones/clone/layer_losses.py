"""What the losses that layers add are of the rows: means, sums or by row."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone import activity
from keras_clones.warn import warn_or_refuse

# What `clone_model(layer_losses=...)` takes: for all layers, or by name.
Kinds: TypeAlias = "str | Mapping[str, str] | None"
# What is told of losses that come from activity regularizers, by their ids.
Marks: TypeAlias = dict[int, str]


@contextlib.contextmanager
def marking(layer: keras.Layer, weights: Any, many: bool) -> Iterator[Marks]:
    """Mark the losses that come from activity regularizers.

    Keras says what its own are over the rows, whatever else a layer adds, and
    others are tried out.

    Args:
        layer: The `keras.Layer` that is called.
        weights: `Weights` of the clone.
        many: Boolean, whether there are other clones.

    Yields:
        A dict that fills with what these losses are, by their ids: `"rows"`,
        `"sum"`, `"mean"`, or `"mixed"`.
    """
    marks: Marks = {}
    swapped = []
    for one in _keras.layers(layer):
        if one.activity_regularizer is not None:
            swapped.append((one, one.activity_regularizer))
            _mark(one, marks, weights, many)
    try:
        yield marks
    finally:
        for one, regularizer in swapped:
            vars(one)["activity_regularizer"] = regularizer
            vars(one).pop("add_loss", None)


def _mark(layer: keras.Layer, marks: Marks, weights: Any, many: bool) -> None:
    add_loss: Callable[[Any], None] = layer.add_loss
    regularizer = layer.activity_regularizer
    pending: list[str] = []

    def regularize(output: Any) -> Any:
        what = activity.kind(layer, regularizer, output) if many else "sum"
        pending.append(what)
        return regularizer(output)

    def add(loss: Any) -> None:
        if pending:
            loss, what = _by_all_rows(loss, pending.pop(), weights)
            marks[id(loss)] = what
        add_loss(loss)

    vars(layer)["activity_regularizer"] = regularize
    vars(layer)["add_loss"] = add


def _by_all_rows(loss: Any, what: str, weights: Any) -> tuple[Any, str]:
    """Return what a regularizer comes to as the loss of a clone, and its kind.

    Where Keras has divided by the clone's rows, a sum is a mean by now. All
    else is to be divided by the rows of all clones.
    """
    now = _keras.kind_of_activity_losses()
    by_row = tf.is_tensor(loss) and loss.shape.rank != 0
    if what == "mixed" or (what == "sum" and not by_row):
        return loss, what if what == "mixed" else now
    if now == "mean":
        loss = loss * weights.share(loss.dtype)
    return loss, "rows" if by_row else what


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
    layer: keras.Layer, loss: tf.Tensor, marks: Marks, kinds: Kinds
) -> str | None:
    """Say what a loss is: `"rows"`, `"mean"`, `"sum"`, or `None`: not known."""
    if loss.shape.rank != 0:
        return "rows"
    if id(loss) in marks:
        known = marks[id(loss)]
        return _keras.kind_of_activity_losses() if known == "mixed" else known
    if isinstance(kinds, Mapping):
        return kinds.get(layer.name)
    return kinds


def _tell_of_mixing(layers: Mapping[str, keras.Layer], exact: bool) -> None:
    """Tell of activity regularizers that are no sums and no means."""
    names = sorted(layers)
    warn_or_refuse(
        f"Activity regularizers of layers {names} look at the whole batch: "
        "what they come to is neither a sum nor a mean over its rows. A clone "
        "has its own shard, so the model does not train what one device "
        f"trains. `clone_model(..., whole={names})` calls these layers on the "
        "global batch.",
        exact,
        list(layers.values()),
    )


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
    layer: keras.Layer, marks: Marks, kinds: Kinds, exact: bool
) -> list[tuple[keras.Layer, tf.Tensor, str]]:
    """Return the losses that layers added: whose, what, and of which kind."""
    found, unknown = [], []
    mixed: dict[str, keras.Layer] = {}
    for one in _keras.layers(layer):
        for loss in _keras.own_losses(one):
            what = kind(one, loss, marks, kinds)
            if what is None:
                unknown.append(one.name)
            if marks.get(id(loss)) == "mixed":
                mixed[one.name] = one
            found.append((one, loss, what or "mean"))
    if mixed:
        _tell_of_mixing(mixed, exact)
    if unknown:
        _tell_of_scalars(sorted(set(unknown)), exact)
    return found


def local(
    model: keras.Model,
    marks: Marks,
    kinds: Kinds,
    weights: Any,
    exact: bool,
) -> list[tf.Tensor]:
    """Return `model.losses` so that their average by rows is the global one.

    The entries of a loss that is no scalar are added up, as Keras does. A
    weight regularizer is the same in every clone.

    Args:
        model: A `keras.Model`, called before.
        marks: What losses of activity regularizers are, by their ids.
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
