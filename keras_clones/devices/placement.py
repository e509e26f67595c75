"""Which devices there are, which clone goes where, variables to their home."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras, checks
from keras_clones.devices.config import DeploymentConfig
from keras_clones.devices.naming import canonical_device
from keras_clones.warn import warn

# Whoever was told once, or made logical devices, knows that there is no GPU.
_no_gpu_is_known = False


class Clone(NamedTuple):
    """One copy of a model's computation: its name scope and its device."""

    scope: str
    device: str


def use_virtual_devices(
    n: int, device_type: str = "CPU", memory_limit: int | None = None
) -> None:
    """Split the first device of a type into `n` logical devices.

    Call it before TensorFlow starts its devices: first thing in a program or
    in a test suite's `conftest.py`. Logical CPU devices show how a model
    behaves on several devices where there is only one; they share its cores,
    so they do not make it faster.

    Args:
        n: Integer, how many logical devices to make, at least 1.
        device_type: String, `"CPU"` or `"GPU"`. Defaults to `"CPU"`.
        memory_limit: Integer, MiB of memory a logical GPU gets. Must be given
            for `"GPU"`, and only there. Defaults to `None`.

    Raises:
        RuntimeError: If TensorFlow has started its devices already.
        ValueError: If there is no such device, or an argument is out of
            range.

    Example:

    ```python
    from keras_clones import use_virtual_devices

    use_virtual_devices(4)
    ```
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(
            f"Argument `n` must be a positive integer. Received: n={n!r}"
        )
    if device_type not in ("CPU", "GPU"):
        raise ValueError(
            "Argument `device_type` must be 'CPU' or 'GPU'. "
            f"Received: device_type={device_type!r}"
        )
    if (memory_limit is None) == (device_type == "GPU"):
        raise ValueError(
            "Argument `memory_limit` (MiB a logical device) must be given for "
            "'GPU', and only there. "
            f"Received: device_type={device_type!r}, "
            f"memory_limit={memory_limit!r}"
        )
    physical = tf.config.list_physical_devices(device_type)
    if not physical:
        raise ValueError(
            f"There is no {device_type} to split on this machine. "
            f"Received: device_type={device_type!r}"
        )
    global _no_gpu_is_known
    logical = tf.config.LogicalDeviceConfiguration(memory_limit=memory_limit)
    try:
        tf.config.set_logical_device_configuration(physical[0], [logical] * n)
    except RuntimeError as error:
        raise RuntimeError(
            "`use_virtual_devices` must be called before TensorFlow starts "
            "its devices, that is before the first tensor, variable or model "
            "is made. Move the call to the top of the program."
        ) from error
    _no_gpu_is_known = True


def choose_config(
    num_clones: int | None,
    devices: Sequence[str | tf.config.LogicalDevice] | None,
    clone_on_cpu: bool,
) -> DeploymentConfig:
    """Return a valid config, with `num_clones=None` settled.

    It becomes the number of `devices`, else of GPUs, else of logical CPUs.
    """
    if num_clones is None:
        if isinstance(devices, Sequence) and not isinstance(devices, str):
            num_clones = len(devices) or 1
        elif clone_on_cpu:
            num_clones = 1
        else:
            num_clones = len(logical_devices("GPU") or logical_devices("CPU"))
    return DeploymentConfig(num_clones, clone_on_cpu, devices=devices)


def place_clones(config: DeploymentConfig) -> tuple[Clone, ...]:
    """Give each clone of a config a device that this machine has.

    Raises:
        NotImplementedError: If the config asks for more than this machine.
        ValueError: If there are GPUs, but fewer than the config needs, or
            `config.devices` names a device there is not. Also with another
            backend than TensorFlow, or in the scope of a strategy.
    """
    checks.check_backend()
    checks.check_no_strategy()
    if config.worker_device:
        raise NotImplementedError(
            "Clones run on one machine so far: a config of several replicas "
            "or of parameter servers gives device strings, and no more. "
            f"Received: num_replicas={config.num_replicas}, "
            f"num_ps_tasks={config.num_ps_tasks}"
        )
    cpus, gpus = logical_devices("CPU"), logical_devices("GPU")
    _check_devices_are_there(config, cpus, gpus)
    indices = range(config.num_clones)
    wanted = [config.clone_device(i) for i in indices]
    if not gpus and not config.clone_on_cpu and config.devices is None:
        _warn_of_no_gpu(config.num_clones)
        wanted = [cpus[i % len(cpus)] for i in indices]
    return tuple(Clone(config.clone_scope(i), wanted[i]) for i in indices)


def _check_devices_are_there(
    config: DeploymentConfig, cpus: list[str], gpus: list[str]
) -> None:
    if config.devices is not None:
        unknown = [d for d in config.devices if d not in cpus + gpus]
        if unknown:
            raise ValueError(
                "Argument `devices` names devices that this machine does not "
                f"have: {unknown}. It has {short_names(cpus + gpus)}. "
                f"Received: devices={list(config.devices)}"
            )
    elif gpus and len(gpus) < config.num_clones and not config.clone_on_cpu:
        raise ValueError(
            f"Expected at most {len(gpus)} clones, one a GPU: this machine "
            f"has {short_names(gpus)}. "
            f"Received: num_clones={config.num_clones}. Pass "
            f"`num_clones={len(gpus)}`, or `clone_on_cpu=True` to run every "
            "clone on the CPU."
        )


def _warn_of_no_gpu(num_clones: int) -> None:
    """Warn once that clones share a processor, if that may come unexpected."""
    global _no_gpu_is_known
    if num_clones > 1 and not _no_gpu_is_known:
        _no_gpu_is_known = True
        warn(no_gpu(num_clones))


def no_gpu(num_clones: int) -> str:
    """Return what to know of clones where there is no GPU."""
    return (
        f"There is no GPU: {num_clones} clone(s) run on "
        f"{short_names(logical_devices('CPU'))}. They train the same model, "
        "but they share the processor's cores and do not make it faster. "
        "`clone_on_cpu=True` says that this is meant."
    )


def short_name(device: str) -> str:
    """Return a device as it is printed, such as `"GPU:1"`.

    Args:
        device: String, in any form that `tf.DeviceSpec.from_string` takes.
            One of another job or task keeps those in front.
    """
    spec = tf.DeviceSpec.from_string(device)
    name = f"{spec.device_type}:{spec.device_index or 0}"
    if spec.job in (None, "localhost"):
        return name
    task = "" if spec.task is None else f"/task:{spec.task}"
    return f"/job:{spec.job}{task}/{name}"


def short_names(devices: Iterable[str]) -> str:
    """Return devices as they are printed, one after the other."""
    return ", ".join(short_name(device) for device in devices)


def same_device(device: str, other: str) -> bool:
    """Say whether two device strings, short or full, mean one device."""
    one, two = (tf.DeviceSpec.from_string(d) for d in (device, other))
    return (one.device_type, one.device_index) == (
        two.device_type,
        two.device_index,
    )


def move_variables(
    variables: Iterable[keras.Variable], home: str
) -> list[keras.Variable]:
    """Give each variable that lives elsewhere a new home, value and all.

    A TensorFlow variable cannot move, so the Keras variable gets a new one.

    Returns:
        The Keras variables that were moved.
    """
    moved = [v for v in variables if not same_device(v.value.device, home)]
    for variable in moved:
        old = variable.value
        with tf.init_scope(), tf.device(home):
            new = tf.Variable(
                old.read_value(),
                trainable=old.trainable,
                name=variable.name,
                dtype=old.dtype,
                aggregation=old.aggregation,
                synchronization=old.synchronization,
            )
        _keras.set_tf_variable(variable, new)
    return moved


def logical_devices(kind: str) -> list[str]:
    """Return the logical devices of a kind, such as `["/device:GPU:0"]`."""
    return [
        canonical_device(device)
        for device in tf.config.list_logical_devices(kind)
    ]
