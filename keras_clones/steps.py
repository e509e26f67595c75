"""The train, test and predict step on clones, composed of the pure parts."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import (
    _keras,
    custom,
    exactness,
    exchange,
    gradients,
    sharding,
    state,
)
from keras_clones.placement import Clone, logical_devices
from keras_clones.state import Variables
from keras_clones.synchronize import synchronized_layers
from keras_clones.tables import large_tables, looked_up_at_home
from keras_clones.tower import TowerOutput, make_tower, sources


class StepOptions(NamedTuple):
    """What the steps of one deployment go by."""

    clones: tuple[Clone, ...]
    home: str
    loss: str
    batch_norm: str
    layer_losses: str | None
    jit_compile: bool | str


class Step(NamedTuple):
    """One step on one global batch; `training` is `None` to predict."""

    model: keras.Model
    options: StepOptions
    variables: Variables
    batch: tuple[Any, Any, Any]
    rows: sharding.Rows
    training: bool | None
    tables: Sequence[keras.Variable]
    jit_compile: bool


class StepResult(NamedTuple):
    """What the clones of a step come to, on the variables device.

    `loss_values` are those of single outputs that no tracker has seen yet.
    `assigned` holds new values of `Variables.trainable` and `.others`, by
    position, and `seeds` those of `.seeds`.
    """

    outputs: Any
    masks: list[Any]
    loss: Any
    loss_values: list[tf.Tensor]
    assigned: dict[int, tf.Tensor]
    seeds: dict[int, tf.Tensor]
    gradients: list[Any]


def train_step(model: keras.Model, options: StepOptions, data: Any) -> dict:
    """Train on one global batch, as `keras.Model.train_step` does."""
    with tf.device(options.home):
        if exactness.overrides(model, "train_step"):
            return run_own_step(model, options, "train_step", data)
        step = begin(model, options, data, training=True)
        result = run(step)
        assign_state(step.variables, result)
        if step.variables.trainable:
            model.optimizer.apply_gradients(
                zip(result.gradients, step.variables.trainable, strict=True)
            )
        else:
            warnings.warn(
                "The model does not have any trainable weights.", stacklevel=1
            )
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
    data = keras.tree.map_structure(_as_tensor, data)
    rows = sharding.count_rows({"data": data})
    batch = keras.utils.unpack_x_y_sample_weight(data)
    build(model, batch, options.home, training=False, own_step=True)

    def run_on(clones: Sequence[Clone]) -> Any:
        return custom.run(
            model, name, data, rows, clones, options.home, options.batch_norm
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


def begin(
    model: keras.Model, options: StepOptions, data: Any, training: bool | None
) -> Step:
    """Unpack and check a batch, and build what the model still lacks."""
    data = keras.tree.map_structure(_as_tensor, data)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if training is None:
        y, sample_weight = None, None
    named = {"x": x, "y": y, "sample_weight": sample_weight}
    rows = sharding.count_rows(named)
    build(model, (x, y, sample_weight), options.home, bool(training))
    if len(options.clones) > 1:
        exactness.check_layers(model)
    jit_compile = _resolve_jit_compile(model, options)
    return Step(
        model=model,
        options=options,
        variables=state.model_variables(model),
        batch=(x, y, sample_weight),
        rows=rows,
        training=training,
        tables=[] if jit_compile else large_tables(model),
        jit_compile=jit_compile,
    )


def _as_tensor(value: Any) -> Any:
    known = value is None or tf.is_tensor(value)
    return value if known else tf.convert_to_tensor(value)


def build(
    model: keras.Model,
    batch: Any,
    home: str,
    training: bool,
    own_step: bool = False,
) -> None:
    """Create at home what the first step would create.

    A tower must not create variables, so they have to be there before it.

    Raises:
        ValueError: If a model with a step of its own has layers that calling
            the model does not build.
    """
    with tf.init_scope(), tf.device(home):
        if not _keras.is_built(model):
            types = tf.nest.map_structure(tf.type_spec_from_value, batch)
            rehearsal = tf.function(
                functools.partial(_rehearse, model), autograph=False
            )
            # A model with a step of its own may not be one to call.
            with contextlib.suppress(*[Exception] if own_step else []):
                rehearsal.get_concrete_function(*types)
            unbuilt = [
                layer.name
                for layer in _keras.layers(model)
                if layer is not model and not layer.built
            ]
            if own_step and unbuilt:
                raise ValueError(
                    "Expected the layers of a model with a step of its own to "
                    f"be built before it runs on clones. Received: {unbuilt}, "
                    "which are not. Build them, or call them once on data."
                )
        optimizer = model.optimizer if training else None
        if optimizer is not None and not optimizer.built:
            with keras.name_scope(optimizer.name, caller=optimizer):
                optimizer.build(model.trainable_variables)


def _rehearse(model: keras.Model, x: Any, y: Any, sample_weight: Any) -> None:
    with keras.StatelessScope(collect_losses=True), keras.SymbolicScope():
        y_pred = _keras.call(model, x, training=False)
        if model.compiled and y is not None:
            _keras.compute_loss(model, x, y, y_pred, sample_weight, False)
            model.compute_metrics(x, y, y_pred, sample_weight)


def run(step: Step) -> StepResult:
    """Run the clones on their shards of a batch, and bring the results home."""
    run_on = functools.partial(_run_on, step, functools.cache(_towers(step)))
    with looked_up_at_home(step.tables, step.options.home):
        return on_enough_clones(step.options.clones, step.rows, run_on)


def _towers(step: Step) -> Callable[[bool], Callable[..., Any]]:
    """Return what makes a step's tower function, with or without its loss."""

    def make(with_loss: bool) -> Callable[..., Any]:
        tower = make_tower(
            step.model,
            step.variables,
            training=bool(step.training),
            layer_losses=(
                step.options.layer_losses
                if len(step.options.clones) > 1
                else "mean"
            ),
            with_loss=with_loss,
            with_gradients=with_loss and bool(step.training),
        )
        return exchange.out_of_line(tower, step.jit_compile)

    return make


