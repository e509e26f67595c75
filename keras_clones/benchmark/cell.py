"""One cell of the benchmark: one model, one peer, in a process of its own."""

import json
import subprocess
import sys
import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_clones.benchmark import jax_cell
from keras_clones.benchmark.models import TASKS, Task
from keras_clones.benchmark.timed_fit import (
    Cell,
    compiled,
    make_data,
    time_fit,
)
from keras_clones.benchmark.transfers import count_transfers, traffic
from keras_clones.devices.placement import logical_devices
from keras_clones.devices.virtual import use_virtual_devices
from keras_clones.door.attach import clone_model
from keras_clones.look import resident


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
    data = make_data(task)
    steps = cell.steps or task.steps
    before = resident.peak()
    model = _model(cell, task)
    result = time_fit(model, data, cell, steps)
    result["memory"] = _peak_memory(before)
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


def _model(cell: Cell, task: Task) -> keras.Model:
    keras.utils.set_random_seed(0)
    if cell.peer in ("plain", "clones", "gather"):
        model = task.make()
        if cell.peer != "plain":
            clone_model(model, num_clones=cell.clones, **_options(cell, task))
        return compiled(model)
    devices = (logical_devices("GPU") or logical_devices("CPU"))[: cell.clones]
    if cell.peer == "mirrored":
        strategy = tf.distribute.MirroredStrategy(
            devices, getattr(tf.distribute, cell.reduction or "")()
        )
    else:
        strategy = tf.distribute.experimental.CentralStorageStrategy(devices)
    with strategy.scope():
        return compiled(task.make())


def _options(cell: Cell, task: Task) -> dict[str, Any]:
    """Return what `clone_model` gets besides the number of clones."""
    options = {"update": cell.update, "pieces": cell.pieces, **task.options}
    if cell.peer == "gather":
        options["loss"] = "gather"
    return options


def _peak_memory(before: int | None) -> float | None:
    """Return the MiB of the fullest GPU, else what the process grew by."""
    gpus = logical_devices("GPU")
    if gpus:
        info = tf.config.experimental.get_memory_info
        return max(
            info(gpu.removeprefix("/device:"))["peak"] / (1 << 20)
            for gpu in gpus
        )
    grown = resident.grown(before)
    return None if grown is None else grown / (1 << 20)


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
        cell = Cell(**json.loads(spec))
        run = jax_cell.measure if cell.peer == "jax" else measure
        result = run(cell)
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        result = {"error": f"{type(error).__name__}: {text[-1].strip()}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
