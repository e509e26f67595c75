"""What the examples run on: the GPUs there are, or CPU devices without one.

The examples import it; it is none itself.
"""

import argparse
import pathlib
import sys
import tempfile

import tensorflow as tf

from keras_clones import use_virtual_devices


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return number


def add_clones(parser, without_gpu):
    """Add `--clones` to the arguments of an example."""
    parser.add_argument(
        "--clones",
        type=positive,
        help="how many (default: one a GPU, or "
        f"{without_gpu} on virtual CPU devices where there is no GPU)",
    )


def add_training(parser, epochs, folder):
    """Add `--epochs`, `--batch-size` and `--folder`, with their defaults."""
    parser.add_argument(
        "--epochs", type=positive, default=epochs, help=f"default: {epochs}"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        help="rows of the global batch (default: 64)",
    )
    parser.add_argument(
        "--folder", default=folder, help=f"where to save (default: {folder})"
    )


def take_devices(clones, without_gpu, device_memory=None):
    """Take the devices that there are, and say which.

    Args:
        clones: Integer, how many clones to make, or `None`: one a GPU.
        without_gpu: Integer, how many to make where there is no GPU.
        device_memory: Integer, MiB of the logical GPUs to split the first
            GPU into, one a clone. Defaults to `None`: GPUs stay whole.

    Returns:
        How many clones to make.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        clones = clones or without_gpu
        use_virtual_devices(clones)
        print(
            f"There is no GPU: {clones} clone(s) on as many virtual CPU "
            "devices, which share the processor's cores."
        )
    elif device_memory:
        clones = clones or 2
        use_virtual_devices(clones, "GPU", device_memory)
        print(f"{clones} clone(s) on GPU:0, of {device_memory} MiB each.")
    else:
        if clones and clones > len(gpus):
            sys.exit(
                f"error: --clones must be at most {len(gpus)}, one a GPU of "
                f"this machine. Received: --clones {clones}"
            )
        clones = clones or len(gpus)
        names = ", ".join(f"GPU:{i}" for i in range(clones))
        print(f"{clones} clone(s) on {names}.")
    return clones


def check_folder(folder, flag="--folder"):
    """Make a folder, or stop an example that could not save anything."""
    try:
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        sys.exit(
            f"error: {flag} must be a folder that can be written to. "
            f"Received: {flag} {folder}: {error}"
        )
