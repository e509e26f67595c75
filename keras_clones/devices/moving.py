"""Moving variables to their homes."""

from collections.abc import Iterable

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.devices.naming import canonical_device


def same_device(device: str, other: str) -> bool:
    """Say whether two device strings, short or full, mean one device."""
    one, two = map(canonical_device, (device, other))
    return one == two


def device_of(variable: keras.Variable) -> str:
    """Return where a variable is at home."""
    return canonical_device(_keras.tf_variable(variable).device)


def move_variables(
    homes: Iterable[tuple[keras.Variable, str]],
) -> list[keras.Variable]:
    """Give each variable that lives elsewhere a new home, value and all.

    A TensorFlow variable cannot move, so the Keras variable gets a new one.

    Args:
        homes: Iterable of variables, each with its home, a device string.

    Returns:
        The Keras variables that were moved.
    """
    # In the rehearsal of a call, layers make variables that get values later.
    moved = [
        (variable, home)
        for variable, home in homes
        if _keras.tf_variable(variable) is not None
        and device_of(variable) != home
    ]
    for variable, home in moved:
        old = variable.value
        with tf.init_scope(), tf.device(home):
            new = tf.Variable(
                old.read_value(),
                trainable=old.trainable,
                name=variable.name,
                dtype=old.dtype,
                aggregation=old.aggregation,
                synchronization=old.synchronization,
            )
        _keras.set_tf_variable(variable, new)
    return [variable for variable, _ in moved]
