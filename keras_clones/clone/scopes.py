"""The scope in which a clone runs: variables are mirrors, assignments kept."""

import contextlib
from typing import Any

import keras
import tensorflow as tf

from keras_clones.clone.custom_gradients import Read, of_mirrors


class CloneScope(keras.StatelessScope):
    """A scope that maps variables to mirrors, and keeps what is assigned.

    Assignments stop gradients, as assigning a variable does: what reads a
    variable after an assignment has a gradient with respect to the variable,
    and none with respect to what the new value came from.

    Args:
        mirrors: List of pairs of a `keras.Variable` and its value here.

    Attributes:
        readers: List of the lists that get what is read, innermost last.
    """

    def __init__(self, mirrors: list[tuple[keras.Variable, Any]]) -> None:
        super().__init__(mirrors, collect_losses=True)
        self._assigned: dict[int, keras.Variable] = {}
        self.readers: list[list[Read]] = []
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> "CloneScope":
        """Enter the scope."""
        self._entered.enter_context(of_mirrors())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the scope."""
        self._entered.close()
        super().__exit__(*error)

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return the value in this scope, else the variable's own.

        Keras's own returns `None`, which weight regularizers cannot take.
        """
        value = super().get_current_value(variable)
        value = variable._value if value is None else value
        return self.tell(variable, value)

    def tell(self, variable: keras.Variable, value: Any) -> Any:
        """Tell those who want to know what is read of a variable."""
        for reader in self.readers:
            reader.append(Read(variable, value))
        return value

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Keep what a variable is assigned."""
        variable, value = update
        value = tf.stop_gradient(value)
        if variable.trainable:
            before = self.get_current_value(variable)
            value += before - tf.stop_gradient(before)
        self._assigned[id(variable)] = variable
        super().add_update((variable, value))

    def assigned(self) -> list[keras.Variable]:
        """Return the variables that were assigned in this scope."""
        return list(self._assigned.values())
