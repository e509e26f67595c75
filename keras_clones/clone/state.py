"""What becomes of BatchNormalization statistics, seeds and counters."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras

POLICIES = ("mean", "sum", "first", "max", "min")


class Variables(NamedTuple):
    """A model's variables by what a tower does with them, each once.

    `trainable` get gradients, `others` may be assigned in the forward pass,
    `seeds` are advanced by random layers and differ from clone to clone.
    """

    trainable: list[keras.Variable]
    others: list[keras.Variable]
    seeds: list[keras.Variable]

    @property
    def weights(self) -> list[keras.Variable]:
        """All that have mirrors, in the order of these."""
        return [*self.trainable, *self.others]


class Policies(NamedTuple):
    """What a deployment says of variables that layers assign.

    `batch_norm` is `"mean"`, `"first"` or `"sync"`. `named` maps patterns of
    variables' paths to one of `POLICIES`. `alone` says that there is one clone.
    `otherwise` is the policy of what nothing is known of; `None` averages
    floating point values, and takes whole numbers from the first clone.
    """

    batch_norm: str = "mean"
    named: Mapping[str, str] = {}
    alone: bool = False
    otherwise: str | None = None


class Policy(NamedTuple):
    """How a variable's new values merge, and whether that is known to be so.

    `seen` says that it is known from the trace alone.
    """

    name: str
    known: bool
    seen: bool = False


class Changes(NamedTuple):
    """New values that a clone gave variables, by how they merge.

    Each is a dict by position among the assigned variables: parts of an
    average by rows, parts to add to the old value, values of which the
    largest, the smallest or the first clone's counts.
    """

    averaged: dict[int, tf.Tensor]
    added: dict[int, tf.Tensor]
    largest: dict[int, tf.Tensor]
    smallest: dict[int, tf.Tensor]
    first: dict[int, tf.Tensor]


def model_variables(model: keras.Layer) -> Variables:
    """Return every variable that a forward pass may touch."""
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
    model: keras.Layer | None,
    variables: Sequence[keras.Variable],
    policies: Policies,
    alike: Sequence[bool],
) -> list[Policy]:
    """Return how each variable's new values merge.

    What the user says of a variable counts first, then what its layer is
    known to need, then its own `aggregation`. What every clone assigns alike
    comes from the first. Of the rest, floating point values are averaged by
    rows and whole numbers come from the first clone, and neither is known to
    be right, unless the deployment has a policy for all of it.

    Args:
        model: The `keras.Layer` the variables belong to, `None` if there is
            none.
        variables: Sequence of `keras.Variable`s.
        policies: `Policies` of the deployment.
        alike: Sequence of booleans, whether every clone assigns the same.
    """
    statistics = {
        id(variable)
        for layer in ([] if model is None else _keras.layers(model))
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.non_trainable_variables
    }

    def policy(variable: keras.Variable, is_alike: bool) -> Policy:
        if policies.alone:
            return Policy("first", True)
        for pattern, name in policies.named.items():
            if fnmatch.fnmatchcase(variable.path, pattern):
                return Policy(name, True)
        if id(variable) in statistics:
            # Synchronized layers come to the same statistics in every clone.
            mean = policies.batch_norm == "mean"
            return Policy("mean" if mean else "first", True)
        if variable.aggregation == "only_first_replica":
            return Policy("first", True)
        if variable.aggregation in ("sum", "mean"):
            return Policy(variable.aggregation, True)
        if policies.otherwise is not None:
            return Policy(policies.otherwise, True)
        floating = tf.as_dtype(variable.dtype).is_floating
        if is_alike:
            return Policy("first", True, seen=True)
        return Policy("mean" if floating else "first", False)

    return [policy(v, a) for v, a in zip(variables, alike, strict=True)]


def clone_changes(
    names: Sequence[str],
    old: Sequence[tf.Tensor],
    new: Sequence[tf.Tensor],
    weigh: Callable[[tf.Tensor], tf.Tensor],
    if_live: Callable[[tf.Tensor], tf.Tensor],
) -> Changes:
    """Return a clone's part of what becomes of variables.

    Args:
        names: Sequence of strings, the policies of the variables.
        old: Sequence of their values before.
        new: Sequence of their values after.
        weigh: Function that multiplies a value by the clone's share.
        if_live: Function that makes zeros of a value of a clone without rows.
    """
    changes = Changes({}, {}, {}, {}, {})
    for i, (name, before, after) in enumerate(
        zip(names, old, new, strict=True)
    ):
        if name == "mean":
            changes.averaged[i] = weigh(after)
        elif name == "sum":
            changes.added[i] = if_live(after - before)
        else:
            kept = {
                "max": changes.largest,
                "min": changes.smallest,
                "first": changes.first,
            }
            kept[name][i] = after
    return changes


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
