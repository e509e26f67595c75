"""Gradients of the losses of clones, with respect to each clone's mirrors."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone.changes import by_rows
from keras_clones.devices.moving import device_of, same_device
from keras_clones.exchange import bringing_home, laying_out
from keras_clones.model_deploy.clones import Clone, name_scope, scopes_of
from keras_clones.model_deploy.reads import MirrorScope
from keras_clones.tensors import merging, traced
from keras_clones.tensors.traced import RowGradient


def differentiate(
    clones: Sequence[Clone],
    losses: Sequence[tf.Tensor],
    seeds: Sequence[tf.Tensor],
    variables: Sequence[keras.Variable],
) -> list[list[Any]]:
    """Return the gradients of each clone's loss, on the clone's device.

    Args:
        clones: Sequence of `Clone`s.
        losses: Sequence of scalar tensors, one a clone.
        seeds: Sequence of scalar tensors, what the gradients are multiplied
            by.
        variables: Sequence of `keras.Variable`s.

    Returns:
        A list with one list of gradients a clone. Those of one variable are
        of one kind: tensors, `RowGradient`s of as many parts, or `None`s.
    """
    columns = []
    for clone, loss, seed in zip(clones, losses, seeds, strict=True):
        scopes = scopes_of([clone])
        with name_scope(clone.scope), tf.device(clone.device):
            found = _gradients(loss, seed, variables, scopes)
            if len(clones) > 1:
                found = by_rows(found, _is_alike(clone))
        columns.append(found)
    by_variable = [
        _alike(list(column), variable, clones)
        for column, variable in zip(
            zip(*columns, strict=True), variables, strict=True
        )
    ]
    return [list(row) for row in zip(*by_variable, strict=True)]


def merge(
    layout: laying_out.Layout,
    columns: Sequence[Sequence[Any]],
    variables: Sequence[keras.Variable],
    parts: list[Any],
) -> bringing_home.Merged:
    """Add up the clones' gradients at home, and what else adds up.

    Those of a table that is looked up at home are there already.

    Args:
        layout: `Layout` of the clones.
        columns: Sequence with one sequence of gradients a clone.
        variables: Sequence of the variables they are of.
        parts: List with one nest of dense tensors a clone.
    """
    by_variable = list(zip(*columns, strict=True))
    there = {
        i: merging.merge(column)
        for i, column in enumerate(by_variable)
        if any(_is_at(gradient, device_of(variables[i])) for gradient in column)
    }
    away = [i for i in range(len(variables)) if i not in there]
    found, rest = bringing_home.merge_gradients(
        layout,
        [[column[i] for i in away] for column in columns],
        [variables[i] for i in away],
        parts,
    )
    merged = {**there, **dict(zip(away, found, strict=True))}
    return bringing_home.Merged(
        [merged[i] for i in range(len(variables))], rest
    )


def add(
    merged: Sequence[Any],
    loss: tf.Tensor,
    scale: Any,
    variables: Sequence[keras.Variable],
    scopes: Sequence[MirrorScope],
) -> list[Any]:
    """Add the gradients of a loss that counts once to those of the clones.

    Args:
        merged: Sequence of gradients, `None` where there is none.
        loss: Scalar tensor, which may depend on what any clone made.
        scale: Number or scalar tensor, what the optimizer scales losses by.
        variables: Sequence of `keras.Variable`s.
        scopes: Sequence of the `MirrorScope`s of the clones.
    """
    seed = tf.cast(scale, loss.dtype)
    found = _gradients(loss, seed, variables, scopes)
    return [
        merging.largest(both)
        if _keras.overwrites_with_gradient(variable)
        else merging.merge(both)
        for variable, *both in zip(variables, merged, found, strict=True)
    ]


def _gradients(
    loss: tf.Tensor,
    seed: tf.Tensor,
    variables: Sequence[keras.Variable],
    scopes: Sequence[MirrorScope],
) -> list[Any]:
    """Differentiate a loss by mirrors, and by what reads variables itself.

    Nothing flows from a mirror on into the variable. What packs it for its
    way to the clone would make gradients by rows dense, and zeros of none.
    """
    mirrors = [
        [m for s in scopes if (m := s.known_mirror(v)) is not None]
        for v in variables
    ]
    # Mirrors on the home device are one tensor.
    mirrors = [list({id(m): m for m in some}.values()) for some in mirrors]
    sources = [
        [_keras.tf_variable(variable), *some]
        for variable, some in zip(variables, mirrors, strict=True)
    ]
    found = iter(
        tf.gradients(
            [loss],
            [source for some in sources for source in some],
            grad_ys=[seed],
            stop_gradients=[mirror for some in mirrors for mirror in some],
        )
    )
    return [merging.merge([next(found) for _ in some]) for some in sources]


def _is_alike(clone: Clone) -> Any:
    """Return what says whether a tensor comes from nothing of the clone's."""
    given = [] if clone.made is None else clone.made.given
    depends = traced.dependence(given)
    return lambda tensor: not depends(tensor)


def _is_at(gradient: Any, device: str) -> bool:
    """Say whether a gradient by rows is on a device."""
    if not isinstance(gradient, (tf.IndexedSlices, RowGradient)):
        return False
    rows = tf.nest.flatten(gradient, expand_composites=True)
    return same_device(rows[0].device, device)


def _alike(
    column: list[Any], variable: keras.Variable, clones: Sequence[Clone]
) -> list[Any]:
    """Make the gradients of one variable alike in kind over the clones.

    They differ where the function does other things in another clone.
    """
    if len({_kind(gradient) for gradient in column}) == 1:
        rows = column[0]
        return _settle(column) if isinstance(rows, RowGradient) else column
    by_row = all(g is None or isinstance(g, RowGradient) for g in column)
    made = []
    for gradient, clone in zip(column, clones, strict=True):
        with name_scope(clone.scope), tf.device(clone.device):
            if isinstance(gradient, RowGradient):
                gradient = merging.merge([gradient])
            if by_row:
                rows = _no_rows(variable) if gradient is None else gradient
                made.append(RowGradient([rows], [], []))
            elif gradient is None:
                made.append(tf.zeros(variable.shape, variable.dtype))
            else:
                made.append(tf.convert_to_tensor(gradient))
    return made


def _kind(gradient: Any) -> Any:
    if isinstance(gradient, RowGradient):
        return tuple(len(parts) for parts in gradient)
    return gradient is None


def _no_rows(variable: keras.Variable) -> tf.IndexedSlices:
    return tf.IndexedSlices(
        tf.zeros([0, *variable.shape[1:]], variable.dtype),
        tf.zeros([0], tf.int32),
        tf.constant(variable.shape, tf.int32),
    )


def _settle(column: list[RowGradient]) -> list[RowGradient]:
    """Keep those look-ups for constant that have the same ids in all clones.

    A function may look up other ids in another clone, whatever it is given.
    """
    settled = [
        RowGradient(list(g.repeated), [], list(g.unique)) for g in column
    ]
    for parts in zip(*(g.constant for g in column), strict=True):
        first, *others = (part.indices for part in parts)
        same = all(traced.same(first, other) for other in others)
        for gradient, part in zip(settled, parts, strict=True):
            (gradient.constant if same else gradient.repeated).append(part)
    return settled
