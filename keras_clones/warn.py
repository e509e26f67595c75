"""Warnings that point at the user's line, wherever they come up."""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import keras
import tensorflow as tf

# Code that users call into, or that calls what they wrote; not theirs.
_FOLDERS = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (__file__, keras.__file__, tf.__file__)
)
_AUTOGRAPH = "__autograph_generated_file"


def warn(message: str) -> None:
    """Warn at the innermost line that is not this package's.

    Frames of Keras and TensorFlow do not count either: what comes up while a
    step is traced points at the call of `fit`.

    Args:
        message: String, what to warn of.
    """
    if _collecting.silent:
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_skipped(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


class RefusedError(ValueError):
    """Raised where `exact=True` refuses what would only be warned of."""


class Found(NamedTuple):
    """What could differ from one device, and would not by whole layers.

    `fails` says whether it lets a step fail.
    """

    message: str
    layers: Sequence[keras.Layer]
    fails: bool = False


class _Collecting(threading.local):
    """Where what is found in this thread goes, if it is not warned of."""

    found: list[Found] | None = None
    silent = False


_collecting = _Collecting()


@contextlib.contextmanager
def collecting() -> Iterator[list[Found]]:
    """Collect what whole layers would mend in place of warning of it."""
    held, found = _collecting.found, list[Found]()
    _collecting.found = found
    try:
        yield found
    finally:
        _collecting.found = held


def as_here() -> Callable[[], AbstractContextManager[None]]:
    """Return what lets another thread warn as this one does now."""
    here = dict(vars(_collecting))

    @contextlib.contextmanager
    def warning() -> Iterator[None]:
        held = dict(vars(_collecting))
        vars(_collecting).update(here)
        try:
            yield
        finally:
            vars(_collecting).clear()
            vars(_collecting).update(held)

    return warning


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Warn of nothing, where a call is made to look at it alone."""
    held, _collecting.silent = _collecting.silent, True
    try:
        yield
    finally:
        _collecting.silent = held


def warn_or_refuse(
    message: str, exact: bool, layers: Sequence[keras.Layer] = ()
) -> None:
    """Warn of what could differ from one device, or refuse it.

    Args:
        message: String, what differs, and what to do about it.
        exact: Boolean, whether the deployment lets nothing differ.
        layers: Sequence of the layers that would let nothing differ, were
            they called whole. Defaults to none: that would not mend it.

    Raises:
        ValueError: If `exact`.
    """
    if exact:
        raise RefusedError(message)
    if layers and _collecting.found is not None:
        # Clones that run as Python tell of it one by one.
        if all(one.message != message for one in _collecting.found):
            _collecting.found.append(Found(message, layers))
    else:
        warn(message)


def cannot_shard(message: str, layer: keras.Layer) -> ValueError:
    """Return the error of a layer that cannot be called on shards.

    Args:
        message: String, why not, and what to do about it.
        layer: The layer. It could be called whole.
    """
    if _collecting.found is not None:
        _collecting.found.append(Found(message, [layer], fails=True))
    return ValueError(message)


def _is_skipped(file: str) -> bool:
    return os.path.abspath(file).startswith(_FOLDERS) or _AUTOGRAPH in file
