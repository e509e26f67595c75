"""Fitting a model on made-up data, and timing its steps."""

import statistics
import sys
import time
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones.benchmark.models import CLASSES, Gan, Task

# Steps between the first, which traces, and the first that is timed.
WARM_UP = 3
# Batches in memory, so that a step does not find its data in the cache.
_BATCHES = 4


class Cell(NamedTuple):
    """What a cell's process is told.

    `peer` is `"plain"`, `"clones"`, `"gather"` (clones whose loss is computed
    at home), `"mirrored"`, `"central"` or `"jax"`, `clones` how many clones or
    replicas there are, `update` and `pieces` are options of clones, and
    `reduction` is the name of a cross-device reduction of `tf.distribute`.
    `threads` are those within an operation and those between operations.
    `logical` is how many logical GPUs the first GPU is split into.
    `transfers` asks for what a step sends. `wait` makes the cell wait after
    its warm-up for a line on its standard input.
    """

    model: str
    peer: str
    clones: int = 1
    reduction: str | None = None
    steps: int | None = None
    threads: tuple[int, int] | None = None
    logical: int | None = None
    transfers: bool = False
    wait: bool = False
    update: str = "auto"
    pieces: int = 1


class Stopwatch(keras.callbacks.Callback):
    """A callback that notes when each step ends.

    As with every callback of a batch's end that is not asynchronous, `fit`
    reads the logs first, and so waits for the device.
    """

    def __init__(self, wait: bool = False) -> None:
        super().__init__()
        self.wait = wait
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Note the time."""
        if batch == WARM_UP and self.wait:
            print("ready", flush=True)
            sys.stdin.readline()
        self.ends.append(time.perf_counter())


def time_fit(
    model: keras.Model, data: tf.data.Dataset, cell: Cell, steps: int
) -> dict[str, Any]:
    """Return `ms` and `first` of a cell, as its process gives them."""
    stopwatch = Stopwatch(cell.wait)
    start = time.perf_counter()
    model.fit(
        data,
        steps_per_epoch=1 + WARM_UP + steps,
        verbose=0,
        callbacks=[stopwatch],
    )
    timed = np.diff(stopwatch.ends[WARM_UP:])
    return {
        "ms": 1000 * statistics.median(timed),
        "first": stopwatch.ends[0] - start,
    }


def make_data(task: Task) -> tf.data.Dataset:
    """Return batches of a task, again and again."""
    rng = np.random.default_rng(0)
    missing = task.batch // 3 if task.partial else 0
    shape = (_BATCHES * task.batch - missing, *task.shape)
    x: Any = rng.random(shape, "float32")
    if task.ids is not None:
        x = rng.integers(0, task.ids, shape, "int32")
    y: Any = rng.integers(0, CLASSES, len(x), "int32")
    if task.masked:
        x, y = _padded(x, rng)
    data = tf.data.Dataset.from_tensor_slices((x, y))
    data = data.batch(task.batch, drop_remainder=not task.partial).cache()
    return data.repeat().prefetch(2)


def _padded(x: np.ndarray, rng: np.random.Generator) -> tuple[Any, Any]:
    """Return texts that end in padding, and for each word the one after it."""
    lengths = rng.integers(1, x.shape[1] + 1, (len(x), 1))
    x = np.where(np.arange(x.shape[1]) < lengths, np.maximum(x, 1), 0)
    return x, np.roll(x, -1, axis=1)


def compiled(model: keras.Model) -> keras.Model:
    """Compile a model of a task, and return it."""
    judged = not isinstance(model, Gan)
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        metrics=["accuracy"] if judged else None,
    )
    return model
