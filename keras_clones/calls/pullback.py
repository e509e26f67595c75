"""A layer call on the clones as one operation that tapes run backward."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _tf
from keras_clones.calls import call_tower, joining
from keras_clones.calls.arguments import Arguments
from keras_clones.calls.call_tower import Body, CallTower, floating
from keras_clones.exchange import bringing_home, laying_out, tracing
from keras_clones.tensors import merging, sharding, traced


class Sharded(NamedTuple):
    """A layer call that is to run on clones.

    `values` are what was read of the variables, `mirrors` what the clones
    got of them. `lay_out` makes a `Layout` of shards and mirrors, `trace` a
    `CallTower` for it, with or without a way back, in a graph or not. What
    calls layers again runs within `busy`.
    """

    body: Body
    given: Arguments
    shards: sharding.Shards
    values: list[tf.Tensor]
    mirrors: list[list[Any]]
    lay_out: Callable[[list[Any], list[Any]], laying_out.Layout]
    trace: Callable[[laying_out.Layout, bool, bool], CallTower]
    busy: Callable[[], AbstractContextManager[None]]
    is_synchronized: bool


class Run(NamedTuple):
    """One clone's run of a call, and what it takes to run it backward."""

    output: call_tower.CallOutput
    notes: Any
    residuals: Any = ()
    tape: Any = None
    extra: tuple[tf.Variable, ...] = ()


class Joined(NamedTuple):
    """What the clones came to: one run each, and what they join to."""

    layout: laying_out.Layout
    runs: list[Run]
    values: list[Any]


def run(sharded: Sharded, watched: bool) -> Joined:
    """Run a call on the clones, and join what it gives back.

    A tape that is active sees one operation, from the inputs and variables
    of the call to the joined values, whose gradient runs the clones backward.

    Args:
        sharded: `Sharded` call.
        watched: Boolean, whether any tape may want gradients.
    """
    given = sharded.given
    if not watched:
        data = given.split(sharded.shards)
        layout = sharded.lay_out(data, sharded.mirrors)
        made = sharded.trace(layout, False, False)
        runs = _run(made, sharded.body, layout, False)
        return Joined(layout, runs, _join(sharded.body.layer, runs))
    with _tf.stop_recording():
        # No tape that is active knows these tensors.
        leaves = tf.nest.map_structure(
            tf.identity, given.leaves, expand_composites=True
        )
    given = given._replace(leaves=leaves)
    with _own_tape() as tape:
        tape.watch(floating(leaves))
        data = given.split(sharded.shards)
    layout = sharded.lay_out(data, sharded.mirrors)
    made = sharded.trace(layout, True, False)
    runs = _run(made, sharded.body, layout, True)
    with _own_tape() as last:
        last.watch([floating(run.output.values) for run in runs])
        joined = _join(sharded.body.layer, runs)
    extra = _extra(made, runs)

    def pull(upstream: list[Any]) -> list[Any]:
        back = _Backward(sharded, made, layout, runs, extra)
        return back.pull(upstream, joined, last, data, leaves, tape)

    inputs = [
        *floating(sharded.given.leaves),
        *_wanted_values(sharded),
        *(variable.read_value() for variable in extra),
    ]
    values = _record(sharded, inputs, joined, pull)
    return Joined(layout, runs, values)


def _own_tape() -> tf.GradientTape:
    return tf.GradientTape(persistent=True, watch_accessed_variables=False)


def _extra(made: CallTower, runs: Sequence[Run]) -> list[tf.Variable]:
    """Return the variables of nobody that a call uses."""
    found = [*made.extra, *(v for run in runs for v in run.extra)]
    return list({id(v): v for v in found}.values())


def _wanted_values(sharded: Sharded) -> list[tf.Tensor]:
    body, values = sharded.body, sharded.values
    num_trained = len(body.variables.trainable)
    others = values[num_trained:]
    return [*values[:num_trained], *(others[i] for i in body.watched_others)]


def _wanted_variables(body: Body) -> list[keras.Variable]:
    others = body.variables.others
    return [
        *body.variables.trainable,
        *(others[i] for i in body.watched_others),
    ]


