"""Which devices there are, which clone goes where, where variables live."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_clones import checks
from keras_clones.devices import hosts, virtual
from keras_clones.devices.config import DeploymentConfig
from keras_clones.devices.homes import Homes
from keras_clones.devices.naming import canonical_device


class PlacedClone(NamedTuple):
    """One copy of a model's computation: its name scope and its device."""

    scope: str
    device: str


def choose_config(
    num_clones: int | None,
    devices: Sequence[str | tf.config.LogicalDevice] | None,
    clone_on_cpu: bool,
) -> DeploymentConfig:
    """Return a valid config, with `num_clones=None` settled.

    It becomes the number of `devices`, else of GPUs, else of logical CPUs. In
    a cluster without GPUs, it is one a replica.
    """
    found = hosts.cluster()
    if num_clones is None and devices is None and found is not None:
        gpus = [] if clone_on_cpu else replica_devices("GPU")
        devices = gpus or [host.cpu for host in found.replicas]
        clone_on_cpu = False
    if num_clones is None:
        if isinstance(devices, Sequence) and not isinstance(devices, str):
            num_clones = len(devices) or 1
        elif clone_on_cpu:
            num_clones = 1
        else:
            num_clones = len(logical_devices("GPU") or logical_devices("CPU"))
    num_ps_tasks = 0 if found is None else len(found.ps)
    return DeploymentConfig(
        num_clones, clone_on_cpu, num_ps_tasks=num_ps_tasks, devices=devices
    )


def place_clones(config: DeploymentConfig) -> tuple[PlacedClone, ...]:
    """Give each clone of a config a device that there is.

    Raises:
        ValueError: If there are GPUs, but fewer than the config needs, or
            `config.devices` names a device there is not, or the config asks
            for other tasks than the cluster has. Also with another backend
            than TensorFlow, or in the scope of a strategy.
    """
    checks.check_backend()
    checks.check_no_strategy()
    _check_cluster(config)
    _check_devices_are_there(config)
    wanted = _wanted_devices(config)
    scopes = [f"clone_{i}" for i in range(len(wanted))]
    if len(wanted) == 1:
        scopes = [config.clone_scope(0)]
    return tuple(map(PlacedClone, scopes, wanted))


def main_home() -> str:
    """Return the device where data arrives and the optimizer runs."""
    return canonical_device("CPU:0")


def find_homes(config: DeploymentConfig, strategy: str | None) -> Homes:
    """Return where the variables of a model are at home.

    Args:
        config: `DeploymentConfig`, which `place_clones` has checked.
        strategy: String, one of `homes.STRATEGIES`, or `None`: on the
            parameter servers, greedily, or else on the controller.

    Raises:
        ValueError: If the strategy is for parameter servers, and there are
            none.
    """
    found, main = hosts.cluster(), main_home()
    ps = [] if found is None else list(found.ps[: config.num_ps_tasks])
    if strategy in ("greedy", "round_robin") and not ps:
        raise ValueError(
            f"`variables={strategy!r}` divides the variables among parameter "
            "servers, and there are none. Pass `variables='spread'` to divide "
            "them among the replicas, or leave it out. "
            f"Received: variables={strategy!r}"
        )
    if found is None or strategy == "controller":
        return Homes(main)
    if strategy == "spread":
        return Homes(main, [host.cpu for host in found.replicas], "spread")
    return Homes(main, [host.cpu for host in ps], strategy or "greedy")


def homes_of_rows(
    homes: Homes, clones: Sequence[PlacedClone]
) -> tuple[str, ...]:
    """Return the devices that rows of tables can be divided over.

    These are the parameter servers, if weights are at home there, or the CPUs
    of all replicas. Without a cluster they are the clones' CPUs.

    Args:
        homes: `Homes` of the weights.
        clones: Sequence of `PlacedClone`s.
    """
    found = hosts.cluster()
    if found is None:
        devices = [canonical_device(clone.device) for clone in clones]
        return tuple(dict.fromkeys(d for d in devices if "CPU" in d))
    if homes.devices != (homes.main,):
        return homes.devices
    return tuple(host.cpu for host in found.replicas)


