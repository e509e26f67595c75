"""Bring what clones come to home, and make one of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone import state
from keras_clones.devices.moving import device_of
from keras_clones.exchange.laying_out import Layout
from keras_clones.tensors import merging, traced, transfer


def bring_home(
    layout: Layout, values: list[Any], home: str | None = None
) -> list[Any]:
    """Send one nest of results a clone home, by default to the layout's."""
    sources = [clone.device for clone in layout.clones][: len(values)]
    with tf.name_scope("bring_home"):
        return transfer.collect(values, sources, home or layout.home)


def add_up(layout: Layout, values: list[Any], home: str | None = None) -> Any:
    """Send one nest of dense results a clone home, where they are added up."""
    sources = [clone.device for clone in layout.clones]
    with tf.name_scope("bring_home"):
        return transfer.add_up(values, sources, home or layout.home)


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
    # Outside of training there are none.
    homes = [device_of(v) for v, *_ in zip(variables, *results, strict=False)]
    merged: dict[int, Any] = {}
    rest: Any = parts
    for home in dict.fromkeys([layout.home, *homes]):
        here = [i for i, one in enumerate(homes) if one == home]
        dense = [
            {i: r[i] for i in here if i not in apart and r[i] is not None}
            for r in results
        ]
        if home == layout.home:
            beside = list(zip(parts or [()] * len(dense), dense, strict=True))
            rest, found = add_up(layout, beside)
        else:
            found = add_up(layout, dense, home) if any(dense) else {}
        merged.update(found)
        by_rows = [i for i in here if i in apart]
        listed = [[r[i] for i in by_rows] for r in results]
        kept = bring_home(layout, listed, home)
        with tf.device(home), tf.name_scope("merge_gradients"):
            for i, column in zip(by_rows, zip(*kept, strict=True), strict=True):
                merged[i] = _merge_apart(variables[i], column)
    return Merged([merged.get(i) for i in range(len(variables))], rest)


def _merge_apart(variable: keras.Variable, column: Sequence[Any]) -> Any:
    overwrites = _keras.overwrites_with_gradient(variable)
    return (merging.largest if overwrites else merging.merge)(column)
