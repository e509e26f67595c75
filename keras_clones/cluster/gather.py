"""The controller waits for every task of its cluster, and looks at each."""

import contextlib
import socket
import time
from typing import Any

from keras_clones.cluster import hello
from keras_clones.cluster.resolve import Spec
from keras_clones.devices.hosts import Host

# A task that has connected says hello at once.
_HELLO_SECONDS = 5.0
# An address is looked at for so long even when the time is nearly up.
_LEAST_SECONDS = 1.0


def gather(spec: Spec, timeout: float) -> dict[Host, socket.socket]:
    """Return a connection to each task, once all are there and alike.

    Args:
        spec: `Spec` of the cluster. This process is the controller.
        timeout: Float, seconds to wait for all tasks together.

    Raises:
        OSError: If the port of this process is in use.
        TimeoutError: If a task does not answer.
        RuntimeError: If a task has other versions or another cluster.
    """
    deadline = time.monotonic() + timeout
    lines: dict[Host, socket.socket] = {}
    try:
        with hello.listen(spec.controller) as listener:
            said = _wait_for_all(spec, listener, lines, deadline)
        _check_all_there(spec, lines, timeout)
        _check_alike(spec, said)
        _check_answers(spec, deadline, timeout)
        for host in spec.others:
            hello.send(lines[host], go=True)
    except BaseException as error:
        refuse(lines, error)
        raise
    return lines


def refuse(lines: dict[Host, socket.socket], error: BaseException) -> None:
    """Tell tasks that they are not needed, and why."""
    for line in lines.values():
        with contextlib.suppress(OSError):
            hello.send(line, refused=str(error) or type(error).__name__)
        line.close()


def _wait_for_all(
    spec: Spec,
    listener: socket.socket,
    lines: dict[Host, socket.socket],
    deadline: float,
) -> dict[Host, dict[str, Any]]:
    """Keep a connection of each task that says hello; return what they say."""
    tasks: dict[Any, Host] = {(h.job, h.task): h for h in spec.others}
    said: dict[Host, dict[str, Any]] = {}
    while len(lines) < len(tasks):
        if (left := deadline - time.monotonic()) <= 0:
            break
        listener.settimeout(left)
        try:
            line, _ = listener.accept()
            line.settimeout(_HELLO_SECONDS)
            message = hello.receive(line) or {}
        except OSError:
            continue
        host = tasks.get((message.get("job"), message.get("task")))
        if host is None:
            line.close()
            continue
        # A task that was restarted meanwhile takes the place of the first.
        if host in lines:
            lines[host].close()
        hello.keep_alive(line)
        lines[host], said[host] = line, message
    return said


def _check_all_there(
    spec: Spec, lines: dict[Host, socket.socket], timeout: float
) -> None:
    missing = [host for host in spec.others if host not in lines]
    if missing:
        raise TimeoutError(
            "Expected every task of the cluster to come to "
            f"{spec.controller.name} ({spec.controller.address}) within "
            f"{timeout:g} seconds. Received: nothing from "
            f"{hello.named(missing)}. Start the same script, or `python -m "
            "keras_clones serve`, in each, see that they reach this address, "
            "or raise `timeout`."
        )


def _check_alike(spec: Spec, said: dict[Host, dict[str, Any]]) -> None:
    """Refuse tasks that have other versions, or know of another cluster."""
    own = hello.versions()
    other = []
    for host in spec.others:
        theirs = said[host].get("versions") or {}
        differ = [
            f"{n} {theirs.get(n)}" for n in own if theirs.get(n) != own[n]
        ]
        if differ:
            other.append(f"{hello.named([host])} has {', '.join(differ)}")
    if other:
        here = ", ".join(f"{name} {version}" for name, version in own.items())
        raise RuntimeError(
            "Expected every task to have the versions that "
            f"{spec.controller.name} has: {here}. Received: "
            f"{'; '.join(other)}. Install the same in all."
        )
    for host in spec.others:
        if (theirs := said[host].get("jobs")) != spec.jobs:
            raise RuntimeError(
                "Expected every task to be told of the same cluster, which "
                f"is {spec.jobs} in {spec.controller.name}. Received: "
                f"{theirs} in {hello.named([host])}. Give all the same "
                "`cluster` in `TF_CONFIG`."
            )


def _check_answers(spec: Spec, deadline: float, timeout: float) -> None:
    """Refuse addresses where no server of TensorFlow answers."""
    silent = []
    for host in spec.others:
        left = max(deadline - time.monotonic(), _LEAST_SECONDS)
        if not hello.answers(host.address, left):
            silent.append(host)
    if silent:
        raise TimeoutError(
            f"Expected {spec.controller.name} to reach TensorFlow's server in "
            f"every task within {timeout:g} seconds. Received: no answer from "
            f"{hello.named(silent)}, which did come here themselves. Check "
            "that each address leads to its task from here, and no firewall "
            "is between."
        )
