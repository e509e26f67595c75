"""Moving variables to their homes."""

from collections.abc import Iterable

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.devices.divided import Divided
from keras_clones.devices.naming import canonical_device

_NONE = tf.VariableAggregation.NONE
_AUTO = tf.VariableSynchronization.AUTO


def same_device(device: str, other: str) -> bool:
    """Say whether two device strings, short or full, mean one device."""
    one, two = map(canonical_device, (device, other))
    return one == two


def device_of(variable: keras.Variable) -> str:
    """Return where a variable is at home, or put together of its parts."""
    return canonical_device(_keras.tf_variable(variable).device)


def home_of(variable: keras.Variable) -> str | tuple[str, ...]:
    """Return the home of a variable, or those that it is divided over."""
    value = _keras.tf_variable(variable)
    return value.homes if isinstance(value, Divided) else device_of(variable)


def move_variables(
    homes: Iterable[tuple[keras.Variable, str | tuple[str, ...]]],
    main: str,
) -> list[keras.Variable]:
    """Give each variable that lives elsewhere a new home, value and all.

    A TensorFlow variable cannot move, so the Keras variable gets a new one.

    Args:
        homes: Iterable of variables, each with its home, a device string, or
            a tuple of those that its rows are divided over.
        main: Device string, where what is divided is put together.

    Returns:
        The Keras variables that were moved.
    """
    # In the rehearsal of a call, layers make variables that get values later.
    moved = [
        (variable, home)
        for variable, home in homes
        if _keras.tf_variable(variable) is not None
        and home_of(variable) != home
    ]
    for variable, home in moved:
        if isinstance(home, tuple):
            _divide(variable, home, main)
        else:
            _move(variable, home)
    return [variable for variable, _ in moved]


def _move(variable: keras.Variable, home: str) -> None:
    old = _keras.tf_variable(variable)
    with tf.init_scope(), tf.device(home):
        new = tf.Variable(
            old.read_value(),
            trainable=variable.trainable,
            name=variable.name,
            dtype=old.dtype,
            aggregation=getattr(old, "aggregation", _NONE),
            synchronization=getattr(old, "synchronization", _AUTO),
        )
    _keras.set_tf_variable(variable, new)
    vars(variable).pop("sparse_read", None)


def _divide(
    variable: keras.Variable, homes: tuple[str, ...], main: str
) -> None:
    with tf.init_scope():
        whole = _keras.tf_variable(variable).read_value()
        new = Divided(whole, homes, main, variable.name)
    _keras.set_tf_variable(variable, new)
    # `tf.gather` asks what it reads for this, which Keras's variables lack.
    vars(variable)["sparse_read"] = new.sparse_read
