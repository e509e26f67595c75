"""Do clones come to what one device comes to? Their values, compared."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls import body
from keras_clones.exchange import bringing_home, laying_out
from keras_clones.tensors import sharding, traced

# Differences over the largest entry that are rounding, by bytes of a float.
# On a CPU: a GPU rounds products of float32 like half as many bits.
_ROUNDING = {8: 1e-8, 4: 1e-4, 2: 5e-2}


class Ran(NamedTuple):
    """What the clones of a call came to."""

    layout: laying_out.Layout
    outputs: list[body.CallOutput]
    notes: list[body.CallNotes]


def rounding(layer: keras.Layer) -> float:
    """Return what differs over the largest entry by rounding alone."""
    size = tf.as_dtype(layer.compute_dtype or "float32").size
    return _ROUNDING.get(size, _ROUNDING[4])


def compare_values(one: Ran, other: Ran, tolerance: float) -> str | None:
    """Say what differs of two runs on the same rows.

    That is `"outputs"` or `"losses"`, else `"kept"`: scalars that layers keep.
    """
    (outputs, losses), (other_outputs, other_losses) = (
        ran.notes[0].ends for ran in (one, other)
    )
    whole = one.outputs[0].values
    columns = list(zip(*(out.values for out in other.outputs), strict=True))
    parts = list(zip(columns, other.notes[0].kinds, strict=True))

    def differ(mine: Sequence[Any], theirs: Sequence[Any]) -> bool:
        return len(mine) != len(theirs) or not all(
            _joins(value, column, kind, tolerance)
            for value, (column, kind) in zip(mine, theirs, strict=True)
        )

    if differ(whole[:outputs], parts[:other_outputs]):
        return "outputs"
    if differ(whole[losses:], parts[other_losses:]):
        return "losses"
    kept, others = whole[outputs:losses], parts[other_outputs:other_losses]
    # What a layer is given and keeps is new to it only where it was split.
    if len(kept) != len(others):
        return None
    sums = [i for i, (_, kind) in enumerate(others) if kind == "sum"]
    is_other = differ([kept[i] for i in sums], [others[i] for i in sums])
    return "kept" if is_other else None


def _joins(
    whole: Any, parts: Sequence[Any], kind: str, tolerance: float
) -> bool:
    """Say whether what clones come to can be joined to what one comes to."""
    if kind == "sum":
        return _same(whole, tf.add_n(list(parts)), tolerance)
    if all(_same(whole, part, tolerance) for part in parts):
        return True
    try:
        joined = sharding.join_leaf(tuple(parts))
    except Exception:
        return False
    return _same(whole, joined, tolerance)


def _same(one: Any, other: Any, tolerance: float) -> bool:
    pairs = zip(
        tf.nest.flatten(one, expand_composites=True),
        tf.nest.flatten(other, expand_composites=True),
        strict=False,
    )
    return all(_same_dense(*pair, tolerance) for pair in pairs)


def _same_dense(one: tf.Tensor, other: tf.Tensor, tolerance: float) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not traced.is_continuous(one):
        return bool(tf.reduce_all(one == other))
    rounding = _ROUNDING.get(one.dtype.real_dtype.size, 0)
    tolerance = max(tolerance, rounding)
    wide = tf.complex128 if one.dtype.is_complex else tf.float64
    a, b = (tf.cast(value, wide).numpy() for value in (one, other))
    finite = a[np.isfinite(a)]
    largest = np.max(np.abs(finite), initial=0.0)
    return np.allclose(a, b, 0, tolerance * largest + 1e-30, equal_nan=True)


def compare_state(
    one: Ran, two: Ran, tolerance: float, read: Callable[[Any], Any]
) -> str | None:
    """Say whether the clones' merged state differs.

    Args:
        one: `Ran` of one clone.
        two: `Ran` of several.
        tolerance: Float, the rounding over the largest entry.
        read: Function from a variable's value to what the clones got of it.
    """
    changes = [output.changes for output in two.outputs]
    total = bringing_home.add_up(
        two.layout, [(c.averaged, c.added) for c in changes]
    )
    merged = bringing_home.merge_changes(two.layout, changes, *total)
    merged = {id(two.notes[0].assigned[i]): v for i, v in merged.items()}
    added = {id(two.notes[0].assigned[i]) for i in total[1]}
    alone = one.outputs[0].changes.first
    for i, variable in enumerate(one.notes[0].assigned):
        value = merged.get(id(variable))
        if id(variable) in added:
            value += read(_keras.tf_variable(variable).read_value())
        if value is None or not _same(alone[i], value, tolerance):
            return "state"
    return None
