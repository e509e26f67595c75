"""When something of a training step is there, measured within the step."""

from typing import Any, NamedTuple

import tensorflow as tf


class Clocks(NamedTuple):
    """Variables that keep when a step starts and when each clone ends.

    `start` and the `ends`, one a clone, are float64 scalars: seconds.
    """

    start: tf.Variable
    ends: list[tf.Variable]


def make(num_clones: int, home: str) -> Clocks:
    """Return clocks for the clones of a deployment, at home."""
    with tf.init_scope(), tf.device(home):
        zero = tf.zeros([], tf.float64)
        start, *ends = (
            tf.Variable(zero, trainable=False) for _ in range(1 + num_clones)
        )
    return Clocks(start, ends)


def seconds_now(clock: tf.Variable, after: Any) -> tf.Tensor:
    """Return the time in seconds when all tensors of a nest are there.

    Within a `tf.function`, TensorFlow runs operations that have a state but
    no variable one after the other, so that one clone's time would wait for
    all others. So each time is read in a function that has a variable.
    """

    @tf.function(autograph=False, experimental_attributes={"_noinline": True})
    def read() -> tf.Tensor:
        return clock.assign(tf.timestamp()).read_value()

    leaves = tf.nest.flatten(after, expand_composites=True)
    with tf.control_dependencies([x for x in leaves if tf.is_tensor(x)]):
        return read()
