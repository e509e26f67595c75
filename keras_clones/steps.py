"""The train, test and predict step on clones, composed of the pure parts."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import (
    _keras,
    combine,
    custom,
    exactness,
    exchange,
    sharding,
    state,
)
from keras_clones.begin import Step, StepOptions, as_tensor, begin, build
from keras_clones.placement import Clone
from keras_clones.state import Variables
from keras_clones.synchronize import synchronized_layers
from keras_clones.tables import looked_up_at_home
from keras_clones.tower import make_tower


def train_step(model: keras.Model, options: StepOptions, data: Any) -> dict:
    """Train on one global batch, as `keras.Model.train_step` does."""
    with tf.device(options.home):
        if exactness.overrides(model, "train_step"):
            return run_own_step(model, options, "train_step", data)
        step = begin(model, options, data, training=True)
        result = run(step)
        if options.watch is not None:
            options.watch.record(
                result.clone_losses,
                result.gradients,
                step.variables.trainable,
                model.optimizer.scale_loss(1.0),
            )
        assign_state(step.variables, result)
        if step.variables.trainable:
            model.optimizer.apply_gradients(
                zip(result.gradients, step.variables.trainable, strict=True)
            )
        else:
            warnings.warn(
                "The model does not have any trainable weights.", stacklevel=1
            )
        with tf.name_scope("update_metrics"):
            return update_metrics(step, result)


def test_step(model: keras.Model, options: StepOptions, data: Any) -> dict:
    """Evaluate one global batch, as `keras.Model.test_step` does."""
    with tf.device(options.home):
        if exactness.overrides(model, "test_step"):
            return run_own_step(model, options, "test_step", data)
        step = begin(model, options, data, training=False)
        result = run(step)
        assign_state(step.variables, result)
        return update_metrics(step, result)


def predict_step(model: keras.Model, options: StepOptions, data: Any) -> Any:
    """Predict one global batch, as `keras.Model.predict_step` does."""
    with tf.device(options.home):
        if exactness.overrides(model, "predict_step"):
            return run_own_step(model, options, "predict_step", data)
        step = begin(model, options, data, training=None)
        result = run(step)
        assign_state(step.variables, result)
        return result.outputs


def run_own_step(
    model: keras.Model, options: StepOptions, name: str, data: Any
) -> Any:
    """Run a step that the model's class overrides in every clone."""
    data = keras.tree.map_structure(as_tensor, data)
    rows = sharding.count_rows({"data": data})
    batch = keras.utils.unpack_x_y_sample_weight(data)
    build(model, batch, options.home, training=False, own_step=True)
    if len(options.clones) > 1:
        exactness.check_layers(model)

    def run_on(clones: Sequence[Clone]) -> Any:
        return custom.run(
            model,
            name,
            data,
            rows,
            clones,
            options.home,
            options.batch_norm,
            options.shares,
        )

    return on_enough_clones(options.clones, rows, run_on)


def on_enough_clones(
    clones: Sequence[Clone],
    rows: sharding.Rows,
    run_on: Callable[[Sequence[Clone]], Any],
) -> Any:
    """Run on every clone, or on the first if there are more than rows.

    So no clone ever runs on an empty shard.
    """
    if len(clones) == 1:
        return run_on(clones)
    if isinstance(rows, int):
        return run_on(clones if rows >= len(clones) else clones[:1])
    return tf.cond(
        rows >= len(clones), lambda: run_on(clones), lambda: run_on(clones[:1])
    )


def run(step: Step) -> combine.StepResult:
    """Run the clones on their shards of a batch, and bring the results home."""
    run_on = functools.partial(_run_on, step, functools.cache(_towers(step)))
    with looked_up_at_home(step.tables, step.options.home):
        return on_enough_clones(step.options.clones, step.rows, run_on)


