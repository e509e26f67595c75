"""A task that serves: its devices are the controller's until that is done."""

import socket
import time
from typing import Any

import tensorflow as tf

from keras_clones import _tf
from keras_clones.cluster import hello
from keras_clones.cluster.resolve import Spec

# Between two attempts to reach the controller, and two looks at its port.
_PAUSE = 0.2
_LOOK_SECONDS = 5.0
# TensorFlow cannot stop a server, so the one of a task serves it again.
_servers: dict[Spec, Any] = {}


def serve(spec: Spec, timeout: float) -> None:
    """Serve the controller of a cluster until it is done or gone.

    Args:
        spec: `Spec` of the cluster. This process is not the controller.
        timeout: Float, seconds to wait for the controller at first.

    Raises:
        OSError: If the port of this process is in use.
        TimeoutError: If the controller does not come up.
        RuntimeError: If the controller refuses this task.
    """
    _start_server(spec)
    with _greet(spec, timeout) as line:
        _wait(spec, line)


def _start_server(spec: Spec) -> None:
    """Start TensorFlow's server, with the devices that this process has."""
    if spec in _servers:
        return
    # Servers of TensorFlow may share a port in silence.
    hello.listen(spec.here).close()
    hello.warn_of_open_port(spec.here)
    _servers[spec] = tf.distribute.Server(
        tf.train.ClusterSpec(spec.jobs),
        job_name=spec.here.job,
        task_index=spec.here.task,
        protocol="grpc",
        config=_tf.session_config(),
    )


def _greet(spec: Spec, timeout: float) -> socket.socket:
    """Return a connection to the controller, which has said to go on."""
    deadline = time.monotonic() + timeout
    heard: str = "nothing"
    while (left := deadline - time.monotonic()) > 0:
        try:
            return _try_to_greet(spec, left, timeout)
        except OSError as error:
            heard = str(error)
        time.sleep(min(_PAUSE, max(deadline - time.monotonic(), 0)))
    controller = spec.controller
    raise TimeoutError(
        f"Expected {controller.name}, the controller, to answer at "
        f"{controller.address} within {timeout:g} seconds. Received: {heard}. "
        f"Start it, see that {spec.here.name} reaches this address, or raise "
        "`timeout`."
    )


def _try_to_greet(spec: Spec, left: float, timeout: float) -> socket.socket:
    """Say hello once, and return the connection if it was welcome.

    Raises:
        OSError: If there is no controller, or not yet.
    """
    line = socket.create_connection(
        hello.split(spec.controller.address), min(left, _LOOK_SECONDS)
    )
    try:
        hello.keep_alive(line)
        hello.send(
            line,
            job=spec.here.job,
            task=spec.here.task,
            jobs=spec.jobs,
            versions=hello.versions(),
        )
        # The controller waits for all others, for as long as it was told.
        line.settimeout(timeout + _LOOK_SECONDS)
        answer = hello.receive(line)
        if answer is None:
            raise ConnectionError("a connection without an answer")
        if "refused" in answer:
            raise RuntimeError(
                f"{spec.controller.name}, the controller, refused "
                f"{spec.here.name}: {answer['refused']}"
            )
    except BaseException:
        line.close()
        raise
    return line


def _wait(spec: Spec, line: socket.socket) -> None:
    """Return when the controller has said that it is done, or is gone."""
    line.settimeout(None)
    try:
        if hello.receive(line) is not None:
            return
    except OSError:
        pass
    # A connection may break on its way while the controller goes on.
    while hello.answers(spec.controller.address, _LOOK_SECONDS):
        time.sleep(_PAUSE)
