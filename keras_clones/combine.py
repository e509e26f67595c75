"""Combine what the clones return into one loss, gradient and state."""

from collections.abc import Iterable, Sequence
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
    state,
)
from keras_clones.begin import Step
from keras_clones.tower import TowerOutput, sources


class StepResult(NamedTuple):
    """What the clones of a step come to, on the variables device.

    `loss_values` are those of single outputs that no tracker has seen yet.
    `metrics` is what the batch adds to the variables of the compiled metrics,
    or `None` where they are still to see the outputs.
    `assigned` holds new values of `Variables.trainable` and `.others`, by
    position, and `seeds` those of `.seeds`.
    """

    outputs: Any
    masks: list[Any]
    loss: Any
    loss_values: list[tf.Tensor]
    metrics: list[tf.Tensor] | None
    assigned: dict[int, tf.Tensor]
    seeds: dict[int, tf.Tensor]
    gradients: list[Any]


def combine_losses(
    step: Step,
    layout: exchange.Layout,
    tower: exchange.TracedTower,
    with_metrics: bool,
) -> StepResult:
    """Average the losses that the clones compute, each by its rows."""
    results = exchange.call(tower, layout)
    small = [result._replace(outputs=None, masks=[]) for result in results]
    arrived = exchange.bring_home(layout, small)
    columns = zip(*(result.gradients for result in arrived), strict=True)
    values = zip(*(result.loss_values for result in arrived), strict=True)
    added = zip(*(result.metrics for result in arrived), strict=True)
    wanted = not with_metrics and needs_outputs(step.model)
    return collect_results(step, layout, results, arrived, wanted)._replace(
        loss=gradients.average([r.loss for r in arrived], layout.shares),
        loss_values=[gradients.average(v, layout.shares) for v in values],
        metrics=[tf.add_n(part) for part in added] if with_metrics else None,
        gradients=_merge_gradients(columns, step.variables.trainable, tower),
    )


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
    if not step.training:
        return collect_results(
            step, layout, results, results, needs_outputs(model)
        )._replace(loss=loss)
    pulled, direct = tape.gradient(
        loss,
        (targets, [variable.value for variable in trainable]),
        output_gradients=model.optimizer.scale_loss(tf.ones_like(loss)),
    )
    arrived = exchange.bring_home(
        layout,
        [
            result._replace(outputs=None, masks=[], gradients=pulled_back)
            for result, pulled_back in zip(
                results, pullback(pulled), strict=True
            )
        ],
    )
    columns = zip(
        *(result.gradients for result in arrived), direct, strict=True
    )
    return collect_results(
        step, layout, results, arrived, needs_outputs(model)
    )._replace(
        loss=loss,
        gradients=_merge_gradients(columns, step.variables.trainable, tower),
    )


def _merge_gradients(
    columns: Iterable[Sequence[Any]],
    variables: Sequence[keras.Variable],
    tower: exchange.TracedTower,
) -> list[Any]:
    return [
        gradients.largest(column)
        if _keras.overwrites_with_gradient(variable)
        else gradients.merge(column, unique_rows=position in tower.unique_rows)
        for position, (column, variable) in enumerate(
            zip(columns, variables, strict=False)
        )
    ]


def collect_results(
    step: Step,
    layout: exchange.Layout,
    results: list[TowerOutput],
    arrived: list[TowerOutput],
    with_outputs: bool,
) -> StepResult:
    """Merge what was assigned, and join the outputs if they are needed.

    Args:
        step: `Step` that the clones ran.
        layout: `Layout` of its batch.
        results: List with what each clone returned.
        arrived: The same on the variables device, outputs left out.
        with_outputs: Boolean, whether anything needs the outputs, which stay
            in the clones else.
    """
    variables = [*step.variables.trainable, *step.variables.others]
    positions = list(arrived[0].assigned)
    policies = state.merge_policies(
        step.model,
        [variables[i] for i in positions],
        step.options.batch_norm,
    )
    if step.training and len(layout.clones) > 1:
        exactness.warn_of_inexact_state(
            step.model,
            [variables[i] for i in positions],
            step.options.batch_norm,
        )
    shares = step.options.balance
    if shares is not None and layout.started is not None and len(results) > 1:
        ends = [
            balance.seconds_now(clock, result)
            for clock, result in zip(shares.clocks[1:], arrived, strict=True)
        ]
        balance.observe(shares, [end - layout.started for end in ends])
    outputs, masks = _join_outputs(results) if with_outputs else (None, [])
    return StepResult(
        outputs=outputs,
        masks=masks,
        loss=None,
        loss_values=[],
        metrics=None,
        assigned={
            i: state.merge(
                policy,
                variables[i].value,
                [result.assigned[i] for result in arrived],
                layout.shares,
            )
            for i, policy in zip(positions, policies, strict=True)
        },
        seeds=arrived[0].seeds,
        gradients=[],
    )


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
