"""The tower function: the pure function that a clone runs on its shard."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.state import Variables


class TowerInput(NamedTuple):
    """What a clone gets for one step.

    `mirrors` holds the values of `Variables.trainable`, then of
    `Variables.others`. `share` holds two float64 numbers: the rows of the
    shard over the rows of the global batch, and the optimizer's loss scale.
    """

    mirrors: list[tf.Tensor]
    seeds: list[tf.Tensor]
    x: Any
    y: Any
    sample_weight: Any
    share: tf.Tensor


class TowerOutput(NamedTuple):
    """What a clone gives back.

    `layer_losses` are the clone's parts of `model.losses`: their sum over the
    clones is that of the global batch. `loss_values` are the losses of single
    outputs that Keras logs. `others` and `seeds` hold the new values of the
    variables that the forward pass assigned, by position. `gradients` are
    those of the clone's part of the scaled global loss.
    """

    outputs: Any
    masks: list[Any]
    loss: Any
    loss_values: list[tf.Tensor]
    layer_losses: list[tf.Tensor]
    others: dict[int, tf.Tensor]
    seeds: dict[int, tf.Tensor]
    gradients: list[Any]


Tower = Callable[[TowerInput], TowerOutput]


def make_tower(
    model: keras.Model,
    variables: Variables,
    *,
    training: bool,
    with_loss: bool,
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
        with_loss: Boolean, whether the clone computes its own loss.
        with_gradients: Boolean, whether it also computes the gradients.

    Returns:
        A function from `TowerInput` to `TowerOutput`, with no side effects.
    """
    num_trainable = len(variables.trainable)

    def tower(inputs: TowerInput) -> TowerOutput:
        trained = inputs.mirrors[:num_trainable]
        others = inputs.mirrors[num_trainable:]
        trackers = _keras.loss_trackers(model) if with_loss else []
        mapping = [
            *zip(variables.trainable, trained, strict=True),
            *zip(variables.others, others, strict=True),
            *zip(variables.seeds, inputs.seeds, strict=True),
            *(
                (v, tf.zeros(v.shape, v.dtype))
                for m in trackers
                for v in m.variables
            ),
        ]
        loss, loss_values, gradients = None, [], []
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            if with_gradients:
                tape.watch(trained)
            with keras.StatelessScope(mapping, collect_losses=True) as scope:
                outputs, layer_losses = _forward(
                    model, inputs.x, inputs.share[0], training
                )
                if with_loss:
                    share = inputs.share[0]
                    local = [l / tf.cast(share, l.dtype) for l in layer_losses]
                    with _keras.overriding_losses(model, local):
                        loss = _keras.compute_loss(
                            model,
                            inputs.x,
                            inputs.y,
                            outputs,
                            inputs.sample_weight,
                            training,
                        )
        if with_loss:
            loss_values = [_tracked_value(scope, m) for m in trackers]
        if with_gradients and loss is not None:
            seed = tf.cast(tf.reduce_prod(inputs.share), loss.dtype)
            gradients = tape.gradient(loss, trained, output_gradients=seed)
        return TowerOutput(
            outputs=outputs,
            masks=[_keras.get_mask(t) for t in keras.tree.flatten(outputs)],
            loss=loss,
            loss_values=loss_values,
            layer_losses=layer_losses,
            others=_assigned(scope, variables.others, others),
            seeds=_assigned(scope, variables.seeds, inputs.seeds),
            gradients=gradients,
        )

    return tower


def _forward(
    model: keras.Model, x: Any, share: tf.Tensor, training: bool
) -> tuple[Any, list[tf.Tensor]]:
    """Call the model; return its outputs and its parts of `model.losses`.

    A scalar loss is taken for a mean over the batch (Keras divides activity
    regularizers by the rows), or for a value that is the same in every clone.
    The entries of any other loss are added up, as Keras does.
    """
    outputs = _keras.call(model, x, training)
    parts = []
    for loss in model.losses:
        loss = tf.convert_to_tensor(loss)
        if loss.dtype.is_integer or loss.dtype.is_bool:
            loss = tf.cast(loss, keras.config.floatx())
        if loss.shape.rank == 0:
            loss = loss * tf.cast(share, loss.dtype)
        parts.append(tf.reduce_sum(loss))
    return outputs, parts


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
