"""Variables of TensorFlow's own that a layer assigns: every clone does."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.warn import warn_or_refuse


def kept(layer: keras.Layer) -> list[tuple[keras.Layer, str, tf.Variable]]:
    """Return the variables that layers keep on themselves: whose, and where."""
    return [
        (one, name, value)
        for one in _keras.layers(layer)
        for name, value in list(vars(one).items())
        if isinstance(value, tf.Variable)
    ]


def tell(
    layer: keras.Layer, variables: Sequence[tf.Variable], exact: bool
) -> None:
    """Tell of variables that each clone assigns by itself.

    Args:
        layer: The `keras.Layer` that the clones call.
        variables: Sequence of the variables.
        exact: Boolean, whether to refuse them.
    """
    ids = {id(variable) for variable in variables}
    places = [one for one in kept(layer) if id(one[-1]) in ids]
    names = {id(v): f"{type(x).__name__}.{name}" for x, name, v in places}
    if variables:
        found = sorted({names.get(id(v), v.name) for v in variables})
        # Whoever assigns one that is elsewhere cannot be told.
        owners = [x for x, _, _ in places] if ids <= names.keys() else []
        warn_or_refuse(
            f"A layer assigns {found}, made by `tf.Variable`, in `call`: every "
            "clone assigns it, once for its own shard. Make such variables "
            "with `self.add_weight(..., trainable=False, aggregation=...)`, "
            "which clones merge as `aggregation` says.",
            exact,
            owners,
        )


def telling(
    layer: keras.Layer, tower: Callable[[Any], Any], exact: bool
) -> Callable[[Any], Any]:
    """Let a function that clones run as Python tell of what it assigns.

    Args:
        layer: The `keras.Layer` that it calls.
        tower: The function.
        exact: Boolean, whether to refuse that.
    """

    def run(inputs: Any) -> Any:
        known = [variable for _, _, variable in kept(layer)]
        before = [_tf.mark_of_writes(v) for v in known]
        result = tower(inputs)
        pairs = zip(known, before, strict=True)
        tell(layer, [v for v, b in pairs if _tf.mark_of_writes(v) != b], exact)
        return result

    return run
