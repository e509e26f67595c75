"""`connect`: makes a script's process the controller, or a task that serves."""

import contextlib
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from keras_clones import _tf
from keras_clones.checks import check_backend
from keras_clones.cluster import hello, watch
from keras_clones.cluster.gather import gather, refuse
from keras_clones.cluster.join import check_not_stuck, join
from keras_clones.cluster.resolve import EVALUATOR, Spec, resolve
from keras_clones.cluster.serve import serve
from keras_clones.devices import hosts
from keras_clones.devices.hosts import Cluster, Host
from keras_clones.warn import warn

# The controller's connections to its tasks, by whose end they know of its own.
_lines: dict[Host, socket.socket] = {}
# The cluster that `connect` connected to, if to any: there can be but one.
_made: list[Cluster] = []


def connect(
    cluster: Mapping[str, Any] | str | None = None,
    *,
    timeout: float = 60.0,
    exit: bool = True,
) -> Cluster | None:
    """Connect this process to the cluster that it belongs to, if to any.

    Every process of a cluster runs the same script, and calls this before
    the first tensor, variable or model is made. In the controller (the task
    `chief`, or else worker 0) it waits for all other tasks, and the script
    goes on, with the devices of all. In every other task it serves the
    controller until that is done or gone, and then ends the program. Where
    there is no cluster it does nothing, so the script runs alone, too.

    A server of TensorFlow listens on all network interfaces, without
    authentication: keep a cluster in a private network.

    Args:
        cluster: Dict of the form that `TF_CONFIG` has, such as `{"cluster":
            {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"], "ps": [...]},
            "task": {"type": "worker", "index": 0}}`, or that as a JSON
            string. Defaults to `None`: what the environment variable
            `TF_CONFIG` has, or else the tasks of this Slurm step.
        timeout: Float, seconds to wait for the other tasks to come, for
            TensorFlow to connect to them, and in a task for the controller.
            Defaults to `60.0`.
        exit: Boolean, whether a task that has served ends the program
            (`SystemExit`, code 0). Defaults to `True`. With `False` it
            returns `None`.

    Returns:
        A `Cluster` in the process that is to go on, whose `controller` is
        this process, with `replicas` and `ps`. Without a cluster, one of this
        process alone. `None` in a task that has served.

    Raises:
        ValueError: If `cluster` or `TF_CONFIG` is malformed.
        RuntimeError: If TensorFlow has started its devices already, is
            connected to another cluster, or if tasks have other versions of
            TensorFlow, Keras or this package.
        TimeoutError: If a task, or the controller, does not answer.
        OSError: If the port of this process is in use.

    Example:

    ```python
    import keras_clones

    cluster = keras_clones.connect()
    print(len(cluster.replicas), "replicas")
    ```
    """
    check_backend()
    _check_timeout(timeout)
    check_not_stuck()
    spec = resolve(cluster, os.environ)
    connected = hosts.cluster()
    if spec is None:
        return connected or _alone()
    if connected is not None:
        return _again(spec, connected)
    if spec.here == spec.controller:
        return _lead(spec, timeout)
    if spec.here.job == EVALUATOR:
        warn(
            "There is nothing to do for an evaluator: the controller "
            "evaluates, on the devices of all. Leave the task out."
        )
    else:
        serve(spec, timeout)
    if exit:
        sys.exit(0)
    return None


def disconnect() -> None:
    """Tell the tasks that serve this process that it is done.

    They know by themselves when the process ends. Call it where the process
    lives on: at the end of a function that Ray Train runs, or in a notebook.
    A process connects once: afterwards nothing runs on the other tasks.
    Without a cluster it does nothing.

    Raises:
        RuntimeError: If TensorFlow is connected to a cluster that `connect`
            did not connect it to.

    Example:

    ```python
    import keras_clones

    keras_clones.connect()
    keras_clones.disconnect()
    ```
    """
    found = hosts.cluster()
    if found is not None and found not in _made:
        raise RuntimeError(
            "Expected a cluster that `keras_clones.connect()` connected to. "
            f"Received: {found}, which TensorFlow was connected to otherwise. "
            "End its servers the way they were started."
        )
    watch.stop()
    for line in _lines.values():
        # A task may have ended before.
        with contextlib.suppress(OSError):
            hello.send(line, done=True)
        line.close()
    _lines.clear()


def _lead(spec: Spec, timeout: float) -> Cluster:
    """Wait for all tasks, and connect TensorFlow to them."""
    if _tf.has_devices():
        raise RuntimeError(
            "Expected `keras_clones.connect()` before TensorFlow starts its "
            "devices, which it does with the first tensor, variable or model, "
            "and which cannot join a cluster afterwards. Received: a call "
            "after that. Move it up, to right after the imports."
        )
    lines = gather(spec, timeout)
    hello.warn_of_open_port(spec.here)
    try:
        join(spec, lines, timeout)
    except BaseException as error:
        refuse(lines, error)
        raise
    _lines.update(lines)
    watch.start(lines, timeout)
    found = hosts.cluster() or _alone()
    _made.append(found)
    return found


def _again(spec: Spec, connected: Cluster) -> Cluster:
    """Return the cluster there is, if it is the one that is asked for."""
    same = sorted(connected.hosts) == sorted(spec.hosts)
    is_over = connected in _made and not _lines
    if same and connected.controller == spec.here and not is_over:
        return connected
    over = ", and disconnected from it since" if is_over else ""
    raise RuntimeError(
        "Expected `keras_clones.connect()` to be told of the cluster that "
        "this process is connected to, since it can connect to one only, and "
        f"once. Received: {spec.jobs} as {spec.here.name}, connected to "
        f"{connected.hosts} as {connected.controller.name}{over}. Start a new "
        "process."
    )


def _alone() -> Cluster:
    here = Host("localhost", 0, "")
    return Cluster(here, (here,), ())


def _check_timeout(timeout: float) -> None:
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not number or not timeout > 0:
        raise ValueError(
            "Argument `timeout` must be a positive number of seconds. "
            f"Received: timeout={timeout!r}"
        )
