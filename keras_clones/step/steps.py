"""The train, test and predict step on clones, composed of the pure parts.

A step flows one of two ways. By towers, each clone computes its own loss and
gradients, where the loss is an exact mean over the shards. By calls, the step
runs once, on the global batch, and only its calls of layers run on clones.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls import calls, looks
from keras_clones.clone.tables import looked_up_at_home
from keras_clones.exchange import bringing_home, laying_out, tracing
from keras_clones.plan import exactness
from keras_clones.plan.options import StepOptions
from keras_clones.plan.watch import Watch
from keras_clones.step import combine
from keras_clones.step.begin import Step, as_tensors, begin, unpack
from keras_clones.step.tower import Tower
from keras_clones.tensors import sharding


def train_step(model: keras.Model, options: StepOptions, data: Any) -> dict:
    """Train on one global batch, as `keras.Model.train_step` does."""
    if exactness.overrides(model, "train_step"):
        return run_own_step(model, options, "train_step", data)
    return run_step(model, options, data, training=True)


def test_step(model: keras.Model, options: StepOptions, data: Any) -> dict:
    """Evaluate one global batch, as `keras.Model.test_step` does."""
    if exactness.overrides(model, "test_step"):
        return run_own_step(model, options, "test_step", data)
    return run_step(model, options, data, training=False)


def predict_step(model: keras.Model, options: StepOptions, data: Any) -> Any:
    """Predict one global batch, as `keras.Model.predict_step` does."""
    if exactness.overrides(model, "predict_step"):
        return run_own_step(model, options, "predict_step", data)
    with tf.device(options.home):
        batch = unpack(data, with_targets=False)
        sharding.count_rows({"x": batch[0]})
        step = keras.Model.predict_step
        return calls.run(model, options, False, lambda: step(model, batch[:1]))


def run_own_step(
    model: keras.Model, options: StepOptions, name: str, data: Any
) -> Any:
    """Run a step that the model's class overrides, once."""
    with tf.device(options.home):
        data = as_tensors(data)
        own_step = getattr(type(model), name)
        training = name == "train_step"
        return calls.run(
            model, options, training, lambda: own_step(model, data)
        )


def run_step(
    model: keras.Model, options: StepOptions, data: Any, training: bool
) -> dict:
    """Run Keras's own train or test step on one global batch."""
    with tf.device(options.home):
        x, y, sample_weight = batch = unpack(data, with_targets=True)
        rows = sharding.count_rows(
            {"x": x, "y": y, "sample_weight": sample_weight}
        )
        step = begin(model, options, batch, rows, training)

        def run() -> dict:
            towers = trace_towers(step)
            if towers is None:
                return run_by_calls(step)
            return run_by_towers(step, *towers)

        counted = _keras.iterations(model.optimizer) if training else None
        return unless_empty(rows, run, model.get_metrics_result, counted)


def unless_empty(
    rows: sharding.Rows,
    run: Callable[[], dict],
    skip: Callable[[], dict],
    iterations: Any,
) -> dict:
    """Run a step if its batch has rows, else leave everything as it is.

    Args:
        rows: Integer or scalar int32 tensor, the rows of the batch.
        run: Function that runs the step.
        skip: Function that returns what there is without it.
        iterations: Variable that counts the steps, or `None`. Keras counts a
            step that finds the data at its end, too, since counting does not
            wait for data. So do clones, to train on with the same count.
    """
    if isinstance(rows, int):
        return run() if rows else skip()
    if iterations is not None:
        iterations.assign_add(1)

    def uncounted(function: Callable[[], dict]) -> dict:
        if iterations is not None:
            iterations.assign_sub(1)
        return function()

    return tf.cond(rows > 0, lambda: uncounted(run), lambda: uncounted(skip))


def trace_towers(
    step: Step,
) -> tuple[laying_out.Layout, tracing.TracedTower] | None:
    """Trace the towers of a step, if the clones can compute its loss.

    Returns:
        The `Layout` of the batch and the `TracedTower`, or `None` if the loss
        has to see the outputs of all clones.
    """
    plan = step.plan
    # Outside of a graph, outputs show their masks when it is too late.
    unseen = tf.executing_eagerly() and plan.may_change
    if unseen or not plan.loss_in_clones:
        return None
    layout = _lay_out(step)
    with looked_up_at_home(plan.tables, step.options.home):
        tower = tracing.trace(_towers(step), layout, plan.synchronized)
    if tower.returns is not None:
        plan = plan.knowing(_why_not(step, tower))
    if not plan.loss_in_clones:
        return None
    if plan.reason:
        warnings.warn(
            "The losses of the clones do not average to the loss of the "
            f"global batch: {plan.reason}. With loss='clones' the model trains "
            "on their average all the same; loss='auto' computes the loss "
            "of the global batch.",
            stacklevel=1,
        )
    return layout, tower


def _why_not(step: Step, tower: tracing.TracedTower) -> str | None:
    """Say why losses of shards do not average, going by a traced tower."""
    own_metrics = exactness.overrides(step.model, "compute_metrics")
    if tower.notes.keeps and own_metrics:
        return "layers keep tensors for `compute_metrics`"
    return exactness.why_not_on(
        step.batch[1], tower.returns.outputs, tower.returns.masks
    )


def _lay_out(step: Step) -> laying_out.Layout:
    options, variables = step.options, step.variables
    num = sharding.enough(step.rows, len(options.clones))
    clones = options.clones[:num]
    even = num == 1 or num < len(options.clones)
    shards = sharding.divide(step.rows, num, None if even else options.shares)
    with tf.name_scope("split_batch"):
        data = sharding.split_rows(step.batch, shards)
    mirrors = laying_out.send_mirrors(
        laying_out.read_variables(variables, step.plan.tables),
        options.home,
        clones,
    )
    scale = step.model.optimizer.scale_loss(1.0) if step.training else 1.0
    group = options.group(clones, step.training, scale)
    seeds = laying_out.read_seeds(variables)
    return laying_out.lay_out(shards, group, seeds, data, mirrors)


