"""The batches of a step that may have to run on them again.

A step takes its batch from an iterator, which gives it once. In a graph, the
step itself hands it over, when it runs.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _tf
from keras_clones.calls.arguments import Arguments
from keras_clones.calls.streams import Replayed

_CPU = "/device:CPU:0"


class Kept(NamedTuple):
    """Batches that steps took, and what the iterator said of them, if it did.

    `spec` is a structure of `tf.TypeSpec`s, or `None`.
    """

    batches: list[Any]
    spec: Any

    def iterator(self) -> Any:
        """Return an iterator over them like the one that gave them.

        A step that is traced with it sees what it would see, such as sizes
        that are not known, and need not be traced again for the other.
        """
        if self.spec is None:
            return iter(self.batches)
        one, *others = map(self._alone, self.batches)
        for other in others:
            one = one.concatenate(other)
        variant = tf.data.experimental.to_variant(one)
        return iter(tf.data.experimental.from_variant(variant, self.spec))

    def _alone(self, batch: Any) -> tf.data.Dataset:
        batch = tf.nest.pack_sequence_as(self.spec, tf.nest.flatten(batch))
        return tf.data.Dataset.from_tensors(batch)


class Batches:
    """The batches that steps ran on while they were kept.

    Attributes:
        kept: List of them, in the order of the steps.
        taken: List of those that were taken from an iterator of Python's.
        drawn: `Replayed` draws of the steps.
    """

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.taken: list[Any] = []
        self.drawn = Replayed()
        self._flag: tf.Variable | None = None
        self._see_new: Callable[[], None] | None = None

    @contextlib.contextmanager
    def keeping(self, see_new: Callable[[], None]) -> Iterator[None]:
        """Keep the batches of the steps that run.

        Args:
            see_new: Function to call when there are new variables, before a
                step assigns them.
        """
        if self._flag is None:
            with tf.device(_CPU):
                self._flag = tf.Variable(False, trainable=False)
        self.kept, self._see_new = [], see_new
        self.drawn.start()
        self._flag.assign(True)
        try:
            yield
        finally:
            self._see_new = None
            self._flag.assign(False)

    @contextlib.contextmanager
    def of_step(self, data: Any) -> Iterator[None]:
        """Keep the batch of a step that is made, if they are kept just now."""
        if self._see_new is None:
            yield
            return
        if tf.executing_eagerly():
            self.kept.append(data)
            with self.drawn.of_step():
                yield
            return
        self._keep_in_graph(Arguments.of((data,), {}))
        try:
            with self.drawn.of_step():
                yield
        finally:
            with tf.init_scope():
                self._see_new()

    def see_built(self) -> None:
        """Tell of variables that are there, outside of a graph."""
        if self._see_new is not None and tf.executing_eagerly():
            self._see_new()

    def _keep_in_graph(self, given: Arguments) -> None:
        components = given.components()
        leaves = [tf.type_spec_from_value(leaf) for leaf in given.leaves]
        # What is kept for good are no tensors of a graph.
        structure = keras.tree.map_structure(lambda _: 0, given.structure)
        given = given._replace(structure=structure, leaves=[])
        # TensorFlow never lets go of the function.
        here = weakref.ref(self)

        def keep(*components: tf.Tensor) -> None:
            batches = here()
            if batches is not None:
                found = tf.nest.pack_sequence_as(
                    leaves, list(components), expand_composites=True
                )
                (batch,), _ = given.pack(found)
                batches.kept.append(batch)

        def keep_now() -> tf.Tensor:
            with tf.control_dependencies(
                [tf.py_function(keep, components, [])]
            ):
                return tf.constant(True)

        with _tf.stop_recording(), tf.device(_CPU):
            tf.cond(self._flag, keep_now, lambda: tf.constant(False))
