"""What has to hold before anything can run on clones."""

from typing import Any

import keras
import tensorflow as tf


def check_backend() -> None:
    """Refuse to go on with another backend than TensorFlow.

    Raises:
        ValueError: If Keras has another backend.
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "keras_clones works with Keras's TensorFlow backend: set "
            "`KERAS_BACKEND=tensorflow` before Keras is imported. "
            f"Received: backend={keras.backend.backend()!r}"
        )


def check_no_strategy() -> None:
    """Refuse to go on within the scope of a `tf.distribute` strategy.

    Raises:
        ValueError: If there is one.
    """
    if tf.distribute.has_strategy():
        name = type(tf.distribute.get_strategy()).__name__
        raise ValueError(
            "Expected clones to be made and run outside of every "
            "`tf.distribute` scope: they take the place of a strategy. "
            f"Received: a call within the scope of {name}. Move it out of "
            "`strategy.scope()`."
        )


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Check that an argument is one of a few.

    Raises:
        ValueError: If it is not.
    """
    if not any(value is choice or value == choice for choice in choices):
        raise ValueError(
            f"Argument `{name}` must be one of {choices}. "
            f"Received: {name}={value!r}"
        )
