"""The benchmark: `python -m keras_clones benchmark`."""

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_clones.benchmark import processes
from keras_clones.benchmark import results as table
from keras_clones.benchmark.cells import (
    CONTROLS,
    PEERS,
    leave_out_jax,
    make_cells,
)
from keras_clones.benchmark.models import TASKS
from keras_clones.benchmark.timed_fit import Cell
from keras_clones.update.update import CHOICES

_LEGEND = """\
Each figure is the best of the repeats. A step is the median of a fit's steps,
with the logs read after each. Memory is that of the fullest GPU, or what the
process grew by. Bytes are those between devices in the step's graph, without
collectives and what tf.data moves."""


def add_command(commands: Any) -> None:
    """Add `benchmark` to the commands of a parser."""
    parser = commands.add_parser(
        "benchmark",
        help="time clones against plain Keras, tf.distribute and JAX",
        description="Time a step of clones, plain Keras, tf.distribute and "
        "Keras on JAX, each in a process of its own.",
    )
    _add_cells(parser)
    _add_runs(parser)
    parser.add_argument("--out", metavar="FILE.json", help="write all figures")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the steps")
    parser.add_argument(
        "--markdown", action="store_true", help="also print a Markdown table"
    )
    parser.set_defaults(run=lambda options: run(parser, options))


def _add_cells(parser: argparse.ArgumentParser) -> None:
    """Add what says which cells there are."""
    parser.add_argument(
        "--models",
        type=_names(TASKS),
        default=list(TASKS),
        metavar="NAMES",
        help=f"which of {','.join(TASKS)}; default: all",
    )
    parser.add_argument(
        "--clones",
        type=_counts,
        metavar="NUMBERS",
        help="numbers of clones, and of the peers' replicas; default: "
        "1,2,4,8, or those of them that the machine's GPUs allow",
    )
    parser.add_argument(
        "--against",
        type=_names(PEERS),
        default=list(PEERS),
        metavar="NAMES",
        help=f"which of {','.join(PEERS)}; default: all. gather is clones "
        "with loss='gather', for models with masks",
    )
    parser.add_argument(
        "--update",
        type=_names(CHOICES),
        default=["auto"],
        metavar="NAMES",
        help=f"which of {','.join(CHOICES)}, options of clones; default: auto",
    )
    parser.add_argument(
        "--pieces",
        type=_counts,
        default=[1],
        metavar="NUMBERS",
        help="in how many pieces clones work through their rows; default: 1",
    )


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """Add what says how each cell runs."""
    parser.add_argument(
        "--threads",
        type=_threads,
        metavar="INTRA,INTER",
        help="threads within an operation and between operations; "
        "default: TensorFlow's",
    )
    parser.add_argument(
        "--repeat",
        type=_count,
        default=3,
        metavar="N",
        help="how often to time each cell, of which the best counts; "
        "default: 3",
    )
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
        processes.say(
            "There is no GPU: NcclAllReduce, which needs them, is left out."
        )
    leave_out_jax(options)
    cells = make_cells(options, gpus)
    results: dict[Cell, list[dict]] = {}
    code = 0
    try:
        processes.measure(cells, options.repeat, results)
    except KeyboardInterrupt:
        processes.say("Interrupted. These cells have finished:")
        code = 130
    print(table.plain_text(results))
    print(f"\n{_LEGEND}")
    if options.markdown:
        print(f"\n{table.markdown(results)}")
    if options.out:
        text = json.dumps(make_report(options, results), indent=2)
        pathlib.Path(options.out).write_text(f"{text}\n")
    if options.plot:
        table.draw(table.make_rows(results), options.plot)
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
    if options.plot:
        if importlib.util.find_spec("matplotlib") is None:
            parser.error(
                "argument --plot: it needs matplotlib: `pip install matplotlib`"
            )
        formats, end = table.picture_formats(), pathlib.Path(options.plot)
        if end.suffix[1:].lower() not in formats:
            parser.error(
                "argument --plot: expected a file name that ends in one of "
                f"{', '.join(formats)}. Received: {options.plot!r}"
            )
    for name in ("out", "plot"):
        if path := getattr(options, name):
            try:
                _try_to_write(pathlib.Path(path))
            except OSError as error:
                parser.error(f"argument --{name}: cannot write to it: {error}")


def _try_to_write(path: pathlib.Path) -> None:
    """Open a file to write, and leave it as it was."""
    there = path.exists()
    path.open("a").close()
    if not there:
        path.unlink()


def make_report(
    options: argparse.Namespace, results: table.Results
) -> dict[str, Any]:
    """Return all that a run found, and on what machine, for JSON."""
    # By itself, since the nightly build of Keras has another name.
    packages = (tf, keras, np)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "arguments": {k: v for k, v in vars(options).items() if k != "run"},
        "machine": {
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
            "gpus": _gpu_names(),
            "python": platform.python_version(),
            **{one.__name__: one.__version__ for one in packages},
        },
        "rows": [row._asdict() for row in table.make_rows(results)],
        "controls": [c._asdict() for c in table.make_controls(results)],
        "cells": [
            {**cell._asdict(), "repeats": list(repeats)}
            for cell, repeats in results.items()
        ],
    }


def _gpu_names() -> list[str]:
    details = tf.config.experimental.get_device_details
    return [
        details(gpu).get("device_name", gpu.name)
        for gpu in tf.config.list_physical_devices("GPU")
    ]
