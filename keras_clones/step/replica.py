"""One replica that steps by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.cluster import watch
from keras_clones.devices.hosts import host_name


class Replica:
    """Runs steps on the clones of one process of a cluster.

    Attributes:
        prefix: String, what the names of its devices begin with.

    Args:
        prefix: String, what the names of its devices begin with.
        step: Function from a batch to logs.
        variables: Function that returns all variables that the step may add
            to: others may add to them at the same time.
        forget: Function that is called when its process is lost.
    """

    def __init__(
        self,
        prefix: str,
        step: Callable[[Any], Any],
        variables: Callable[[], Sequence[keras.Variable]],
        forget: Callable[[], None],
    ) -> None:
        self.prefix = prefix
        self._step = step
        self._variables = variables
        self._forget = forget
        self._has_made = False
        self._function = self._new_function()

    @property
    def name(self) -> str:
        """What it is called where it is printed."""
        return host_name(self.prefix)

    def step_on(self, data: Any) -> Callable[[], Any]:
        """Return a function that runs a step on a batch, and returns logs.

        It waits until the step is done, and can be called in any thread.
        """
        concrete = self._function.get_concrete_function(data)
        if self._has_made:
            # The first step has made what it adds to.
            self._function = self._new_function()
            concrete = self._function.get_concrete_function(data)

        def run() -> Any:
            logs = concrete(data)
            return tf.nest.map_structure(lambda value: value.numpy(), logs)

        return run

    def forget(self) -> None:
        """Let nothing wait for its process any more."""
        self._forget()
        spec = tf.DeviceSpec.from_string(self.prefix)
        _tf.forget_task(spec.job, spec.task)

    def _new_function(self) -> Any:
        return tf.function(self._traced, autograph=False, reduce_retracing=True)

    def _traced(self, data: Any) -> Any:
        """Make a step, as it is traced."""
        known = self._variables()
        with _keras.adding_at_once(known):
            logs = self._step(data)
        self._has_made = len(self._variables()) > len(known)
        return logs

    def is_lost(self) -> bool:
        """Say whether its process is gone or stuck."""
        return watch.is_lost(self.prefix)
