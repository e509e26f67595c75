"""Mirrors for functions of the user's own, whose variables are found out."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone import state
from keras_clones.clone.scopes import CloneScope
from keras_clones.devices import placement
from keras_clones.devices.moving import device_of
from keras_clones.exchange import laying_out


class Mirrors:
    """The values of variables, each read once at home, and their mirrors.

    Args:
        home: Device string, where the variables live.
        clones: Sequence of `placement.PlacedClone`s.
        foreseen: Sequence of the `keras.Variable`s that are likely to be read.
            Their mirrors are sent together, packed. The mirror of any other
            variable is sent by itself when a clone reads it.

    Attributes:
        variables: List of the `keras.Variable`s that clones read, each once.
    """

    def __init__(
        self,
        home: str,
        clones: Sequence[placement.PlacedClone],
        foreseen: Sequence[keras.Variable] = (),
    ) -> None:
        self.home = home
        # What reads these in a function was traced when they were foreseen.
        self.variables = list(foreseen)
        self._clones = clones
        self._graph = _graph()
        self._values: dict[int, tf.Tensor] = {}
        self._noted = {id(variable) for variable in foreseen}
        self._mirrors = self._send(
            [v for v in foreseen if not _keras.is_seed_state(v)]
        )

    def _send(self, variables: list[keras.Variable]) -> list[dict[int, Any]]:
        """Send each clone its mirrors: one dict a clone, by variable."""
        values = [self.value(variable) for variable in variables]
        homes = [device_of(variable) for variable in variables]
        sent = laying_out.send_mirrors(values, homes, self._clones)
        found = []
        for mirrors, clone in zip(sent, self._clones, strict=True):
            with tf.device(clone.device), tf.name_scope("send_mirrors"):
                # A gradient cannot end at a call of a function.
                mirrors = [
                    mirror if mirror is value else tf.identity(mirror)
                    for mirror, value in zip(mirrors, values, strict=True)
                ]
            found.append(dict(zip(map(id, variables), mirrors, strict=True)))
        return found

    def note(self, variable: keras.Variable) -> None:
        """Remember that a variable was read."""
        if id(variable) not in self._noted:
            self._noted.add(id(variable))
            self.variables.append(variable)

    def value(self, variable: keras.Variable) -> tf.Tensor:
        """Return the value of a variable at home, read at most once."""
        if id(variable) not in self._values:
            # The last slash keeps it out of the scope of the clone that
            # happens to read the variable first.
            home = tf.device(device_of(variable))
            with self.outside(), home, tf.name_scope("home/"):
                self._values[id(variable)] = _keras.tf_variable(
                    variable
                ).read_value()
        return self._values[id(variable)]

    def mirror(self, variable: keras.Variable, clone_index: int) -> tf.Tensor:
        """Return a clone's mirror of a variable, made if it is not there."""
        mirrors = self._mirrors[clone_index]
        if id(variable) not in mirrors:
            mirrors[id(variable)] = self._make(variable, clone_index)
        return mirrors[id(variable)]

    def known(self, variable: keras.Variable, clone_index: int) -> Any:
        """Return a clone's mirror of a variable, `None` if it has none."""
        return self._mirrors[clone_index].get(id(variable))

    def _make(self, variable: keras.Variable, clone_index: int) -> tf.Tensor:
        value = self.value(variable)
        device = self._clones[clone_index].device
        with self.outside():
            if _keras.is_seed_state(variable):
                with tf.device(self.home):
                    [value] = state.offset_seeds([value], clone_index)
            if device == device_of(variable):
                return value
            with tf.device(device):
                return tf.identity(value)

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


class MirrorScope(CloneScope):
    """The scope of a clone of which nobody knows what it will read.

    Args:
        mirrors: `Mirrors` of all clones.
        clone_index: Integer, which clone runs in the scope.
    """

    def __init__(self, mirrors: Mirrors, clone_index: int) -> None:
        super().__init__([])
        self.mirrors = mirrors
        self.clone_index = clone_index

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return what was assigned in this scope, else the mirror."""
        value = super().get_current_value(variable)
        _check_made(variable, value)
        if not isinstance(value, tf.Variable):
            return value
        self.mirrors.note(variable)
        if self.mirrors.is_in_function():
            return value
        return self.tell(variable, self.mirror(variable))

    def mirror(self, variable: keras.Variable) -> tf.Tensor:
        """Return the mirror of a variable, whatever was assigned here."""
        return self.mirrors.mirror(variable, self.clone_index)

    def known_mirror(self, variable: keras.Variable) -> Any:
        """Return the mirror of a variable, `None` if there is none."""
        return self.mirrors.known(variable, self.clone_index)

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Keep what a variable is assigned."""
        if not self.mirrors.is_outside():
            raise ValueError(
                f"The variable {update[0].path!r} is assigned inside of "
                "`tf.cond`, `tf.while_loop` or a `tf.function`, from where "
                "clones cannot bring its value home. Assign it in `model_fn` "
                "itself: take `@tf.function` off what `model_fn` calls."
            )
        super().add_update(update)


class _Recorder(CloneScope):
    """A scope that reads the variables themselves, and remembers which."""

    def __init__(self, builds: bool) -> None:
        super().__init__([])
        self.read: dict[int, keras.Variable] = {}
        self._builds = builds

    def get_current_value(self, variable: keras.Variable) -> Any:
        value = super().get_current_value(variable)
        if not self._builds:
            _check_made(variable, value)
        self.read[id(variable)] = variable
        return value


def rehearse(
    call: Callable[[], Any], home: str, builds: bool = False
) -> tuple[Any, list[keras.Variable]]:
    """Trace a function in a graph of its own, which never runs.

    Args:
        call: Function without arguments.
        home: Device string, where the variables live.
        builds: Boolean, whether the function may make variables, at home.
            Defaults to `False`.

    Returns:
        What the function returns, and the variables that it reads.
    """
    returned: list[Any] = []
    recorder = _Recorder(builds)

    @tf.function(autograph=False)
    def rehearsal() -> None:
        building = keras.SymbolicScope() if builds else contextlib.nullcontext()
        with recorder, building:
            returned.append(call())

    with tf.device(home):
        rehearsal.get_concrete_function()
    return returned[0], list(recorder.read.values())


def _check_made(variable: keras.Variable, value: Any) -> None:
    if value is None:
        raise ValueError(
            "Expected the variables to be there before clones use them. "
            f"Received: {variable.path!r}, which is made in the clone. "
            "Build the model first: give it a `keras.Input`, or call it "
            "once on data."
        )


def _graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
