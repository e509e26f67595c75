"""How processes of a cluster greet each other before they compute.

TensorFlow tells nothing of the process at the other end, neither its versions
nor whether it has ended. So each task holds one connection to the
controller's address, made before TensorFlow takes that port: lines of JSON go
over it, and its end is the end of the process that held it.
"""

import errno
import ipaddress
import json
import selectors
import socket
import sys
import time
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from keras_clones.devices.hosts import Host
from keras_clones.warn import warn

_LONGEST = 1 << 16
# What opens HTTP/2, which is what TensorFlow's servers speak: the preface, and
# a frame of settings, which the other side answers with one of its own.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, *5 * [0]))
_SETTINGS = 4


def versions() -> dict[str, str]:
    """Return the versions that all processes of a cluster must share."""
    # A module imports nothing above it, and the package is there already.
    own = sys.modules["keras_clones"].__version__
    return {
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "keras_clones": own,
    }


def send(line: socket.socket, **message: Any) -> None:
    """Send one message."""
    line.sendall(json.dumps(message).encode() + b"\n")


def receive(line: socket.socket) -> dict[str, Any] | None:
    """Return one message, `None` at the end or if it is none of ours.

    Raises:
        OSError: If the connection broke, or had nothing in its time.
    """
    data = b""
    while not data.endswith(b"\n"):
        # One byte at a time, so that nothing of the next message is taken.
        byte = line.recv(1)
        if not byte or len(data) > _LONGEST:
            return None
        data += byte
        # A server of TensorFlow does not end its lines.
        if data[:1] != b"{":
            return None
    try:
        message = json.loads(data)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def has_ended(line: socket.socket) -> bool:
    """Return whether the process at the other end is gone.

    Several threads ask this of one line. So it is left as blocking as it is:
    one that is made to block again by another thread would be waited for.
    """
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(line, selectors.EVENT_READ)
            if not selector.select(0):
                return False
        return not line.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):
        return True


def named(hosts: Iterable[Host]) -> str:
    """Return what processes are called in an error."""
    return ", ".join(f"{host.name} ({host.address})" for host in hosts)


def split(address: str) -> tuple[str, int]:
    """Return the host and the port of an address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Return whether an address is of this machine alone."""
    host = split(address)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: Host) -> socket.socket:
    """Return a socket that listens at the address of this process.

    Raises:
        OSError: If it cannot be had, such as a port in use.
    """
    name, port = split(host.address)
    try:
        if is_loopback(host.address):
            family = socket.AF_INET6 if ":" in name else socket.AF_INET
            return socket.create_server((name, port), family=family)
        # The address may be one that the network maps to this machine.
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True
            )
        return socket.create_server(("", port))
    except OSError as error:
        what = f"cannot be listened at: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            what = "is in use by another process, or by a server that this "
            what += "process started before, which TensorFlow cannot stop"
        raise OSError(
            error.errno,
            f"The port of {host.name} {what}. Received: "
            f"address={host.address!r}. Give the task another port, in the "
            "`TF_CONFIG` of every task, or end what has it.",
        ) from error


def keep_alive(line: socket.socket) -> None:
    """Have a connection break when the other machine is gone without a word."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("IDLE", 5), ("INTVL", 5), ("CNT", 3)):
        if option := getattr(socket, f"TCP_KEEP{name}", None):
            line.setsockopt(socket.IPPROTO_TCP, option, value)


def answers(address: str, seconds: float) -> bool:
    """Return whether a TensorFlow server answers at an address in time."""
    deadline = time.monotonic() + seconds
    try:
        with socket.create_connection(split(address), seconds) as line:
            line.sendall(_PREFACE)
            head = b""
            while len(head) < 9:
                line.settimeout(max(deadline - time.monotonic(), 0.01))
                if not (more := line.recv(9 - len(head))):
                    return False
                head += more
    except OSError:
        return False
    return head[3] == _SETTINGS


def warn_of_open_port(host: Host) -> None:
    """Say that TensorFlow's server is open to whoever reaches this machine."""
    if not is_loopback(host.address):
        warn(
            f"TensorFlow's server of {host.name} ({host.address}) listens on "
            "every network interface of this machine, without authentication: "
            "whoever reaches the port can run computations here and read "
            "files. Keep it in a private network, behind a firewall or a "
            "network policy that lets in the tasks of this cluster alone."
        )
