"""What other callbacks have counted and kept, as far as it is plain."""

import collections
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_clones.callbacks.backup_plain import NotPlainError, decode, encode
from keras_clones.callbacks.profiler import CloneProfiler
from keras_clones.callbacks.summaries import CloneSummaries

# They hold what runs, of which no number tells.
_WITHOUT = (
    keras.callbacks.ProgbarLogger,
    keras.callbacks.BackupAndRestore,
    CloneProfiler,
    CloneSummaries,
)
# Given by `fit`, anew each time.
_GIVEN = ("params", "validation_data")

States = list[dict[str, tuple[Any, list[np.ndarray]]]]


def states(callbacks: Sequence[keras.callbacks.Callback]) -> States:
    """Return the plain attributes of each callback, by name."""
    return [_attributes(callback) for callback in callbacks]


def changed(
    callbacks: Sequence[keras.callbacks.Callback],
    first: States,
    arrays: list[np.ndarray],
) -> list[list[Any]]:
    """Return what has changed since the training began, for JSON.

    What has not is an argument, which a user may want to be another now.

    Args:
        callbacks: Callbacks of the training.
        first: Their `states` as the training began.
        arrays: List that the arrays are appended to.
    """
    found = []
    for callback, was in zip(callbacks, first, strict=True):
        now = {
            name: value
            for name, value in _attributes(callback).items()
            if name not in was or not _same(value, was[name])
        }
        held = {
            name: encode(decode(*value), arrays) for name, value in now.items()
        }
        found.append([_kind(callback), held])
    return found


def restore(
    callbacks: Sequence[keras.callbacks.Callback],
    saved: list[list[Any]],
    arrays: list[np.ndarray],
) -> None:
    """Give callbacks what others of their class had, the first the first's."""
    by_kind = collections.defaultdict(list)
    for kind, held in saved:
        by_kind[kind].append(held)
    for callback in callbacks:
        left = by_kind[_kind(callback)]
        for name, value in (left.pop(0) if left else {}).items():
            setattr(callback, name, decode(value, arrays))


def _kind(callback: keras.callbacks.Callback) -> str:
    return f"{type(callback).__module__}.{type(callback).__qualname__}"


def _attributes(
    callback: keras.callbacks.Callback,
) -> dict[str, tuple[Any, list[np.ndarray]]]:
    if isinstance(callback, _WITHOUT):
        return {}
    left_out = set(_GIVEN)
    if hasattr(callback, "monitor_op"):
        # Keras turns its sign around as it finds the direction, once.
        left_out.add("min_delta")
    found = {}
    for name, value in vars(callback).items():
        if name in left_out:
            continue
        arrays: list[np.ndarray] = []
        try:
            found[name] = encode(value, arrays), arrays
        except NotPlainError:
            continue
    return found


def _same(
    one: tuple[Any, list[np.ndarray]], other: tuple[Any, list[np.ndarray]]
) -> bool:
    # As text, since no NaN equals another.
    if repr(one[0]) != repr(other[0]) or len(one[1]) != len(other[1]):
        return False
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(one[1], other[1], strict=True)
    )
