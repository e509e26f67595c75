"""The command line of `launch`."""

import argparse
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from keras_clones.cluster import isolate
from keras_clones.cluster.launch import Run, launch

_SAFETY = (
    "TensorFlow's servers listen on every network interface, whatever address "
    "they are given, and without authentication: whoever reaches a port can "
    "run computations in the task and read its files. Run this on a machine "
    "behind a firewall, or with --isolate."
)


def add_command(commands: Any) -> None:
    """Add `launch` to the commands of a parser."""
    parser = commands.add_parser(
        "launch",
        help="run a script in every task of a cluster on this machine",
        usage="%(prog)s [options] script.py [arguments ...]",
        description="Start the tasks of a cluster on this machine, each with "
        "the same script, which calls keras_clones.connect(). Lines that they "
        "print begin with the task's name. All end when one fails; the exit "
        "code is that of the first that did, 128 and the number of the signal "
        "that ended it, or 124 when the time was up.",
        epilog=_SAFETY,
    )
    _add_options(parser)
    parser.add_argument(
        "-m",
        dest="module",
        action="store_true",
        help="the script is the name of a module, as for `python -m`",
    )
    parser.add_argument("script", help="what every task runs")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="arguments of the script"
    )
    parser.set_defaults(run=run, error=parser.error)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how many tasks there are, and for how long."""
    parser.add_argument(
        "--replicas",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="processes whose devices take clones; the first runs the script "
        "(default: 1). The machine's GPUs are divided among them",
    )
    parser.add_argument(
        "--ps",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="parameter servers, which are home to variables (default: 0)",
    )
    parser.add_argument(
        "--restarts",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="how often to start all tasks again when one fails; "
        "KERAS_CLONES_RESTART has how often that was (default: 0)",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="end all tasks after so many seconds, with code 124",
    )
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="give the tasks a network of their own with nothing but a "
        "loopback interface, where the system allows it (Linux)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the tasks, and return the exit code."""
    if not options.module and not pathlib.Path(options.script).exists():
        options.error(
            "expected the path of a script, or -m and the name of a module. "
            f"Received: {options.script!r}, which is not there"
        )
    if options.isolate:
        _isolate()
    what = ["-m", options.script] if options.module else [options.script]
    return launch(
        Run(
            command=(sys.executable, *what, *options.arguments),
            replicas=options.replicas,
            ps=options.ps,
            restarts=options.restarts,
            seconds=options.timeout,
            gpus=_gpus(os.environ),
        )
    )


def _isolate() -> None:
    """Become the same command without `--isolate`, in a network of its own."""
    at = sys.argv.index("--isolate")
    again = [*sys.argv[1:at], *sys.argv[at + 1 :]]
    command = [sys.executable, "-m", "keras_clones", *again]
    file = str(pathlib.Path(isolate.__file__))
    os.execv(sys.executable, [sys.executable, "-I", "-S", file, *command])


def _gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the GPUs that this machine lets this process see."""
    count = len(tf.config.list_physical_devices("GPU"))
    named = environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(n) for n in range(count)]
    return tuple(names[:count])


def _at_least(least: int) -> Any:
    """Return what reads an integer of an argument."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least}. Received: {text!r}"
            )
        return value

    return integer


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(
            f"must be a positive number of seconds. Received: {text!r}"
        )
    return value
