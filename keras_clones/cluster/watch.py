"""Whether the hosts of a cluster are there, while the controller computes.

A host that dies lets TensorFlow's step fail. One that is stuck does not, and
nothing of TensorFlow's ends the wait for it. So each host is asked for a
number, time and again, by a thread of its own, which also a busy host answers
in milliseconds. From one that has not answered in time, the controller takes
its own connections, which ends whatever waits for it.
"""

import atexit
import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.cluster import hello
from keras_clones.devices.hosts import Host

# Between two questions, and two looks at who has answered.
_PAUSE = 0.5
# How long it may take until the end of a process is known, once TensorFlow
# has said that something failed.
_SECONDS_TO_NOTICE = 3.0
_SECONDS_TO_END = 2.0
_NETWORK_ERRORS = (
    *(tf.errors.UnavailableError, tf.errors.AbortedError),
    *(tf.errors.CancelledError, tf.errors.DeadlineExceededError),
    *(tf.errors.InternalError, tf.errors.UnknownError),
    *(tf.errors.FailedPreconditionError, tf.errors.InvalidArgumentError),
)


class _Watched:
    """What is known of one host."""

    def __init__(self, host: Host, line: socket.socket) -> None:
        self.host = host
        self.line = line
        self.answered = time.monotonic()
        self.silent = 0.0


class Watch:
    """Asks the hosts of a cluster whether they are there.

    Args:
        lines: Dict of `Host`s to the connections that their processes hold.
        timeout: Float, seconds after which a silent host counts as stuck.
    """

    def __init__(
        self, lines: dict[Host, socket.socket], timeout: float
    ) -> None:
        self._watched = [_Watched(host, line) for host, line in lines.items()]
        self.seen_lost: list[str] = []
        self._timeout = timeout
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start to ask, in threads that do not keep the process alive."""
        calls: list[tuple[Any, ...]] = [(self._look,)]
        calls += [(self._ask, one) for one in self._watched]
        for target, *args in calls:
            thread = threading.Thread(target=target, args=args, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Ask no more, and let go of the hosts that do not answer."""
        self._over.set()
        for one in self._watched:
            if one.silent:
                _disconnect(one.host)
        # A thread within TensorFlow must not outlive the interpreter.
        for thread in self._threads:
            thread.join(_SECONDS_TO_END)

    def lost(self) -> list[str]:
        """Return what is to be said of the hosts that are gone or stuck."""
        found = [(one.host, self._why_lost(one)) for one in self._watched]
        return [f"{hello.named([host])} {why}" for host, why in found if why]

    def hosts_lost(self) -> list[Host]:
        """Return the hosts that are gone or stuck."""
        return [one.host for one in self._watched if self._why_lost(one)]

    def _why_lost(self, one: _Watched) -> str | None:
        if hello.has_ended(one.line):
            return "has ended"
        if one.silent > self._timeout:
            seconds = time.monotonic() - one.answered
            return f"has not answered for {seconds:.0f} seconds"
        return None

    def _ask(self, one: _Watched) -> None:
        def number() -> float:
            with tf.device(one.host.cpu):
                return float(tf.constant(1.0) + 1.0)

        apart = _tf.Apart()
        # To ask a host that has ended would be one more error of TensorFlow's.
        while not self._over.wait(_PAUSE) and not hello.has_ended(one.line):
            try:
                apart.run(number)
            except tf.errors.OpError:
                continue
            one.answered = time.monotonic()

    def _look(self) -> None:
        before = time.monotonic()
        while not self._over.wait(_PAUSE):
            now = time.monotonic()
            # What kept this thread may have kept the others, too, so that a
            # host is not silent for longer than this thread has looked.
            passed = min(now - before, 2 * _PAUSE)
            before = now
            for one in self._watched:
                recent = now - one.answered < 2 * _PAUSE
                one.silent = 0.0 if recent else one.silent + passed
                if one.silent > self._timeout:
                    _disconnect(one.host)
            self.seen_lost = self.lost()


_watches: list[Watch] = []


def start(lines: dict[Host, socket.socket], timeout: float) -> None:
    """Watch the hosts of a cluster from now on."""
    watch = Watch(lines, timeout)
    watch.start()
    _watches.append(watch)
    _keras.wait_by(_wait)
    atexit.register(stop)


def stop() -> None:
    """Watch nothing any more."""
    while _watches:
        _watches.pop().stop()
    _keras.wait_by(_tf.wait_for_all)


def naming_lost_hosts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that names the host that an error comes from.

    TensorFlow raises such an error in a step, or wherever a program waits for
    operations next.
    """

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except _NETWORK_ERRORS as error:
            if lost := explain(error):
                raise lost from error
            raise

    return named


def is_lost(prefix: str) -> bool:
    """Say whether a host is known to be gone or stuck.

    Args:
        prefix: String, what the names of its devices begin with.
    """
    lost = [host for watch in _watches for host in watch.hosts_lost()]
    return any(host.prefix == prefix for host in lost)


def explain(error: BaseException) -> ConnectionError | None:
    """Return what an error of a running step comes from, if from a lost host.

    Args:
        error: What TensorFlow raised.
    """
    if not isinstance(error, _NETWORK_ERRORS):
        return None
    deadline = time.monotonic() + _SECONDS_TO_NOTICE
    while _watches and time.monotonic() < deadline:
        if lost := [what for watch in _watches for what in watch.lost()]:
            return _lost(lost)
        time.sleep(_PAUSE / 5)
    return None


def check() -> None:
    """Raise if a host is seen to be gone or stuck.

    TensorFlow does not always say so of one that has no part in the step.

    Raises:
        ConnectionError: If a host is lost.
    """
    if lost := [what for watch in _watches for what in watch.seen_lost]:
        raise _lost(lost)


def _wait() -> None:
    """Wait for all operations, but not for good for a host that is lost.

    TensorFlow may do so where a host ends while a program waits.
    """
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            _tf.wait_for_all()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    patience = _SECONDS_TO_END
    while thread.is_alive() and patience > 0:
        thread.join(_PAUSE)
        if any(watch.seen_lost for watch in _watches):
            patience -= _PAUSE
    if thread.is_alive():
        check()
    if failed:
        raise failed[0]


def _lost(hosts: list[str]) -> ConnectionError:
    return ConnectionError(
        "Expected every host of the cluster to compute its part of the step. "
        f"Received: {', and '.join(hosts)}. What was assigned until then is "
        "kept, where variables are on hosts that are there. Start all tasks "
        "again and go on from a backup (`keras_clones.Backup`), as `launch "
        "--restarts` does. Look at what the host printed, and at its memory; "
        "raise `timeout` of `connect` if it was only slow."
    )


def _disconnect(host: Host) -> None:
    """Shut down this process's connections to the server of a host."""
    name, port = hello.split(host.address)
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        _shut_down({str(info[4][0]) for info in found}, port)


def _shut_down(addresses: set[str], port: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                address, its_port = one.getpeername()[:2]
                # What is mapped to IPv6 is written with its prefix.
                if its_port == port and (
                    address.removeprefix("::ffff:") in addresses
                ):
                    one.shutdown(socket.SHUT_RDWR)
