"""The way back through a layer call: its clones run backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones.calls import run_again
from keras_clones.calls.body import Body
from keras_clones.calls.call_tower import CallTower
from keras_clones.calls.forward import Run, Sharded, join, run_each
from keras_clones.calls.traced_backward import floating, run_backward, wanted
from keras_clones.exchange import (
    arrivals,
    bringing_home,
    in_turns,
    laying_out,
    tracing,
)
from keras_clones.tensors import merging, traced


def wanted_values(sharded: Sharded) -> list[tf.Tensor]:
    """Return what was read of the variables that gradients go to."""
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


class Split(NamedTuple):
    """The data of a call as the clones got it.

    `leaves` are the tensors of the call, `shards` has a list a clone of what
    they were split into, and `tape` has seen them split.
    """

    leaves: list[Any]
    shards: list[Any]
    tape: tf.GradientTape


class Pulled(NamedTuple):
    """The gradients of a clone: `data` has a list for each of its pieces."""

    variables: list[Any]
    data: list[list[Any]]
    extra: list[Any]


class WayBack(NamedTuple):
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
        joining: tf.GradientTape,
        split: Split,
    ) -> list[Any]:
        """Return gradients with respect to inputs, variables and the rest."""
        pairs = zip(floating(values), upstream, strict=True)
        by_clone = _gradient(
            joining,
            [pair for pair in pairs if pair[1] is not None],
            [floating(run.output.values) for run in self.runs],
        )
        laying_out.start_clock(self.layout.clocks, by_clone, "back")
        pulled = self._pull_all(by_clone)
        if self._has_hidden_rows(pulled):
            pulled = self._pull_in_graph(by_clone)
        arrivals.tell(self.layout, pulled, "back")
        return self._merge(pulled, split)

    def _pull_all(self, upstream: list[Any]) -> list["Pulled"]:
        """Run all clones backward."""
        if self.layout.takes_turns:
            return self._pull_in_turns(upstream)
        pulled = laying_out.each(
            self.layout,
            lambda i: self._pull_clone(i, upstream[i]),
            self.made.tower.synchronized,
        )
        parts = [self._apart(one) for one in pulled]
        return [Pulled(known, [data], more) for known, data, more in parts]

    def _apart(self, pulled: list[Any]) -> tuple[list[Any], ...]:
        """Return gradients of variables, of data and of the rest."""
        num = len(_wanted_variables(self.sharded.body))
        end = len(pulled) - len(self.extra)
        return pulled[:num], pulled[num:end], pulled[end:]

    def _pull_in_turns(self, upstream: list[Any]) -> list["Pulled"]:
        """Run each piece once more, and backward, one after the other."""
        variables = _wanted_variables(self.sharded.body)

        def pull(i: int) -> in_turns.Part:
            run = run_again.run(
                self.sharded, self.made, self.layout.inputs[i], upstream[i]
            )
            back = self._replace(
                runs=[*self.runs[:i], run, *self.runs[i + 1 :]]
            )
            known, data, more = self._apart(back._pull_clone(i, upstream[i]))
            added, rows = in_turns.split_gradients(known, variables)
            return in_turns.Part(added, (rows, data, more))

        def finish(total: in_turns.Total) -> Pulled:
            rows, data, more = zip(*total.listed, strict=True)
            known = in_turns.join_gradients(total.added, rows)
            columns = zip(*more, strict=True)
            rest = [merging.merge(column) for column in columns]
            return Pulled(known, list(data), rest)

        return in_turns.take_turns(self.layout, pull, finish)

    def _pull_clone(self, i: int, upstream: list[Any]) -> list[Any]:
        with tf.name_scope("backward_pass"):
            return self._run_back(i, upstream)

    def _run_back(self, i: int, upstream: list[Any]) -> list[Any]:
        inputs, run = self.layout.inputs[i], self.runs[i]
        values = floating(run.output.values)
        known = wanted(self.sharded.body, inputs)
        sources = [*known, *floating(inputs.data), *self.extra]
        if all(g is None for g in upstream):
            return [None] * len(sources)
        backward = self.made.backward
        if backward is not None:
            return run_backward(
                backward, inputs, run.residuals, values, upstream
            )
        pairs = zip(values, upstream, strict=True)
        found = _gradient(
            run.tape, [pair for pair in pairs if pair[1] is not None], sources
        )
        return self.sharded.body.by_rows(found, inputs, run.notes)

    def _has_hidden_rows(self, pulled: list["Pulled"]) -> bool:
        """Say whether only a graph tells how gradients by rows merge."""
        return (
            tf.executing_eagerly()
            and len(self.layout.clones) > 1
            and any(
                isinstance(g, traced.RowGradient) for g in pulled[0].variables
            )
        )

    def _pull_in_graph(self, by_clone: list[list[Any]]) -> list["Pulled"]:
        with self.sharded.busy():
            made = self.sharded.trace(self.layout, True, True)
        other = self._replace(made=made)
        if not self.layout.takes_turns:
            runs = run_each(made, self.sharded.body, self.layout, True)
            other = other._replace(runs=runs)
        return other._pull_all(by_clone)

    def _merge(self, pulled: list["Pulled"], split: Split) -> list[Any]:
        variables = _wanted_variables(self.sharded.body)
        merged = bringing_home.merge_gradients(
            in_turns.by_clone(self.layout),
            [p.variables for p in pulled],
            variables,
        ).gradients
        by_shard = [data for p in pulled for data in p.data]
        pairs = [
            (t, g)
            for shard, data in zip(split.shards, by_shard, strict=True)
            for t, g in zip(floating(shard), data, strict=True)
            if g is not None
        ]
        to_data = _gradient(split.tape, pairs, floating(split.leaves))
        columns = zip(*(p.extra for p in pulled), strict=True)
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


def pull_again(
    sharded: Sharded, inputs: list[tf.Tensor], upstream: list[Any]
) -> list[Any]:
    """Run a call and run it backward, for tapes that differentiate that too.

    All that happens here is seen by the tapes that are active, so that they
    can run it backward in turn.
    """
    body, given = sharded.body, sharded.body.given
    _check_again(sharded)
    num = len(floating(given.leaves))
    variables = len(wanted_values(sharded))
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(inputs)
        rest = iter(inputs[:num])
        flat = [
            next(rest) if traced.is_continuous(t) else t
            for t in given.components()
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
        values = join(body.layer, runs)
    pairs = zip(floating(values), upstream, strict=True)
    return _gradient(tape, [p for p in pairs if p[1] is not None], inputs)


def _check_again(sharded: Sharded) -> None:
    """Refuse calls that tapes cannot run backward twice."""
    layer = sharded.body.layer
    if sharded.is_synchronized:
        raise NotImplementedError(
            "Gradients of gradients through a `BatchNormalization` that is "
            "synchronized are not there. Received: layer "
            f"{layer.name!r}. Use `batch_norm='mean'`."
        )
    if len(sharded.shards.sizes) > 1 and not sharded.body.may_meet:
        raise NotImplementedError(
            "Gradients of gradients keep what all pieces compute, so a call "
            "that they go through cannot be made in pieces. Received: layer "
            f"{layer.name!r}. Pass `pieces=1`, and smaller batches or "
            "more clones where memory does not suffice."
        )


def _plain_mirrors(sharded: Sharded, read: list[tf.Tensor]) -> list[list[Any]]:
    """Return mirrors that tapes see come from what was read.

    Of a table whose rows clones were given, it is the whole.
    """
    body = sharded.body
    trained = len(body.variables.trainable)
    places = [*range(trained), *(trained + i for i in body.watched_others)]
    mirrors = [list(one) for one in sharded.mirrors]
    for one in mirrors:
        for place, tensor in zip(places, read, strict=True):
            if one[place] is not None or place in sharded.foreseen:
                one[place] = tf.identity(tensor)
    return mirrors