def _check_cluster(config: DeploymentConfig) -> None:
    found = hosts.cluster()
    if found is None:
        if config.worker_device or not config.sync:
            raise ValueError(
                "Expected a cluster for a config of several replicas or of "
                "parameter servers: this process is connected to none. Call "
                "`keras_clones.connect()` first, at the top of the program. "
                f"Received: num_replicas={config.num_replicas}, "
                f"num_ps_tasks={config.num_ps_tasks}, sync={config.sync}"
            )
        return
    there = {"num_replicas": found.replicas, "num_ps_tasks": found.ps}
    least = {"num_replicas": 1, "num_ps_tasks": 0}
    for name, tasks in there.items():
        value = getattr(config, name)
        if value not in (least[name], len(tasks)):
            names = ", ".join(host.name for host in tasks) or "none"
            raise ValueError(
                f"Argument `{name}` must be {len(tasks)}, as many as the "
                f"cluster has ({names}), or {least[name]}. "
                f"Received: {name}={value}"
            )
    if not config.sync and config.num_replicas == 1:
        raise ValueError(
            "Argument `sync=False` lets several replicas step by themselves: "
            f"pass `num_replicas={len(found.replicas)}` with it. "
            "Received: sync=False, num_replicas=1"
        )
    if config.replica_id:
        raise ValueError(
            "Argument `replica_id` must be 0 in a cluster: one controller, "
            "replica 0, drives the clones of all replicas. "
            f"Received: replica_id={config.replica_id}"
        )


def _pools(config: DeploymentConfig) -> list[str | None]:
    """Return the replicas that get clones each, by the prefix of their devices.

    `None` stands for all of them together.
    """
    found = hosts.cluster()
    if found is None or config.num_replicas == 1:
        return [None]
    return [host.prefix for host in found.replicas]


def _wanted_devices(config: DeploymentConfig) -> list[str]:
    """Return one device a clone, those of a replica after each other."""
    count, on_cpu = config.num_clones, config.clone_on_cpu
    if config.devices is not None:
        return [config.clone_device(i) for i in range(count)]
    wanted: list[str] = []
    for pool in _pools(config):
        gpus = [] if on_cpu else replica_devices("GPU", pool)
        cpus = replica_devices("CPU", pool)
        if not gpus and not on_cpu and hosts.cluster() is None:
            virtual.tell_of_no_gpu(count, no_gpu(count))
        found = gpus or (cpus[:1] if on_cpu else cpus)
        wanted += [found[i % len(found)] for i in range(count)]
    return wanted


def _check_devices_are_there(config: DeploymentConfig) -> None:
    cluster = hosts.cluster()
    if config.devices is not None:
        there = logical_devices("CPU") + logical_devices("GPU")
        unknown = [d for d in config.devices if d not in there]
        whose = "this machine" if cluster is None else "the cluster"
        if unknown:
            raise ValueError(
                f"Argument `devices` names devices that {whose} does not "
                f"have: {unknown}. It has {short_names(there)}. "
                f"Received: devices={list(config.devices)}"
            )
        return
    for pool in _pools(config):
        gpus = replica_devices("GPU", pool)
        if gpus and len(gpus) < config.num_clones and not config.clone_on_cpu:
            whose = "this machine" if cluster is None else "the cluster"
            raise ValueError(
                f"Expected at most {len(gpus)} clones, one a GPU: "
                f"{pool or whose} has {short_names(gpus)}. "
                f"Received: num_clones={config.num_clones}. Pass "
                f"`num_clones={len(gpus)}`, or `clone_on_cpu=True` to run "
                "every clone on the CPU."
            )


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


def logical_devices(kind: str) -> list[str]:
    """Return the logical devices of a kind, such as `["/device:GPU:0"]`.

    In a cluster these are those of all its processes.
    """
    return [
        canonical_device(device)
        for device in tf.config.list_logical_devices(kind)
    ]


def replica_devices(kind: str, prefix: str | None = None) -> list[str]:
    """Return the devices of a kind that take clones, a replica after the other.

    Args:
        kind: String, `"CPU"` or `"GPU"`.
        prefix: String, what the names of one replica's devices begin with.
            Defaults to `None`: those of all replicas.
    """
    devices, found = logical_devices(kind), hosts.cluster()
    if found is None:
        return devices
    prefixes = [host.prefix for host in found.replicas]
    return [
        device
        for one in ([prefix] if prefix else prefixes)
        for device in devices
        if device.startswith(f"{one}/")
    ]
