"""What clones assign in a way that one device does not: told, or refused."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_clones import _keras
from keras_clones.plan.options import StepOptions
from keras_clones.warn import warn_or_refuse

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


def tell_of_inexact_state(
    model: keras.Layer,
    assigned: Sequence[keras.Variable],
    options: StepOptions,
    unknown: Sequence[keras.Variable],
) -> None:
    """Tell of what a training step assigned that differs by clone.

    Args:
        model: A `keras.Model`.
        assigned: Sequence of `keras.Variable`s that the forward pass assigned.
        options: `StepOptions` of the deployment.
        unknown: Sequence of those of which nothing says how they merge.
    """
    ids = {id(variable) for variable in assigned}
    if options.batch_norm != "sync":
        _tell_of_normalizing(model, ids, options.exact)
    metrics = {
        id(v): m for m in _keras.layer_metrics(model) for v in m.variables
    }
    unknown = [v for v in unknown if id(v) not in metrics]
    _tell_of_unknown(model, unknown, options.exact)
    found = {id(metrics[i]): metrics[i] for i in ids & metrics.keys()}
    _tell_of_metrics(model, list(found.values()), options.exact)


def _tell_of_normalizing(
    model: keras.Layer, ids: set[int], exact: bool
) -> None:
    """Tell of layers that normalize each shard by itself."""
    names = [
        layer.name
        for layer in _keras.layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        and not layer.synchronized
        and ids & {id(v) for v in layer.variables}
    ]
    if names:
        warn_or_refuse(
            f"{_some(names)} normalize each "
            "clone's shard by itself, so they do not train what one device "
            "trains. `clone_model(..., batch_norm='sync')` normalizes over "
            "the global batch.",
            exact,
        )


def _tell_of_metrics(
    model: keras.Layer, metrics: Sequence[Any], exact: bool
) -> None:
    """Tell of metrics of layers whose state is no sum over rows."""
    found = [m for m in metrics if not isinstance(m, _SUMS)]
    if found:
        names = sorted({m.name for m in found})
        warn_or_refuse(
            f"Metrics {names} are updated in a layer, by each "
            "clone with its own shard, and what they add is added up. That "
            "is exact for a metric whose state is a sum. Update any other "
            "in `compute_metrics`, which sees the global batch.",
            exact,
            _owners(model, _keras.own_metrics, found),
        )


def _owners(
    model: keras.Layer, found: Callable[[keras.Layer], Sequence[Any]], of: Any
) -> list[keras.Layer]:
    """Return the layers of which a function returns any of some objects."""
    ids = {id(one) for one in of}
    known = _keras.layers(model)
    return [one for one in known if ids & {id(x) for x in found(one)}]


def _tell_of_unknown(
    model: keras.Layer, inexact: Sequence[keras.Variable], exact: bool
) -> None:
    """Tell of variables of which nothing says how their values merge."""
    floats = [v for v in inexact if keras.backend.is_float_dtype(v.dtype)]
    if floats:
        paths = [v.path for v in floats]
        warn_or_refuse(
            f"Variables {paths} are assigned in the forward pass, by each "
            "clone from its own shard; their values are averaged by rows, "
            "which may differ from what one device comes to. Make the "
            "variable with `aggregation='mean'`, `'sum'` or "
            "`'only_first_replica'` to say what is right, or say it here: "
            f"`clone_model(..., state={{{paths[0]!r}: 'mean'}})`.",
            exact,
            _owners(model, _keras.own_variables, floats),
        )
    counts = [v for v in inexact if not keras.backend.is_float_dtype(v.dtype)]
    if counts:
        paths = [v.path for v in counts]
        warn_or_refuse(
            f"Variables {paths} are assigned in the forward pass, by each "
            "clone from its own shard, and the first clone's value counts: a "
            "count of rows counts the first clone's. Make the variable with "
            "`aggregation='sum'` to add up what the clones add, or say it "
            f"here: `clone_model(..., state={{{paths[0]!r}: 'sum'}})`.",
            exact,
            _owners(model, _keras.own_variables, counts),
        )


def _some(names: list[str]) -> str:
    """Return the names of layers if they are few, else how many there are."""
    if len(names) <= 3:
        return f"Layers {names}"
    return f"{len(names)} layers, {names[:3]} among them,"
