"""A step by calls: Keras's own, once, whose calls of layers run on clones."""

from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls import calls
from keras_clones.plan.watch import Watch
from keras_clones.step.applying import apply, record
from keras_clones.step.begin import Step
from keras_clones.tensors import sharding


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
    gradients: list[Any] = []
    if variables:
        gradients = tape.gradient(scaled, variables)
        record(
            step, lambda watch: _clone_losses(watch, step, outputs), gradients
        )
    apply(model, gradients, variables, step.options)
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
