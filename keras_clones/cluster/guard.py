"""Ends the processes that a launch started, should it be killed itself.

A process of its own, run as a file, so that it needs nothing but Python. It
reads from a pipe that only the launch writes to: `+N` for a group of processes
that has started, `-N` for one that has ended. At the end of the pipe the
launch is gone, and what is left is ended.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable


def main(lines: Iterable[str]) -> None:
    """Follow the groups of processes, and end those that are left."""
    groups: set[int] = set()
    for line in lines:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.stdin)
