"""The commands of `python -m keras_clones`."""

import argparse
import sys
from collections.abc import Sequence

from keras_clones.benchmark import benchmark_command
from keras_clones.cluster import launch_command, serve_command
from keras_clones.comparing import compare_command
from keras_clones.look import machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_clones",
        description="Train a Keras 3 model on every device of a machine.",
    )
    # A module imports nothing above it, and the package is there already.
    version = sys.modules["keras_clones"].__version__
    parser.add_argument(
        "--version",
        action="version",
        version=f"keras_clones {version}",
        help="print the version of keras_clones, and stop",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    compare_command.add_command(commands)
    benchmark_command.add_command(commands)
    machine.add_command(commands)
    launch_command.add_command(commands)
    serve_command.add_command(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
