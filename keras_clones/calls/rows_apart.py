"""Do the rows of a batch stay apart in a layer? Looked at with real rows.

A few rows go through a layer once as one device calls it, and once as two
clones do. What comes out must be the same.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.calls import call_tower
from keras_clones.calls.arguments import Arguments
from keras_clones.calls.runs import Ran, compare_state, compare_values, rounding
from keras_clones.calls.undone import left_as_it_is, through
from keras_clones.clone import state
from keras_clones.devices.placement import Clone
from keras_clones.exchange import laying_out
from keras_clones.exchange.batch_norm import synchronized_layers
from keras_clones.plan.options import StepOptions
from keras_clones.tensors import sharding

# How many rows are looked at, and how many to be sure of what was found.
_ROWS = 3
_AGAIN = (5, 4, 2)
# The same where a layer draws: as 3 + 2 and 5 + 4, since outside of a graph
# what is drawn for as many entries as there are rows is taken for one a row.
_DRAWN = (5, 9)
# Weights below are set aside: a gate of zero would hide what it lets through.
_SMALL = 0.05
_MOST_ENTRIES = 10_000_000


class Finding(NamedTuple):
    """A layer in which rows know each other, and by what that shows.

    `what` is `"outputs"`, `"losses"` or `"state"`, or `"rows"` where the
    layer cannot run on fewer rows than the batch has.
    """

    layer: keras.Layer
    what: str


def has_own_code(layer: keras.Layer) -> bool:
    """Say whether a layer is not known to keep rows apart.

    It is if its `call` is not Keras's, or runs a function that is not, or
    works along the first axis.
    """
    functions = [
        getattr(layer, "activation", None),
        getattr(layer, "recurrent_activation", None),
    ]
    if isinstance(layer, keras.layers.Lambda):
        return True
    if not _is_of_keras(type(layer).call):
        return True
    if any(callable(f) and not _is_of_keras(f) for f in functions):
        return True
    axis = getattr(layer, "axis", None)
    return 0 in (axis if isinstance(axis, (list, tuple)) else [axis])


def _is_of_keras(function: Any) -> bool:
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.startswith(("keras.", "tensorflow."))


def candidates(layer: keras.Layer) -> list[keras.Layer]:
    """Return a layer and those inside of it that are to be looked at."""
    return [one for one in _keras.layers(layer) if has_own_code(one)]


def look(
    layer: keras.Layer,
    method: Callable[..., Any],
    given: Arguments,
    options: StepOptions,
) -> list[Finding]:
    """Find the layers in which rows know each other.

    Nothing of the model is changed.

    Args:
        layer: The `keras.Layer` that is called on clones.
        method: Its method.
        given: `Arguments`, with tensors that have values.
        options: `StepOptions` of the deployment.
    """
    rows = int(given.count_rows())
    looking = _Look(layer, method, _for_a_look(layer, options))
    with left_as_it_is(layer), through(layer, _without_draws):
        num = min(_ROWS, rows)
        try:
            one = looking.run(layer, method, _first(given, num), 1)
        except Exception:
            looking.run(layer, method, given, 1)
            return looking.blame_who_raises(_first(given, num))
        again = [n for n in _AGAIN if n <= rows and n != num] or [num]
        if _draws(layer, one):
            if rows < max(_DRAWN):
                return []
            num, again = _DRAWN[0], list(_DRAWN[1:])
            one = looking.run(layer, method, _first(given, num), 1)
        if looking.judge(layer, method, _first(given, num), one) is None:
            return []
        return looking.blame(_first(given, num), _first(given, again[0]))


class _Look:
    """A look at one call of a layer on the clones."""

    def __init__(
        self,
        layer: keras.Layer,
        method: Callable[..., Any],
        options: StepOptions,
    ) -> None:
        self._layer = layer
        self._method = method
        self._options = options
        self._findings: dict[int, Finding] = {}
        self._raised: list[keras.Layer] = []
        self._busy = False

    def run(
        self,
        layer: keras.Layer,
        method: Callable[..., Any],
        given: Arguments,
        num: int,
    ) -> Ran:
        """Run a call on a number of clones."""
        home = self._options.home
        clones = tuple(Clone(f"clone_{i}", home) for i in range(num))
        shards = sharding.divide(int(given.count_rows()), num)
        variables = state.model_variables(layer)
        body = call_tower.Body(
            layer,
            method,
            given,
            variables,
            self._options._replace(clones=clones),
            False,
            (),
        )
        read = laying_out.read_variables(variables, ())
        mirrors = [[_without_zeros(value) for value in read]] * num
        data = given.split(shards)
        synchronized = synchronized_layers(layer, "sync") if num > 1 else []
        with _tf.stop_recording(), tf.device(home):
            layout = laying_out.lay_out(
                shards,
                data,
                mirrors,
                variables,
                1.0,
                clones,
                home,
                random=self._options.random,
            )
            ran = laying_out.each(
                layout, lambda i: body(layout.inputs[i]), synchronized
            )
        outputs, notes = zip(*ran, strict=True)
        return Ran(layout, list(outputs), list(notes))

    def judge(
        self,
        layer: keras.Layer,
        method: Callable[..., Any],
        given: Arguments,
        one: Ran,
    ) -> str | None:
        """Say what of a call two clones come to otherwise, if anything."""
        if int(given.count_rows()) < 2:
            return None
        held, self._busy = self._busy, True
        try:
            tolerance = max(rounding(x) for x in _keras.layers(layer))
            what = self._compare(layer, method, given, one, tolerance)
            if what is None or what == "rows":
                return what
            # What is drawn by TensorFlow itself differs from run to run.
            again = self.run(layer, method, given, 1)
            same = compare_values(one, again, tolerance) is None
            return what if same else None
        finally:
            self._busy = held

    def _compare(
        self,
        layer: keras.Layer,
        method: Callable[..., Any],
        given: Arguments,
        one: Ran,
        tolerance: float,
    ) -> str | None:
        try:
            two = self.run(layer, method, given, 2)
        except Exception:
            return "rows"
        found = compare_values(one, two, tolerance)
        if found is None and self._options.exact:
            found = compare_state(one, two, tolerance, _without_zeros)
        return found

    def blame(self, given: Arguments, more: Arguments) -> list[Finding]:
        """Return the innermost layers by which a call fails, to be sure."""
        found = self._blame(given)
        try:
            confirmed = self._blame(more)
        except Exception:
            return list(found.values())
        return [one for key, one in found.items() if key in confirmed]

    def _blame(self, given: Arguments) -> dict[int, Finding]:
        self._findings = {}
        with through(self._layer, self._spy, has_own_code):
            one = self.run(self._layer, self._method, given, 1)
        if not self._findings:
            what = self.judge(self._layer, self._method, given, one)
            if what is not None:
                key = id(self._layer)
                self._findings[key] = Finding(self._layer, what)
        return self._findings

    def blame_who_raises(self, given: Arguments) -> list[Finding]:
        """Return the innermost layer that does not run on few rows."""
        self._busy = False
        with (
            through(self._layer, self._spy, has_own_code),
            contextlib.suppress(Exception),
        ):
            self.run(self._layer, self._method, given, 1)
        layer = self._raised[0] if self._raised else self._layer
        return [Finding(layer, "rows")]

    def _spy(
        self, layer: keras.Layer, method: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return method(*args, **kwargs)
            before = len(self._findings)
            try:
                result = method(*args, **kwargs)
            except Exception:
                self._raised.append(layer)
                raise
            if len(self._findings) == before:
                given = Arguments.of(args, kwargs)
                self._judge_inside(layer, method, given)
            return result

        return call

    def _judge_inside(
        self, layer: keras.Layer, method: Callable[..., Any], given: Arguments
    ) -> None:
        held, self._busy = self._busy, True
        try:
            one = self.run(layer, method, given, 1)
            what = self.judge(layer, method, given, one)
        finally:
            self._busy = held
        if what is not None:
            self._findings[id(layer)] = Finding(layer, what)


def _for_a_look(layer: keras.Layer, options: StepOptions) -> StepOptions:
    """Return options by which clones come to what one device comes to."""
    kinds = options.layer_losses
    if not isinstance(kinds, str):
        known = dict(kinds or {})
        # What is taken for a mean, with a warning elsewhere.
        kinds = {
            one.name: known.get(one.name, "mean")
            for one in _keras.layers(layer)
        }
    return options._replace(
        home="/device:CPU:0",
        layer_losses=kinds,
        batch_norm="sync",
        random="global",
        shares=None,
        balance=None,
        watch=None,
    )


def _first(given: Arguments, num: int) -> Arguments:
    """Return arguments with the first rows only."""
    rows = int(given.count_rows())
    leaves = [
        sharding.slice_rows(leaf, 0, num)
        if sharding.has_rows(leaf) and int(sharding.leaf_rows(leaf)) == rows
        else leaf
        for leaf in given.leaves
    ]
    return given._replace(leaves=leaves)


def _without_zeros(value: Any) -> Any:
    """Return the value of a weight, not that of one that is still zero."""
    if (
        not value.dtype.is_floating
        or value.shape.num_elements() > _MOST_ENTRIES
    ):
        return value
    if not value.shape.num_elements():
        return value
    largest = tf.reduce_max(tf.abs(value))
    added = 0.3 if value.shape.rank < 2 else 0.1
    return value + tf.cast(added, value.dtype) if largest < _SMALL else value


def _draws(layer: keras.Layer, ran: Ran) -> bool:
    """Say whether a call drew random numbers."""
    seeds = {id(v) for v in state.model_variables(layer).seeds}
    return any(id(v) in seeds for v in ran.notes[0].assigned)


def _without_draws(
    layer: keras.Layer, method: Callable[..., Any]
) -> Callable[..., Any] | None:
    """Let layers of Keras that draw do what they do outside of training."""
    parameters = layer.call_signature_parameters
    drawing = getattr(layer, "seed_generator", None) is not None
    if has_own_code(layer) or not drawing or "training" not in parameters:
        return None
    place = parameters.index("training")

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > place:
            args = (*args[:place], False, *args[place + 1 :])
        else:
            kwargs = {**kwargs, "training": False}
        return method(*args, **kwargs)

    return call
