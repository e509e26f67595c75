"""A step by towers: each clone computes its own loss and gradients."""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls import looks
from keras_clones.calls.undone import left_as_it_is
from keras_clones.clone.given_rows import NotForeseenError
from keras_clones.clone.inputs import TowerInput, input_types
from keras_clones.clone.tables import looked_up_at_home
from keras_clones.exchange import (
    bringing_home,
    foreseen,
    from_hosts,
    laying_out,
    tracing,
)
from keras_clones.plan import counting, exactness
from keras_clones.step import combine
from keras_clones.step.applying import apply, record
from keras_clones.step.begin import Step, unpack
from keras_clones.step.tower import Tower
from keras_clones.tensors import sharding
from keras_clones.update.update import writes_rows


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
    counts = _count(step)
    if counts is None and (reason := counting.reason(step.model)):
        plan = plan.knowing(reason)
        if not plan.loss_in_clones:
            return None
    counted = any(one is not None for one in counts or ())
    layout, tower = _trace(step, counts if counted else None)
    if tower.returns is not None:
        plan = plan.knowing(_why_not(step, tower, counted))
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


def _count(step: Step) -> list[Any] | None:
    """Return what losses divide by on the global batch, if that is known.

    Losses of a clone's rows by themselves are for a watch to want, and what
    hosts have read is not here.
    """
    if not counting.may_count(step.model):
        return []
    if step.options.watch is not None or step.hosts is not None:
        return None
    return counting.find(step.model, step.batch, step.training)


def _why_not(
    step: Step, tower: tracing.TracedTower, counted: bool
) -> str | None:
    """Say why losses of shards do not average, going by a traced tower."""
    own_metrics = exactness.overrides(step.model, "compute_metrics")
    if tower.notes.keeps and own_metrics:
        return "layers keep tensors for `compute_metrics`"
    if tower.notes.rowless:
        return "an output has no rows of the batch"
    return exactness.why_not_on(
        step.batch[1], tower.returns.outputs, tower.returns.masks, counted
    )


def _trace(
    step: Step, counts: list[Any] | None, foresees: bool = True
) -> tuple[laying_out.Layout, tracing.TracedTower]:
    """Lay the rows of a batch out over the clones, and trace their towers."""
    layout, found = _lay_out(step, foresees)
    inputs = [one._replace(counts=counts) for one in layout.inputs]
    layout = layout._replace(inputs=inputs)
    towers, synchronized = _towers(step, layout), step.plan.synchronized
    if found is None:
        with _tables_at_home(step):
            return layout, tracing.trace(towers, layout, synchronized)
    try:
        tower = tracing.trace(towers, found.typed(layout), synchronized)
    except NotForeseenError:
        return _trace(step, counts, foresees=False)
    return layout, found.giving(tower, writes_rows(step.model))


def _lay_out(
    step: Step, foresees: bool
) -> tuple[laying_out.Layout, foreseen.Foreseen | None]:
    """Lay the rows of a batch out over the clones.

    Args:
        step: `Step` of Keras.
        foresees: Boolean, whether tables may stay home from clones that XLA
            compiles.
    """
    options, variables = step.options, step.variables
    num = sharding.enough(step.rows, len(options.clones))
    clones = options.clones[:num]
    devices = [clone.device for clone in clones]
    with tf.name_scope("split_batch"):
        shards, data = _split(step, num)
        pieces, turns = options.divide(shards, clones)
        data = pieces.split(data, devices)
    tables, found = step.plan.tables, None
    if step.plan.jit_compile:
        found = _foresee(step, data) if foresees and tables else None
        tables = [] if found is None else list(found.tables.values())
    mirrors = laying_out.send_mirrors(
        laying_out.read_variables(variables, tables),
        laying_out.homes_of(variables),
        clones,
    )
    scale = step.model.optimizer.scale_loss(1.0) if step.training else 1.0
    group = options.group(turns, step.training, scale, pieces.turns)
    seeds = laying_out.read_seeds(variables)
    layout = laying_out.lay_out(
        pieces.shards, group, seeds, data, pieces.spread(mirrors)
    )
    return layout, found


def _foresee(step: Step, data: Sequence[Any]) -> foreseen.Foreseen | None:
    """Foresee look-ups in large tables, for clones that XLA compiles."""
    if tf.executing_eagerly():
        return None
    tower = Tower(step, may_be_idle=False)

    def look(inputs: TowerInput) -> None:
        with left_as_it_is(step.model):
            tower.look(inputs)

    weights, tables = step.variables.weights, step.plan.tables
    types = input_types(step.variables, data)
    return foreseen.foresee(look, weights, tables, types)


def _split(step: Step, num: int) -> tuple[sharding.Shards, list[Any]]:
    """Divide the rows of a batch over some of the clones."""
    shares, clones = step.options.shares, step.options.clones
    if step.hosts is not None:
        groups = from_hosts.clones_of_hosts(step.hosts, clones)
        if groups is not None:
            shards, data = from_hosts.divide(step.hosts, groups, shares)
            return shards, [unpack(one, with_targets=True) for one in data]
    even = num == 1 or num < len(clones)
    shards = sharding.divide(step.rows, num, None if even else shares)
    return shards, sharding.split_rows(step.batch, shards)


def _towers(step: Step, layout: laying_out.Layout) -> tracing.CallableTower:
    """Return the tower function of a step, callable from any place."""
    options, needed = step.options, step.plan.outputs_leave
    devices = [clone.device for clone in options.clones]
    inline = options.pieces == 1 and tracing.inlines(
        devices, len(step.variables.trainable)
    )
    return tracing.callable_tower(
        step.model,
        Tower(step, layout.shards.may_be_idle),
        tracing.TowerOptions(inline, step.plan.jit_compile, options.exact),
        lambda output: (
            output if needed else output._replace(outputs=None, masks=[])
        ),
    )


def run_by_towers(
    step: Step, layout: laying_out.Layout, tower: tracing.TracedTower
) -> dict:
    """Run a step whose clones compute their own losses and gradients."""
    model, variables = step.model, step.variables.trainable
    first = _look_at_rows(step)
    with first, _tables_at_home(step):
        result = combine.run(
            step,
            layout,
            tower,
            lambda: tracing.trace(_towers(step, layout), layout, in_graph=True),
        )
    if step.training:
        record(step, lambda _: result.clone_losses, result.gradients)
    bringing_home.assign(result.variables, result.assigned, result.added)
    if step.training:
        apply(model, result.gradients, variables, step.options)
    with tf.name_scope("update_metrics"):
        return _update_metrics(step, result)


def _tables_at_home(step: Step) -> contextlib.AbstractContextManager[None]:
    tables = [] if step.plan.jit_compile else step.plan.tables
    return looked_up_at_home(tables, writes_rows(step.model))


def _look_at_rows(step: Step) -> contextlib.AbstractContextManager[None]:
    """Look whether the model mixes rows, in a first step."""
    x = step.batch[0]
    if step.hosts is not None:
        # Those of the controller will do, so that no others travel for it.
        x, _, _ = unpack(step.hosts.of_each_host()[0], with_targets=True)
    call = looks.call_of(step.model, x, step.training)
    return looks.look_at(call, step.options, step.training)


def _update_metrics(step: Step, result: combine.StepResult) -> dict:
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
