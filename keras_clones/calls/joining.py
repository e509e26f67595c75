"""How what a layer returns and leaves behind is joined from the clones."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone.inputs import TowerInput, Weights
from keras_clones.clone.leftovers import kept_tensors, tensors_in
from keras_clones.tensors import sharding, traced


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
        weights_of = [m for m in inputs.mirrors if m is not None]
        self._from_weights = traced.dependence(weights_of)

    def _add(self, value: Any, kind: str) -> None:
        if kind == "rows":
            value = self._weights.own_rows(value)
        elif kind == "mean":
            value, kind = self._weights.weigh(value), "sum"
        elif kind == "sum":
            value = self._weights.if_live(value)
        self.values.append(value)
        self.kinds.append(kind)

    def add_outputs(self, outputs: Any) -> Callable[[Any], Any]:
        """Add what the call returned, with masks and logits that hang on it."""
        flat = keras.tree.flatten(outputs)
        flat = [
            tf.convert_to_tensor(x) if isinstance(x, keras.Variable) else x
            for x in flat
        ]
        extras = []
        for x in flat:
            if tf.is_tensor(x):
                self._add(x, self._kind(x))
                hanging = (_keras.get_mask(x), _keras.get_logits(x))
                extras.append([h is not None for h in hanging])
                for hung in hanging:
                    if hung is not None:
                        self._add(hung, self._kind(hung))

        def finish(values: Any) -> Any:
            which = iter(extras)
            made = []
            for x in flat:
                if not tf.is_tensor(x):
                    made.append(x)
                    continue
                value = next(values)
                has_mask, has_logits = next(which)
                if has_mask:
                    _keras.set_mask(value, next(values))
                if has_logits:
                    _keras.set_logits(value, next(values))
                made.append(value)
            return keras.tree.pack_sequence_as(outputs, made)

        return finish

    def add_kept(self, before: Any) -> Callable[[Any], None]:
        """Add tensors that the call left on layers."""
        places = []
        layers = {id(one): one for one in _keras.layers(self._layer)}
        after = kept_tensors(self._layer)
        for (owner, name), ids in after.items():
            if before.get((owner, name)) == ids:
                continue
            layer = layers[owner]
            value = vars(layer)[name]
            found = tensors_in(value)
            if not tf.executing_eagerly():
                graph = tf.compat.v1.get_default_graph()
                if any(getattr(t, "graph", None) is not graph for t in found):
                    continue
            for tensor in found:
                self._add(tensor, self._kind(tensor))
            places.append((layer, name, value))

        def finish(values: Any) -> None:
            for layer, name, value in places:
                vars(layer)[name] = _replace_tensors(value, values)

        return finish

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
            return "mean" if value.dtype.is_floating else self._same(value)
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
        raise ValueError(unlike(self._layer, value.shape))


def check_same(layer: keras.Layer, column: Sequence[Any]) -> None:
    """Refuse, outside of a graph, what differs by clone and has no rows."""
    first = column[0]
    for other in column[1:]:
        if first.shape != other.shape or not tf.reduce_all(first == other):
            raise ValueError(unlike(layer, first.shape))


def unlike(layer: keras.Layer, shape: Any) -> str:
    """Return what is said of an output that clones cannot join."""
    return (
        f"Expected what layer {layer.name!r} returns to have the rows of its "
        "input first, to be a scalar that is a mean over them, or not to "
        "depend on them, so that it can be joined from the clones. Received: "
        f"a value of shape {tuple(shape)} that depends on the rows. Return a "
        "value with rows, compute this one in the step or in `compute_loss`, "
        "which see the whole batch, or use one clone."
    )


def _replace_tensors(value: Any, values: Any) -> Any:
    """Return lists, tuples and dicts with other tensors in them."""
    if isinstance(value, dict):
        return {k: _replace_tensors(v, values) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        made = [_replace_tensors(entry, values) for entry in value]
        if hasattr(value, "_fields"):
            return type(value)(*made)
        return tuple(made) if isinstance(value, tuple) else made
    return next(values) if tensors_in(value) else value
