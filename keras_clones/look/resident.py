"""What this process holds of the machine's memory, now and at its peak."""

import pathlib

_STATUS = pathlib.Path("/proc/self/status")
_RESET = pathlib.Path("/proc/self/clear_refs")


def peak() -> int | None:
    """Return the most bytes that this process has held at a time.

    Returns:
        Integer, since the last `reset_peak` where that returned `True`, or
        `None` where the system does not tell.
    """
    if _STATUS.exists():
        # `getrusage` counts what the parent held when it started this one.
        return _read("VmHWM")
    try:
        import resource
    except ImportError:  # There is none on Windows.
        return None
    # In bytes on macOS, which is what has `resource` and no `/proc`.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def grown(before: int | None) -> int | None:
    """Return the bytes by which the peak has grown, if both are known."""
    now = peak()
    if before is None or now is None:
        return None
    # The system counts in steps, and can be a little behind.
    return max(0, now - before)


def reset_peak() -> bool:
    """Let the peak be what the process holds now; say if that was possible."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()


def _read(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
