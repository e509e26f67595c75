"""Do the rows of a batch stay apart in a layer? Looked at with real rows.

A few rows go through a layer once as one device calls it, and once as two
clones do. What comes out must be the same.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from keras_clones import _keras
from keras_clones.calls import looking, streams
from keras_clones.calls.arguments import Arguments, LayerCall
from keras_clones.calls.own_code import has_own_code
from keras_clones.calls.runs import Ran
from keras_clones.calls.undone import left_as_it_is, through
from keras_clones.clone import state
from keras_clones.plan.options import StepOptions
from keras_clones.tensors import sharding

# How many rows are looked at, and how many to be sure of what was found.
_ROWS = 3
_AGAIN = (5, 4, 2)
# The same where a layer draws: as 3 + 2 and 5 + 4, since outside of a graph
# what is drawn for as many entries as there are rows is taken for one a row.
_DRAWN = (5, 9)


class Finding(NamedTuple):
    """A layer in which rows know each other, and by what that shows.

    `what` is `"outputs"`, `"kept"`, `"losses"` or `"state"`, or `"rows"` where
    the layer cannot run on fewer rows than the batch has.
    """

    layer: keras.Layer
    what: str


def look(call: LayerCall, options: StepOptions) -> list[Finding]:
    """Find the layers in which rows know each other.

    Nothing of the model is changed.

    Args:
        call: `LayerCall` on clones, with tensors that have values.
        options: `StepOptions` of the deployment.
    """
    rows = int(call.given.count_rows())
    options = _for_a_look(call.layer, options)
    draws = streams.Draws()
    call = call._replace(method=draws.watched(call.method))
    with (
        left_as_it_is(call.layer, draws),
        through(call.layer, _without_draws),
    ):
        sizes = _sizes(call, rows)
        num = sizes[0]
        try:
            one = looking.run(_first(call, num), options, 1)
        except Exception:
            looking.run(call, options, 1)
            return _Blame(options).who_raises(_first(call, num))
        again = sizes[1:] or [num]
        if _draws(call.layer, one):
            if rows < max(_DRAWN):
                return []
            num, again = _DRAWN[0], list(_DRAWN[1:])
            one = looking.run(_first(call, num), options, 1)
        # What differs from run to run may hold layers that do not.
        if looking.differs(_first(call, num), options, one) is None:
            return []
        return _blame(_first(call, num), _first(call, again[0]), options)


def _sizes(call: LayerCall, rows: int) -> list[int]:
    """Return how many rows to look at, and how many to be sure.

    No other tensor of the call, which it gets whole, is to have as many.
    """
    leaves = [leaf for leaf in call.given.leaves if sharding.has_rows(leaf)]
    others = {int(sharding.leaf_rows(leaf)) for leaf in leaves} - {rows}
    sizes = [n for n in (_ROWS, *_AGAIN) if n <= rows and n not in others]
    return sizes or [min(_ROWS, rows)]


def _blame(
    call: LayerCall, more: LayerCall, options: StepOptions
) -> list[Finding]:
    """Return the innermost layers by which a call fails, to be sure."""
    found = _Blame(options).who_differs(call)
    try:
        confirmed = _Blame(options).who_differs(more)
    except Exception:
        return list(found.values())
    return [one for key, one in found.items() if key in confirmed]


class _Blame:
    """Judges the calls that a call makes in turn, while it runs."""

    def __init__(self, options: StepOptions) -> None:
        self._options = options
        self._findings: dict[int, Finding] = {}
        self._raised: list[keras.Layer] = []
        self._busy = False
        self._leaves = False
        self._rows = 0

    def who_differs(self, call: LayerCall) -> dict[int, Finding]:
        """Return the innermost layers that clones come to otherwise."""
        self._leaves = call.leaves
        self._rows = int(call.given.count_rows())
        with through(call.layer, self._spy, has_own_code):
            one = looking.run(call, self._options, 1)
        if not self._findings:
            self._note(call.layer, looking.judge(call, self._options, one))
        return self._findings

    def who_raises(self, call: LayerCall) -> list[Finding]:
        """Return the innermost layer that does not run on few rows."""
        with (
            through(call.layer, self._spy, has_own_code),
            contextlib.suppress(Exception),
        ):
            looking.run(call, self._options, 1)
        layer = self._raised[0] if self._raised else call.layer
        return [Finding(layer, "rows")]

    def _note(self, layer: keras.Layer, what: str | None) -> None:
        if what is not None:
            self._findings[id(layer)] = Finding(layer, what)

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
                given = Arguments.of(args, kwargs).of_rows(self._rows)
                self._judge_inside(
                    LayerCall(layer, method, given, self._leaves)
                )
            return result

        return call

    def _judge_inside(self, call: LayerCall) -> None:
        self._busy = True
        try:
            one = looking.run(call, self._options, 1)
            what = looking.judge(call, self._options, one)
        finally:
            self._busy = False
        self._note(call.layer, what)


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
        layer_losses=kinds,
        batch_norm="sync",
        random="global",
        shares=None,
        balance=None,
        clocks=None,
        watch=None,
        pieces=1,
    )


def _first(call: LayerCall, num: int) -> LayerCall:
    """Return a call with the first rows only."""
    given = call.given
    rows = int(given.count_rows())
    leaves = [
        sharding.slice_rows(leaf, 0, num)
        if sharding.has_rows(leaf) and int(sharding.leaf_rows(leaf)) == rows
        else leaf
        for leaf in given.leaves
    ]
    return call._replace(given=given._replace(leaves=leaves))


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
