"""Which losses split over shards exactly, and may stay in the clones."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_clones import _keras, sharding
from keras_clones.warn import warn

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
# Metrics whose state is a sum over rows.
_SUMS = (
    keras.metrics.Sum,
    keras.metrics.Mean,
    keras.metrics.AUC,
    keras.metrics.Precision,
    keras.metrics.Recall,
    keras.metrics.TruePositives,
    keras.metrics.TrueNegatives,
    keras.metrics.FalsePositives,
    keras.metrics.FalseNegatives,
    keras.metrics.MeanIoU,
)
_MEANS = ("sum_over_batch_size", "mean")


def overrides(model: keras.Model, method: str) -> bool:
    """Say whether a model's class has its own version of a Keras method."""
    return getattr(type(model), method) is not getattr(keras.Model, method)


def check_layers(
    model: keras.Model, is_apart: Callable[[keras.Layer], bool]
) -> None:
    """Refuse layers that cannot run on shards.

    Args:
        model: A `keras.Model`.
        is_apart: Function that says whether a layer is not called on shards.

    Raises:
        ValueError: If a recurrent layer keeps its state from batch to batch.
    """
    stateful = [
        layer.name
        for layer in _keras.layers(model)
        if isinstance(layer, keras.layers.RNN)
        and layer.stateful
        and not is_apart(layer)
    ]
    if stateful:
        raise ValueError(
            "Expected recurrent layers that start each batch anew. Received: "
            f"layers with `stateful=True`: {stateful}. Their state has a row "
            "for each row of the global batch, and a clone sees only its "
            "shard. Pass the state from batch to batch as an input and an "
            "output (`return_state=True`), call the layers whole by "
            f"`clone_model(..., whole={stateful})`, or use one clone."
        )


def warn_of_inexact_state(
    model: keras.Layer,
    assigned: Sequence[keras.Variable],
    batch_norm: str,
    unknown: Sequence[keras.Variable],
) -> None:
    """Warn of what a training step assigned that differs by clone.

    Args:
        model: A `keras.Model`.
        assigned: Sequence of `keras.Variable`s that the forward pass assigned.
        batch_norm: String, the policy of `BatchNormalization` layers.
        unknown: Sequence of those of which nothing says how they merge.
    """
    ids = {id(variable) for variable in assigned}

    def owners(kind: Any, keep: Callable[[Any], bool]) -> list[Any]:
        return [
            layer
            for layer in _keras.layers(model)
            if isinstance(layer, kind)
            and keep(layer)
            and ids & {id(v) for v in layer.variables}
        ]

    normalizing = owners(
        keras.layers.BatchNormalization,
        lambda layer: batch_norm != "sync" and not layer.synchronized,
    )
    if normalizing:
        warn(
            f"{_some([layer.name for layer in normalizing])} normalize each "
            "clone's shard by itself, so they do not train what one device "
            "trains. `clone_model(..., batch_norm='sync')` normalizes over "
            "the global batch."
        )
    metrics = {
        id(v): m for m in _keras.layer_metrics(model) for v in m.variables
    }
    _warn_of_unknown([v for v in unknown if id(v) not in metrics])
    not_sums = {
        metrics[i].name
        for i in ids & metrics.keys()
        if not isinstance(metrics[i], _SUMS)
    }
    if not_sums:
        warnings.warn(
            f"Metrics {sorted(not_sums)} are updated in a layer, by each "
            "clone with its own shard, and what they add is added up. That "
            "is exact for a metric whose state is a sum. Update any other "
            "in `compute_metrics`, which sees the global batch.",
            stacklevel=1,
        )


def _warn_of_unknown(inexact: Sequence[keras.Variable]) -> None:
    """Warn of variables of which nothing says how their values merge."""
    floats = [v.path for v in inexact if keras.backend.is_float_dtype(v.dtype)]
    if floats:
        warnings.warn(
            f"Variables {floats} are assigned in the forward pass, by each "
            "clone from its own shard; their values are averaged by rows, "
            "which may differ from what one device comes to. Make the "
            "variable with `aggregation='mean'`, `'sum'` or "
            "`'only_first_replica'` to say what is right, or say it here: "
            f"`clone_model(..., state={{{floats[0]!r}: 'mean'}})`.",
            stacklevel=1,
        )
    counts = [v.path for v in inexact if v.path not in floats]
    if counts:
        warnings.warn(
            f"Variables {counts} are assigned in the forward pass, by each "
            "clone from its own shard, and the first clone's value counts: a "
            "count of rows counts the first clone's. Make the variable with "
            "`aggregation='sum'` to add up what the clones add, or say it "
            f"here: `clone_model(..., state={{{counts[0]!r}: 'sum'}})`.",
            stacklevel=1,
        )


def _some(names: list[str]) -> str:
    """Return the names of layers if they are few, else how many there are."""
    if len(names) <= 3:
        return f"Layers {names}"
    return f"{len(names)} layers, {names[:3]} among them,"


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
        if loss.reduction not in _MEANS:
            return f"loss {loss.name!r} has reduction={loss.reduction!r}"
        if function[1].get("axis", -1) != -1:
            return f"loss {loss.name!r} has axis={function[1]['axis']}"
        if function[1].get("ignore_class") is not None:
            return f"loss {loss.name!r} has an `ignore_class`"
    return None


def why_not_on(y: Any, y_pred: Any, masks: list[Any]) -> str | None:
    """Say why the losses of shards do not average, going by the outputs.

    Args:
        y: A nest of targets.
        y_pred: A nest of outputs.
        masks: List with the mask of each output, or `None`.

    Returns:
        A string with the reason, or `None` if they do.
    """
    if any(mask is not None for mask in masks):
        return "an output has a mask, whose valid entries differ by shard"
    leaves = keras.tree.flatten((y, y_pred))
    if any(sharding.is_composite(leaf) for leaf in leaves):
        return "a target or an output is ragged or sparse"
    shapes = [leaf.shape for leaf in keras.tree.flatten(y_pred)]
    if any(shape.rank is None or shape.rank < 2 for shape in shapes):
        return "an output has no axis beside the batch"
    return None
