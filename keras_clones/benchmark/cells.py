"""Which cells a run of the benchmark has, and which it leaves out."""

import argparse
import importlib.util

from keras_clones.benchmark import processes
from keras_clones.benchmark.models import TASKS
from keras_clones.benchmark.timed_fit import Cell

PEERS = ("plain", "gather", "mirrored", "central", "jax")
REDUCTIONS = (
    "ReductionToOneDevice",
    "HierarchicalCopyAllReduce",
    "NcclAllReduce",
)
# The models whose clones are compared with two independent processes.
CONTROLS = ("cnn", "transformer", "mobilenet")


def leave_out_jax(options: argparse.Namespace) -> None:
    """Say which cells of JAX there are none of, and why."""
    if "jax" not in options.against:
        return
    why = ""
    if importlib.util.find_spec("jax") is None:
        why = "jax is not installed (`pip install 'keras_clones[jax]'`)"
    elif options.logical:
        why = "JAX does not split a GPU (`--logical`)"
    if why:
        options.against = [name for name in options.against if name != "jax"]
        processes.say(f"{why}: its cells are left out.")
        return
    if own := [name for name in options.models if TASKS[name].own_step]:
        processes.say(
            f"The train steps of {', '.join(own)} are written for TensorFlow: "
            "no cells of JAX."
        )


def make_cells(options: argparse.Namespace, gpus: int) -> list[Cell]:
    """Return the cells of a run, in the order of the table."""
    reductions = [name for name in REDUCTIONS if gpus or "Nccl" not in name]
    cells = []
    for model in options.models:
        plain = Cell(
            model,
            "plain",
            steps=options.steps,
            threads=options.threads,
            logical=options.logical,
        )
        if "plain" in options.against:
            cells.append(plain)
        own_step = TASKS[model].own_step
        if "jax" in options.against and not own_step:
            cells.append(plain._replace(peer="jax"))
        for clones in options.clones:
            cell = plain._replace(peer="clones", clones=clones)
            ours = _with_options(cell, options)
            cells += ours
            if "gather" in options.against and TASKS[model].masked:
                cells += [one._replace(peer="gather") for one in ours]
            if "mirrored" in options.against:
                cells += [
                    cell._replace(peer="mirrored", reduction=name)
                    for name in reductions
                ]
            if "central" in options.against:
                cells.append(cell._replace(peer="central"))
            if "jax" in options.against and clones > 1 and not own_step:
                cells.append(cell._replace(peer="jax"))
        if options.control and model in CONTROLS:
            cells.append(plain._replace(peer="control"))
    return cells


def _with_options(cell: Cell, options: argparse.Namespace) -> list[Cell]:
    """Return a cell of clones with each of the options that are asked for."""
    return [
        cell._replace(update=update, pieces=pieces)
        for update in options.update
        for pieces in options.pieces
    ]
