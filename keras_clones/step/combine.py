"""Combine what the clones return into one loss, gradient and state."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones.clone.changes import Notes
from keras_clones.devices import balance
from keras_clones.exchange import (
    arrivals,
    bringing_home,
    in_turns,
    laying_out,
    to_parts,
    tracing,
)
from keras_clones.plan import inexact
from keras_clones.step import of_pieces
from keras_clones.step.begin import Step
from keras_clones.step.tower import TowerOutput
from keras_clones.tensors import sharding, traced


class StepResult(NamedTuple):
    """What the clones of a step come to, on the variables device.

    `loss_values` are those of single outputs that no tracker has seen yet.
    `metrics` is what the batch adds to the variables of the compiled metrics,
    empty where they are still to see the outputs.
    `assigned` holds new values of `variables` by position, those at `added`
    to be added to the old ones. `clone_losses` has the loss of each clone's
    shard, if a watch wants it.
    """

    outputs: Any
    masks: list[Any]
    loss: Any
    loss_values: list[tf.Tensor]
    metrics: list[tf.Tensor]
    variables: list[keras.Variable]
    assigned: dict[int, tf.Tensor]
    added: Sequence[int]
    gradients: list[Any]
    clone_losses: tf.Tensor | None = None


def run(
    step: Step,
    layout: laying_out.Layout,
    tower: tracing.TracedTower,
    trace_in_graph: Callable[[], tracing.TracedTower],
) -> StepResult:
    """Run the clones on their shards, and bring the results home.

    Args:
        step: `Step` of Keras.
        layout: `Layout` of its batch.
        tower: `TracedTower` of its model.
        trace_in_graph: Function that traces the tower outside of a graph,
            too: only a graph tells how gradients by rows merge.
    """
    results, notes = _call(step, tower, layout)
    if _have_hidden_rows(layout, results):
        results, notes = _call(step, trace_in_graph(), layout)
    if step.training and len(layout.clones) > 1:
        inexact.tell_of_inexact_state(
            step.model, notes.assigned, step.options, notes.unknown
        )
    layout = in_turns.by_clone(layout)
    merged = to_parts.merge_gradients(
        layout,
        [result.gradients for result in results],
        step.variables.trainable,
        [_parts(result) for result in results],
    )
    total = merged.parts
    if step.training:
        _observe(step, layout, results)
    outputs, masks = _join_outputs(step, results)
    return StepResult(
        outputs=outputs,
        masks=masks,
        loss=total.loss,
        loss_values=total.loss_values,
        metrics=total.metrics,
        variables=notes.assigned,
        assigned=bringing_home.merge_changes(
            layout, [r.changes for r in results], total.averaged, total.added
        ),
        added=list(total.added),
        gradients=merged.gradients,
        clone_losses=_clone_losses(step, layout, results),
    )


class _Parts(NamedTuple):
    """What adds up over the clones besides gradients: dense tensors."""

    loss: Any
    loss_values: list[tf.Tensor]
    metrics: list[tf.Tensor]
    averaged: dict[int, tf.Tensor]
    added: dict[int, tf.Tensor]


def _parts(result: TowerOutput) -> _Parts:
    return _Parts(
        loss=result.loss,
        loss_values=result.loss_values,
        metrics=result.metrics,
        averaged=result.changes.averaged,
        added=result.changes.added,
    )


def _have_hidden_rows(
    layout: laying_out.Layout, results: list[TowerOutput]
) -> bool:
    """Say whether only a graph tells how gradients by rows merge."""
    many = tf.executing_eagerly() and len(layout.clones) > 1
    return many and any(
        isinstance(g, traced.RowGradient) for g in results[0].gradients
    )


def _call(
    step: Step, tower: tracing.TracedTower, layout: laying_out.Layout
) -> tuple[list[TowerOutput], Notes]:
    """Run the tower on every clone."""
    if layout.takes_turns:
        return of_pieces.run_pieces(step, layout, tower)
    if tower.concrete is not None:
        results = laying_out.each(
            layout, lambda i: tower.call(layout.inputs[i]), tower.synchronized
        )
        return results, tower.notes
    pairs = laying_out.each(
        layout, lambda i: tower.call(layout.inputs[i]), tower.synchronized
    )
    return [result for result, _ in pairs], pairs[0][1]


def _clone_losses(
    step: Step, layout: laying_out.Layout, results: list[TowerOutput]
) -> tf.Tensor | None:
    """Return the loss of each clone's shard, if a watch wants it."""
    watch = step.options.watch
    if watch is None or not step.training:
        return None
    parts = bringing_home.bring_home(layout, [r.loss for r in results])

    def losses() -> tf.Tensor:
        found = [
            tf.math.divide_no_nan(part, tf.cast(inputs.numbers[0], part.dtype))
            for inputs, part in zip(layout.inputs, parts, strict=True)
        ]
        # The last clones have no rows where there are few.
        with_rows = tf.minimum(step.rows, len(found))
        return tf.stack([tf.cast(x, tf.float64) for x in found])[:with_rows]

    def none() -> tf.Tensor:
        return tf.zeros([len(results)], tf.float64)

    with tf.name_scope("update_metrics"):
        return tf.cond(watch.wanted, losses, none)


def _observe(
    step: Step, layout: laying_out.Layout, results: list[TowerOutput]
) -> None:
    """Measure what each clone took until its gradients were there."""
    gradients = [result.gradients for result in results]
    seconds = arrivals.seconds_until_there(layout, gradients)
    if seconds is not None and step.options.balance is not None:
        balance.observe(step.options.balance, seconds)


def _join_outputs(
    step: Step, results: list[TowerOutput]
) -> tuple[Any, list[Any]]:
    """Join the outputs of the clones, if they are brought home."""
    if not step.plan.outputs_leave:
        return None, []
    outputs = sharding.join([result.outputs for result in results])
    masks = sharding.join([result.masks for result in results])
    return outputs, masks
