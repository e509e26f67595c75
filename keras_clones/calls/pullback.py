"""A layer call on the clones as one operation that tapes run backward."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_clones import _tf
from keras_clones.calls import run_again
from keras_clones.calls.call_tower import CallTower
from keras_clones.calls.forward import (
    Joined,
    Run,
    Sharded,
    join,
    run_each,
    run_without_residuals,
)
from keras_clones.calls.traced_backward import floating
from keras_clones.calls.way_back import (
    Split,
    WayBack,
    pull_again,
    wanted_values,
)
from keras_clones.tensors import traced


def run(sharded: Sharded, watched: bool) -> Joined:
    """Run a call on the clones, and join what it gives back.

    A tape that is active sees one operation, from the inputs and variables
    of the call to the joined values, whose gradient runs the clones backward.

    Args:
        sharded: `Sharded` call.
        watched: Boolean, whether any tape may want gradients.
    """
    given = sharded.body.given
    if not watched:
        data = given.split(sharded.shards)
        made, layout = sharded.ready(data, watched=False)
        runs = run_each(made, sharded.body, layout, False)
        return Joined(layout, runs, join(sharded.body.layer, runs))
    with _tf.stop_recording():
        # No tape that is active knows these tensors.
        leaves = tf.nest.map_structure(
            tf.identity, given.leaves, expand_composites=True
        )
    given = given._replace(leaves=leaves)
    with _own_tape() as tape:
        tape.watch(floating(leaves))
        data = given.split(sharded.shards)
    made, layout = sharded.ready(data, watched=True)
    if layout.takes_turns:
        run_again.check(sharded, made, layout)
        runs = run_without_residuals(sharded, layout)
    else:
        runs = run_each(made, sharded.body, layout, True)
    with _own_tape() as last:
        last.watch([floating(run.output.values) for run in runs])
        joined = join(sharded.body.layer, runs)
    extra = _extra(made, runs)

    def pull(upstream: list[Any]) -> list[Any]:
        back = WayBack(sharded, made, layout, runs, extra)
        return back.pull(upstream, joined, last, Split(leaves, data, tape))

    inputs = [
        *floating(sharded.body.given.leaves),
        *wanted_values(sharded),
        *(v.read_value() if isinstance(v, tf.Variable) else v for v in extra),
    ]
    values = _record(sharded, inputs, joined, pull)
    return Joined(layout, runs, values)


def _own_tape() -> tf.GradientTape:
    return tf.GradientTape(persistent=True, watch_accessed_variables=False)


def _extra(made: CallTower, runs: Sequence[Run]) -> list[Any]:
    """Return variables of nobody and tensors of the step that a call uses."""
    found = [*made.extra, *(v for run in runs for v in run.extra)]
    return list({id(v): v for v in found}.values())


def _record(
    sharded: Sharded,
    inputs: list[tf.Tensor],
    values: list[Any],
    pull: Callable[[list[Any]], list[Any]],
) -> list[Any]:
    """Let active tapes know how joined values came from inputs.

    A tape fills in zeros for values that a loss does not depend on. Each value
    is passed on by an operation of its own, which notes that a gradient came.
    """
    flat = tf.nest.flatten(values, expand_composites=True)
    where = [i for i, t in enumerate(flat) if traced.is_continuous(t)]
    if not where:
        return values
    arrived: set[int] = set()

    def backward(*upstream: Any) -> list[Any]:
        known = [
            g if i in arrived or len(where) == 1 else None
            for i, g in zip(where, upstream, strict=True)
        ]
        arrived.clear()
        present = [g for g in known if g is not None]
        if _tf.num_watching([*inputs, *present]):
            return pull_again(sharded, inputs, known)
        return pull(known)

    with _tf.stop_recording():
        inner = [tf.identity(flat[i]) for i in where]
    _tf.record_operation("ShardedCall", inner, inputs, backward)
    outer = _noting(inner, where, arrived) if len(where) > 1 else inner
    for i, t in zip(where, outer, strict=True):
        flat[i] = t
    return tf.nest.pack_sequence_as(values, flat, expand_composites=True)


def _noting(
    values: list[tf.Tensor], where: list[int], arrived: set[int]
) -> list[tf.Tensor]:
    """Pass values on by operations that note where a gradient came."""

    def note(i: int) -> Callable[[Any], list[Any]]:
        def passed_on(gradient: Any) -> list[Any]:
            arrived.add(i)
            return [gradient]

        return passed_on

    with _tf.stop_recording():
        passed = [tf.identity(t) for t in values]
    for i, one, other in zip(where, values, passed, strict=True):
        _tf.record_operation("Value", [other], [one], note(i))
    return passed
