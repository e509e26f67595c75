"""Runs a command in a network of its own, where the system allows it.

Run as a file, since a process with threads, such as one that has imported
TensorFlow, cannot go to another user namespace. What it becomes has a loopback
interface and no other: nobody else reaches its ports.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def isolate() -> None:
    """Go to a network namespace of this process's own.

    Raises:
        OSError: If the system does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    unshare = getattr(libc, "unshare", None)
    if unshare is None:
        raise OSError("there are no namespaces on this system")
    if unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)


def main(command: list[str]) -> None:
    """Become a command, in a network of its own if that can be had."""
    try:
        isolate()
    except OSError as error:
        print(
            f"No network of its own can be had here ({error}): going on "
            "without. The tasks' ports are open to whoever reaches this "
            "machine.",
            file=sys.stderr,
            flush=True,
        )
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
