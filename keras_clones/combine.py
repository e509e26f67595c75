"""Combine what the clones return into one loss, gradient and state."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import (
    _keras,
    balance,
    exactness,
    exchange,
    gradients,
    sharding,
)
from keras_clones.begin import Step
from keras_clones.tower import TowerInput, TowerOutput, sources


class StepResult(NamedTuple):
    """What the clones of a step come to, on the variables device.

    `loss_values` are those of single outputs that no tracker has seen yet.
    `metrics` is what the batch adds to the variables of the compiled metrics,
    empty where they are still to see the outputs.
    `assigned` holds new values of `Variables.trainable` and `.others`, by
    position, and `seeds` those of `.seeds`. `clone_losses` has the loss of
    each clone's shard, if a watch wants it.
    """

    outputs: Any
    masks: list[Any]
    loss: Any
    loss_values: list[tf.Tensor]
    metrics: list[tf.Tensor]
    assigned: dict[int, tf.Tensor]
    seeds: dict[int, tf.Tensor]
    gradients: list[Any]
    clone_losses: tf.Tensor | None = None


class _Parts(NamedTuple):
    """What adds up over the clones: a nest of dense tensors, one a clone.

    `gradients` are by position among the trainable variables.
    """

    loss: Any
    loss_values: list[tf.Tensor]
    metrics: list[tf.Tensor]
    averaged: dict[int, tf.Tensor]
    added: dict[int, tf.Tensor]
    gradients: dict[int, tf.Tensor]


def combine_losses(
    step: Step,
    layout: exchange.Layout,
    tower: exchange.TracedTower,
    with_outputs: bool,
) -> StepResult:
    """Add up what the clones compute of the loss and its gradients."""
    results = exchange.call(tower, layout)
    return collect_results(step, layout, results, with_outputs, tower)


def gather_outputs(
    step: Step, layout: exchange.Layout, tower: exchange.TracedTower
) -> StepResult:
    """Compute one loss on the joined outputs, and send its gradient back."""
    model, trainable = step.model, step.variables.trainable
    x, y, sample_weight = step.batch
    watched = [
        sources(step.variables, inputs) if step.training else []
        for inputs in layout.inputs
    ]
    results, pullback = exchange.call_with_pullback(tower, layout, watched)
    targets = [exchange.targets(result) for result in results]
    with tf.GradientTape() as tape:
        tape.watch(targets)
        outputs, _ = _join_outputs(results)
        parts = zip(*(result.layer_losses for result in results), strict=True)
        with _keras.overriding_losses(
            model, [tf.add_n(part) for part in parts]
        ):
            loss = _keras.compute_loss(
                model, x, y, outputs, sample_weight, bool(step.training)
            )
    wanted = needs_outputs(model)
    if not step.training:
        collected = collect_results(step, layout, results, wanted)
        return collected._replace(loss=loss)
    pulled, direct = tape.gradient(
        loss,
        (targets, [variable.value for variable in trainable]),
        output_gradients=model.optimizer.scale_loss(tf.ones_like(loss)),
    )
    results = [
        result._replace(gradients=pulled_back)
        for result, pulled_back in zip(results, pullback(pulled), strict=True)
    ]
    collected = collect_results(step, layout, results, wanted, tower)
    return collected._replace(
        loss=loss,
        gradients=[
            gradients.merge([one, other])
            for one, other in zip(collected.gradients, direct, strict=True)
        ],
    )


def collect_results(
    step: Step,
    layout: exchange.Layout,
    results: list[TowerOutput],
    with_outputs: bool,
    tower: exchange.TracedTower | None = None,
) -> StepResult:
    """Bring the clones' results home and make one of them.

    Args:
        step: `Step` that the clones ran.
        layout: `Layout` of its batch.
        results: List with what each clone returned.
        with_outputs: Boolean, whether anything needs the outputs, which stay
            in the clones else.
        tower: `TracedTower` whose gradients are in the results. Defaults to
            `None`: there are none.
    """
    first = results[0]
    variables = [*step.variables.trainable, *step.variables.others]
    positions = [*first.averaged, *first.added, *first.assigned]
    if step.training and len(layout.clones) > 1:
        exactness.warn_of_inexact_state(
            step.model,
            [variables[i] for i in positions],
            step.options.batch_norm,
        )
    apart = [
        i
        for i, gradient in enumerate(first.gradients)
        if isinstance(gradient, tf.IndexedSlices)
        or _keras.overwrites_with_gradient(step.variables.trainable[i])
    ]
    total = exchange.add_up(layout, [_parts(r, apart) for r in results])
    columns = zip(
        *exchange.bring_home(
            layout, [[r.gradients[i] for i in apart] for r in results]
        ),
        strict=True,
    )
    unique = tower.unique_rows if tower is not None else frozenset()
    with tf.name_scope("merge_gradients"):
        merged = {
            i: gradients.largest(column)
            if _keras.overwrites_with_gradient(step.variables.trainable[i])
            else gradients.merge(column, unique_rows=i in unique)
            for i, column in zip(apart, columns, strict=True)
        }
    if step.training and step.options.balance is not None:
        _observe(step.options.balance, layout, results)
    assigned, seeds = exchange.first_home(layout, (first.assigned, first.seeds))
    outputs, masks = _join_outputs(results) if with_outputs else (None, [])
    return StepResult(
        outputs=outputs,
        masks=masks,
        loss=total.loss,
        loss_values=total.loss_values,
        metrics=total.metrics,
        assigned={
            **assigned,
            **total.averaged,
            **{i: variables[i].value + v for i, v in total.added.items()},
        },
        seeds=seeds,
        gradients=[
            merged[i] if i in merged else total.gradients[i]
            for i in range(len(first.gradients))
        ],
        clone_losses=_clone_losses(step, layout, results),
    )


def _clone_losses(
    step: Step, layout: exchange.Layout, results: list[TowerOutput]
) -> tf.Tensor | None:
    """Return the loss of each clone's shard, if a watch wants it.

    Where the loss is computed once on all outputs, it is computed on those of
    each clone besides.
    """
    watch = step.options.watch
    if watch is None or not step.training:
        return None
    parts = None
    if results[0].loss is not None:
        parts = exchange.bring_home(layout, [r.loss for r in results])

    def losses() -> tf.Tensor:
        found = [
            parts[i] / tf.cast(inputs.share[0], parts[i].dtype)
            if parts is not None
            else _loss_of_shard(step.model, inputs, result)
            for i, (inputs, result) in enumerate(
                zip(layout.inputs, results, strict=True)
            )
        ]
        return tf.stack([tf.cast(loss, tf.float64) for loss in found])

    def none() -> tf.Tensor:
        return tf.zeros([len(results)], tf.float64)

    with tf.name_scope("update_metrics"):
        return tf.cond(watch.wanted, losses, none)


def _loss_of_shard(
    model: keras.Model, inputs: TowerInput, result: TowerOutput
) -> tf.Tensor:
    share = inputs.share[0]
    local = [l / tf.cast(share, l.dtype) for l in result.layer_losses]
    for output, mask in zip(
        keras.tree.flatten(result.outputs), result.masks, strict=True
    ):
        _keras.set_mask(output, mask)
    # The scope keeps what this adds to the metrics of single outputs.
    with keras.StatelessScope(), _keras.overriding_losses(model, local):
        return _keras.compute_loss(
            model,
            inputs.x,
            inputs.y,
            result.outputs,
            inputs.sample_weight,
            True,
        )


def _parts(result: TowerOutput, apart: Sequence[int]) -> _Parts:
    """Return what of a clone's result adds up, leaving some gradients apart."""
    return _Parts(
        loss=result.loss,
        loss_values=result.loss_values,
        metrics=result.metrics,
        averaged=result.averaged,
        added=result.added,
        gradients={
            i: gradient
            for i, gradient in enumerate(result.gradients)
            if i not in apart
        },
    )


def _observe(
    measured: balance.Balance,
    layout: exchange.Layout,
    results: list[TowerOutput],
) -> None:
    """Measure what each clone took until its gradients were home."""
    if layout.started is None or len(results) == 1:
        return
    seconds = []
    for clock, result in zip(measured.clocks[1:], results, strict=True):
        gradient = next(g for g in result.gradients if g is not None)
        # A value at home, since a GPU is not done when its kernels are queued.
        arrived = tf.identity(tf.reshape(gradient, [-1])[:1])
        end = balance.seconds_now(clock, arrived)
        seconds.append(end - layout.started)
    balance.observe(measured, seconds)


def _join_outputs(results: list[TowerOutput]) -> tuple[Any, list[Any]]:
    outputs = sharding.join([result.outputs for result in results])
    masks = sharding.join([result.masks for result in results])
    for output, mask in zip(keras.tree.flatten(outputs), masks, strict=True):
        _keras.set_mask(output, mask)
    return outputs, masks


def needs_outputs(model: keras.Model) -> bool:
    """Say whether metrics have to see the outputs."""
    return _keras.has_compiled_metrics(model) or exactness.overrides(
        model, "compute_metrics"
    )
