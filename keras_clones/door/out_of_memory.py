"""What is said when a device has no memory even for pieces of one row."""

import math
import re
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_clones import _tf
from keras_clones.devices.naming import canonical_device
from keras_clones.devices.placement import PlacedClone, short_name
from keras_clones.look.page import readable

_ALLOCATION = re.compile(
    r"allocating tensor with shape\s*\[([\d,]*)\] and type (\w+) on (\S+)"
)
_BYTES = re.compile(r"allocate ([\d.]+ ?[KMGT]?i?B|\d+ bytes)")


def for_good(error: Any, clones: Sequence[PlacedClone]) -> Exception:
    """Return the error of a batch that does not fit row by row.

    Args:
        error: The `tf.errors.ResourceExhaustedError` of its step.
        clones: Sequence of `PlacedClone`s.
    """
    device, needs = _what_failed(error, clones)
    return _error(
        error,
        "Expected devices with memory for one row of the batch at a time. "
        f"Received: pieces='auto', which came to pieces of one row, and "
        f"{device} has not got it: {needs}, and {_what_there_is(device)}. The "
        "model is as it was before this batch. Make rows smaller (shorter "
        "sequences, smaller images), use a smaller model, or devices with "
        f"more memory. TensorFlow says: {error.message}",
    )


def later(error: Any) -> Exception:
    """Return the error of a batch for whose size there was memory before."""
    return _error(
        error,
        "A device ran out of memory in a batch no larger than others that it "
        "had memory for: something else takes memory by now. The step may "
        "have changed some of the model's variables: go on from a backup or "
        "a saved model, in more pieces, such as "
        f"`clone_model(..., pieces=2)`. TensorFlow says: {error.message}",
    )


def _error(cause: Any, message: str) -> Exception:
    return tf.errors.ResourceExhaustedError(cause.node_def, cause.op, message)


def _what_failed(error: Any, clones: Sequence[PlacedClone]) -> tuple[str, str]:
    """Return on which device what could not be had, as far as it is told."""
    if found := _ALLOCATION.search(error.message):
        sizes, kind, where = found.groups()
        shape = tuple(int(n) for n in sizes.split(",") if n)
        try:
            size = tf.as_dtype(kind).size
        except TypeError:
            size = 4
        size = readable(math.prod(shape) * size)
        return short_name(where), f"a piece needs {size} more, for a {shape}"
    names = list(dict.fromkeys(short_name(c.device) for c in clones))
    device = names[0] if len(names) == 1 else f"one of {names}"
    if found := _BYTES.search(error.message):
        return device, f"a piece needs {found[1]} more"
    return device, "a piece needs more than that"


def _what_there_is(device: str) -> str:
    """Return what memory a device has."""
    for one in _tf.list_local_devices():
        if short_name(canonical_device(one.name)) == device:
            there = f"it has {readable(one.memory_limit)}"
            if "GPU" not in device:
                return there
            info = tf.config.experimental.get_memory_info(device)
            return f"{there}, of which it held {readable(info['peak'])} at most"
    return "what it has is not known"
