"""Which processes a cluster has and which of them this one is, as it is told.

Pure: nothing is asked of a network or of TensorFlow.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from keras_clones.cluster.slurm import slurm_step
from keras_clones.devices.hosts import Host

# In the order in which the controller is looked for.
_JOBS = ("chief", "worker", "ps")
# Of TF's Estimators: it takes no part in a training.
EVALUATOR = "evaluator"
_EXAMPLE = (
    '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


class Spec(NamedTuple):
    """The processes of a cluster, and which of them this one is.

    Attributes:
        hosts: Tuple of `Host`s, by job and then by index: `chief`, `worker`,
            `ps`.
        here: `Host` that this process is.
    """

    hosts: tuple[Host, ...]
    here: Host

    @property
    def controller(self) -> Host:
        """The process that drives the clones: the chief, or else worker 0."""
        return self.hosts[0]

    @property
    def others(self) -> tuple[Host, ...]:
        """All processes but the controller."""
        return self.hosts[1:]

    @property
    def jobs(self) -> dict[str, list[str]]:
        """The addresses of each job, as `tf.train.ClusterSpec` takes them."""
        found: dict[str, list[str]] = {}
        for host in self.hosts:
            found.setdefault(host.job, []).append(host.address)
        return found


def resolve(
    cluster: Mapping[str, Any] | str | None, environ: Mapping[str, str]
) -> Spec | None:
    """Return the cluster that a process is told of.

    Args:
        cluster: Dict of the form that `TF_CONFIG` has, or that as a JSON
            string. With `None`, `TF_CONFIG` of the environment, or else the
            variables of a Slurm step.
        environ: Mapping of the names of environment variables to strings.

    Returns:
        A `Spec`, or `None` where there is no cluster or only one process.

    Raises:
        ValueError: If something is missing, malformed or contradicts itself.
    """
    if cluster is not None:
        return _read(cluster, "Argument `cluster`")
    if config := environ.get("TF_CONFIG", "").strip():
        return _read(config, "TF_CONFIG")
    step = slurm_step(environ)
    return None if step is None else _read(step, "The Slurm step")


def _read(config: Mapping[str, Any] | str, source: str) -> Spec | None:
    """Return what a configuration says, once it is known to be right."""
    config = _parsed(config, source)
    if not config:
        return None
    for part in ("cluster", "task"):
        if not isinstance(config.get(part), Mapping):
            raise _error(source, f'a dict under "{part}"', config)
    hosts = _hosts(config, source)
    here = _here(config, source, hosts)
    if len(hosts) == 1 and here == hosts[0]:
        return None
    return Spec(hosts, here)


def _parsed(config: Mapping[str, Any] | str, source: str) -> Mapping[str, Any]:
    value: Any = config
    if isinstance(config, str):
        try:
            value = json.loads(config)
        except json.JSONDecodeError as error:
            raise _error(source, f"JSON ({error})", config) from error
    if not isinstance(value, Mapping):
        raise _error(source, "a dict", config)
    return value


def _hosts(config: Mapping[str, Any], source: str) -> tuple[Host, ...]:
    jobs = {job: v for job, v in config["cluster"].items() if job != EVALUATOR}
    unknown = sorted(set(jobs) - set(_JOBS))
    if unknown:
        raise _error(source, f"jobs of {list(_JOBS)}, not {unknown}", config)
    for job, addresses in jobs.items():
        if not isinstance(addresses, list | tuple):
            raise _error(source, f'a list of addresses for "{job}"', config)
        for address in addresses:
            if not _is_address(address):
                wanted = "addresses of the form host:port, with a port of 1 "
                wanted += f"to 65535, not {address!r}"
                raise _error(source, wanted, config)
    hosts = tuple(
        Host(job, index, address)
        for job in _JOBS
        for index, address in enumerate(jobs.get(job, ()))
    )
    if not hosts or hosts[0].job == "ps":
        wanted = 'a "worker" or a "chief", which is the controller'
        raise _error(source, wanted, config)
    if len(jobs.get("chief", ())) > 1:
        raise _error(source, 'one "chief" at most', config)
    found = [host.address for host in hosts]
    repeated = sorted({one for one in found if found.count(one) > 1})
    if repeated:
        wanted = f"an address of its own for each task, not {repeated} twice"
        raise _error(source, wanted, config)
    return hosts


def _here(
    config: Mapping[str, Any], source: str, hosts: tuple[Host, ...]
) -> Host:
    job, index = config["task"].get("type"), config["task"].get("index")
    if job is None or index is None:
        part = "type" if job is None else "index"
        raise _error(source, f'"{part}" under "task"', config)
    if job == EVALUATOR:
        return Host(EVALUATOR, 0, "")
    tasks = [host for host in hosts if host.job == job]
    if not tasks:
        there = sorted({host.job for host in hosts})
        raise _error(source, f'one of {there} as the "type" of "task"', config)
    whole = isinstance(index, int) and not isinstance(index, bool)
    if not whole or not 0 <= index < len(tasks):
        wanted = f'an integer of 0 to {len(tasks) - 1} as the "index" of '
        wanted += f'"task": "cluster" has {len(tasks)} "{job}"'
        raise _error(source, wanted, config)
    return tasks[index]


def _is_address(address: Any) -> bool:
    if not isinstance(address, str):
        return False
    host, _, port = address.rpartition(":")
    # The address of IPv6 stands in brackets, since it has colons itself.
    plain = ":" not in host or (host[0] == "[" and host[-1] == "]")
    named = bool(host) and plain and "/" not in host and " " not in host
    digits = port.isascii() and port.isdigit()
    return named and digits and 0 < int(port) < 65536


def _error(source: str, wanted: str, config: Any) -> ValueError:
    received = (
        config if isinstance(config, str) else json.dumps(config, default=repr)
    )
    if len(received) > 1000:
        received = received[:1000] + "..."
    return ValueError(
        f"{source} must have {wanted}. For example: {_EXAMPLE}. "
        f"Received: {received}"
    )
