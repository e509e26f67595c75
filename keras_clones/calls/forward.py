"""A layer call on the clones: run once a clone, and joined."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _tf
from keras_clones.calls import joining
from keras_clones.calls.body import Body, CallOutput
from keras_clones.calls.call_tower import CallTower
from keras_clones.calls.traced_backward import floating, wanted
from keras_clones.clone.inputs import TowerInput
from keras_clones.exchange import laying_out
from keras_clones.tensors import sharding


class Sharded(NamedTuple):
    """A layer call that is to run on clones.

    `values` are what was read of the variables, `mirrors` what the clones
    got of them. `lay_out` makes a `Layout` of shards and mirrors, `trace` a
    `CallTower` for it, with or without a way back, in a graph or not. What
    calls layers again runs within `busy`. `foreseen` has the tables whose rows
    the clones are given, and `look_up` returns a `Layout` with these rows.
    """

    body: Body
    shards: sharding.Shards
    values: list[tf.Tensor]
    mirrors: list[list[Any]]
    lay_out: Callable[[list[Any], list[Any]], laying_out.Layout]
    trace: Callable[[laying_out.Layout, bool, bool], CallTower]
    busy: Callable[[], AbstractContextManager[None]]
    is_synchronized: bool
    foreseen: dict[int, keras.Variable]
    look_up: Callable[[laying_out.Layout], laying_out.Layout]

    def ready(
        self, data: list[Any], watched: bool
    ) -> tuple[CallTower, laying_out.Layout]:
        """Return a tower for the clones' data, and what it is to run on."""
        layout = self.lay_out(data, self.mirrors)
        made = self.trace(layout, watched, False)
        return made, self.look_up(layout)


class Run(NamedTuple):
    """One clone's run of a call, and what it takes to run it backward."""

    output: CallOutput
    notes: Any
    residuals: Any = ()
    tape: Any = None
    extra: tuple[tf.Variable, ...] = ()


class Joined(NamedTuple):
    """What the clones came to: one run each, and what they join to."""

    layout: laying_out.Layout
    runs: list[Run]
    values: list[Any]


def run_each(
    made: CallTower, body: Body, layout: laying_out.Layout, watched: bool
) -> list[Run]:
    """Run a call on every clone."""

    def run(i: int) -> Run:
        return run_one(made, body, layout.inputs[i], watched)

    if made.tower.concrete is None:
        return laying_out.each(layout, run, made.tower.synchronized)
    with _tf.stop_recording():
        return laying_out.each(layout, run)


def run_one(
    made: CallTower, body: Body, inputs: TowerInput, watched: bool
) -> Run:
    """Run a call as one clone does, within its scope and on its device."""
    tower = made.tower
    if tower.concrete is not None:
        output, residuals = tower.call(inputs)
        return Run(output, tower.notes, residuals)
    with tf.GradientTape(persistent=True) as tape:
        known = wanted(body, inputs)
        if watched:
            tape.watch([*floating(inputs.data), *known])
        output, notes = tower.call(inputs)
    extra = [
        v
        for v in tape.watched_variables()
        if isinstance(v, tf.Variable) and not any(v is one for one in known)
    ]
    return Run(output, notes, (), tape, tuple(extra))


def run_without_residuals(
    sharded: Sharded, layout: laying_out.Layout
) -> list[Run]:
    """Run a call piece by piece, and keep nothing but what it gives back."""
    made = sharded.trace(layout, False, False)

    def run(i: int) -> Run:
        found = run_one(made, sharded.body, layout.inputs[i], False)
        # A tape holds what the layers of its piece have computed.
        return found._replace(tape=None)

    with _tf.stop_recording():
        return laying_out.each(layout, run)


def join(layer: keras.Layer, runs: Sequence[Run]) -> list[Any]:
    """Join what the clones gave back, value by value."""
    columns = zip(*(run.output.values for run in runs), strict=True)
    joined = []
    for kind, column in zip(runs[0].notes.kinds, columns, strict=True):
        if kind == "same" and len(column) > 1:
            joining.check_same(layer, column)
        if len(column) == 1 or kind in ("first", "same"):
            joined.append(column[0])
        elif kind == "rows":
            joined.append(sharding.join_leaf(column))
        else:
            joined.append(tf.add_n(column))
    return joined
