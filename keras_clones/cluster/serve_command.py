"""`python -m keras_clones serve`: a task of a cluster without the script."""

import argparse
import os
import sys
from typing import Any

from keras_clones.cluster.connect import connect
from keras_clones.cluster.resolve import resolve
from keras_clones.devices.virtual import use_virtual_devices


def add_command(commands: Any) -> None:
    """Add `serve` to the commands of a parser."""
    parser = commands.add_parser(
        "serve",
        help="offer this machine's devices to the controller of a cluster",
        description="Be the task of a cluster that TF_CONFIG or a Slurm step "
        "tells of, as keras_clones.connect() makes a script one, until the "
        "controller is done or gone.",
        epilog="TensorFlow's server listens on every network interface, "
        "without authentication: keep it in a private network.",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to wait for the controller (default: 60)",
    )
    parser.add_argument(
        "--virtual-devices",
        type=int,
        metavar="N",
        help="split the CPU into so many devices",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve, and return the exit code."""
    try:
        _serve(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"keras_clones serve: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(options: argparse.Namespace) -> None:
    spec = resolve(None, os.environ)
    if spec is None or spec.here == spec.controller:
        who = "no cluster" if spec is None else f"{spec.here.name}, which is it"
        raise ValueError(
            "Expected TF_CONFIG to tell of a task other than the controller, "
            f"which runs the script. Received: {who}"
        )
    if options.virtual_devices is not None:
        use_virtual_devices(options.virtual_devices)
    print(
        f"{spec.here.name} serves {spec.controller.name} at "
        f"{spec.here.address or 'no address'}",
        flush=True,
    )
    connect(timeout=options.timeout, exit=False)
