"""One task's process and what it prints, and what ends it if all else fails."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from keras_clones.cluster import guard

_lock = threading.Lock()


def say(message: str) -> None:
    """Print a line of the launch itself."""
    _write(sys.stderr, f"[launch] {message}\n".encode())


class Process:
    """A process in a group of its own, whose lines are printed with a name.

    Attributes:
        name: String, such as `"worker 1"`.
        group: Integer, the number of its group of processes.
    """

    def __init__(
        self, name: str, command: Sequence[str], environ: Mapping[str, str]
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.group = self._process.pid
        streams = (
            (self._process.stdout, sys.stdout),
            (self._process.stderr, sys.stderr),
        )
        self._threads = [
            threading.Thread(target=self._print, args=pair, daemon=True)
            for pair in streams
        ]
        for thread in self._threads:
            thread.start()

    def poll(self) -> int | None:
        """Return its exit code as a shell has it, `None` while it runs."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def signal(self, number: int) -> None:
        """Send a signal to it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, number)

    def is_left(self) -> bool:
        """Return whether it, or anything that it started, is there."""
        self._process.poll()
        try:
            os.killpg(self.group, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def close(self) -> None:
        """Wait for it, and for what it printed."""
        self._process.wait()
        for thread in self._threads:
            # Who left the group may keep its end open.
            thread.join(1.0)

    def _print(self, lines: IO[bytes], out: Any) -> None:
        prefix = f"[{self.name}] ".encode()
        for line in lines:
            _write(out, prefix + line.rstrip(b"\n") + b"\n")


class Guard:
    """A process that ends all others when this one is killed."""

    def __init__(self) -> None:
        file = str(pathlib.Path(guard.__file__))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", file],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()

    def add(self, process: Process) -> None:
        """Have a process ended, with all that it started."""
        self._tell(f"+{process.group}\n")

    def drop(self, process: Process) -> None:
        """Leave a process alone from now on, as it has ended."""
        self._tell(f"-{process.group}\n")

    def _tell(self, line: str) -> None:
        if self._process.stdin is None:
            return
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass


def _write(out: Any, data: bytes) -> None:
    with _lock:
        try:
            out.buffer.write(data)
            out.flush()
        except (BrokenPipeError, ValueError):
            # Nobody reads it any more. What is printed must still be taken, or
            # the tasks would wait; the launch ends as those do that print.
            os.kill(os.getpid(), signal.SIGTERM)
