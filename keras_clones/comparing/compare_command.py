"""The command `python -m keras_clones compare`."""

import argparse
import importlib
import json
import os
import sys
from typing import Any

import keras
import tensorflow as tf

from keras_clones.comparing.by_config import CannotCopyError
from keras_clones.comparing.comparing import compare
from keras_clones.comparing.comparison import Comparison
from keras_clones.devices import virtual
from keras_clones.look import picture


def add_command(commands: Any) -> None:
    """Add `compare` to the commands of a parser."""
    parser = commands.add_parser(
        "compare",
        help="compare clones of a model with plain Keras",
        description="Train copies of a model, plain and on clones, on the "
        "same batches: whether they train the same, what mends it if not, "
        "and how long a step takes.",
    )
    _add_comparison(parser)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="an argument of clone_model, such as batch_norm=sync or "
        "exact=true; may be given several times",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print no progress"
    )
    parser.add_argument("--out", metavar="FILE.json", help="write all figures")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw differences and times"
    )
    parser.set_defaults(run=lambda options: run(parser, options))


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    """Add what says what is compared, and how."""
    parser.add_argument(
        "function",
        metavar="module:function",
        help="a function without arguments that returns the compiled model "
        "and its data: x, (x, y), a dataset, or a generator of batches",
    )
    parser.add_argument(
        "--batch-size",
        type=_count,
        metavar="N",
        help="rows of a global batch, with arrays; default: 32",
    )
    parser.add_argument(
        "--clones",
        type=_counts,
        metavar="N,N",
        help="numbers of clones; default: 1,2,4, or those of them that the "
        "machine's GPUs allow",
    )
    parser.add_argument(
        "--steps",
        type=_count,
        default=10,
        metavar="N",
        help="training steps to compare; default: 10",
    )
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32"),
        help="type of numbers to judge differences in, float32 standing for "
        "the model's own; default: float64 if the model can be made in it",
    )


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Compare, print what it came to, and return the exit code.

    It is 1 if any number of clones trained another model.
    """
    if not tf.config.list_physical_devices("GPU"):
        _split_cpu(max(options.clones or (4,)))
    function = _find(parser, options.function)
    result = function()
    if not _is_pair(result):
        parser.error(
            "expected a function that returns a compiled model and its data. "
            f"Received: {type(result).__name__} from {options.function}"
        )
    try:
        if options.plot:
            picture.check_path(options.plot)
        try:
            found = _against(result[0], result[1], options)
        except CannotCopyError:
            # The function makes copies where a config does not.
            found = _against(lambda: function()[0], result[1], options)
        if options.plot:
            found.plot(options.plot)
    except (ImportError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(found)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(found.to_dict(), file, indent=1)
    return 0 if found.same else 1


def _against(model: Any, data: Any, options: argparse.Namespace) -> Comparison:
    """Compare a model, or what a function makes, by what was asked for."""
    counts = {} if options.clones is None else {"num_clones": options.clones}
    x, y = _parts(data)
    return compare(
        model,
        x,
        y,
        batch_size=options.batch_size,
        steps=options.steps,
        dtype=options.dtype,
        verbose=0 if options.quiet else 1,
        **counts,
        **dict(options.option),
    )


def _split_cpu(count: int) -> None:
    """Give each clone a logical CPU device, unless there are devices."""
    try:
        virtual.use_virtual_devices(count)
    except RuntimeError:
        return


def _find(parser: argparse.ArgumentParser, text: str) -> Any:
    """Return the function of `module:function`."""
    module, _, name = text.partition(":")
    if not module or not name:
        parser.error(
            "expected module:function, such as train:make_model_and_data. "
            f"Received: {text!r}"
        )
    # As `python -m` does, but a program's own folder comes first.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        parser.error(f"cannot find {text!r}: {error}")
    if not callable(function):
        parser.error(f"expected a function. Received: {text!r}, {function!r}")
    return function


def _is_pair(result: Any) -> bool:
    """Say whether a function gave a model and data."""
    known = isinstance(result, tuple) and len(result) == 2
    return known and isinstance(result[0], keras.Model)


def _parts(data: Any) -> tuple[Any, Any]:
    """Return inputs and targets: a pair is both."""
    if isinstance(data, tuple) and len(data) == 2:
        return data
    return data, None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1. Received: {text!r}"
        )
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _option(text: str) -> tuple[str, Any]:
    """Return an option's name and value: JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(
            f"expected NAME=VALUE, such as batch_norm=sync. Received: {text!r}"
        )
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
