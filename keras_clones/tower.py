"""The tower function: the pure function that a clone runs on its shard."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras, draws, layer_losses, sharding, state
from keras_clones.scopes import CloneScope
from keras_clones.state import Changes, Policies, Variables
from keras_clones.traced import RowGradient, dependence, row_gradient


class TowerInput(NamedTuple):
    """What a clone gets.

    `mirrors` holds the values of `Variables.trainable`, then of
    `Variables.others`, and `None` for a table that stays home. `data` is a
    nest with the clone's rows: a batch `(x, y, sample_weight)`, or what a
    layer is called with. `numbers` holds three float64 numbers: the rows of
    the shard over those of the whole, the optimizer's loss scale, and the
    index of the clone. `place` is a resource that keeps clones with a state
    of their own from waiting for each other. Where layers draw what one device
    draws, `total` is of shape (rows of the global batch, 0), and a fourth of
    the `numbers` says which of these rows is the first of the clone.
    """

    mirrors: list[tf.Tensor | None]
    seeds: list[tf.Tensor]
    data: Any
    numbers: tf.Tensor
    place: tf.Tensor | None = None
    total: tf.Tensor | None = None


class TowerOutput(NamedTuple):
    """What a clone gives back.

    Losses, metrics and gradients are the clone's parts: their sums over the
    clones are those of the global batch. `loss_values` are the losses of
    single outputs that Keras logs, `metrics` what the batch adds to the
    compiled metrics' variables, `gradients` those of the scaled loss.
    `changes` are new values of the variables in `Notes.assigned`.
    """

    outputs: Any
    masks: list[Any]
    loss: Any
    loss_values: list[tf.Tensor]
    changes: Changes
    metrics: list[tf.Tensor]
    gradients: list[Any]


class Notes(NamedTuple):
    """What is found out about a tower while it is traced.

    `assigned` has the variables that it assigns, and `unknown` those among
    them of which nothing says how their values merge; `seen` those that only
    the trace tells to be alike. `keeps` says whether layers keep tensors on
    themselves.
    """

    assigned: list[keras.Variable]
    unknown: list[keras.Variable]
    seen: list[keras.Variable]
    keeps: bool = False


Tower = Callable[[TowerInput], tuple[TowerOutput, Notes]]


class Weights:
    """What a clone's values are multiplied by.

    Args:
        inputs: `TowerInput` of the clone.
        may_be_idle: Boolean, whether the clone may have got no row of its
            own. It then runs on another's, and nothing of that counts.
    """

    def __init__(self, inputs: TowerInput, may_be_idle: bool) -> None:
        self._share = inputs.numbers[0]
        self._idle = may_be_idle
        self.share = functools.cache(lambda t: tf.cast(self._share, t))

    def weigh(self, value: tf.Tensor) -> tf.Tensor:
        """Multiply a value by the clone's share of the rows."""
        return value * self.share(value.dtype)

    def if_live(self, value: tf.Tensor) -> tf.Tensor:
        """Return zeros in place of a value of a clone without rows."""
        if not self._idle:
            return value
        return value * tf.cast(self._share > 0, value.dtype)

    def own_rows(self, value: Any) -> Any:
        """Return a tensor without the rows of a clone that has none."""
        if not self._idle or not sharding.has_rows(value):
            return value
        if isinstance(value, tf.SparseTensor):
            shape = tf.where(
                tf.one_hot(0, value.shape.rank, True, False),
                tf.cast(self._share > 0, tf.int64) * value.dense_shape,
                value.dense_shape,
            )
            return tf.sparse.slice(value, tf.zeros_like(shape), shape)
        rows = tf.cast(
            value.nrows()
            if isinstance(value, tf.RaggedTensor)
            else tf.shape(value)[0],
            tf.int32,
        )
        return value[: rows * tf.cast(self._share > 0, tf.int32)]


