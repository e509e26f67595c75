"""What follows from a comparison: which clones and options to use."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_clones.comparing import training
from keras_clones.comparing.records import (
    OUT_OF_MEMORY,
    Advice,
    Cause,
    Run,
    joined,
    named,
)
from keras_clones.comparing.training import Plain

# What is faster by less than this is as fast.
_GAIN = 1.05


def advise(runs: Sequence[Run], options: Mapping[str, Any]) -> Advice:
    """Say which number of clones and options to use, and by how much.

    Args:
        runs: Sequence of `Run`s, timed, that of plain Keras first.
        options: Mapping, what `clone_model` got for all of them.
    """
    found = _fastest(runs, options)
    return found._replace(text=found.text + _in_pieces(runs, options))


def _in_pieces(runs: Sequence[Run], options: Mapping[str, Any]) -> str:
    """Say which pieces to try where memory did not suffice."""
    short = next((run for run in runs if run.failed == OUT_OF_MEMORY), None)
    pieces = options.get("pieces", 1)
    if short is None or pieces == "auto":
        return ""
    used = joined(options, short.options)
    used["pieces"] = "auto" if pieces == 1 else 2 * pieces
    call = named({"num_clones": short.num_clones or 1, **used})
    return (
        f" Memory did not suffice for {short.name}: `clone_model(model, "
        f"{call})` trains the same weights in less."
    )


def _fastest(runs: Sequence[Run], options: Mapping[str, Any]) -> Advice:
    plain = runs[0]
    fit = [run for run in runs[1:] if run.same and run.seconds]
    best = min(fit, key=lambda run: run.seconds or 0.0, default=None)
    if best is None or not plain.seconds or not best.seconds:
        text = (
            "Use plain Keras: no clones that train the same model were timed."
        )
        return Advice(0, {}, 1.0, text)
    gain = plain.seconds / best.seconds
    if gain < _GAIN:
        text = (
            f"Use plain Keras: the fastest clones that train the same model "
            f"({best.name}) take {1 / gain:.2f} times its time a step."
        )
        return Advice(0, {}, 1.0, text)
    used = joined(options, best.options)
    call = named({"num_clones": best.num_clones, **used})
    text = (
        f"Use `clone_model(model, {call})`: a step is {gain:.2f} times as "
        "fast as plain Keras's, of the same model."
    )
    return Advice(best.num_clones, used, gain, text)


def explains(causes: Sequence[Cause]) -> bool:
    """Say whether causes explain a difference: tried, or with no option.

    Where options were tried and mend nothing, something else is wrong, too.
    """
    tried = [cause.tried for cause in causes if cause.tried is not None]
    return any(tried) if tried else any(not c.suspected for c in causes)


def how_judged(dtype: str, plain: Plain) -> str:
    """Say what counts as rounding."""
    text = (
        f"Judged in {dtype}. Rounding is what is within "
        f"{training.SPREAD} times the spread of plain Keras itself, from "
        "weights that differ by one unit in the last place"
    )
    if plain.draws:
        return f"{text}, each row in its place, which says what it draws."
    if plain.by_order:
        return f"{text}. Plain Keras goes by the order of a batch's rows."
    return f"{text} and with the rows of each batch in another order."


def versions() -> dict[str, str]:
    """Return the versions that a report needs, and the devices."""
    # The package has its version, and is above this in what it imports.
    own = sys.modules["keras_clones"]
    devices = tf.config.list_logical_devices()
    return {
        "keras_clones": own.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "devices": ", ".join(device.name for device in devices),
    }
