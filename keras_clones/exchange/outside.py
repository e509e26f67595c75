"""Variables of TensorFlow's own that a layer assigns: every clone does."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.warn import warn_or_refuse


def _named(layer: keras.Layer) -> dict[str, tf.Variable]:
    """Return the variables that layers keep on themselves, by their names."""
    return {
        f"{type(one).__name__}.{name}": value
        for one in _keras.layers(layer)
        for name, value in list(vars(one).items())
        if isinstance(value, tf.Variable)
    }


def tell(
    layer: keras.Layer, variables: Sequence[tf.Variable], exact: bool
) -> None:
    """Tell of variables that each clone assigns by itself.

    Args:
        layer: The `keras.Layer` that the clones call.
        variables: Sequence of the variables.
        exact: Boolean, whether to refuse them.
    """
    names = {id(value): name for name, value in _named(layer).items()}
    if variables:
        found = sorted({names.get(id(v), v.name) for v in variables})
        warn_or_refuse(
            f"A layer assigns {found}, made by `tf.Variable`, in `call`: every "
            "clone assigns it, once for its own shard. Make such variables "
            "with `self.add_weight(..., trainable=False, aggregation=...)`, "
            "which clones merge as `aggregation` says.",
            exact,
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
        known = list(_named(layer).values())
        before = [_tf.mark_of_writes(v) for v in known]
        result = tower(inputs)
        pairs = zip(known, before, strict=True)
        tell(layer, [v for v, b in pairs if _tf.mark_of_writes(v) != b], exact)
        return result

    return run
