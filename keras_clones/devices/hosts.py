"""The hosts of the cluster that this process belongs to, if to any."""

from typing import NamedTuple

import tensorflow as tf

from keras_clones import _tf

# A process of these jobs offers its devices to clones, and may be the first.
_REPLICA_JOBS = ("chief", "worker")
_PS_JOB = "ps"


class Host(NamedTuple):
    """One process of a cluster.

    Attributes:
        job: String, the name of its job, such as `"worker"`.
        task: Integer, its index in the job.
        address: String, such as `"10.0.0.1:2222"`.
    """

    job: str
    task: int
    address: str

    @property
    def prefix(self) -> str:
        """What the names of its devices begin with."""
        return f"/job:{self.job}/replica:0/task:{self.task}"

    @property
    def cpu(self) -> str:
        """Its first CPU, as a device string."""
        return f"{self.prefix}/device:CPU:0"

    @property
    def name(self) -> str:
        """What it is called where it is printed, such as `"worker 1"`."""
        return f"{self.job} {self.task}"


class Cluster(NamedTuple):
    """The processes of a cluster, by what they do.

    Attributes:
        controller: `Host` that this process is: it drives the clones.
        replicas: Tuple of the `Host`s whose devices take clones, the
            controller first.
        ps: Tuple of the `Host`s that are home to variables.
    """

    controller: Host
    replicas: tuple[Host, ...]
    ps: tuple[Host, ...]

    @property
    def hosts(self) -> tuple[Host, ...]:
        """All processes, those with clones first."""
        return self.replicas + self.ps


def cluster() -> Cluster | None:
    """Return the cluster that TensorFlow is connected to, `None` without."""
    definition = _tf.server_definition()
    if definition is None:
        return None
    tasks = [
        Host(job.name, index, address)
        for job in definition.cluster.job
        for index, address in sorted(job.tasks.items())
    ]
    here = (definition.job_name, definition.task_index)
    controller = next(
        (task for task in tasks if (task.job, task.task) == here),
        Host(*here, ""),
    )
    others = sorted(
        task
        for task in tasks
        if task.job in _REPLICA_JOBS and task != controller
    )
    ps = sorted(task for task in tasks if task.job == _PS_JOB)
    return Cluster(controller, (controller, *others), tuple(ps))


def host_of(device: str) -> str:
    """Return what the names of all devices of a device's host begin with.

    Args:
        device: Device string. Without a job it is one of this host, `""`
            where there is no cluster.
    """
    spec = tf.DeviceSpec.from_string(device)
    if spec.job in (None, "localhost"):
        found = cluster()
        return found.controller.prefix if found else ""
    return f"/job:{spec.job}/replica:0/task:{spec.task or 0}"


def host_name(prefix: str) -> str:
    """Return what a host is called, such as `"worker 1"`."""
    spec = tf.DeviceSpec.from_string(prefix)
    return f"{spec.job} {spec.task}" if spec.job else "this machine"
