"""Mirrors for functions of the user's own, made when a variable is read."""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, state


class Reads:
    """The values of variables, each read once at home for all clones.

    Attributes:
        home: Device string, where the variables live.
        variables: List of the `keras.Variable`s that were read.
    """

    def __init__(self, home: str) -> None:
        self.home = home
        self.variables: list[keras.Variable] = []
        self._graph = _graph()
        self._values: dict[int, tf.Tensor] = {}
        self._noted: set[int] = set()

    def note(self, variable: keras.Variable) -> None:
        """Remember that a variable was read."""
        if id(variable) not in self._noted:
            self._noted.add(id(variable))
            self.variables.append(variable)

    def value(self, variable: keras.Variable, raw: tf.Variable) -> tf.Tensor:
        """Return the value of a variable, read at most once."""
        if id(variable) not in self._values:
            # The last slash keeps it out of the scope of the clone that
            # happens to read the variable first.
            with self.outside(), tf.device(self.home), tf.name_scope("home/"):
                self._values[id(variable)] = raw.read_value()
        return self._values[id(variable)]

    def is_outside(self) -> bool:
        """Say whether no `tf.cond` or `tf.function` is being traced inside."""
        return _graph() is self._graph

    def is_in_function(self) -> bool:
        """Say whether a `tf.function` is being traced inside.

        It may be called again, from where mirrors of this step are not there.
        Branches and bodies of loops, which have graphs of other classes, are
        not.
        """
        graph = _graph()
        while graph is not None and graph is not self._graph:
            if type(graph).__name__ == "FuncGraph":
                return True
            graph = getattr(graph, "outer_graph", None)
        return False

    def outside(self) -> contextlib.AbstractContextManager[Any]:
        """Leave every `tf.cond` and `tf.function` that is traced inside.

        What is made in one of these is not there for the rest.
        """
        if self.is_outside():
            return contextlib.nullcontext()
        if self._graph is None:
            return tf.init_scope()
        return self._graph.as_default()


class MirrorScope(_keras.CloneScope):
    """A scope in which one clone reads mirrors, and keeps what it assigns.

    A mirror is made when its variable is first read, so that nothing needs to
    be known of the function that runs in the scope. What reads a variable
    after an assignment has a gradient with respect to the variable, and none
    with respect to what the new value came from, as without a scope.
    """

    def __init__(self, reads: Reads, clone_index: int, device: str) -> None:
        super().__init__(collect_losses=True)
        self._reads = reads
        self._clone_index = clone_index
        self._device = device
        self._mirrors: dict[int, tf.Tensor] = {}

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return what was assigned in this scope, else the mirror."""
        value = super().get_current_value(variable)
        if value is None:
            raise ValueError(
                "Expected the variables to be there before clones use them. "
                f"Received: {variable.path!r}, which is made in the clone. "
                "Build the model first: give it a `keras.Input`, or call it "
                "once on data."
            )
        if not isinstance(value, tf.Variable):
            return value
        self._reads.note(variable)
        if self._reads.is_in_function():
            return value
        if id(variable) not in self._mirrors:
            self._mirrors[id(variable)] = self._mirror(variable, value)
        return self._mirrors[id(variable)]

    def _mirror(self, variable: keras.Variable, raw: tf.Variable) -> tf.Tensor:
        value = self._reads.value(variable, raw)
        with self._reads.outside():
            if _keras.is_seed_state(variable):
                with tf.device(self._reads.home):
                    [value] = state.offset_seeds([value], self._clone_index)
            if self._device == self._reads.home:
                return value
            with tf.device(self._device):
                return tf.identity(value)

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Keep what a variable is assigned."""
        variable, value = update
        if not self._reads.is_outside():
            raise ValueError(
                f"The variable {variable.path!r} is assigned inside of "
                "`tf.cond`, `tf.while_loop` or a `tf.function`, from where "
                "clones cannot bring its value home. Assign it in `model_fn` "
                "itself: take `@tf.function` off what `model_fn` calls."
            )
        value = tf.stop_gradient(value)
        if variable.trainable:
            before = self.get_current_value(variable)
            value += before - tf.stop_gradient(before)
        super().add_update((variable, value))


def assign_merged(
    scopes: Sequence[MirrorScope], shares: Sequence[tf.Tensor], home: str
) -> None:
    """Give every variable that clones assigned one new value.

    As in TF-Slim's `model_deploy`, what the first clone assigned counts. A
    variable's own `aggregation` is honoured: metrics have `"sum"`, so they
    count the rows of all clones.
    """
    assigned = {id(v): v for s in scopes for v in s.assigned_variables()}
    for variable in assigned.values():
        with tf.device(home):
            old = variable.value.read_value()
            new = [scope.get_current_value(variable) for scope in scopes]
            policy = variable.aggregation
            if policy not in ("sum", "mean"):
                policy = "first"
            variable.assign(state.merge(policy, old, new, shares))


def _graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
