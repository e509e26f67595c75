"""The update of one variable: what it goes by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class Numbers:
    """Scalar tensors that the updates of one step share, each made once.

    Args:
        optimizer: The `keras.optimizers.Optimizer` that updates.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = optimizer
        self._made: dict[Any, tf.Tensor] = {}

    def forget(self) -> None:
        """Forget them all: another step begins."""
        self._made.clear()

    def once(
        self, key: Any, dtype: tf.DType, make: Callable[[], Any]
    ) -> tf.Tensor:
        """Return the number under a key, made if it is not there yet."""
        if (key, dtype) not in self._made:
            made = make()
            # `tf.cast` would take a Python number for one in float32 first.
            if isinstance(made, (int, float)):
                made = tf.constant(made, dtype)
            self._made[key, dtype] = tf.cast(made, dtype)
        return self._made[key, dtype]

    def iteration(self, later: int, dtype: tf.DType) -> tf.Tensor:
        """Return the number of this step, or of a later one."""
        return self.once(
            ("iteration", later),
            dtype,
            lambda: self._optimizer.iterations + later,
        )


class Update(NamedTuple):
    """The update of one variable.

    Attributes:
        optimizer: The `keras.optimizers.Optimizer` that updates.
        variable: `tf.Variable`.
        slots: List of the `tf.Variable`s that the optimizer keeps of it,
            `None` for those that it does not need.
        gradient: Tensor of the variable's shape and dtype, or
            `tf.IndexedSlices`.
        learning_rate: Scalar tensor or variable.
        numbers: `Numbers` of the step.
    """

    optimizer: keras.optimizers.Optimizer
    variable: tf.Variable
    slots: list[Any]
    gradient: Any
    learning_rate: Any
    numbers: Numbers

    @property
    def dtype(self) -> tf.DType:
        """The type of the variable's numbers."""
        return self.variable.dtype

    @property
    def rate(self) -> tf.Tensor:
        """The learning rate."""
        return self.once("rate", lambda: self.learning_rate)

    @property
    def adam_rate(self) -> tf.Tensor:
        """The learning rate of Adam, which makes up for moments from zero."""
        return self.once(
            "adam_rate",
            lambda: (
                self.rate
                * tf.sqrt(1 - self.power("beta_2"))
                / (1 - self.power("beta_1"))
            ),
        )

    def number(self, name: str) -> tf.Tensor:
        """Return a hyperparameter of the optimizer, by its name."""
        return self.once(name, lambda: getattr(self.optimizer, name))

    def cast(self, name: str) -> tf.Tensor:
        """Return a hyperparameter as Keras casts it, by way of float32."""
        return self.once(
            ("cast", name),
            lambda: keras.ops.cast(
                getattr(self.optimizer, name), self.dtype.name
            ),
        )

    def rest(self, name: str) -> tf.Tensor:
        """Return what a hyperparameter leaves of 1."""
        return self.once(
            ("rest", name), lambda: 1 - getattr(self.optimizer, name)
        )

    def power(self, name: str) -> tf.Tensor:
        """Return a hyperparameter to the power of the number of the step."""
        return self.once(
            ("power", name),
            lambda: tf.pow(
                self.cast(name), self.numbers.iteration(1, self.dtype)
            ),
        )

    def once(self, key: Any, make: Callable[[], Any]) -> tf.Tensor:
        """Return a number that other updates of the step share."""
        return self.numbers.once(key, self.dtype, make)
