"""Pieces of clones that take turns: what each comes to is added up at once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone.state import Changes
from keras_clones.exchange import laying_out
from keras_clones.tensors import merging, traced


class Part(NamedTuple):
    """What a piece comes to, by how a clone makes one of its pieces.

    Attributes:
        added: Nest of dense tensors, which add up.
        listed: Nest of what is kept piece by piece until the last one.
        changes: `Changes` of variables, or `None`.
    """

    added: Any
    listed: Any
    changes: Any = None


class Total(NamedTuple):
    """What the pieces of a clone have come to so far: `listed` is a list."""

    added: Any
    listed: list[Any]
    changes: Any


def take_turns(
    layout: laying_out.Layout,
    function: Callable[[int], Part],
    finish: Callable[[Total], Any],
) -> list[Any]:
    """Call a function once a piece, on each clone one after the other.

    A piece begins when the one before it is added up, so that a device holds
    what one piece computes, and one sum.

    Args:
        layout: `Layout` of the rows.
        function: Function of the index of the piece.
        finish: Function of the `Total` of a clone that makes its result.

    Returns:
        A list with one result a clone, on its device.
    """
    results = []
    for own in layout.turns:
        total = _take(layout, own, function)
        with laying_out.on_clone(layout, own[-1], None):
            results.append(finish(total))
    return results


def _take(
    layout: laying_out.Layout, own: range, function: Callable[[int], Part]
) -> Total:
    with laying_out.on_clone(layout, own[0], None):
        first = function(own[0])
    total = Total(first.added, [first.listed], first.changes)
    for i in own[1:]:
        last = total.added, total.listed[-1], total.changes
        with laying_out.on_clone(layout, i, last):
            total = _add(total, function(i))
    return total


def _add(total: Total, part: Part) -> Total:
    changes = total.changes
    if changes is not None:
        changes = _add_changes(changes, part.changes)
    return Total(
        tf.nest.map_structure(_sum, total.added, part.added),
        [*total.listed, part.listed],
        changes,
    )


def _sum(one: Any, other: Any) -> Any:
    return None if one is None else one + other


def _add_changes(one: Changes, other: Changes) -> Changes:
    """Merge what two pieces made of variables, in their order."""
    reduced = {
        "averaged": tf.add,
        "added": tf.add,
        "largest": tf.maximum,
        "smallest": tf.minimum,
    }
    merged = {
        kind: {
            i: function(value, getattr(other, kind)[i])
            for i, value in getattr(one, kind).items()
        }
        for kind, function in reduced.items()
    }
    return Changes(**merged, first=one.first)


def merge_changes(
    layout: laying_out.Layout, changes: list[Changes]
) -> list[Changes]:
    """Merge what the pieces of each clone made of variables, on its device."""
    merged = []
    for own in layout.turns if layout.takes_turns else []:
        with tf.device(layout.clones[own[0]].device):
            merged.append(
                functools.reduce(_add_changes, changes[own[0] : own[-1] + 1])
            )
    return merged or changes


def split_gradients(
    gradients: Sequence[Any], variables: Sequence[keras.Variable]
) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return those of a piece's gradients that add up, and those by rows."""
    listed = {
        i: g
        for i, (g, v) in enumerate(zip(gradients, variables, strict=True))
        if isinstance(g, (traced.RowGradient, tf.IndexedSlices))
        or _keras.overwrites_with_gradient(v)
    }
    rest = enumerate(gradients)
    return {i: g for i, g in rest if i not in listed}, listed


def join_gradients(
    added: dict[int, Any], listed: Sequence[dict[int, Any]]
) -> list[Any]:
    """Return the gradients of a clone, of sums and of rows of its pieces."""
    rows = {i: merging.of_pieces([one[i] for one in listed]) for i in listed[0]}
    found = {**added, **rows}
    return [found[i] for i in range(len(found))]


def by_clone(layout: laying_out.Layout) -> laying_out.Layout:
    """Return the layout of clones of that of their pieces.

    Its inputs have the data of each clone's first piece.
    """
    if not layout.takes_turns:
        return layout
    firsts = [own[0] for own in layout.turns]
    inputs = []
    for i, own in zip(firsts, layout.turns, strict=True):
        shares = [layout.inputs[j].numbers[:1] for j in own]
        numbers = [tf.add_n(shares), layout.inputs[i].numbers[1:]]
        inputs.append(layout.inputs[i]._replace(numbers=tf.concat(numbers, 0)))
    return layout._replace(
        clones=[layout.clones[i] for i in firsts],
        inputs=inputs,
        turns=[range(i, i + 1) for i in range(len(firsts))],
    )
