"""How what a layer returns and leaves behind is joined from the clones."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone.inputs import TowerInput, Weights
from keras_clones.clone.leftovers import (
    kept_by_layers,
    tensors_in,
    with_tensors,
)
from keras_clones.tensors import sharding, traced
from keras_clones.warn import cannot_shard


class Joining:
    """Collects what a clone gives back of a call, and how it joins.

    Attributes:
        doubt: String, `"first"` or `"rows"`: how something joins that may have
            as many rows as the call, or a multiple of them, by chance. Only a
            trace that knows of no number tells. `None` if there is no doubt.
    """

    def __init__(
        self,
        layer: keras.Layer,
        inputs: TowerInput,
        weights: Weights,
        many: bool,
        is_alike: Callable[[tf.Tensor], bool],
    ) -> None:
        self.values: list[Any] = []
        self.kinds: list[str] = []
        self.doubt: str | None = None
        self._layer = layer
        self._weights = weights
        self._many = many
        self._is_alike = is_alike
        self._rows = {leaf.shape[0] for leaf in inputs.data if leaf.shape.rank}
        self._given = {id(leaf) for leaf in inputs.data}
        weights_of = [m for m in inputs.mirrors if m is not None]
        self._from_weights = traced.dependence(weights_of)

    def _add(self, value: Any, kind: str) -> None:
        if kind == "rows":
            value = self._weights.own_rows(value)
        elif kind == "mean":
            value, kind = self._weights.weigh(value), "sum"
        elif kind == "sum":
            value = self._weights.if_live(value)
        if any(value is one for one in self.values):
            # Gradients of one that is returned twice would count twice.
            value = tf.nest.map_structure(
                tf.identity, value, expand_composites=True
            )
        self.values.append(value)
        self.kinds.append(kind)

    def add_outputs(self, outputs: Any) -> Callable[[Any], Any]:
        """Add what the call returned, with masks and logits that hang on it.

        Objects of a user's own, such as distributions, hold tensors, too.
        """
        flat = keras.tree.flatten(outputs)
        flat = [
            tf.convert_to_tensor(x) if isinstance(x, keras.Variable) else x
            for x in flat
        ]
        extras = []
        for x in (tensor for leaf in flat for tensor in tensors_in(leaf)):
            self._add(x, self._kind(x))
            hanging = (_keras.get_mask(x), _keras.get_logits(x))
            extras.append([h is not None for h in hanging])
            for hung in hanging:
                if hung is not None:
                    self._add(hung, self._kind(hung))

        def finish(values: Any) -> Any:
            which = iter(extras)

            def joined(_: Any) -> Any:
                value = next(values)
                has_mask, has_logits = next(which)
                if has_mask:
                    _keras.set_mask(value, next(values))
                if has_logits:
                    _keras.set_logits(value, next(values))
                return value

            made = [with_tensors(leaf, joined) for leaf in flat]
            return keras.tree.pack_sequence_as(outputs, made)

        return finish

    def add_kept(self, before: Any) -> Callable[[Any], None]:
        """Add tensors that the call left on layers."""
        is_new = self._is_new(before)
        places = []
        for owner, name, found in kept_by_layers(self._layer):
            ids = [id(tensor) for tensor in found]
            new = [is_new(tensor) for tensor in found]
            if before.get((id(owner), name)) == ids or not any(new):
                continue
            for tensor in itertools.compress(found, new):
                self._add(tensor, self._kind(tensor))
            # Outside of a graph, each clone adds to the same list.
            value = with_tensors(vars(owner)[name], lambda tensor: tensor)
            places.append((owner, name, value, new))

        def finish(values: Any) -> None:
            for layer, name, value, new in places:
                # What was there before this call, which may not be the first
                # that goes by these notes.
                there = vars(layer).get(name)
                vars(layer)[name] = _replace_new(value, new, values, there)

        return finish

    def _is_new(self, before: Any) -> Callable[[Any], bool]:
        """Return what says whether a tensor on a layer is the clone's own.

        Others were there before, as entries of a list that a call adds to.
        """
        old = {i for ids in before.values() for i in ids} - self._given
        if tf.executing_eagerly():
            return lambda tensor: id(tensor) not in old
        graph = tf.compat.v1.get_default_graph()
        return lambda tensor: (
            getattr(tensor, "graph", None) is graph and id(tensor) not in old
        )

    def add_losses(self, losses: Any) -> Callable[[Any], None]:
        """Add what layers passed to `add_loss`."""
        owners = []
        for layer, loss, kind in losses:
            self._add(tf.convert_to_tensor(loss), kind)
            owners.append(layer)

        def finish(values: Any) -> None:
            for layer in owners:
                _keras.add_own_loss(layer, next(values))

        return finish

    def _kind(self, value: Any) -> str:
        if not self._many:
            return "rows" if sharding.has_rows(value) else "first"
        shape = value.shape
        if shape.rank == 0:
            alike = not tf.executing_eagerly() and self._is_alike(value)
            if alike:
                return "first"
            return "mean" if traced.is_continuous(value) else self._same(value)
        if shape.rank is None or shape[0] is None:
            return "rows"
        if shape[0] in self._rows:
            alike = not tf.executing_eagerly() and self._is_alike(value)
            alike = alike and self._from_weights(value)
            if not alike:
                return "rows"
            self.doubt = self.doubt or "first"
            return "first"
        if self._may_be_folded(value):
            self.doubt = "rows"
            return "rows"
        return self._same(value)

    def _may_be_folded(self, value: Any) -> bool:
        """Say whether there may be several rows for each of the call."""
        if tf.executing_eagerly() or self._is_alike(value):
            return False
        known = [rows for rows in self._rows if rows]
        return any(value.shape[0] % rows == 0 for rows in known)

    def _same(self, value: Any) -> str:
        """Return `"first"` for what is alike in all clones, or say it is not.

        Outside of a graph only the values tell, once all clones have run.
        """
        if tf.executing_eagerly():
            return "same"
        if self._is_alike(value):
            return "first"
        raise _unlike(self._layer, value.shape)


def check_same(layer: keras.Layer, column: Sequence[Any]) -> None:
    """Refuse, outside of a graph, what differs by clone and has no rows."""
    first = column[0]
    for other in column[1:]:
        if first.shape != other.shape or not tf.reduce_all(first == other):
            raise _unlike(layer, first.shape)


def _unlike(layer: keras.Layer, shape: Any) -> ValueError:
    """Return the error of an output that clones cannot join."""
    return cannot_shard(
        f"Expected what layer {layer.name!r} returns to have the rows of its "
        "input first, to be a scalar that is a mean over them, or not to "
        "depend on them, so that it can be joined from the clones. Received: "
        f"a value of shape {tuple(shape)} that depends on the rows. Return a "
        "value with rows, compute this one in the step or in `compute_loss`, "
        f"which see the whole batch, or call the layer on it: `whole="
        f"[{layer.name!r}]`.",
        layer,
    )


def _replace_new(
    value: Any, new: Sequence[bool], values: Any, there: Any
) -> Any:
    """Return what a layer keeps with joined tensors for those of a clone.

    Args:
        value: What the layer kept when it was called by a clone.
        new: Sequence of booleans, which tensors in it the clone has made.
        values: Iterator of the joined ones.
        there: What the layer keeps now, from which the others come.
    """
    own = {id(t) for t in itertools.compress(tensors_in(value), new)}
    which = iter(new)
    old = iter([t for t in tensors_in(there) if id(t) not in own])

    def replace(tensor: Any) -> Any:
        return next(values) if next(which) else next(old, tensor)

    return with_tensors(value, replace)
