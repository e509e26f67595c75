"""Warnings that point at the user's line, wherever they come up."""

import os
import sys
import warnings

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
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_skipped(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def warn_or_refuse(message: str, exact: bool) -> None:
    """Warn of what may train to other weights, or refuse it.

    Args:
        message: String, what to say.
        exact: Boolean, whether it is an error.

    Raises:
        ValueError: If `exact`.
    """
    if exact:
        raise ValueError(message)
    warn(message)


def _is_skipped(file: str) -> bool:
    return os.path.abspath(file).startswith(_FOLDERS) or _AUTOGRAPH in file
