"""What is wrong with what `CloneProfiler` is asked for, if anything is."""

import importlib.util
import operator
import os
from typing import Any

# What its files are called where nothing says it.
NAME = "clone_profile"


def checked_steps(steps: Any) -> tuple[int, int]:
    """Return the range of steps to trace."""
    try:
        if any(isinstance(step, bool) for step in steps):
            raise TypeError
        begin, end = (operator.index(step) for step in steps)
    except (TypeError, ValueError):
        raise TypeError(
            "Argument `steps` must be a pair of integers. "
            f"Received: steps={steps!r}"
        ) from None
    if not 0 <= begin < end:
        raise ValueError(
            "Argument `steps` must be two increasing integers, the first at "
            f"least 0. Received: steps={steps!r}"
        )
    return begin, end


def check_can_draw() -> None:
    """Ask for what draws the timeline."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "`CloneProfiler` draws its timeline with matplotlib: "
            "`pip install matplotlib`."
        )


def checked_path(path: Any) -> str:
    """Return the path of its files, without a suffix."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise TypeError(
            "Argument `path` must be a path of a folder, or of a file without "
            f"its suffix. Received: path={path!r}"
        )
    name = _without_suffix(os.fspath(path))
    folder = os.path.dirname(os.path.abspath(name))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(
            "Argument `path` must be in a folder that exists and can be "
            f"written to. Received: path={str(path)!r}, whose folder is "
            f"{folder!r}"
        )
    return name


def _without_suffix(path: str) -> str:
    """Return the path that the suffixes of both files are added to."""
    separators = tuple(filter(None, (os.sep, os.altsep)))
    if path.endswith(separators) or os.path.isdir(path):
        return os.path.join(path, NAME)
    base, suffix = os.path.splitext(path)
    return base if suffix in (".png", ".json") else path