def _run_on(
    step: Step,
    towers: Callable[[bool], Callable[..., Any]],
    clones: Sequence[Clone],
) -> StepResult:
    model, options = step.model, step.options
    layout = exchange.lay_out(
        step.batch,
        step.rows,
        step.variables,
        step.tables,
        model.optimizer.scale_loss(1.0) if step.training else 1.0,
        clones,
        options.home,
    )
    if step.training is None:
        results = exchange.call(exchange.trace(towers(False), layout), layout)
        return _collect(step, layout, results)
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
            return _combine_losses(step, layout, tower)
    tower = exchange.trace(towers(False), layout, synchronized)
    return _gather_outputs(step, layout, tower)


def _combine_losses(
    step: Step, layout: exchange.Layout, tower: exchange.TracedTower
) -> StepResult:
    """Average the losses that the clones compute, each by its rows."""
    results = exchange.call(tower, layout)
    small = [result._replace(outputs=None, masks=[]) for result in results]
    arrived = exchange.bring_home(layout, small)
    columns = zip(*(result.gradients for result in arrived), strict=True)
    values = zip(*(result.loss_values for result in arrived), strict=True)
    return _collect(step, layout, results, arrived)._replace(
        loss=gradients.average([r.loss for r in arrived], layout.shares),
        loss_values=[gradients.average(v, layout.shares) for v in values],
        gradients=_merge_gradients(columns, step.variables.trainable, tower),
    )


def _gather_outputs(
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
        return _collect(step, layout, results)._replace(loss=loss)
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
    return _collect(step, layout, results, arrived)._replace(
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


def _collect(
    step: Step,
    layout: exchange.Layout,
    results: list[TowerOutput],
    arrived: list[TowerOutput] | None = None,
) -> StepResult:
    """Join outputs if anything needs them, and merge what was assigned."""
    arrived = arrived or results
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
    wanted = step.training is None or _needs_outputs(step.model)
    outputs, masks = _join_outputs(results) if wanted else (None, [])
    return StepResult(
        outputs=outputs,
        masks=masks,
        loss=None,
        loss_values=[],
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


def _needs_outputs(model: keras.Model) -> bool:
    return _keras.has_compiled_metrics(model) or exactness.overrides(
        model, "compute_metrics"
    )


def _resolve_jit_compile(model: keras.Model, options: StepOptions) -> bool:
    if options.jit_compile != "auto":
        return bool(options.jit_compile)
    # Keras settles its own "auto" by whether the machine has a GPU. Without
    # one, a true value is what the user asked `compile` for.
    on_gpu = all("GPU" in clone.device for clone in options.clones)
    return model.jit_compile and (on_gpu or not logical_devices("GPU"))


def assign_state(variables: Variables, result: StepResult) -> None:
    """Give the variables that the clones assigned their merged values."""
    mirrored = [*variables.trainable, *variables.others]
    for position, value in result.assigned.items():
        mirrored[position].assign(value)
    for position, value in result.seeds.items():
        variables.seeds[position].assign(value)


def update_metrics(step: Step, result: StepResult) -> dict:
    """Update every metric once, over the global batch; return the logs."""
    model = step.model
    x, y, sample_weight = step.batch
    _keras.loss_tracker(model).update_state(
        result.loss, sample_weight=step.rows
    )
    first = next(leaf for leaf in keras.tree.flatten(x) if leaf is not None)
    trackers = _keras.loss_trackers(model)
    for tracker, value in zip(trackers, result.loss_values, strict=False):
        tracker.update_state(value, sample_weight=first.shape[0])
    if not _needs_outputs(model):
        return model.get_metrics_result()
    for output, mask in zip(
        keras.tree.flatten(result.outputs), result.masks, strict=True
    ):
        _keras.set_mask(output, mask)
    return model.compute_metrics(x, y, result.outputs, sample_weight)
