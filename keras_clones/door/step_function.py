"""A step function of a cloned model, and what it takes to run it again."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls import undone
from keras_clones.door.deployed import Deployment
from keras_clones.exchange import outside


class StepFunction(NamedTuple):
    """A step function of a cloned model, and what it takes to run it again.

    Attributes:
        model: A cloned `keras.Model`.
        made: Its `Deployment`.
        name: String, which of its step functions it is.
        function: The step function itself.
        variables: Function that returns all variables that it may change.
        make_anew: Function that puts steps on the model which go by what its
            deployment goes by now, and makes its step functions anew.
    """

    model: keras.Model
    made: Deployment
    name: str
    function: Callable[..., Any]
    variables: Callable[[], Iterable[keras.Variable]]
    make_anew: Callable[[], None]

    def made_anew(self) -> Any:
        """Make the step function anew, and return it."""
        self.make_anew()
        return getattr(self.model, self.name)


class Remembered:
    """What variables and layers of a model hold before a step.

    An optimizer that is built until it is undone is not built again; a layer
    that is stays so.
    """

    def __init__(self, step: StepFunction) -> None:
        self._step = step
        self._held: dict[int, tuple[Any, Any]] = {}
        unbuilt = [o for o in _keras.optimizers(step.model) if not o.built]
        built = [layer for layer in _keras.layers(step.model) if layer.built]
        self._forget = undone.remember([*unbuilt, *built], variables=False)
        self.see_new()

    def see_new(self) -> None:
        """Remember also what has been made since."""
        raw = [variable for *_, variable in outside.kept(self._step.model)]
        for variable in [*self._step.variables(), *raw]:
            if id(variable) not in self._held:
                value = np.array(tf.convert_to_tensor(variable).numpy())
                self._held[id(variable)] = variable, value

    def has(self, variables: Iterable[keras.Variable]) -> bool:
        """Say whether all of some variables are remembered."""
        return all(id(variable) in self._held for variable in variables)

    def undo(self) -> None:
        """Give all of it back."""
        self._forget()
        for variable, value in self._held.values():
            variable.assign(value)
