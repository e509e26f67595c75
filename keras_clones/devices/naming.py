"""Names of devices and of jobs, in one form, or what is wrong with them."""

import re
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_clones.devices import hosts

# What TensorFlow takes for the name of a job.
_JOB = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


# What TensorFlow calls this machine, which is also what it means by nothing.
_HERE = {"job": (None, "localhost"), "replica": (None, 0), "task": (None, 0)}


def check_job_name(name: str, value: str) -> None:
    """Say what is wrong with the name of a job, if anything is."""
    wanted = (
        f"Argument `{name}` must be a string of letters, digits and "
        "underscores that begins with a letter, such as 'worker'. "
        f"Received: {name}={value!r}"
    )
    if not isinstance(value, str):
        raise TypeError(wanted)
    if not _JOB.fullmatch(value):
        raise ValueError(wanted)


def check_devices(
    devices: Sequence[str | tf.config.LogicalDevice],
) -> tuple[str, ...]:
    """Return devices in the form `/device:GPU:0`, each once."""
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise TypeError(
            "Argument `devices` must be a list of device strings, such as "
            f"['GPU:0', 'GPU:1']. Received: devices={devices!r}"
        )
    if not devices:
        raise ValueError(
            "Argument `devices` must name at least one device. "
            f"Received: devices={devices!r}"
        )
    canonical = tuple(canonical_device(device) for device in devices)
    repeated = sorted({d for d in canonical if canonical.count(d) > 1})
    if repeated:
        raise ValueError(
            "Argument `devices` must name each device once. "
            f"Received: devices={list(devices)!r}, which repeats {repeated}. "
            "`use_virtual_devices` makes several devices of one."
        )
    return canonical


def canonical_device(device: str | tf.config.LogicalDevice) -> str:
    """Return a device in the one form that this package writes it in.

    That is `/device:GPU:1` on one machine. In a cluster it also says which
    process has it: `/job:worker/replica:0/task:1/device:GPU:1`.

    Args:
        device: String, in any form that `tf.DeviceSpec.from_string` takes,
            such as `"gpu:1"` or `"/job:localhost/device:GPU:1"`, or a
            `tf.config.LogicalDevice`. Without an index it means the first,
            without a job this process's.

    Raises:
        ValueError: If it is no CPU or GPU, or is of another process and there
            is no cluster.
    """
    spec = _device_spec(device)
    if spec is None:
        raise ValueError(
            "A device must be a CPU or a GPU, as a string such as 'GPU:0' or "
            "'/device:CPU:1', or as one of `tf.config.list_logical_devices()`. "
            f"Received: {device!r}"
        )
    name = f"/device:{spec.device_type}:{spec.device_index or 0}"
    here = all(getattr(spec, part) in known for part, known in _HERE.items())
    if here or hosts.cluster() is not None:
        return hosts.host_of(spec.to_string()) + name
    raise ValueError(
        "A device must be one of this machine, such as 'GPU:0' or "
        "'/job:localhost/device:GPU:0', as this process is connected to no "
        "cluster. Call `keras_clones.connect()` first, at the top of the "
        f"program. Received: {device!r}"
    )


def _device_spec(device: Any) -> tf.DeviceSpec | None:
    """Return what a device is called, if it is called that of a CPU or GPU."""
    if isinstance(device, tf.config.LogicalDevice):
        device = device.name
    # A star stands for any device, and one is to be named.
    if not isinstance(device, str) or "*" in device:
        return None
    try:
        spec = tf.DeviceSpec.from_string(device)
    except ValueError:
        return None
    known = spec.device_type in ("CPU", "GPU")
    return spec if known and (spec.device_index or 0) >= 0 else None
