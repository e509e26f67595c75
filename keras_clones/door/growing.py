"""Pieces that grow in number: a step that ran out of memory runs again.

With `pieces="auto"`, a batch whose step runs out of memory on some device is
run again in twice as many pieces, as if nothing had happened. So a batch is
taken from its iterator before the step, and variables are given back what they
held. Once a batch of some size fits, nothing is kept for others of that size.
"""

import itertools
from collections.abc import Callable
from typing import Any, NoReturn

import keras
import tensorflow as tf

from keras_clones.door import out_of_memory
from keras_clones.door.deployed import Deployment
from keras_clones.door.step_function import Remembered, StepFunction
from keras_clones.tensors import by_host, sharding

# How often a step is run again that was only told to be cancelled.
_TRIES = 4
_ENDED = (tf.errors.ResourceExhaustedError, tf.errors.CancelledError)


class Growing:
    """A step function that runs again in more pieces where memory ends.

    Args:
        step: `StepFunction`, whose function can fail without harm.
    """

    def __init__(self, step: StepFunction) -> None:
        self._step = step
        self._model, self._made = step.model, step.made
        self._name = step.name
        self._fitting: list[Any] = []

    def __call__(self, data: Any) -> Any:
        """Run steps on what they get: an iterator, or a list of batches."""
        if self._name == "predict_function":
            return self._run(data, lambda: data)
        result, batch = None, None
        most = self._model.steps_per_execution
        for batch in itertools.islice(data, most):
            # It is another one, once there are more pieces.
            growing = getattr(self._model, self._name) or self
            result = growing.run(batch)
        if batch is None:
            raise StopIteration
        return result

    def run(self, batch: Any) -> Any:
        """Run one step on one batch."""
        return self._run(batch, lambda: iter([batch]))

    def _run(self, batch: Any, again: Callable[[], Any]) -> Any:
        made = self._made
        sizes = _sizes(batch)
        fits = any(_is_within(sizes, one) for one in self._fitting)
        undo = None if fits else Remembered(self._step).undo
        try:
            result = self._try(again, undo)
        except _ENDED as error:
            if undo is None:
                _fail(error, out_of_memory.later)
            undo()
            if made.pieces >= _most_rows(made, batch):
                for_good = out_of_memory.for_good
                _fail(error, lambda error: for_good(error, made.clones))
            made.grow()
            return self._step.made_anew()._run(batch, again)
        if not fits:
            self._fitting.append(sizes)
        made.report_pieces()
        return result

    def _try(
        self, again: Callable[[], Any], undo: Callable[[], None] | None
    ) -> Any:
        """Run a step, once more where it is not told what it failed by.

        When one device runs out of memory, TensorFlow may only tell that
        others were cancelled, which wait for it. If that is all it tells,
        time and again, memory is what it most likely is.
        """
        for _ in range(_TRIES):
            try:
                return self._step.function(again())
            except tf.errors.CancelledError:
                if undo is None:
                    raise
                undo()
                # The guard took it off.
                setattr(self._model, self._name, self)
        return self._step.function(again())


def _fail(
    error: tf.errors.OpError, why: Callable[[Any], Exception]
) -> NoReturn:
    """Raise why memory ended, or what TensorFlow told if it did not tell."""
    if isinstance(error, tf.errors.CancelledError):
        raise error
    raise why(error) from error


def _sizes(batch: Any) -> list[tuple[Any, ...]]:
    """Return the sizes of all that a batch is made of."""
    leaves = tf.nest.flatten(batch, expand_composites=True)
    return [tuple(getattr(leaf, "shape", ())) for leaf in leaves]


def _is_within(sizes: list[Any], others: list[Any]) -> bool:
    """Say whether a batch is no larger than another, in no axis."""
    return len(sizes) == len(others) and all(
        len(one) == len(other)
        and all(a <= b for a, b in zip(one, other, strict=True))
        for one, other in zip(sizes, others, strict=True)
    )


def _most_rows(made: Deployment, batch: Any) -> int:
    """Return the rows of the largest shard of a batch."""
    leaves = keras.tree.flatten(by_host.joined(batch))
    rows = [int(leaf.shape[0]) for leaf in leaves if sharding.has_rows(leaf)]
    return max(made.shard_sizes(max(rows)))