def _towers(step: Step) -> tracing.CallableTower:
    """Return the tower function of a step, callable from any place."""
    model, options = step.model, step.options
    with_metrics = step.plan.metrics_in_clones
    num = sharding.enough(step.rows, len(options.clones))
    tower = Tower(
        model,
        step.variables,
        options,
        training=step.training,
        with_metrics=with_metrics,
        may_be_idle=num > 1 and not isinstance(step.rows, int),
    )
    needed = step.plan.outputs_leave
    devices = [clone.device for clone in options.clones]
    return tracing.callable_tower(
        model,
        tower,
        tracing.inlines(devices, len(step.variables.trainable)),
        step.plan.jit_compile,
        lambda output: (
            output if needed else output._replace(outputs=None, masks=[])
        ),
        options.exact,
    )


def run_by_towers(
    step: Step, layout: laying_out.Layout, tower: tracing.TracedTower
) -> dict:
    """Run a step whose clones compute their own losses and gradients."""
    model, variables = step.model, step.variables.trainable
    first = _look_at_rows(step)
    with first, looked_up_at_home(step.plan.tables, step.options.home):
        result = combine.run(
            step,
            layout,
            tower,
            lambda: tracing.trace(_towers(step), layout, in_graph=True),
        )
    watch = step.options.watch
    if watch is not None and step.training:
        _record(watch, step, result.clone_losses, result.gradients)
    bringing_home.assign(result.variables, result.assigned, result.added)
    if step.training and variables:
        model.optimizer.apply_gradients(
            zip(result.gradients, variables, strict=True)
        )
    elif step.training:
        _warn_of_no_weights()
    with tf.name_scope("update_metrics"):
        return update_metrics(step, result)


def _look_at_rows(step: Step) -> contextlib.AbstractContextManager[None]:
    """Look whether the model mixes rows, in a first step of training."""
    model = step.model
    if not step.training:
        return contextlib.nullcontext()

    def call(x: Any) -> Any:
        return _keras.call(model, x, training=True)

    return looks.look_at(step.options, model, call, (step.batch[0],), {})


def run_by_calls(step: Step) -> dict:
    """Run Keras's own step once, on the global batch."""
    model, batch = step.model, step.batch

    def run() -> dict:
        if step.training:
            return _train_once(step)
        return keras.Model.test_step(model, batch)

    return calls.run(model, step.options, step.training, run)


def _train_once(step: Step) -> dict:
    """Train as `keras.Model.train_step` does, and let a watch know."""
    model = step.model
    x, y, sample_weight = step.batch
    variables = model.trainable_weights
    with tf.GradientTape() as tape:
        outputs = _keras.call(model, x, training=True)
        loss = _keras.compute_loss(model, x, y, outputs, sample_weight, True)
        _keras.loss_tracker(model).update_state(loss, sample_weight=step.rows)
        scaled = model.optimizer.scale_loss(loss)
    if variables:
        gradients = tape.gradient(scaled, variables)
        watch = step.options.watch
        if watch is not None:
            losses = _clone_losses(watch, step, outputs)
            _record(watch, step, losses, gradients)
        model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    else:
        _warn_of_no_weights()
    with tf.name_scope("update_metrics"):
        return model.compute_metrics(x, y, outputs, sample_weight)


def _clone_losses(watch: Watch, step: Step, outputs: Any) -> tf.Tensor:
    """Return the loss of each clone's rows by itself, if it is wanted."""
    model, options = step.model, step.options
    num = sharding.enough(step.rows, len(options.clones))
    shards = sharding.divide(step.rows, num)
    x, y, sample_weight = step.batch
    masks = [_keras.get_mask(t) for t in keras.tree.flatten(outputs)]
    losses = list(model.losses)

    def loss(shard: Any) -> tf.Tensor:
        x, y, outputs, sample_weight, masks = shard
        for output, mask in zip(
            keras.tree.flatten(outputs), masks, strict=True
        ):
            _keras.set_mask(output, mask)
        # The scope keeps what this adds to the metrics of single outputs.
        with keras.StatelessScope(), _keras.overriding_losses(model, losses):
            found = _keras.compute_loss(
                model, x, y, outputs, sample_weight, True
            )
        return tf.cast(found, tf.float64)

    def wanted() -> tf.Tensor:
        nest = (x, y, outputs, sample_weight, masks)
        found = [loss(shard) for shard in sharding.split_rows(nest, shards)]
        return tf.stack(found)[: tf.minimum(step.rows, num)]

    def unwanted() -> tf.Tensor:
        return tf.zeros([num], tf.float64)

    return tf.cond(watch.wanted, wanted, unwanted)


def _record(watch: Watch, step: Step, losses: Any, gradients: Any) -> None:
    watch.record(
        losses,
        gradients,
        step.variables.trainable,
        step.model.optimizer.scale_loss(1.0),
    )


def _warn_of_no_weights() -> None:
    warnings.warn(
        "The model does not have any trainable weights.", stacklevel=1
    )


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
    if result.metrics or not exactness.needs_outputs(model):
        return model.get_metrics_result()
    for output, mask in zip(
        keras.tree.flatten(result.outputs), result.masks, strict=True
    ):
        _keras.set_mask(output, mask)
    return model.compute_metrics(x, y, result.outputs, sample_weight)