def make_tower(
    model: keras.Model,
    variables: Variables,
    *,
    training: bool,
    scalar_losses: layer_losses.Kinds,
    policies: Policies,
    with_metrics: bool,
    may_be_idle: bool,
    exact: bool = False,
) -> Tower:
    """Return the tower function of a model that computes its own loss.

    The forward pass and the loss run inside one scope that maps every
    variable to its mirror: apart, the gradients of weight regularizers would
    be lost without a word.

    Args:
        model: A built `keras.Model`.
        variables: `Variables` of the model.
        training: Boolean, what the model is called with. Gradients are
            computed if so.
        scalar_losses: What a scalar that a layer passes to `add_loss` is of
            the rows, as `layer_losses.kind` takes it.
        policies: `Policies` by which variables that are assigned merge.
        with_metrics: Boolean, whether the clone also updates the compiled
            metrics, from zero, by its own shard.
        may_be_idle: Boolean, whether a clone may have no row of its own.
        exact: Boolean, whether to refuse draws that cannot be those of the
            global batch, if layers are to draw these. Defaults to `False`.

    Returns:
        A function from `TowerInput` to `TowerOutput` and `Notes`, with no
        side effects.
    """

    def tower(inputs: TowerInput) -> tuple[TowerOutput, Notes]:
        x, y, sample_weight = inputs.data
        trained = sources(variables, inputs)
        weights = Weights(inputs, may_be_idle)
        trackers = _keras.loss_trackers(model)
        metrics = _keras.metric_variables(model) if with_metrics else []
        from_zero = [*(v for m in trackers for v in m.variables), *metrics]
        scope = CloneScope(
            [
                *mapping(variables, inputs),
                *((v, tf.zeros(v.shape, v.dtype)) for v in from_zero),
            ]
        )
        before = kept_tensors(model)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            if training:
                tape.watch(trained)
            with scope, first_writes(inputs):
                with layer_losses.marking(model) as marks:
                    outputs = _keras.call(model, x, training)
                local = layer_losses.local(model, marks, scalar_losses, weights)
                with _keras.overriding_losses(model, local):
                    loss = _keras.compute_loss(
                        model, x, y, outputs, sample_weight, training
                    )
                if with_metrics:
                    with tf.name_scope("update_metrics"):
                        _keras.update_compiled_metrics(
                            model, y, outputs, sample_weight
                        )
        is_alike = alike_in_all(inputs)
        gradients = []
        if training:
            seed = tf.cast(tf.reduce_prod(inputs.numbers[:2]), loss.dtype)
            with tf.name_scope("backward_pass"):
                gradients = by_rows(
                    tape.gradient(loss, trained, output_gradients=seed),
                    is_alike,
                )
        changes, notes = find_changes(
            model,
            variables,
            inputs,
            scope,
            policies,
            weights,
            is_alike,
            from_zero,
        )
        values = [_tracked_value(scope, m) for m in trackers]
        output = TowerOutput(
            outputs=keras.tree.map_structure(weights.own_rows, outputs),
            masks=[
                None if mask is None else weights.own_rows(mask)
                for mask in map(_keras.get_mask, keras.tree.flatten(outputs))
            ],
            loss=weights.weigh(loss),
            loss_values=[weights.weigh(value) for value in values],
            changes=changes,
            metrics=[
                weights.if_live(scope.get_current_value(v)) for v in metrics
            ],
            gradients=gradients,
        )
        return output, notes._replace(keeps=kept_tensors(model) != before)

    def drawing_tower(inputs: TowerInput) -> tuple[TowerOutput, Notes]:
        leaves = keras.tree.flatten(inputs.data)
        with drawing(inputs, list(filter(sharding.has_rows, leaves)), exact):
            return tower(inputs)

    return drawing_tower


def drawing(
    inputs: TowerInput, leaves: Sequence[Any], exact: bool
) -> contextlib.AbstractContextManager[None]:
    """Let a clone draw what it is to draw.

    Args:
        inputs: `TowerInput` of the clone.
        leaves: Sequence of the tensors in its data that have its rows.
        exact: Boolean, whether to refuse draws that cannot be those of the
            global batch.
    """
    if inputs.total is None or not leaves:
        return contextlib.nullcontext()
    return draws.of_global_batch(leaves, inputs.total, inputs.numbers[3], exact)


def mapping(
    variables: Variables, inputs: TowerInput
) -> list[tuple[keras.Variable, tf.Tensor]]:
    """Return which value stands for which variable in a clone."""
    mirrored = zip(
        [*variables.trainable, *variables.others], inputs.mirrors, strict=True
    )
    seeds = zip(variables.seeds, inputs.seeds, strict=True)
    return [*((v, m) for v, m in mirrored if m is not None), *seeds]


def sources(variables: Variables, inputs: TowerInput) -> list[Any]:
    """Return what a clone's gradients are with respect to.

    These are the mirrors of the trainable variables, or the variable itself
    where it is a table that stays home.
    """
    mirrors = inputs.mirrors[: len(variables.trainable)]
    return [
        _keras.tf_variable(variable) if mirror is None else mirror
        for variable, mirror in zip(variables.trainable, mirrors, strict=True)
    ]


