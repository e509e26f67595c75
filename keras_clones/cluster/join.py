"""TensorFlow of the controller is connected to all tasks, in bounded time.

TensorFlow itself waits for a task that has died or is stuck without an end, in
a call that nothing interrupts. So a thread of its own makes the call.
"""

import socket
import threading
import time

import tensorflow as tf

from keras_clones import _tf
from keras_clones.cluster import hello
from keras_clones.cluster.resolve import Spec
from keras_clones.devices.hosts import Host

_PAUSE = 0.05
# Threads whose call failed or did not return. They hold TensorFlow's devices.
_stuck: list[threading.Thread] = []


def check_not_stuck() -> None:
    """Refuse to connect after an attempt that came to nothing."""
    if _stuck:
        raise RuntimeError(
            "Expected TensorFlow not to have tried to connect before in this "
            "process. Received: a second attempt, after one that failed. Start "
            "a new process."
        )


def join(spec: Spec, lines: dict[Host, socket.socket], timeout: float) -> None:
    """Connect TensorFlow to the tasks of a cluster.

    Args:
        spec: `Spec` of the cluster. This process is the controller.
        lines: Dict of the tasks to the connections that they hold.
        timeout: Float, seconds to wait for TensorFlow.

    Raises:
        TimeoutError: If a task dies meanwhile, or does not answer.
    """
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            tf.config.experimental_connect_to_cluster(
                tf.train.ClusterSpec(spec.jobs),
                job_name=spec.here.job,
                task_index=spec.here.task,
                protocol="grpc",
            )
            _tf.ensure_initialized()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    _stuck.append(thread)
    _wait(thread, lines, timeout)
    if errors:
        raise errors[0]
    _stuck.remove(thread)


def _wait(
    thread: threading.Thread,
    lines: dict[Host, socket.socket],
    timeout: float,
) -> None:
    """Return when a thread has ended."""
    deadline = time.monotonic() + timeout
    while thread.is_alive():
        thread.join(_PAUSE)
        ended = [host for host, line in lines.items() if hello.has_ended(line)]
        late = time.monotonic() > deadline
        if thread.is_alive() and (ended or late):
            silent = ended or [
                host for host in lines if not hello.answers(host.address, 1.0)
            ]
            why = "has ended" if ended else "does not answer"
            what = (
                f"{hello.named(silent)}, which {why}" if silent else "nothing"
            )
            raise TimeoutError(
                "Expected every task to answer TensorFlow, which connects, "
                f"within {timeout:g} seconds. Received: {what}. Start all "
                "tasks again, in new processes."
            )
