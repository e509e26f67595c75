"""What is said of clones in errors that a model raises while they run."""

import re
from typing import Any

import tensorflow as tf

from keras_clones import sharding

_MAY_MEAN = (
    "If the model runs on one device, look for a batch size that is fixed, in "
    "`keras.Input` or in a layer, and for an output with as many columns as "
    "the batch has rows."
)


def add_note(error: Exception, i: int, shards: sharding.Shards) -> None:
    """Say in an error which clone ran, on how many of how many rows."""
    size, rows = (
        n if isinstance(n, int) else "unknown"
        for n in (shards.sizes[i], shards.rows)
    )
    of = f"{size} of {rows} rows"
    if "unknown" in (size, rows):
        of = "a part of a batch whose size is not known yet"
    _append(
        error,
        f"This was raised while clone {i} of {len(shards.sizes)} ran on "
        f"{of}. {_MAY_MEAN}",
    )


def add_note_of_run(error: Exception, num_clones: int) -> None:
    """Say in an error of a running step which clone it came from."""
    if not isinstance(error, tf.errors.OpError) or num_clones == 1:
        return
    found = re.search(r"clone_(\d+)/", str(error))
    if found:
        _append(
            error,
            f"This was raised while clone {found[1]} of {num_clones} ran on "
            f"its rows of the batch. {_MAY_MEAN}",
        )


def _append(error: Any, note: str) -> None:
    """Append to the message of an error, once."""
    if getattr(error, "_noted", False):
        return
    error._noted = True
    if isinstance(error, tf.errors.OpError):
        error._message = f"{error._message}\n\n{note}"
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n\n{note}", *error.args[1:])
