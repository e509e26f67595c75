"""The file of a backup, which is whole whenever its writer is killed."""

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# A newer one is written by a newer version of this package.
FORMAT = 1
NAME = "backup.npz"
PREVIOUS = "previous.npz"
WRITING = "writing.npz"
_DATA = "data"


class Content(NamedTuple):
    """What is in a backup.

    Attributes:
        data: Dict of what JSON can hold.
        arrays: List of arrays.
    """

    data: dict[str, Any]
    arrays: list[np.ndarray]


def write(folder: str, content: Content) -> None:
    """Write a backup in place of the last one, which is kept beside it.

    Killed at any time, there is a whole backup: this, or the one before.

    Raises:
        OSError: If it cannot be written. The backups there are remain.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, NAME)
    writing = os.path.join(folder, WRITING)
    text = json.dumps({"format": FORMAT, **content.data}).encode()
    named: dict[str, Any] = {_DATA: np.frombuffer(text, np.uint8)}
    named |= {str(i): array for i, array in enumerate(content.arrays)}
    with open(writing, "wb") as file:
        np.savez(file, **named)
        file.flush()
        os.fsync(file.fileno())
    if os.path.exists(path):
        os.replace(path, os.path.join(folder, PREVIOUS))
    os.replace(writing, path)
    _sync_names(folder)


def read(folder: str) -> Content | None:
    """Return the last whole backup; `None` if none was ever made.

    Raises:
        ValueError: If there are backups, and none of them can be read.
    """
    wrong = []
    for name in (NAME, PREVIOUS):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            continue
        try:
            return _read_file(path)
        except _UNREADABLE as error:
            wrong.append(f"{path!r}: {error}")
    if wrong:
        raise ValueError(
            "Expected a backup that this version of `keras_clones` can read. "
            f"Received: folder={folder!r}, with " + "; ".join(wrong) + ". "
            "Use the version that wrote it, or another folder to begin anew."
        )
    return None


def remove(folder: str) -> None:
    """Remove the backups, and the folder if nothing else is in it."""
    # The one before goes first: alone, it would be taken for the last.
    for name in (WRITING, PREVIOUS, NAME):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    with contextlib.suppress(OSError):
        os.rmdir(folder)


# What comes up in files that are cut off, changed or something else.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError),
    *(zipfile.BadZipFile, NotImplementedError, zlib.error),
)


def _read_file(path: str) -> Content:
    with np.load(path, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is no backup")
        data = json.loads(archive[_DATA].tobytes())
        if data.get("format") != FORMAT:
            raise ValueError(
                f"its format is {data.get('format')}, not {FORMAT}"
            )
        return Content(data, _in_order(archive))


def _in_order(archive: Any) -> list[np.ndarray]:
    names: Sequence[str] = [name for name in archive.files if name != _DATA]
    return [archive[str(i)] for i in range(len(names))]


def _sync_names(folder: str) -> None:
    """Let the new names outlast a loss of power, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
