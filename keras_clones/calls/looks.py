"""When it is looked at whether rows stay apart.

In a graph, a first step keeps what it calls layers with, and the look comes
when it is done. Outside of one, the look comes before the call.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, _tf, warn
from keras_clones.calls import own_code, rows_apart, telling
from keras_clones.calls.arguments import Arguments, LayerCall
from keras_clones.calls.batches import Batches
from keras_clones.plan.options import StepOptions
from keras_clones.tensors.by_host import HostBatch

_CPU = "/device:CPU:0"
TRAINING = "train_function"


class Looks:
    """What one deployment has looked at.

    Attributes:
        given_up: List of pairs of a layer's name and the error for which it
            could not be looked at.
        settled: Set of the names of step functions that found nothing left
            to look at. After a training step, the others look no more.
        refused: The error by which a step was refused outside of a graph,
            which Keras tells in its own words on the way.
        batches: `Batches` of steps that may run again.
        num_runs: Integer, how many steps were run to be looked at.
    """

    def __init__(self) -> None:
        self.given_up: list[tuple[str, Exception]] = []
        self.settled: set[str] = set()
        self.refused: ValueError | None = None
        self.batches = Batches()
        self.num_runs = 0
        self._waiting: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = (
            weakref.WeakKeyDictionary()
        )
        self._kept: list[_Kept] = []
        self._found: list[rows_apart.Finding] = []
        self._defers = False

    @contextlib.contextmanager
    def deferred(self, see_new: Callable[[], None] | None) -> Iterator[None]:
        """Let what is kept wait for `findings` while a step runs.

        Args:
            see_new: Function to call when there are new variables, before a
                step assigns them, or `None` if the step cannot run again.
        """
        self._defers = True
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_defers", False)
            if see_new is not None:
                stack.enter_context(self.batches.keeping(see_new))
            yield

    def is_settled(self, name: str) -> bool:
        """Say whether nothing is left for a step function to look at.

        Args:
            name: String, `"train_function"` or another.
        """
        return bool(self.settled & {name, TRAINING})

    def findings(self, name: str = "") -> list[rows_apart.Finding]:
        """Look at what the steps kept, and let go of it.

        Args:
            name: String, which step function ran. Defaults to none of them.
        """
        ready = [kept for kept in self._kept if kept.components is not None]
        self._kept = [
            kept
            for kept in self._kept
            if not any(kept.is_like(one) for one in ready)
        ]
        if not self._kept:
            self.settled.add(name)
        seen, self._found = self._found, []
        return [*seen, *(one for kept in ready for one in self._look(kept))]

    def at_once(
        self, options: StepOptions, call: LayerCall
    ) -> list[rows_apart.Finding]:
        """Look at a call of a model that has tensors with values."""
        return self._look(_Kept(call, options))

    def start_again(self) -> None:
        """Look at everything once more."""
        self.settled.clear()
        self.num_runs = 0
        self._kept, self._found = [], []
        for flags in self._waiting.values():
            for flag in flags.values():
                flag.assign(True)

    def at(self, call: LayerCall, options: StepOptions) -> list[tf.Tensor]:
        """Look at a call of a layer on the clones, now or later, once.

        Args:
            call: `LayerCall` that the step makes.
            options: `StepOptions` of the deployment.

        Returns:
            A list of what the call has to come after, if it is in a graph.
        """
        layer = call.layer
        if not own_code.candidates(layer):
            return []
        kept = _Kept(call, options)
        if not tf.executing_eagerly():
            return self._keep(kept)
        flag = self._flag(kept)
        if bool(flag.numpy()) and kept.has_rows():
            flag.assign(False)
            found = self._look(kept)
            if self._defers and not options.exact:
                self._found += found
            else:
                self._tell(options, found)
        return []

    def _flag(self, call: "_Kept") -> tf.Variable:
        """Return what says whether a layer is to be looked at, called so."""
        flags = self._waiting.setdefault(call.layer, {})
        mode = call.given.mode()
        if mode not in flags:
            # Steps of Keras 3.16 are traced for the rows of a batch: the trace
            # that comes to look may not be the first, which alone makes some.
            with tf.init_scope(), tf.device(_CPU):
                flags[mode] = tf.Variable(
                    True,
                    trainable=False,
                    experimental_enable_variable_lifting=False,
                )
        return flags[mode]

    def _keep(self, kept: "_Kept") -> list[tf.Tensor]:
        """Let a step keep what it calls a layer with, when it runs first."""
        flag = self._flag(kept)
        with tf.init_scope():
            if not bool(flag.numpy()):
                return []
        self._kept.append(kept)
        # TensorFlow never lets go of the function.
        here, there = weakref.ref(self), weakref.ref(kept)

        def keep(*components: tf.Tensor) -> None:
            looks, mine = here(), there()
            if looks is None or mine is None or not mine.take(components):
                return
            flag.assign(False)
            if not looks._defers:
                looks._tell(mine.options, looks.findings())

        def waiting() -> tf.Tensor:
            with tf.control_dependencies([tf.py_function(keep, tensors, [])]):
                return tf.constant(True)

        tensors = kept.given.components()
        kept.forget_graph()
        with _tf.stop_recording(), tf.device(_CPU):
            return [tf.cond(flag, waiting, lambda: tf.constant(False))]

    def _look(self, kept: "_Kept") -> list[rows_apart.Finding]:
        """Look at a call. What cannot run by itself is given up."""
        try:
            with tf.device(_CPU), kept.context(), warn.silenced():
                call = kept.call()
                return rows_apart.look(call, kept.options)
        except Exception as error:
            self.given_up.append((kept.layer.name, error))
            return []

    def _tell(
        self, options: StepOptions, found: Sequence[rows_apart.Finding]
    ) -> None:
        try:
            telling.tell(found, options.exact)
        except ValueError as error:
            self.start_again()
            self.refused = error
            raise


class _Kept:
    """A call of a layer, kept to be looked at.

    `components` are the dense tensors that it got, once they have values.
    """

    def __init__(self, call: LayerCall, options: StepOptions) -> None:
        self.options = options
        self.layer, self.method, self.given, self.leaves = call
        self.components: Sequence[tf.Tensor] | None = None
        self.context = _keras.call_again()

    def is_like(self, other: "_Kept") -> bool:
        """Say whether another call asks the same layer for the same."""
        return (
            self.layer is other.layer
            and self.given.mode() == other.given.mode()
        )

    def has_rows(self) -> bool:
        """Say whether there are rows enough to know each other."""
        return int(self.arguments().count_rows()) >= 2

    def forget_graph(self) -> None:
        """Keep the types of tensors in place of those of a graph."""
        given = self.given
        self.given = given._replace(
            structure=keras.tree.map_structure(lambda _: 0, given.structure),
            leaves=[tf.type_spec_from_value(leaf) for leaf in given.leaves],
        )

    def take(self, components: Sequence[tf.Tensor]) -> bool:
        """Take the values that a step has, if they have rows enough."""
        held, self.components = self.components, components
        if not self.has_rows():
            self.components = held
            return False
        return True

    def call(self) -> LayerCall:
        """Return the call, with values."""
        return LayerCall(self.layer, self.method, self.arguments(), self.leaves)

    def arguments(self) -> Arguments:
        """Return what the layer is called with, with values."""
        if self.components is None:
            return self.given
        leaves = tf.nest.pack_sequence_as(
            self.given.leaves, list(self.components), expand_composites=True
        )
        return self.given._replace(leaves=leaves)


def call_of(model: keras.Model, x: Any, training: bool) -> LayerCall:
    """Return the call of a model that a step of Keras makes."""

    def call(x: Any) -> Any:
        return _keras.call(model, x, training=training)

    return LayerCall(model, call, Arguments.of((x,), {}))


def look_at(
    call: LayerCall, options: StepOptions, training: bool
) -> AbstractContextManager[None]:
    """Look at a call of a step, if the deployment has not by now.

    Args:
        call: `LayerCall` that the step makes.
        options: `StepOptions` of the deployment.
        training: Boolean, whether it is a training step.

    Returns:
        What to run the call in, so that it comes after the look.
    """
    if options.looks is None or (
        not training and options.looks.is_settled(TRAINING)
    ):
        return contextlib.nullcontext()
    before = options.looks.at(call, options)
    return tf.control_dependencies(before)


def kept(
    model: keras.Model, options: StepOptions, data: Any
) -> AbstractContextManager[None]:
    """Keep the batch of a step that may have to run again."""
    known = isinstance(data, HostBatch) or not own_code.runs_own_code(model)
    if options.looks is None or known:
        return contextlib.nullcontext()
    return options.looks.batches.of_step(data)
