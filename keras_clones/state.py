"""What becomes of BatchNormalization statistics, seeds and counters."""

from collections.abc import Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras


class Variables(NamedTuple):
    """A model's variables by what a tower does with them, each once.

    `trainable` get gradients, `others` may be assigned in the forward pass,
    `seeds` are advanced by random layers and differ from clone to clone.
    """

    trainable: list[keras.Variable]
    others: list[keras.Variable]
    seeds: list[keras.Variable]


def model_variables(model: keras.Model) -> Variables:
    """Return every variable that a model's forward pass may touch."""
    seen: set[int] = set()

    def unseen(variables: Sequence[keras.Variable]) -> list[keras.Variable]:
        fresh = []
        for variable in variables:
            if id(variable) not in seen:
                seen.add(id(variable))
                fresh.append(variable)
        return fresh

    metrics = [v for m in _keras.layer_metrics(model) for v in m.variables]
    seeds = unseen(_keras.seed_states(model))
    trainable = unseen(model.trainable_weights)
    return Variables(trainable, unseen([*model.variables, *metrics]), seeds)


def merge_policies(
    model: keras.Model, variables: Sequence[keras.Variable], batch_norm: str
) -> list[str]:
    """Return how each variable's new values merge: a policy of `merge`.

    A variable's own `aggregation` is honoured. Without one, floating point
    values are averaged by rows, and whole numbers (counters, which every
    clone advances alike) come from the first clone.

    Args:
        model: The `keras.Model` the variables belong to.
        variables: Sequence of `keras.Variable`s.
        batch_norm: String, `"mean"`, `"first"` or `"sync"`: what becomes of
            the moving statistics of `BatchNormalization` layers.
    """
    statistics = {
        id(variable)
        for layer in _keras.layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.non_trainable_variables
    }

    def policy(variable: keras.Variable) -> str:
        if id(variable) in statistics:
            # Synchronized layers come to the same statistics in every clone.
            return "mean" if batch_norm == "mean" else "first"
        if variable.aggregation == "only_first_replica":
            return "first"
        if variable.aggregation in ("sum", "mean"):
            return variable.aggregation
        return "mean" if tf.as_dtype(variable.dtype).is_floating else "first"

    return [policy(variable) for variable in variables]


def merge(
    policy: str,
    old: tf.Tensor,
    new: Sequence[tf.Tensor],
    weights: Sequence[tf.Tensor],
) -> tf.Tensor:
    """Merge the values that the clones gave one variable.

    Args:
        policy: String: `"mean"` averages by rows, `"first"` takes the first
            clone's value, `"sum"` adds up what each clone added.
        old: Tensor, the value before the step.
        new: Sequence of tensors, one a clone.
        weights: Sequence of scalar tensors, each clone's share of the rows.

    Returns:
        The merged value.
    """
    if policy == "first" or len(new) == 1:
        return new[0]
    if policy == "sum":
        return old + tf.add_n([value - old for value in new])
    return tf.add_n(
        [v * tf.cast(w, v.dtype) for v, w in zip(new, weights, strict=True)]
    )


def offset_seeds(
    states: Sequence[tf.Tensor], clone_index: int
) -> list[tf.Tensor]:
    """Return the seed states of one clone, so that its random draws differ.

    A seed state is `[seed, counter]`. The seed of clone `i` is `i` larger,
    that of clone 0 is as it was, so that one clone draws what plain Keras
    draws.
    """
    if clone_index == 0:
        return list(states)
    return [
        state + tf.constant([clone_index, 0], dtype=state.dtype)
        for state in states
    ]
