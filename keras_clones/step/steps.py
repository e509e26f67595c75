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
from keras_clones.calls import calls, looks
from keras_clones.plan import exactness, whole
from keras_clones.plan.options import StepOptions
from keras_clones.step.begin import as_tensors, begin, unpack
from keras_clones.step.by_calls import run_by_calls
from keras_clones.step.by_towers import run_by_towers, trace_towers
from keras_clones.tensors import sharding
from keras_clones.tensors.by_host import HostBatch, count_rows, joined


def train_step(model: keras.Model, options: StepOptions, data: Any) -> dict:
    """Train on one global batch, as `keras.Model.train_step` does."""
    own = exactness.own_method(model, "train_step")
    with looks.kept(model, options, data):
        if own is not None:
            return run_own_step(model, options, own, data, True)
        return run_step(model, options, data, training=True)


def test_step(model: keras.Model, options: StepOptions, data: Any) -> dict:
    """Evaluate one global batch, as `keras.Model.test_step` does."""
    own = exactness.own_method(model, "test_step")
    with looks.kept(model, options, data):
        if own is not None:
            return run_own_step(model, options, own, data, False)
        return run_step(model, options, data, training=False)


def predict_step(model: keras.Model, options: StepOptions, data: Any) -> Any:
    """Predict one global batch, as `keras.Model.predict_step` does."""
    own = exactness.own_method(model, "predict_step")
    with looks.kept(model, options, data):
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
        if not _is_apart(model, options):
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


def _is_apart(model: keras.Model, options: StepOptions) -> bool:
    """Say whether the user has a model see the global batch as it is.

    What it gets may then have rows of other kinds: nodes and edges of graphs.
    """
    apart = whole.find(model, options.whole, options.num_turns)
    return bool(options.whole) and apart.is_apart(model)


@tf.autograph.experimental.do_not_convert
def run_step(
    model: keras.Model, options: StepOptions, data: Any, training: bool
) -> dict:
    """Run Keras's own train or test step on one global batch."""
    with tf.device(options.home):
        batch = unpack(joined(data), with_targets=True)
        named = dict(zip(("x", "y", "sample_weight"), batch, strict=True))
        if _is_apart(model, options) and not isinstance(data, HostBatch):
            rows = sharding.first_rows(batch[0])
        else:
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

    kinds: dict[str, Any] = {}

    def run_and_tell() -> dict:
        logs = uncounted(run)
        kinds.update(logs)
        return logs

    # TensorFlow traces the branches in this order.
    return tf.cond(
        rows > 0, run_and_tell, lambda: _completed(uncounted(skip), kinds)
    )


def _completed(logs: dict, kinds: dict) -> dict:
    """Return logs with all entries that a step has, and no others.

    A `compute_metrics` of the model's own may add some that no metric keeps.

    Args:
        logs: Dict of what the metrics of the model have.
        kinds: Dict of the logs of a step, empty outside of a graph.
    """

    def nothing(value: Any) -> tf.Tensor:
        value = tf.convert_to_tensor(value)
        shape = [size or 0 for size in value.shape or ()]
        missing = float("nan") if value.dtype.is_floating else 0
        return tf.cast(tf.fill(shape, missing), value.dtype)

    if not kinds:
        return logs
    return {
        name: logs[name]
        if name in logs
        else tf.nest.map_structure(nothing, value)
        for name, value in kinds.items()
    }
