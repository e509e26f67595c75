"""Starts the tasks of a cluster on this machine, and ends them all."""

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from keras_clones.cluster.processes import Guard, Process, say

# What `timeout`, the command, ends with.
TIMED_OUT = 124
RESTART = "KERAS_CLONES_RESTART"
# Tasks that the controller no longer needs end by themselves within seconds.
_GRACE = 15.0
_PAUSE = 0.05
# Below the ports that systems give to outgoing connections, which could take
# one before its task has started.
_PORTS = range(10_000, 32_768)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Run(NamedTuple):
    """What is to be run.

    Attributes:
        command: Tuple of strings, what each task runs.
        replicas: Integer, how many tasks are workers.
        ps: Integer, how many are parameter servers.
        restarts: Integer, how often all are started again when one fails.
        seconds: Float, after how long all are ended, `None` for never.
        gpus: Tuple of strings, the GPUs to be divided among the workers.
    """

    command: tuple[str, ...]
    replicas: int
    ps: int = 0
    restarts: int = 0
    seconds: float | None = None
    gpus: tuple[str, ...] = ()


def launch(run: Run) -> int:
    """Run a command in every task of a cluster.

    Args:
        run: `Run`.

    Returns:
        Integer, 0 or the exit code of the task that failed first: 128 and the
        number of the signal if one ended it, or if one ended this.
    """
    deadline = None if run.seconds is None else time.monotonic() + run.seconds
    with _signals() as caught, Guard() as guard:
        for attempt in range(run.restarts + 1):
            if attempt:
                say(f"restart {attempt} of {run.restarts}")
            processes: list[Process] = []
            try:
                for name, environ in tasks(run, attempt, os.environ):
                    process = Process(name, run.command, environ)
                    processes.append(process)
                    guard.add(process)
                code = _follow(processes, caught, deadline)
            finally:
                _end(processes, caught)
                for process in processes:
                    guard.drop(process)
            if caught:
                return 128 + caught[0]
            if code in (0, TIMED_OUT):
                break
    return code


def tasks(
    run: Run, attempt: int, environ: Mapping[str, str]
) -> list[tuple[str, dict[str, str]]]:
    """Return the name and the environment of each task, the controller first.

    Args:
        run: `Run`.
        attempt: Integer, how often the tasks were restarted.
        environ: Mapping, the environment that tasks get besides.
    """
    count = run.replicas + run.ps
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    cluster = {"worker": addresses[: run.replicas]}
    if run.ps:
        cluster["ps"] = addresses[run.replicas :]
    found = []
    for job, job_addresses in cluster.items():
        for index in range(len(job_addresses)):
            config = {
                "cluster": cluster,
                "task": {"type": job, "index": index},
            }
            own = {
                **environ,
                "TF_CONFIG": json.dumps(config),
                "PYTHONUNBUFFERED": "1",
                RESTART: str(attempt),
            }
            if run.gpus:
                share = _share(run, index) if job == "worker" else ()
                own["CUDA_VISIBLE_DEVICES"] = ",".join(share) or "-1"
            found.append((f"{job} {index}", own))
    return found


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens at."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(found) == count:
            break
        try:
            # TensorFlow's server takes the port on every interface.
            socket.create_server(("", port)).close()
        except OSError:
            continue
        found.append(port)
    return found


def _share(run: Run, index: int) -> Sequence[str]:
    """Return the GPUs of one worker."""
    first, last = (
        part * len(run.gpus) // run.replicas for part in (index, index + 1)
    )
    return run.gpus[first:last]


def _follow(
    processes: list[Process], caught: list[int], deadline: float | None
) -> int:
    """Return the exit code of the run once it is over."""
    controller = processes[0]
    over = None
    while not caught:
        now = time.monotonic()
        for process in processes:
            if code := process.poll():
                say(f"{process.name} ended with {code}: ending all tasks")
                return code
        left = [process for process in processes if process.poll() is None]
        if not left:
            return 0
        if deadline is not None and now > deadline:
            say("the time is up: ending all tasks")
            return TIMED_OUT
        if controller.poll() == 0:
            over = over or now
            if now > over + _GRACE:
                names = ", ".join(process.name for process in left)
                say(f"{controller.name} is done: ending {names}")
                return 0
        time.sleep(_PAUSE)
    return 128 + caught[0]


def _end(processes: list[Process], caught: list[int]) -> None:
    """End all processes, with what they started: kindly, and then not."""
    seen = len(caught)
    for process in processes:
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + 5.0
    while any(process.is_left() for process in processes):
        # Who asks for an end twice does not want to wait for it.
        if time.monotonic() > deadline or len(caught) > seen:
            break
        time.sleep(_PAUSE)
    for process in processes:
        process.signal(signal.SIGKILL)
    for process in processes:
        process.close()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Give the signals that would end this process, as they come."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: caught.append(n))
        for number in _ENDING
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.stdout.flush()
