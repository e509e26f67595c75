"""Run the benchmark's cells, each in a process of its own, round by round."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keras_clones.benchmark import jax_cell
from keras_clones.benchmark import results as table
from keras_clones.benchmark.timed_fit import Cell

# A peer that hangs must not stop the run.
_MOST_SECONDS = 1200


def measure(
    cells: Sequence[Cell], repeat: int, results: dict[Cell, list[dict]]
) -> None:
    """Run all cells once, then once more, until each has its repeats.

    So a noisy minute hits all alike. What is found goes into `results` as it
    comes, and so outlives an interruption.
    """
    todo = list(cells) * repeat
    seconds: dict[Cell, float] = {}
    start = time.monotonic()
    for i, cell in enumerate(todo):
        before = time.monotonic()
        line = (
            f"[{i + 1}/{len(todo)}] {cell.model}, {table.label(cell)}, repeat "
            f"{i // len(cells) + 1} of {repeat}, {_clock(before - start)} "
            "elapsed"
        )
        if left := remaining(seconds, todo[i:]):
            line += f", about {_clock(left)} left"
        say(line)
        if cell.peer == "control":
            result = run_pair(cell)
        else:
            result = run_cell(cell._replace(transfers=i < len(cells)))
        results.setdefault(cell, []).append(result)
        seconds[cell] = time.monotonic() - before


def remaining(seconds: Mapping[Cell, float], todo: Sequence[Cell]) -> float:
    """Return the seconds that cells will take: as last time, or on average."""
    if not seconds:
        return 0.0
    mean = sum(seconds.values()) / len(seconds)
    return sum(seconds.get(item, mean) for item in todo)


def run_cell(cell: Cell) -> dict:
    """Run a cell in a process of its own, and return its result."""
    with _started(cell) as process:
        return _result(process)


def run_pair(cell: Cell) -> dict:
    """Time plain Keras on one thread, alone and twice at the same time."""
    cell = cell._replace(peer="plain", threads=(1, 1), wait=True)
    results = []
    for count in (1, 2):
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(_started(cell)) for _ in range(count)
            ]
            # Each has traced and warmed up when it says that it is ready.
            lines = [process.stdout.readline() for process in processes]
            for process in processes:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write("go\n")
                    process.stdin.flush()
            results += [
                _result(process, line)
                for process, line in zip(processes, lines, strict=True)
            ]
    errors = [result for result in results if "error" in result]
    if errors:
        return errors[0]
    alone, *together = (result["ms"] for result in results)
    return {"alone": alone, "together": together}


@contextlib.contextmanager
def _started(cell: Cell) -> Iterator[Any]:
    """Start the process of a cell, and end it if it has not ended by then."""
    package = pathlib.Path(__file__).parents[1]
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    settings = {"KERAS_BACKEND": "tensorflow"}
    if cell.peer == "jax":
        settings = jax_cell.settings(cell, os.environ)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "keras_clones.benchmark.cell"),
            json.dumps(cell._asdict()),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **os.environ,
            **settings,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def _result(process: Any, printed: str = "") -> dict:
    """Wait for a cell's process; return the last line it printed."""
    try:
        output, errors = process.communicate(timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {_MOST_SECONDS} seconds"}
    try:
        return json.loads((printed + output).strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (errors.strip().splitlines() or [""])[-1]
        return {"error": f"exit code {process.returncode}: {last}".strip()}


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def say(line: str) -> None:
    """Print a line that is no result."""
    print(line, file=sys.stderr, flush=True)
