"""The benchmark: `python -m keras_clones benchmark`."""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_clones import benchmark_table as table
from keras_clones.benchmark_cell import TASKS, Cell

PEERS = ("plain", "mirrored", "central")
REDUCTIONS = (
    "ReductionToOneDevice",
    "HierarchicalCopyAllReduce",
    "NcclAllReduce",
)
# The models whose clones are compared with two independent processes.
CONTROLS = ("cnn", "transformer", "mobilenet")
# A peer that hangs must not stop the run.
_MOST_SECONDS = 1200
_LEGEND = """\
Each figure is the best of the repeats. A step is the median of a fit's steps,
with the logs read after each. Memory is that of the fullest GPU, or what the
process grew by. Bytes are those between devices in the step's graph, without
collectives and what tf.data moves."""


def add_command(commands: Any) -> None:
    """Add `benchmark` to the commands of a parser."""
    parser = commands.add_parser(
        "benchmark",
        help="time clones against plain Keras and tf.distribute",
        description="Time a step of clones, plain Keras and tf.distribute, "
        "each in a process of its own.",
    )
    parser.add_argument(
        "--models",
        type=_names(TASKS),
        default=list(TASKS),
        help=f"which of {','.join(TASKS)}; default: all",
    )
    parser.add_argument(
        "--clones",
        type=_counts,
        help="numbers of clones, and of the peers' replicas; default: "
        "1,2,4,8, or those of them that the machine's GPUs allow",
    )
    parser.add_argument(
        "--against",
        type=_names(PEERS),
        default=list(PEERS),
        help=f"which of {','.join(PEERS)}; default: all",
    )
    parser.add_argument(
        "--threads",
        type=_threads,
        metavar="INTRA,INTER",
        help="threads within an operation and between operations; "
        "default: TensorFlow's",
    )
    parser.add_argument("--repeat", type=_count, default=3, metavar="N")
    parser.add_argument(
        "--steps",
        type=_count,
        metavar="N",
        help="steps to time in a cell; default: by model",
    )
    parser.add_argument(
        "--logical",
        type=_count,
        metavar="N",
        help="split the first GPU into N",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="also time two independent processes of one thread each, for "
        f"{', '.join(CONTROLS)}",
    )
    parser.add_argument("--out", metavar="FILE.json", help="write all figures")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the steps")
    parser.add_argument(
        "--markdown", action="store_true", help="also print a Markdown table"
    )
    parser.set_defaults(run=lambda options: run(parser, options))


def _names(choices: Sequence[str] | Mapping[str, Any]) -> Callable:
    """Return what reads a list of names, each one of some choices, once."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"expected names from {','.join(choices)}, separated by "
                f"commas. Received: {text!r}, with {unknown} unknown"
            )
        return _once(names)

    return read


def _counts(text: str) -> list[int]:
    return _once([_count(part) for part in text.split(",")])


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(
            f"expected whole numbers of at least 1. Received: {text!r}"
        )
    return int(text)


def _once(values: list) -> list:
    repeated = sorted({v for v in values if values.count(v) > 1})
    if repeated:
        raise argparse.ArgumentTypeError(
            f"expected each entry once. Received: {repeated} more than once"
        )
    return values


def _threads(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(
            "expected two whole numbers of at least 1: INTRA,INTER, such as "
            f"1,2. Received: {text!r}"
        )
    return _count(parts[0]), _count(parts[1])


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Run the benchmark that a command line asks for; return the exit code."""
    gpus = len(tf.config.list_physical_devices("GPU"))
    _check(parser, options, gpus)
    most = options.logical or gpus
    if options.clones is None:
        options.clones = [n for n in (1, 2, 4, 8) if not most or n <= most]
    if "mirrored" in options.against and not gpus:
        _say("There is no GPU: NcclAllReduce, which needs them, is left out.")
    cells = make_cells(options, gpus)
    results: dict[Cell, list[dict]] = {}
    pairs: dict[str, list[dict]] = {}
    code = 0
    try:
        measure(cells, options, results, pairs)
    except KeyboardInterrupt:
        _say("Interrupted: these are the cells that have finished.")
        code = 130
    rows = table.make_rows(cells, results)
    controls = table.make_controls(pairs)
    print(table.plain_text(rows, controls))
    print(f"\n{_LEGEND}")
    if options.markdown:
        print(f"\n{table.markdown(rows, controls)}")
    if options.out:
        report = make_report(options, cells, results, pairs, rows, controls)
        text = json.dumps(report, indent=2)
        pathlib.Path(options.out).write_text(f"{text}\n")
    if options.plot:
        table.draw(rows, options.plot)
    return code


def _check(
    parser: argparse.ArgumentParser, options: argparse.Namespace, gpus: int
) -> None:
    """Stop for what would only fail after the cells have run."""
    if options.logical and not gpus:
        parser.error(
            "argument --logical: there is no GPU to split. Without one, "
            "clones run on logical CPU devices, and need no --logical."
        )
    most, counts = options.logical or gpus, options.clones or [1]
    if most and max(counts) > most:
        parser.error(
            f"argument --clones: expected at most {most}, one a GPU. "
            f"Received: {max(counts)}. `--logical {max(counts)}` splits the "
            "first GPU."
        )
    for name in ("out", "plot"):
        path = getattr(options, name)
        if path is None:
            continue
        try:
            with _kept_as_it_was(pathlib.Path(path)) as file:
                file.open("a").close()
        except OSError as error:
            parser.error(f"argument --{name}: cannot write to it: {error}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "argument --plot: it needs matplotlib: `pip install matplotlib`"
        )


