"""What is said of clones in errors that a model raises while they run."""

import re
from typing import Any

import tensorflow as tf

from keras_clones.tensors import sharding

_RAISED = "This was raised while"
_MAY_MEAN = (
    "If the model runs on one device, look for a batch size that is fixed, in "
    "`keras.Input` or in a layer, and for an output with as many columns as "
    "the batch has rows."
)
# Where an operation was made, TensorFlow tells in the errors that it raises.
# A clone's are made in a tower function, and all clones run the same one.
_IN_TOWER = re.compile(r'keras_clones.*\W(tower|body)\.py", line \d+, in ')
# Other lines have names, too, of operations that only were to get the result.
_IN_CLONE = re.compile(r"\{\{node [^}]*?clone_(\d+)/")


def add_note(
    error: Exception, i: int, shards: sharding.Shards, what: str = "clone"
) -> None:
    """Say in an error which clone ran, on how many of how many rows.

    Args:
        error: The error.
        i: Integer, the index of the shard.
        shards: `Shards` of the rows.
        what: String, what ran on it. Defaults to `"clone"`.
    """
    size, rows = shards.sizes[i], shards.rows
    known = isinstance(size, int) and isinstance(rows, int)
    of = f"{size} of {rows} rows" if known else "rows of no known number"
    _append(error, f"{what} {i} of {len(shards.sizes)} ran on {of}")


def add_note_of_trace(
    error: Exception, shards: sharding.Shards, what: str = "clone"
) -> None:
    """Say in an error that the function which all clones run was traced."""
    sizes, rows = shards.sizes, shards.rows
    if isinstance(rows, int) and len(set(sizes)) == 1:
        add_note(error, 0, shards, what)
        return
    of = f"some of {rows}" if isinstance(rows, int) else "any number of"
    _append(
        error,
        f"what each of {len(sizes)} {what}s runs was traced for {of} rows",
    )


def add_note_of_run(error: Exception, num_clones: int) -> None:
    """Say in an error of a running step that it came from a clone.

    Which clone it was, TensorFlow tells where each has operations of its own.
    """
    if num_clones == 1:
        return
    text = str(error)
    if not isinstance(error, tf.errors.OpError) or _RAISED in text:
        _move_to_end(error)
    elif found := _IN_CLONE.search(text):
        _append(error, f"clone {found[1]} of {num_clones} ran on its rows")
    elif _IN_TOWER.search(text):
        _append(error, f"one of {num_clones} clones ran on its rows")


def _append(error: Any, where: str) -> None:
    """Append to the message of an error, once."""
    if _RAISED not in str(error):
        note = f"{_RAISED} {where} of the batch. {_MAY_MEAN}"
        _set_message(error, f"{_message(error)}\n\n{note}")


def _move_to_end(error: Any) -> None:
    """Let a note end a message that Keras has put into another."""
    text = _message(error)
    before, raised, rest = text.partition(f"\n\n{_RAISED}")
    where, meaning, after = rest.partition(_MAY_MEAN)
    if after:
        _set_message(error, f"{before}{after}{raised}{where}{meaning}")


def _message(error: Any) -> str:
    if isinstance(error, tf.errors.OpError):
        return error.message
    known = error.args and isinstance(error.args[0], str)
    return error.args[0] if known else ""


def _set_message(error: Any, text: str) -> None:
    if isinstance(error, tf.errors.OpError):
        error._message = text
    elif _message(error):
        error.args = (text, *error.args[1:])
