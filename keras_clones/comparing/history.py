"""What a training came to, step by step."""

import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_clones.comparing import copies

# Bytes of what plain Keras came to that are kept in memory.
_LIMIT = 1 << 30


class History:
    """What a training came to at each step, the larger ones in files."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self._steps: list[Any] = []
        self._size = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, values: Sequence[np.ndarray], logs: dict[str, float]) -> None:
        """Keep the values after one more step."""
        self.logs.append(logs)
        self._size += sum(value.nbytes for value in values)
        if self._size < _LIMIT:
            self._steps.append(list(values))
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
        path = pathlib.Path(self._folder.name, f"{len(self._steps)}.npz")
        np.savez(path, *values)
        self._steps.append(path)

    def values(self, step: int) -> list[np.ndarray]:
        """Return the values after a step, counted from 0."""
        held = self._steps[step]
        if isinstance(held, list):
            return held
        with np.load(held) as file:
            return [file[name] for name in file.files]

    def __len__(self) -> int:
        return len(self._steps)


class Recorder(keras.callbacks.Callback):
    """A callback that hands over each step's values and logs."""

    def __init__(
        self, record: Callable[[list[np.ndarray], dict[str, float]], Any]
    ) -> None:
        super().__init__()
        self.record = record

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Read the variables: they have been updated by now."""
        found = copies.variables(self.model)
        values = [as_numbers(v.numpy()) for v in found]
        self.record(values, _numbers_in(logs or {}))


def as_numbers(array: np.ndarray) -> np.ndarray:
    """Return an array that NumPy can compute with: it has no bfloat16."""
    known = array.dtype.kind in "fiub"
    return array if known else array.astype("float32")


def _numbers_in(logs: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among some logs."""
    flat = {
        ".".join(map(str, path)): np.asarray(value)
        for path, value in keras.tree.flatten_with_path(logs)
    }
    return {k: float(v) for k, v in flat.items() if v.size == 1}