def _run(
    made: CallTower, body: Body, layout: laying_out.Layout, watched: bool
) -> list[Run]:
    """Run a call on every clone."""
    tower = made.tower

    def by_function(i: int) -> Run:
        output, residuals = tower.call(layout.inputs[i])
        return Run(output, tower.notes, residuals)

    def by_python(i: int) -> Run:
        inputs = layout.inputs[i]
        with tf.GradientTape(persistent=True) as tape:
            known = call_tower.wanted(body, inputs)
            if watched:
                tape.watch([*floating(inputs.data), *known])
            output, notes = tower.call(inputs)
        extra = [
            v
            for v in tape.watched_variables()
            if not any(v is one for one in known)
        ]
        return Run(output, notes, (), tape, tuple(extra))

    if tower.concrete is None:
        return laying_out.each(layout, by_python, tower.synchronized)
    with _tf.stop_recording():
        return laying_out.each(layout, by_function)


def _join(layer: keras.Layer, runs: Sequence[Run]) -> list[Any]:
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
    where = [i for i, t in enumerate(flat) if t.dtype.is_floating]
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
            return _pull_again(sharded, inputs, known)
        return pull(known)

    def note(i: int) -> Callable[[Any], list[Any]]:
        def passed_on(gradient: Any) -> list[Any]:
            arrived.add(i)
            return [gradient]

        return passed_on

    with _tf.stop_recording():
        inner = [tf.identity(flat[i]) for i in where]
        outer = inner
        if len(where) > 1:
            outer = [tf.identity(t) for t in inner]
    _tf.record_operation("ShardedCall", inner, inputs, backward)
    if len(where) > 1:
        for i, one, other in zip(where, inner, outer, strict=True):
            _tf.record_operation("Value", [other], [one], note(i))
    for i, t in zip(where, outer, strict=True):
        flat[i] = t
    return tf.nest.pack_sequence_as(values, flat, expand_composites=True)


class _Backward(NamedTuple):
    """What it takes to run the clones of a call backward."""

    sharded: Sharded
    made: CallTower
    layout: laying_out.Layout
    runs: list[Run]
    extra: list[tf.Variable]

    def pull(
        self,
        upstream: list[Any],
        values: list[Any],
        last: tf.GradientTape,
        data: list[Any],
        leaves: list[Any],
        splitting: tf.GradientTape,
    ) -> list[Any]:
        """Return gradients with respect to inputs, variables and the rest."""
        pairs = zip(floating(values), upstream, strict=True)
        by_clone = _gradient(
            last,
            [pair for pair in pairs if pair[1] is not None],
            [floating(run.output.values) for run in self.runs],
        )
        pulled = laying_out.each(
            self.layout,
            lambda i: self._pull_clone(i, by_clone[i]),
            self.made.tower.synchronized,
        )
        if self._has_hidden_rows(pulled):
            pulled = self._pull_in_graph(by_clone)
        return self._merge(pulled, data, leaves, splitting)

    def _pull_clone(self, i: int, upstream: list[Any]) -> list[Any]:
        with tf.name_scope("backward_pass"):
            return self._run_back(i, upstream)

    def _run_back(self, i: int, upstream: list[Any]) -> list[Any]:
        inputs, run = self.layout.inputs[i], self.runs[i]
        values = floating(run.output.values)
        known = call_tower.wanted(self.sharded.body, inputs)
        sources = [*known, *floating(inputs.data), *self.extra]
        if all(g is None for g in upstream):
            return [None] * len(sources)
        backward = self.made.backward
        if backward is not None:
            return call_tower.run_backward(
                backward, inputs, run.residuals, values, upstream
            )
        pairs = zip(values, upstream, strict=True)
        found = _gradient(
            run.tape, [pair for pair in pairs if pair[1] is not None], sources
        )
        return call_tower.by_rows(found, self.sharded.body.alike_in_all(inputs))

    def _has_hidden_rows(self, pulled: list[list[Any]]) -> bool:
        """Say whether only a graph tells how gradients by rows merge."""
        return (
            tf.executing_eagerly()
            and len(pulled) > 1
            and any(isinstance(g, traced.RowGradient) for g in pulled[0])
        )

    def _pull_in_graph(self, by_clone: list[list[Any]]) -> list[list[Any]]:
        with self.sharded.busy():
            made = self.sharded.trace(self.layout, True, True)
        runs = _run(made, self.sharded.body, self.layout, True)
        other = self._replace(made=made, runs=runs)
        return laying_out.each(
            self.layout, lambda i: other._pull_clone(i, by_clone[i])
        )

    def _merge(
        self,
        pulled: list[list[Any]],
        data: list[Any],
        leaves: list[Any],
        splitting: tf.GradientTape,
    ) -> list[Any]:
        variables = _wanted_variables(self.sharded.body)
        num, end = len(variables), len(pulled[0]) - len(self.extra)
        merged = bringing_home.merge_gradients(
            self.layout, [p[:num] for p in pulled], variables
        ).gradients
        pairs = [
            (t, g)
            for shard, p in zip(data, pulled, strict=True)
            for t, g in zip(floating(shard), p[num:end], strict=True)
            if g is not None
        ]
        to_data = _gradient(splitting, pairs, floating(leaves))
        columns = zip(*(p[end:] for p in pulled), strict=True)
        to_extra = [merging.merge(column) for column in columns]
        return [*to_data, *merged, *to_extra]


