"""What is wrong with what `compare` is asked for."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from keras_clones.checks import check_choice
from keras_clones.devices import placement
from keras_clones.devices.config import check_integer
from keras_clones.door.attach import clone_model

# What stands for the default: those of them that the GPUs allow.
NUM_CLONES = (1, 2, 4)
_DTYPES = (None, "float64", "float32")
# Options of `clone_model` that say how many clones there are, or where.
_NUMBERS = ("config", "devices", "num_clones", "model")


def check_numbers(
    batch_size: Any, steps: Any, dtype: Any, verbose: Any
) -> None:
    """Check all arguments but for the clones and their options."""
    if batch_size is not None:
        check_integer("batch_size", batch_size, 1)
    check_integer("steps", steps, 1)
    check_choice("dtype", dtype, _DTYPES)
    check_choice("verbose", verbose, (0, 1, 2))


def check_counts(num_clones: Any, options: Mapping[str, Any]) -> list[int]:
    """Check the clones' options; return the numbers of clones there can be."""
    _check_options(options)
    if isinstance(num_clones, (str, bytes)) or not isinstance(
        num_clones, Sequence
    ):
        raise TypeError(
            "Argument `num_clones` must be a list of integers, such as "
            f"`[1, 2]`. Received: num_clones={num_clones!r}"
        )
    counts = [check_integer("num_clones", n, 1) for n in num_clones]
    if not counts:
        raise ValueError(
            "Argument `num_clones` must have at least one number of clones. "
            f"Received: num_clones={num_clones!r}"
        )
    gpus = placement.logical_devices("GPU")
    on_cpu = options.get("clone_on_cpu", False)
    if num_clones is NUM_CLONES and gpus and not on_cpu:
        counts = [n for n in counts if n <= len(gpus)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in counts:
            config = placement.choose_config(n, None, on_cpu)
            placement.place_clones(config)
    return sorted(set(counts))


def _check_options(options: Mapping[str, Any]) -> None:
    """Check that options are arguments of `clone_model`, but for numbers."""
    given = sorted(set(options) & set(_NUMBERS))
    known = set(clone_model.__kwdefaults__ or {}) - set(_NUMBERS)
    unknown = sorted(set(options) - known - set(_NUMBERS))
    if given or unknown:
        raise TypeError(
            f"Expected arguments of `clone_model` out of {sorted(known)}: the "
            "numbers of clones are in `num_clones`, and each takes the first "
            f"devices. Received: {[*given, *unknown]}"
        )
