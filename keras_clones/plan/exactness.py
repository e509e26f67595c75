"""Which losses split over shards exactly, and may stay in the clones."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_clones import _keras
from keras_clones.tensors import sharding

# Functions that give each row a loss of its own, whatever the other rows are.
# `hinge` and `dice` are not here: they look at the whole batch.
_BY_ROW = {
    keras.losses.mean_squared_error,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_logarithmic_error,
    keras.losses.cosine_similarity,
    keras.losses.huber,
    keras.losses.log_cosh,
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.categorical_generalized_cross_entropy,
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.poisson,
    keras.losses.kl_divergence,
}
# Functions that metrics average, which judge each row by itself.
_JUDGED_BY_ROW = _BY_ROW | {
    keras.metrics.binary_accuracy,
    keras.metrics.categorical_accuracy,
    keras.metrics.sparse_categorical_accuracy,
    keras.metrics.top_k_categorical_accuracy,
    keras.metrics.sparse_top_k_categorical_accuracy,
}
# Metrics that add up over the rows, given targets and outputs. A subclass may
# do anything, so these are compared with the type itself.
ADDITIVE = {
    keras.metrics.AUC,
    keras.metrics.BinaryIoU,
    keras.metrics.F1Score,
    keras.metrics.FBetaScore,
    keras.metrics.FalseNegatives,
    keras.metrics.FalsePositives,
    keras.metrics.IoU,
    keras.metrics.MeanIoU,
    keras.metrics.OneHotIoU,
    keras.metrics.OneHotMeanIoU,
    keras.metrics.Precision,
    keras.metrics.PrecisionAtRecall,
    keras.metrics.R2Score,
    keras.metrics.Recall,
    keras.metrics.RecallAtPrecision,
    keras.metrics.RootMeanSquaredError,
    keras.metrics.SensitivityAtSpecificity,
    keras.metrics.SpecificityAtSensitivity,
    keras.metrics.TrueNegatives,
    keras.metrics.TruePositives,
}
MEANS = ("sum_over_batch_size", "mean")


# Where a cloned model has the steps that were put on it before. The underscores
# keep it out of what Keras walks through to save a model.
OWN_STEPS = "__keras_clones_own_steps__"


def own_method(model: keras.Model, name: str) -> Callable[..., Any] | None:
    """Return a model's own version of a Keras method, `None` if it has none.

    One that is put on the object counts before that of its class, as it does
    for Keras.
    """
    steps = vars(model).get(OWN_STEPS, {})
    put = (steps if name in steps else vars(model)).get(name)
    if put is not None:
        return put
    method = getattr(type(model), name)
    if method is getattr(keras.Model, name):
        return None
    return functools.partial(method, model)


def overrides(model: keras.Model, method: str) -> bool:
    """Say whether a model has its own version of a Keras method."""
    return own_method(model, method) is not None


def check_cudnn(model: keras.Model, devices: Sequence[str]) -> None:
    """Refuse what came to garbage on a GPU: cuDNN's layers in float64.

    Args:
        model: A `keras.Model`.
        devices: Sequence of the clones' device strings.

    Raises:
        ValueError: If a recurrent layer may run by cuDNN in float64.
    """
    kinds = (keras.layers.LSTM, keras.layers.GRU)
    found = [
        layer.name
        for layer in _keras.layers(model)
        if isinstance(layer, kinds)
        and layer.compute_dtype == "float64"
        and getattr(layer, "use_cudnn", False) in (True, "auto")
    ]
    if found and any("GPU" in device for device in devices):
        raise ValueError(
            "Expected recurrent layers that do not run by cuDNN where they "
            f"compute in float64 on GPUs. Received: layers {found} with "
            "`use_cudnn='auto'`. On an H200 an LSTM of masked ids came to "
            "1e280 in clones (plain Keras was right, and clones in float32). "
            "Pass `use_cudnn=False` to these layers, or compute in float32."
        )


def metrics_add_up(model: keras.Model) -> bool:
    """Say whether the compiled metrics' states are sums over the rows.

    Each clone can then update them by its own shard, from zero, and what it
    comes to is added up; the outputs stay in the clones.
    """
    return not overrides(model, "compute_metrics") and all(
        adds_up(metric) if isinstance(metric, keras.Metric) else _will(metric)
        for metric in [
            *_keras.compiled_metrics(model),
            *_keras.metrics_to_build(model),
        ]
    )


def _will(metric: Any) -> bool:
    """Say whether the metric that Keras makes of a value will add up."""
    kind = keras.metrics.MeanMetricWrapper
    if isinstance(metric, type):
        known = metric.__module__.startswith("keras.")
        return metric in ADDITIVE or (known and issubclass(metric, kind))
    return any(metric is one for one in _JUDGED_BY_ROW)


def needs_outputs(model: keras.Model) -> bool:
    """Say whether metrics have to see the outputs."""
    return _keras.has_compiled_metrics(model) or overrides(
        model, "compute_metrics"
    )


def adds_up(metric: keras.Metric) -> bool:
    """Say whether a built-in metric's state is a sum over the rows."""
    if type(metric) in ADDITIVE:
        return True
    kind = keras.metrics.MeanMetricWrapper
    if not isinstance(metric, kind) or (
        type(metric).update_state is not kind.update_state
    ):
        return False
    function, arguments = _keras.metric_function(metric)
    # A function may be any object with `__call__`, also one with no hash.
    known = any(function is one for one in _JUDGED_BY_ROW)
    return known and arguments.get("axis", -1) == -1


def why_not_by_clone(model: keras.Model) -> str | None:
    """Say why the losses of shards do not average to the global loss.

    Args:
        model: A compiled `keras.Model` whose losses are built.

    Returns:
        A string with the reason, or `None` if they do as far as the model
        tells. `why_not_on` has the rest, once outputs are there.
    """
    if overrides(model, "compute_loss"):
        return "the model overrides `compute_loss`"
    for loss in _keras.compiled_losses(model):
        function = _keras.loss_function(loss)
        # A function may be any object with `__call__`, also one with no hash.
        if function is None or all(function[0] is not one for one in _BY_ROW):
            return f"loss {loss.name!r} may look at the whole batch"
        if loss.reduction not in (*MEANS, "mean_with_sample_weight"):
            return f"loss {loss.name!r} has reduction={loss.reduction!r}"
        if function[1].get("axis", -1) != -1:
            return f"loss {loss.name!r} has axis={function[1]['axis']}"
    return None


def why_not_on(
    y: Any, y_pred: Any, masks: list[Any], counted: bool
) -> str | None:
    """Say why the losses of shards do not average, going by the outputs.

    Args:
        y: A nest of targets.
        y_pred: A nest of outputs.
        masks: List with the mask of each output, or `None`.
        counted: Boolean, whether losses count by the entries that masks let
            through.

    Returns:
        A string with the reason, or `None` if they do.
    """
    if not counted and any(mask is not None for mask in masks):
        return "an output has a mask, whose valid entries differ by shard"
    leaves = keras.tree.flatten((y, y_pred))
    if any(sharding.is_composite(leaf) for leaf in leaves):
        return "a target or an output is ragged or sparse"
    shapes = [leaf.shape for leaf in keras.tree.flatten(y_pred)]
    if any(shape.rank is None or shape.rank < 2 for shape in shapes):
        return "an output has no axis beside the batch"
    return None
