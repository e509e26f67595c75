"""One cell of the benchmark: one model, one peer, in a process of its own."""

import json
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones.benchmark.models import CLASSES, TASKS, Gan, Task
from keras_clones.benchmark.transfers import count_transfers, traffic
from keras_clones.devices.placement import logical_devices
from keras_clones.devices.virtual import use_virtual_devices
from keras_clones.door.attach import clone_model
from keras_clones.look import resident

# Steps between the first, which traces, and the first that is timed.
WARM_UP = 3
# Batches in memory, so that a step does not find its data in the cache.
_BATCHES = 4


class Cell(NamedTuple):
    """What a cell's process is told.

    `peer` is `"plain"`, `"clones"`, `"mirrored"` or `"central"`, `clones` how
    many clones or replicas there are, and `reduction` the name of a
    cross-device reduction of `tf.distribute`. `threads` are those within an
    operation and those between operations. `logical` is how many logical
    GPUs the first GPU is split into. `transfers` asks for what a step sends.
    `wait` makes the cell wait after its warm-up for a line on its standard
    input.
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


def measure(cell: Cell) -> dict[str, Any]:
    """Run a cell in this process, whose devices have not started.

    Returns:
        Dict with `ms` (the median step), `first` (seconds from the call of
        `fit` to the end of the first step), `memory` (MiB at the peak) and,
        if asked for, `bytes` and `transfers` (a step, over all devices) and
        `devices` (the same device by device).
    """
    if cell.threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(cell.threads[0])
        tf.config.threading.set_inter_op_parallelism_threads(cell.threads[1])
    _make_devices(cell)
    task = TASKS[cell.model]
    data = _data(task)
    steps = cell.steps or task.steps
    before = resident.peak()
    model = _model(cell, task)
    stopwatch = Stopwatch(cell.wait)
    start = time.perf_counter()
    model.fit(
        data,
        steps_per_epoch=1 + WARM_UP + steps,
        verbose=0,
        callbacks=[stopwatch],
    )
    timed = np.diff(stopwatch.ends[WARM_UP:])
    result = {
        "ms": 1000 * statistics.median(timed),
        "first": stopwatch.ends[0] - start,
        "memory": _peak_memory(before),
    }
    return {**result, **_count(model, data)} if cell.transfers else result


def _make_devices(cell: Cell) -> None:
    if cell.logical:
        share = _gpu_memory() // cell.logical
        use_virtual_devices(cell.logical, "GPU", share)
    elif not tf.config.list_physical_devices("GPU"):
        use_virtual_devices(cell.clones)


def _gpu_memory() -> int:
    """Return the MiB of the first GPU that are free, less some to spare."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--id=0"]
    output = subprocess.check_output(
        [*query, "--format=csv,noheader,nounits"], text=True
    )
    return int(output.split()[0]) * 9 // 10


def _data(task: Task) -> tf.data.Dataset:
    rng = np.random.default_rng(0)
    shape = (_BATCHES * task.batch, *task.shape)
    x: Any = rng.random(shape, "float32")
    if task.ids is not None:
        x = rng.integers(0, task.ids, shape, "int32")
    y = rng.integers(0, CLASSES, len(x), "int32")
    data = tf.data.Dataset.from_tensor_slices((x, y))
    data = data.batch(task.batch, drop_remainder=True).cache()
    return data.repeat().prefetch(2)


def _model(cell: Cell, task: Task) -> keras.Model:
    keras.utils.set_random_seed(0)
    if cell.peer in ("plain", "clones"):
        model = task.make()
        if cell.peer == "clones":
            clone_model(model, num_clones=cell.clones, **task.options)
        return _compiled(model)
    devices = (logical_devices("GPU") or logical_devices("CPU"))[: cell.clones]
    if cell.peer == "mirrored":
        strategy = tf.distribute.MirroredStrategy(
            devices, getattr(tf.distribute, cell.reduction or "")()
        )
    else:
        strategy = tf.distribute.experimental.CentralStorageStrategy(devices)
    with strategy.scope():
        return _compiled(task.make())


def _compiled(model: keras.Model) -> keras.Model:
    judged = not isinstance(model, Gan)
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        metrics=["accuracy"] if judged else None,
    )
    return model


def _peak_memory(before: int | None) -> float | None:
    """Return the MiB of the fullest GPU, else what the process grew by."""
    gpus = logical_devices("GPU")
    if gpus:
        info = tf.config.experimental.get_memory_info
        return max(
            info(gpu.removeprefix("/device:"))["peak"] / (1 << 20)
            for gpu in gpus
        )
    after = resident.peak()
    if before is None or after is None:
        return None
    return (after - before) / (1 << 20)


def _count(model: keras.Model, data: tf.data.Dataset) -> dict[str, Any]:
    """Count what one step of a model that has been trained sends."""
    iterator = iter(
        model.distribute_strategy.experimental_distribute_dataset(data)
        if model.distribute_strategy
        else data
    )
    model.make_train_function(force=True)
    try:
        found = count_transfers(lambda: model.train_function(iterator))
    except ValueError as error:
        return {"bytes": None, "not_counted": str(error)}
    devices = traffic(found)
    return {
        "bytes": sum(t.bytes for t in found),
        "transfers": len(found),
        "devices": {name: t._asdict() for name, t in devices.items()},
    }


def main(spec: str) -> None:
    """Run the cell of a JSON spec, and print its result as a line of JSON."""
    warnings.simplefilter("ignore")
    try:
        result = measure(Cell(**json.loads(spec)))
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {text[-1].strip()}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
