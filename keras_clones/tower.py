"""The tower function: the pure function that a clone runs on its shard."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.state import Variables


class TowerInput(NamedTuple):
    """What a clone gets for one step.

    `mirrors` holds the values of `Variables.trainable`, then of
    `Variables.others`, and `None` for a table that stays home.
    `share` holds two float64 numbers: the rows of the shard over the rows of
    the global batch, and the optimizer's loss scale. `place` is a resource
    that keeps clones with a state of their own from waiting for each other.
    """

    mirrors: list[tf.Tensor | None]
    seeds: list[tf.Tensor]
    x: Any
    y: Any
    sample_weight: Any
    share: tf.Tensor
    place: tf.Tensor | None = None


class TowerOutput(NamedTuple):
    """What a clone gives back.

    Losses, metrics and gradients are the clone's parts: their sums over the
    clones are those of the global batch. `layer_losses` are the parts of
    `model.losses` where they are not in the loss, `loss_values` of the losses
    of single outputs that Keras logs, `metrics` of what the batch adds to the
    compiled metrics' variables, `gradients` of those of the scaled loss.

    What the forward pass assigned is by position among the mirrors: in
    `averaged` and `added` the clone's parts of an average by rows and of what
    to add to the old value, in `assigned` new values, alike or to be taken
    from the first clone. `seeds` holds new values of the seeds.
    """

    outputs: Any
    masks: list[Any]
    loss: Any
    loss_values: list[tf.Tensor]
    layer_losses: list[tf.Tensor]
    averaged: dict[int, tf.Tensor]
    added: dict[int, tf.Tensor]
    assigned: dict[int, tf.Tensor]
    seeds: dict[int, tf.Tensor]
    metrics: list[tf.Tensor]
    gradients: list[Any]


Tower = Callable[[TowerInput], TowerOutput]


def make_tower(
    model: keras.Model,
    variables: Variables,
    *,
    training: bool,
    layer_losses: str | None,
    policies: Callable[[Sequence[keras.Variable]], Sequence[str]],
    with_loss: bool,
    with_metrics: bool,
    with_gradients: bool,
) -> Tower:
    """Return the tower function of a model.

    The forward pass and the loss run inside one scope that maps every
    variable to its mirror: apart, the gradients of weight regularizers would
    be lost without a word.

    Args:
        model: A built `keras.Model`.
        variables: `Variables` of the model.
        training: Boolean, what the model is called with.
        layer_losses: String, `"mean"` or `"sum"`: what a scalar that a layer
            passes to `add_loss` is of the rows. `None` takes it for a mean,
            with a warning.
        policies: Function that returns how each of some variables merges, as
            `state.merge_policies` does.
        with_loss: Boolean, whether the clone computes its own loss.
        with_metrics: Boolean, whether it also updates the compiled metrics,
            from zero, by its own shard.
        with_gradients: Boolean, whether it also computes the gradients.

    Returns:
        A function from `TowerInput` to `TowerOutput`, with no side effects.
    """
    mirrored = [*variables.trainable, *variables.others]

    def tower(inputs: TowerInput) -> TowerOutput:
        trained = sources(variables, inputs)
        share = functools.cache(lambda t: tf.cast(inputs.share[0], t))

        def weigh(value: tf.Tensor) -> tf.Tensor:
            return value * share(value.dtype)

        trackers = _keras.loss_trackers(model) if with_loss else []
        metrics = _keras.metric_variables(model) if with_metrics else []
        from_zero = [*(v for m in trackers for v in m.variables), *metrics]
        mapping = [
            *(
                (variable, mirror)
                for variable, mirror in zip(
                    mirrored, inputs.mirrors, strict=True
                )
                if mirror is not None
            ),
            *zip(variables.seeds, inputs.seeds, strict=True),
            *((v, tf.zeros(v.shape, v.dtype)) for v in from_zero),
        ]
        loss, loss_values, gradients = None, [], []
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            if with_gradients:
                tape.watch(trained)
            with _TowerScope(mapping, trained) as scope:
                outputs = _keras.call(model, inputs.x, training)
                losses = _layer_losses(model, inputs.share[0], layer_losses)
                if with_loss:
                    local = [l / share(l.dtype) for l in losses]
                    with _keras.overriding_losses(model, local):
                        loss = _keras.compute_loss(
                            model,
                            inputs.x,
                            inputs.y,
                            outputs,
                            inputs.sample_weight,
                            training,
                        )
                if with_metrics:
                    with tf.name_scope("update_metrics"):
                        _keras.update_compiled_metrics(
                            model, inputs.y, outputs, inputs.sample_weight
                        )
        if with_gradients and loss is not None:
            seed = tf.cast(tf.reduce_prod(inputs.share), loss.dtype)
            with tf.name_scope("backward_pass"):
                gradients = tape.gradient(loss, trained, output_gradients=seed)
        if with_loss:
            values = [_tracked_value(scope, m) for m in trackers]
            loss, *loss_values = map(weigh, [loss, *values])
        new = _assigned(scope, mirrored, inputs.mirrors)
        merged: dict[str, dict] = {"mean": {}, "sum": {}, "first": {}}
        for position, policy in zip(
            new, policies([mirrored[i] for i in new]), strict=True
        ):
            merged[policy][position] = new[position]
        return TowerOutput(
            outputs=outputs,
            masks=[_keras.get_mask(t) for t in keras.tree.flatten(outputs)],
            loss=loss,
            loss_values=loss_values,
            layer_losses=[] if with_loss else losses,
            averaged={i: weigh(value) for i, value in merged["mean"].items()},
            added={
                i: value - inputs.mirrors[i]
                for i, value in merged["sum"].items()
            },
            assigned=merged["first"],
            seeds=_assigned(scope, variables.seeds, inputs.seeds),
            metrics=[scope.get_current_value(v) for v in metrics],
            gradients=gradients,
        )

    return tower


def sources(variables: Variables, inputs: TowerInput) -> list[Any]:
    """Return what a clone's gradients are with respect to.

    These are the mirrors of the trainable variables, or the variable itself
    where it is a table that stays home.
    """
    mirrors = inputs.mirrors[: len(variables.trainable)]
    return [
        variable.value if mirror is None else mirror
        for variable, mirror in zip(variables.trainable, mirrors, strict=True)
    ]


class _TowerScope(keras.StatelessScope):
    """A scope whose assignments stop gradients, as assigning variables does.

    What reads a variable after an assignment has a gradient with respect to
    the variable, and none with respect to what the new value came from.
    """

    def __init__(
        self,
        mapping: list[tuple[keras.Variable, tf.Tensor]],
        trained: list[tf.Tensor],
    ) -> None:
        super().__init__(mapping, collect_losses=True)
        trained_ids = {id(mirror) for mirror in trained}
        self._trained = {
            id(variable): mirror
            for variable, mirror in mapping
            if id(mirror) in trained_ids
        }

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        variable, value = update
        value = tf.stop_gradient(value)
        mirror = self._trained.get(id(variable))
        if mirror is not None:
            value += mirror - tf.stop_gradient(mirror)
        super().add_update((variable, value))


def _layer_losses(
    model: keras.Model, share: tf.Tensor, scalars: str | None
) -> list[tf.Tensor]:
    """Return the clone's parts of `model.losses`.

    The entries of a loss that is no scalar are added up, as Keras does. A
    scalar is a mean over the rows or a sum, as the user says, or Keras where
    it regularizes outputs. A weight regularizer is the same in every clone, so
    its share of the rows counts it once.
    """
    added = model.losses
    losses = [_keras.as_loss(loss) for loss in added]
    num_own = len(losses) - _keras.num_weight_regularizers(model)
    kinds = dict.fromkeys(
        _keras.activity_losses(model), _keras.kind_of_activity_losses()
    )
    parts = []
    if scalars is None and any(l.shape.rank == 0 for l in losses[:num_own]):
        _warn_of_scalar_losses(model)
    for position, loss in enumerate(losses):
        kind = kinds.get(id(added[position]), scalars)
        is_mean = position >= num_own or kind != "sum"
        if loss.shape.rank == 0 and is_mean:
            loss = loss * tf.cast(share, loss.dtype)
        parts.append(tf.reduce_sum(loss))
    return parts


def _warn_of_scalar_losses(model: keras.Model) -> None:
    """Warn of scalars passed to `add_loss` that are taken for means."""
    names = _keras.layers_with_scalar_losses(model)
    if names:
        warnings.warn(
            f"Layers {names} pass scalars to `add_loss`, which are taken for "
            "means over the rows of the batch. Say "
            "`clone_model(..., layer_losses='mean')` if they are, or 'sum' if "
            "they are sums.",
            stacklevel=1,
        )


def _tracked_value(
    scope: keras.StatelessScope, tracker: keras.metrics.Mean
) -> tf.Tensor:
    """Return what a tracker, zero at first, was updated with."""
    total, count = (scope.get_current_value(v) for v in tracker.variables)
    return tf.math.divide_no_nan(total, tf.cast(count, total.dtype))


def _assigned(
    scope: keras.StatelessScope,
    variables: list[keras.Variable],
    before: list[tf.Tensor],
) -> dict[int, tf.Tensor]:
    """Return the new values of the variables that were assigned."""
    after = [scope.get_current_value(variable) for variable in variables]
    return {
        position: new
        for position, (old, new) in enumerate(zip(before, after, strict=True))
        if new is not old
    }
