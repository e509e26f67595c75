"""A cell of Keras on the JAX backend: plain, or on several devices."""

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_clones.benchmark.models import TASKS
from keras_clones.benchmark.timed_fit import (
    Cell,
    compiled,
    make_data,
    time_fit,
)
from keras_clones.look import resident


def settings(cell: Cell, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that a process of such a cell starts with.

    Args:
        cell: `Cell` whose peer is `"jax"`.
        environment: Mapping, the environment that there is.
    """
    flags = environment.get("XLA_FLAGS", "")
    count = f"--xla_force_host_platform_device_count={cell.clones}"
    found = {
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": f"{flags} {count}".strip(),
        # To tell what memory it needs, it must not take all of it.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if cell.threads is not None:
        # XLA's threads on the CPU are for all devices together.
        found["NPROC"] = str(cell.threads[0])
    return found


def measure(cell: Cell) -> dict[str, Any]:
    """Run a cell in this process, whose backend is JAX.

    With several clones, each device gets its rows by
    `keras.distribution.DataParallel`.

    Returns:
        Dict with `ms`, `first` and `memory`, as those of other peers.
    """
    # What TensorFlow reads the data with is the CPU.
    tf.config.set_visible_devices([], "GPU")
    task = TASKS[cell.model]
    if cell.clones > 1:
        devices = keras.distribution.list_devices()[: cell.clones]
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(devices=devices)
        )
    data = make_data(task)
    before = resident.peak()
    keras.utils.set_random_seed(0)
    model = compiled(task.make())
    result = time_fit(model, data, cell, cell.steps or task.steps)
    return {**result, "memory": _peak_memory(before)}


def _peak_memory(before: int | None) -> float | None:
    """Return the MiB of the fullest GPU, else what the process grew by."""
    import jax

    gpus = [one for one in jax.devices() if one.platform != "cpu"]
    if gpus:
        peaks = [one.memory_stats()["peak_bytes_in_use"] for one in gpus]
        return max(peaks) / (1 << 20)
    grown = resident.grown(before)
    return None if grown is None else grown / (1 << 20)