def alike_in_all(
    inputs: TowerInput, shards: Any = None
) -> Callable[[tf.Tensor], bool]:
    """Return what says whether a tensor is alike in all clones.

    It is if it depends neither on the rows nor on random numbers.

    Args:
        inputs: `TowerInput` of a clone.
        shards: Nest of what in its data differs by clone. Defaults to `None`:
            all of it.
    """
    if tf.executing_eagerly():
        return lambda tensor: False
    differs = inputs.data if shards is None else shards
    leaves = tf.nest.flatten(differs, expand_composites=True)
    rows = [
        leaf for leaf in leaves if leaf is not None and leaf.shape.rank != 0
    ]
    # With draws of the global batch, what is drawn for no rows is alike.
    drawn = inputs.seeds if inputs.total is None else [inputs.numbers]
    depends = dependence([*rows, *drawn])
    return lambda tensor: not depends(tensor)


def by_rows(
    gradients: list[Any], is_alike: Callable[[tf.Tensor], bool]
) -> list[Any]:
    """Take gradients by rows apart, where a graph tells of them."""

    def one(gradient: Any) -> Any:
        if not isinstance(gradient, tf.IndexedSlices):
            return gradient
        if tf.executing_eagerly():
            return RowGradient([gradient], [], [])
        return row_gradient(gradient, is_alike)

    return [one(gradient) for gradient in gradients]


def find_changes(
    layer: keras.Layer,
    variables: Variables,
    inputs: TowerInput,
    scope: CloneScope,
    policies: Policies,
    weights: Weights,
    is_alike: Callable[[tf.Tensor], bool],
    besides: Sequence[keras.Variable] = (),
) -> tuple[Changes, Notes]:
    """Return what a clone assigned, and how that is to merge."""
    known = {id(v) for v in besides}
    assigned = [v for v in scope.assigned() if id(v) not in known]
    seeds = {id(v) for v in variables.seeds}
    values = {id(v): m for v, m in mapping(variables, inputs)}
    old = [values.get(id(v), _keras.tf_variable(v)) for v in assigned]
    new = [scope.get_current_value(v) for v in assigned]
    alike = [
        id(v) in seeds or is_alike(value)
        for v, value in zip(assigned, new, strict=True)
    ]
    found = state.merge_policies(
        layer,
        assigned,
        policies,
        alike,
    )
    pairs = list(zip(assigned, found, strict=True))
    changes = state.clone_changes(
        [policy.name for policy in found],
        old,
        new,
        weights.weigh,
        weights.if_live,
    )
    return changes, Notes(
        assigned,
        unknown=[v for v, p in pairs if not p.known],
        seen=[v for v, p in pairs if p.seen and id(v) not in seeds],
    )


# What Keras itself keeps on a layer.
_NOT_KEPT = ("_losses", "_losses_override")


def kept_tensors(layer: keras.Layer) -> dict[tuple[int, str], Any]:
    """Return the tensors that layers keep on themselves, by their place.

    The values of the dict are lists of the ids of tensors.
    """
    return {
        (id(one), name): [id(leaf) for leaf in leaves]
        for one in _keras.layers(layer)
        for name, value in list(vars(one).items())
        if name not in _NOT_KEPT and (leaves := tensors_in(value))
    }


def tensors_in(value: Any) -> list[Any]:
    """Return the tensors in lists, tuples and dicts, without variables."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    known = tf.is_tensor(value) and not isinstance(
        value, (keras.Variable, tf.Variable)
    )
    return [value] if known else []


def first_writes(inputs: TowerInput) -> contextlib.AbstractContextManager[Any]:
    """Let the first clone alone write summaries, if anything writes any."""
    # Without TensorBoard installed there is nothing to write with.
    if not hasattr(tf.summary, "should_record_summaries"):
        return contextlib.nullcontext()
    wanted = tf.summary.should_record_summaries()
    if tf.get_static_value(wanted) is not None and not tf.get_static_value(
        wanted
    ):
        return contextlib.nullcontext()
    is_first = tf.equal(inputs.numbers[2], 0)
    return tf.summary.record_if(tf.logical_and(is_first, wanted))


def _tracked_value(
    scope: keras.StatelessScope, tracker: keras.metrics.Mean
) -> tf.Tensor:
    """Return what a tracker, zero at first, was updated with."""
    total, count = (scope.get_current_value(v) for v in tracker.variables)
    return tf.math.divide_no_nan(total, tf.cast(count, total.dtype))
