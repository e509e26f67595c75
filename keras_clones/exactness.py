"""Which losses split over shards exactly, and may stay in the clones."""

from typing import Any

import keras

from keras_clones import _keras, sharding

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
_MEANS = ("sum_over_batch_size", "mean")


def overrides(model: keras.Model, method: str) -> bool:
    """Say whether a model's class has its own version of a Keras method."""
    return getattr(type(model), method) is not getattr(keras.Model, method)


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
        if function is None or function[0] not in _BY_ROW:
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
    if any(
        leaf.shape.rank in (None, 0, 1) for leaf in keras.tree.flatten(y_pred)
    ):
        return "an output has no axis beside the batch"
    return None
