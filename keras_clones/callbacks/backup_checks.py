"""What is wrong with what `Backup` is asked for, if anything is."""

import operator
import os
from typing import Any


def checked_folder(folder: Any) -> str:
    """Return the folder of the backups, which is or can be made."""
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise TypeError(
            "Argument `folder` must be the path of a folder. "
            f"Received: folder={folder!r}"
        )
    path = os.path.abspath(os.fspath(folder))
    # The folder itself, or the one that it is going to be made in.
    there = path
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ValueError(
            "Argument `folder` must be the path of a folder, of its own. "
            f"Received: folder={str(folder)!r}, where {there!r} is a file"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            "Argument `folder` must be a folder that can be written to. "
            f"Received: folder={str(folder)!r}, and no file can be made in "
            f"{there!r}"
        )
    return path


def checked_save_freq(save_freq: Any) -> int | None:
    """Return the batches between two backups; `None` for whole epochs."""
    if isinstance(save_freq, str) and save_freq == "epoch":
        return None
    try:
        if isinstance(save_freq, bool):
            raise TypeError
        batches = operator.index(save_freq)
    except TypeError:
        raise TypeError(
            "Argument `save_freq` must be 'epoch' or a number of batches. "
            f"Received: save_freq={save_freq!r}"
        ) from None
    if batches < 1:
        raise ValueError(
            "Argument `save_freq` must be 'epoch' or at least 1. "
            f"Received: save_freq={save_freq!r}"
        )
    return batches


def checked_seed(seed: Any) -> int | None:
    """Return the seed of the order of the data, if there is one."""
    if seed is None:
        return None
    try:
        if isinstance(seed, bool):
            raise TypeError
        number = operator.index(seed)
    except TypeError:
        raise TypeError(
            "Argument `seed` must be an integer or `None`. "
            f"Received: seed={seed!r}"
        ) from None
    if not 0 <= number < 2**31:
        raise ValueError(
            "Argument `seed` must be at least 0 and less than 2**31. "
            f"Received: seed={seed!r}"
        )
    return number