def _towers(step: Step) -> Callable[[bool], exchange.CallableTower]:
    """Return what makes a step's tower function, with or without its loss."""

    def make(with_loss: bool) -> exchange.CallableTower:
        with_metrics = with_loss and exactness.metrics_add_up(step.model)
        tower = make_tower(
            step.model,
            step.variables,
            training=bool(step.training),
            layer_losses=(
                step.options.layer_losses
                if len(step.options.clones) > 1
                else "mean"
            ),
            policies=functools.partial(_policies, step),
            with_loss=with_loss,
            with_metrics=with_metrics,
            with_gradients=with_loss and bool(step.training),
        )
        devices = [clone.device for clone in step.options.clones]
        outputs = not with_loss or _leave(step.model, with_metrics)
        inline = exchange.inlines(devices, len(step.variables.trainable))
        return exchange.callable_tower(tower, inline, step.jit_compile, outputs)

    return make


def _leave(model: keras.Model, with_metrics: bool) -> bool:
    """Say whether outputs leave the clones that compute their own loss."""
    return not with_metrics and combine.needs_outputs(model)


def _policies(step: Step, variables: Sequence[keras.Variable]) -> list[str]:
    if len(step.options.clones) == 1:
        return ["first"] * len(variables)
    return state.merge_policies(step.model, variables, step.options.batch_norm)


def _run_on(
    step: Step,
    towers: Callable[[bool], exchange.CallableTower],
    clones: Sequence[Clone],
) -> combine.StepResult:
    model, options = step.model, step.options
    layout = exchange.lay_out(
        step.batch,
        step.rows,
        step.variables,
        step.tables,
        model.optimizer.scale_loss(1.0) if step.training else 1.0,
        clones,
        options.home,
        options.shares if clones == options.clones else None,
        options.balance.clocks[0]
        if options.balance and step.training
        else None,
    )
    if step.training is None:
        results = exchange.call(exchange.trace(towers(False), layout), layout)
        return combine.collect_results(step, layout, results, with_outputs=True)
    synchronized = (
        synchronized_layers(model, options.batch_norm)
        if step.training and len(clones) > 1
        else []
    )
    reason = exactness.why_not_by_clone(model)
    if synchronized and options.loss == "auto":
        reason = "layers share sums over the clones"
    if options.loss == "clones" or (options.loss == "auto" and not reason):
        tower = exchange.trace(towers(True), layout, synchronized)
        if tower.returns is not None:
            reason = reason or exactness.why_not_on(
                step.batch[1], tower.returns.outputs, tower.returns.masks
            )
        if options.loss == "clones" and reason:
            warnings.warn(
                "The losses of the clones do not average to the loss of the "
                f"global batch: {reason}. With loss='clones' the model trains "
                "on their average all the same; loss='auto' computes the loss "
                "of the global batch.",
                stacklevel=1,
            )
        if options.loss == "clones" or not reason:
            outputs = _leave(model, exactness.metrics_add_up(model))
            return combine.combine_losses(step, layout, tower, outputs)
    tower = exchange.trace(
        towers(False), layout, synchronized, runs_back=bool(step.training)
    )
    return combine.gather_outputs(step, layout, tower)


def assign_state(variables: Variables, result: combine.StepResult) -> None:
    """Give the variables that the clones assigned their merged values."""
    mirrored = [*variables.trainable, *variables.others]
    for position, value in result.assigned.items():
        mirrored[position].assign(value)
    for position, value in result.seeds.items():
        variables.seeds[position].assign(value)


def update_metrics(step: Step, result: combine.StepResult) -> dict:
    """Update every metric once, for the global batch; return the logs."""
    model = step.model
    x, y, sample_weight = step.batch
    _keras.loss_tracker(model).update_state(
        result.loss, sample_weight=step.rows
    )
    first = next(leaf for leaf in keras.tree.flatten(x) if leaf is not None)
    trackers = _keras.loss_trackers(model)
    for tracker, value in zip(trackers, result.loss_values, strict=False):
        tracker.update_state(value, sample_weight=first.shape[0])
    for variable, added in zip(
        _keras.metric_variables(model), result.metrics, strict=False
    ):
        variable.assign_add(added)
    if result.metrics or not combine.needs_outputs(model):
        return model.get_metrics_result()
    for output, mask in zip(
        keras.tree.flatten(result.outputs), result.masks, strict=True
    ):
        _keras.set_mask(output, mask)
    return model.compute_metrics(x, y, result.outputs, sample_weight)
