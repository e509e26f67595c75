"""What a clone comes to besides outputs: gradients by rows, assigned values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone import state
from keras_clones.clone.inputs import TowerInput, Weights, mapping
from keras_clones.clone.scopes import CloneScope
from keras_clones.clone.state import Changes, Policies, Variables
from keras_clones.tensors.traced import RowGradient, row_gradient


class Notes(NamedTuple):
    """What is found out about a tower while it is traced.

    `assigned` has the variables that it assigns, and `unknown` those among
    them of which nothing says how their values merge; `seen` those that only
    the trace tells to be alike. `keeps` says whether layers keep tensors on
    themselves, and `rowless` whether an output does not depend on the rows.
    There is no `doubt` of it, as there may be of a call's outputs.
    """

    assigned: list[keras.Variable]
    unknown: list[keras.Variable]
    seen: list[keras.Variable]
    keeps: bool = False
    rowless: bool = False
    doubt: str | None = None


class Ran(NamedTuple):
    """What a clone got and ran in.

    `scope` has kept what it assigned, `weights` say what its values count
    for, and `is_alike` says whether a tensor is alike in all clones.
    """

    inputs: TowerInput
    scope: CloneScope
    weights: Weights
    is_alike: Callable[[tf.Tensor], bool]


def by_rows(
    gradients: list[Any], is_alike: Callable[[tf.Tensor], bool]
) -> list[Any]:
    """Take gradients by rows apart, where a graph tells of them."""

    def one(gradient: Any) -> Any:
        if not isinstance(gradient, tf.IndexedSlices):
            return gradient
        if tf.executing_eagerly():
            return RowGradient([gradient], [], [])
        return row_gradient(gradient, is_alike)

    return [one(gradient) for gradient in gradients]


def find_changes(
    layer: keras.Layer,
    variables: Variables,
    ran: Ran,
    policies: Policies,
    besides: Sequence[keras.Variable] = (),
) -> tuple[Changes, Notes]:
    """Return what a clone assigned, and how that is to merge.

    Args:
        layer: The `keras.Layer` that it called.
        variables: `Variables` of the layer.
        ran: `Ran`.
        policies: `Policies` of what layers assign.
        besides: Sequence of variables that are left out.
    """
    inputs, scope, weights, is_alike = ran
    known = {id(v) for v in besides}
    assigned = [v for v in scope.assigned() if id(v) not in known]
    seeds = {id(v) for v in variables.seeds}
    values = {id(v): m for v, m in mapping(variables, inputs)}
    old = [values.get(id(v), _keras.tf_variable(v)) for v in assigned]
    new = [scope.get_current_value(v) for v in assigned]
    alike = [
        id(v) in seeds or is_alike(value)
        for v, value in zip(assigned, new, strict=True)
    ]
    found = state.merge_policies(
        layer,
        assigned,
        policies,
        alike,
    )
    pairs = list(zip(assigned, found, strict=True))
    changes = state.clone_changes(
        [policy.name for policy in found],
        old,
        new,
        weights.weigh,
        weights.if_live,
    )
    return changes, Notes(
        assigned,
        unknown=[v for v, p in pairs if not p.known],
        seen=[v for v, p in pairs if p.seen and id(v) not in seeds],
    )