def _gradient(
    tape: tf.GradientTape, pairs: Sequence[tuple[Any, Any]], sources: Any
) -> Any:
    """Return gradients of targets, given those with respect to the targets."""
    if not pairs:
        return tf.nest.map_structure(lambda _: None, sources)
    targets, upstream = zip(*pairs, strict=True)
    return tape.gradient(
        list(targets),
        sources,
        output_gradients=[
            merging.merge([g])
            if isinstance(g, traced.RowGradient)
            else tf.cast(g, t.dtype)
            for t, g in zip(targets, upstream, strict=True)
        ],
    )


def _pull_again(
    sharded: Sharded, inputs: list[tf.Tensor], upstream: list[Any]
) -> list[Any]:
    """Run a call and run it backward, for tapes that differentiate that too.

    All that happens here is seen by the tapes that are active, so that they
    can run it backward in turn.
    """
    body, given = sharded.body, sharded.given
    if sharded.is_synchronized:
        raise NotImplementedError(
            "Gradients of gradients through a `BatchNormalization` that is "
            "synchronized are not there. Received: layer "
            f"{body.layer.name!r}. Use `batch_norm='mean'`."
        )
    num = len(floating(given.leaves))
    variables = len(_wanted_values(sharded))
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(inputs)
        rest = iter(inputs[:num])
        flat = [
            next(rest) if t.dtype.is_floating else t for t in given.components()
        ]
        leaves = tf.nest.pack_sequence_as(
            given.leaves, flat, expand_composites=True
        )
        data = given._replace(leaves=leaves).split(sharded.shards)
        read = inputs[num : num + variables]
        layout = sharded.lay_out(data, _plain_mirrors(sharded, read))
        # Python itself, not a function: a tape then runs back only what it is
        # asked for, where it would run all of a function back.
        with sharded.busy():
            outputs = laying_out.each(
                layout,
                lambda i: body(tracing.open_rows(layout.inputs[i], layout)),
            )
        runs = [Run(output, notes) for output, notes in outputs]
        values = _join(body.layer, runs)
    pairs = zip(floating(values), upstream, strict=True)
    return _gradient(tape, [p for p in pairs if p[1] is not None], inputs)


def _plain_mirrors(sharded: Sharded, read: list[tf.Tensor]) -> list[list[Any]]:
    """Return mirrors that tapes see come from what was read."""
    body = sharded.body
    trained = len(body.variables.trainable)
    places = [*range(trained), *(trained + i for i in body.watched_others)]
    mirrors = [list(one) for one in sharded.mirrors]
    for one in mirrors:
        for place, tensor in zip(places, read, strict=True):
            if one[place] is not None:
                one[place] = tf.identity(tensor)
    return mirrors
