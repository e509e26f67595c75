"""The train, test and predict step on clones, composed of the pure parts.

A step flows one of two ways. By towers, each clone computes its own loss and
gradients, where the loss is an exact mean over the shards. By calls, the step
runs once, on the global batch, and only its calls of layers run on clones.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls import calls
from keras_clones.plan import exactness
from keras_clones.plan.options import StepOptions
from keras_clones.step.begin import as_tensors, begin, unpack
from keras_clones.step.by_calls import run_by_calls
from keras_clones.step.by_towers import run_by_towers, trace_towers
from keras_clones.tensors import sharding
from keras_clones.tensors.by_host import HostBatch, count_rows, joined


def train_step(model: keras.Model, options: StepOptions, data: Any) -> dict:
    """Train on one global batch, as `keras.Model.train_step` does."""
    own = exactness.own_method(model, "train_step")
    if own is not None:
        return run_own_step(model, options, own, data, True)
    return run_step(model, options, data, training=True)


def test_step(model: keras.Model, options: StepOptions, data: Any) -> dict:
    """Evaluate one global batch, as `keras.Model.test_step` does."""
    own = exactness.own_method(model, "test_step")
    if own is not None:
        return run_own_step(model, options, own, data, False)
    return run_step(model, options, data, training=False)


def predict_step(model: keras.Model, options: StepOptions, data: Any) -> Any:
    """Predict one global batch, as `keras.Model.predict_step` does."""
    own = exactness.own_method(model, "predict_step")
    if own is not None:
        return run_own_step(model, options, own, data, False)
    return run_prediction(model, options, data)


# In a `tf.function` of the user's, AutoGraph would convert some hundred
# functions of this package, which takes seconds. It converts none of Keras's,
# nor a layer that these call: so nothing of the user's is lost.
@tf.autograph.experimental.do_not_convert
def run_prediction(model: keras.Model, options: StepOptions, data: Any) -> Any:
    """Run Keras's own predict step on one global batch."""
    with tf.device(options.home):
        batch = unpack(joined(data), with_targets=False)
        sharding.count_rows({"x": batch[0]})
        step = keras.Model.predict_step
        return calls.run(model, options, False, lambda: step(model, batch[:1]))


def run_own_step(
    model: keras.Model,
    options: StepOptions,
    own: Callable[[Any], Any],
    data: Any,
    training: bool,
) -> Any:
    """Run a step of the model's own, once."""
    with tf.device(options.home):
        data = as_tensors(joined(data))
        return calls.run(model, options, training, lambda: own(data))


@tf.autograph.experimental.do_not_convert
def run_step(
    model: keras.Model, options: StepOptions, data: Any, training: bool
) -> dict:
    """Run Keras's own train or test step on one global batch."""
    with tf.device(options.home):
        batch = unpack(joined(data), with_targets=True)
        named = dict(zip(("x", "y", "sample_weight"), batch, strict=True))
        rows = count_rows(data, named)
        step = begin(model, options, batch, rows, training)
        if isinstance(data, HostBatch):
            step = step._replace(hosts=data)

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

    made: list[dict] = []

    def full() -> dict:
        made[:] = [uncounted(run)]
        return made[0]

    # TensorFlow traces the first of them first.
    return tf.cond(
        rows > 0, full, lambda: _like(uncounted(skip), *(made or [{}]))
    )


def _like(logs: dict, wanted: dict) -> dict:
    """Return logs with the entries of others, as branches must have the same.

    A `compute_metrics` of the model's own may add some: of these there is
    nothing without a step.
    """

    def nothing(value: Any) -> Any:
        value = tf.convert_to_tensor(value)
        sizes = [size or 0 for size in value.shape.as_list()]
        fill = float("nan") if value.dtype.is_floating else 0
        return tf.cast(tf.fill(sizes, fill), value.dtype)

    return {
        name: logs[name]
        if name in logs
        else keras.tree.map_structure(nothing, value)
        for name, value in wanted.items()
    }
