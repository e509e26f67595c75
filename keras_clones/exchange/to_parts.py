"""Gradients of divided tables go to the homes of their rows."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones.devices.divided import parts_of
from keras_clones.devices.moving import home_of
from keras_clones.exchange import bringing_home
from keras_clones.exchange.laying_out import Layout
from keras_clones.tensors import merging, parted, traced


def merge_gradients(
    layout: Layout,
    results: list[list[Any]],
    variables: Sequence[keras.Variable],
    parts: list[Any],
) -> bringing_home.Merged:
    """Add up the clones' gradients at home, those by rows where these are.

    Args:
        layout: `Layout` of the rows.
        results: List with one list of gradients a clone.
        variables: Sequence of the variables they are of.
        parts: List with one nest of dense tensors a clone, which add up, too.
    """
    columns = list(zip(*results, strict=True))
    by_rows = {
        i: variables[i]
        for i, column in enumerate(columns)
        if parts_of(variables[i]) is not None
        and all(isinstance(g, traced.RowGradient) for g in column)
    }
    rest = [
        [None if i in by_rows else g for i, g in enumerate(result)]
        for result in results
    ]
    merged = bringing_home.merge_gradients(layout, rest, variables, parts)
    found = _merge_parts(layout, results, by_rows)
    return merged._replace(
        gradients=[found.get(i, g) for i, g in enumerate(merged.gradients)]
    )


def _merge_parts(
    layout: Layout,
    results: list[list[Any]],
    variables: dict[int, keras.Variable],
) -> dict[int, parted.Parted]:
    """Send each home the rows of its parts, and add them up there."""
    homes = {i: home_of(variable) for i, variable in variables.items()}
    split = []
    for clone, result in zip(layout.clones, results, strict=True):
        with tf.device(clone.device), tf.name_scope("split_gradients"):
            split.append(
                {
                    i: parted.split(result[i], len(homes[i]), _shape(variable))
                    for i, variable in variables.items()
                }
            )
    merged: dict[tuple[int, int], Any] = {}
    for home in dict.fromkeys(home for one in homes.values() for home in one):
        here = [
            (i, j)
            for i, one in homes.items()
            for j, other in enumerate(one)
            if other == home
        ]
        listed = [[one[i][j] for i, j in here] for one in split]
        kept = bringing_home.bring_home(layout, listed, home)
        with tf.device(home), tf.name_scope("merge_gradients"):
            for key, column in zip(here, zip(*kept, strict=True), strict=True):
                merged[key] = merging.merge(column)
    return {
        i: parted.Parted(
            [merged[i, j] for j in range(len(homes[i]))], _shape(variable)
        )
        for i, variable in variables.items()
    }


def _shape(variable: keras.Variable) -> tf.TensorShape:
    return tf.TensorShape(variable.shape)
