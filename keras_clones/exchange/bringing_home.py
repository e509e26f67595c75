"""Bring what clones come to home, and make one of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone import state
from keras_clones.exchange.laying_out import Layout
from keras_clones.tensors import merging, traced, transfer


def bring_home(layout: Layout, values: list[Any]) -> list[Any]:
    """Send one nest of results a clone to the variables device."""
    sources = [clone.device for clone in layout.clones][: len(values)]
    with tf.name_scope("bring_home"):
        return transfer.collect(values, sources, layout.home)


def add_up(layout: Layout, values: list[Any]) -> Any:
    """Send one nest of dense results a clone home, where they are added up."""
    sources = [clone.device for clone in layout.clones]
    with tf.name_scope("bring_home"):
        return transfer.add_up(values, sources, layout.home)


def merge_changes(
    layout: Layout, changes: list[state.Changes], averaged: Any, added: Any
) -> dict[int, Any]:
    """Return the new values of assigned variables, at home, by position.

    Args:
        layout: `Layout` of the rows.
        changes: List of the `Changes` of the clones.
        averaged: Dict of the averages, at home.
        added: Dict of what is to be added to the old values, at home.
    """
    firsts = bring_home(layout, [changes[0].first])[0]
    merged = {**firsts, **averaged}
    for reduce, kind in (
        (tf.reduce_max, "largest"),
        (tf.reduce_min, "smallest"),
    ):
        columns = bring_home(layout, [getattr(c, kind) for c in changes])
        for i in columns[0]:
            merged[i] = reduce(tf.stack([c[i] for c in columns]), axis=0)
    return {**merged, **added}


def assign(
    variables: Sequence[keras.Variable],
    merged: dict[int, Any],
    added: Sequence[int],
) -> None:
    """Give the variables that the clones assigned their merged values."""
    for i, value in merged.items():
        if i in added:
            variables[i].assign_add(value)
        else:
            variables[i].assign(value)


class Merged(NamedTuple):
    """What clones come to at home: one gradient a variable, and the rest."""

    gradients: list[Any]
    parts: Any


def merge_gradients(
    layout: Layout,
    results: list[list[Any]],
    variables: Sequence[keras.Variable],
    parts: list[Any] | None = None,
) -> Merged:
    """Add up the clones' gradients at home, as one device would have them.

    Args:
        layout: `Layout` of the rows.
        results: List with one list of gradients a clone.
        variables: Sequence of the variables they are of.
        parts: List with one nest of dense tensors a clone, which add up, too.
            Defaults to `None`: there are none.
    """
    apart = [
        i
        for i, column in enumerate(zip(*results, strict=True))
        if any(isinstance(g, traced.RowGradient) for g in column)
        or _keras.overwrites_with_gradient(variables[i])
    ]
    dense = [
        {i: g for i, g in enumerate(result) if i not in apart and g is not None}
        for result in results
    ]
    rest, merged = add_up(
        layout, list(zip(parts or [()] * len(dense), dense, strict=True))
    )
    kept = bring_home(layout, [[r[i] for i in apart] for r in results])
    with tf.name_scope("merge_gradients"):
        for i, column in zip(apart, zip(*kept, strict=True), strict=True):
            overwrites = _keras.overwrites_with_gradient(variables[i])
            merge = merging.largest if overwrites else merging.merge
            merged[i] = merge(column)
    return Merged([merged.get(i) for i in range(len(variables))], rest)