@contextlib.contextmanager
def _kept_as_it_was(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Remove a file that is not there before."""
    there = path.exists()
    yield path
    if not there:
        path.unlink()


def make_cells(options: argparse.Namespace, gpus: int) -> list[Cell]:
    """Return the cells of a run, in the order of the table."""
    reductions = [name for name in REDUCTIONS if gpus or "Nccl" not in name]
    cells = []
    for model in options.models:
        common = {
            "model": model,
            "steps": options.steps,
            "threads": options.threads,
            "logical": options.logical,
        }
        if "plain" in options.against:
            cells.append(Cell(peer="plain", **common))
        for clones in options.clones:
            common["clones"] = clones
            cells.append(Cell(peer="clones", **common))
            if "mirrored" in options.against:
                cells += [
                    Cell(peer="mirrored", reduction=name, **common)
                    for name in reductions
                ]
            if "central" in options.against:
                cells.append(Cell(peer="central", **common))
    return cells


def measure(
    cells: Sequence[Cell],
    options: argparse.Namespace,
    results: dict[Cell, list[dict]],
    pairs: dict[str, list[dict]],
) -> None:
    """Run all cells once, then once more, until each has its repeats.

    So a noisy minute hits all alike. What is found goes into `results` and
    `pairs` as it comes, and so outlives an interruption.
    """
    controls = [m for m in options.models if m in CONTROLS and options.control]
    todo = [*cells, *controls] * options.repeat
    seconds: dict[Any, float] = {}
    start = time.monotonic()
    for i, item in enumerate(todo):
        repeat = i // (len(todo) // options.repeat) + 1
        name = (
            f"{item}, two processes"
            if isinstance(item, str)
            else f"{item.model}, {table.label(item)}"
        )
        before = time.monotonic()
        _say(
            f"[{i + 1}/{len(todo)}] {name}, repeat {repeat} of "
            f"{options.repeat}, {_clock(before - start)} elapsed"
            + (
                f", about {_clock(left)} left"
                if (left := remaining(seconds, todo[i:]))
                else ""
            )
        )
        if isinstance(item, str):
            pairs.setdefault(item, []).append(run_pair(item, options.steps))
        else:
            result = run_cell(item._replace(transfers=repeat == 1))
            results.setdefault(item, []).append(result)
        seconds[item] = time.monotonic() - before


def remaining(seconds: Mapping[Any, float], todo: Sequence[Any]) -> float:
    """Return the seconds that cells will take: as last time, or on average."""
    if not seconds:
        return 0.0
    mean = sum(seconds.values()) / len(seconds)
    return sum(seconds.get(item, mean) for item in todo)


def run_cell(cell: Cell) -> dict:
    """Run a cell in a process of its own, and return its result."""
    with _started(cell) as process:
        return _result(process)


def run_pair(model: str, steps: int | None) -> dict:
    """Time plain Keras on one thread, alone and twice at the same time."""
    cell = Cell(model, "plain", steps=steps, threads=(1, 1), wait=True)
    results = []
    for count in (1, 2):
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(_started(cell)) for _ in range(count)
            ]
            # Each has traced and warmed up when it says that it is ready.
            for process in processes:
                process.stdout.readline()
            for process in processes:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write("go\n")
                    process.stdin.flush()
            results += [_result(process) for process in processes]
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
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "keras_clones.benchmark_cell"),
            json.dumps(cell._asdict()),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **os.environ,
            "KERAS_BACKEND": "tensorflow",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def _result(process: Any) -> dict:
    """Wait for a cell's process; return the last line it printed."""
    try:
        output, errors = process.communicate(timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {_MOST_SECONDS} seconds"}
    try:
        return json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (errors.strip().splitlines() or [""])[-1]
        return {"error": f"exit code {process.returncode}: {last}".strip()}


def make_report(
    options: argparse.Namespace,
    cells: Sequence[Cell],
    results: Mapping[Cell, Sequence[dict]],
    pairs: Mapping[str, Sequence[dict]],
    rows: Sequence[table.Row],
    controls: Sequence[table.Control],
) -> dict[str, Any]:
    """Return all that a run found, and on what machine, for JSON."""
    packages = ("tensorflow", "keras", "numpy")
    given = {name: v for name, v in vars(options).items() if name != "run"}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "arguments": given,
        "machine": {
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
            "gpus": _gpu_names(),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "rows": [row._asdict() for row in rows],
        "controls": [control._asdict() for control in controls],
        "cells": [
            {**cell._asdict(), "repeats": results[cell]}
            for cell in cells
            if cell in results
        ],
        "pairs": dict(pairs),
    }


def _gpu_names() -> list[str]:
    details = tf.config.experimental.get_device_details
    return [
        details(gpu).get("device_name", gpu.name)
        for gpu in tf.config.list_physical_devices("GPU")
    ]


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
