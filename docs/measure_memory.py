"""Measure what a training step of a transformer takes of memory, by pieces.

Run it with `python docs/measure_memory.py`, on Linux. Each line is a process of
its own, which trains on one row, then on all, and prints by how much that has
raised the most memory that it ever held. It writes the table of memory.md.
"""

import os
import pathlib
import subprocess
import sys

ROWS, STEPS, WIDTH, BLOCKS = 64, 128, 128, 4
PIECES = (1, 2, 4, 8)


def transformer():
    import keras
    from keras import layers

    inputs = keras.Input((STEPS,), dtype="int32")
    x = layers.Embedding(1000, WIDTH)(inputs)
    x = x + layers.Embedding(STEPS, WIDTH)(keras.ops.arange(STEPS))
    for _ in range(BLOCKS):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, WIDTH // 4)(y, y)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, "gelu")(y))
    outputs = layers.Dense(3)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs)


def most_memory():
    """Return the most memory that this process ever held, in MiB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(pieces, loss):
    """Train, and print by how many MiB all rows raise what one row takes."""
    import keras
    import numpy as np

    from keras_clones import clone_model

    model = clone_model(transformer(), 1, pieces=pieces, loss=loss)
    objective = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", objective)
    x, y = np.ones((ROWS, STEPS), "int32"), np.zeros(ROWS, "int32")
    model.train_on_batch(x[:1], y[:1])
    before = most_memory()
    for _ in range(2):
        model.train_on_batch(x, y)
    print(f"{most_memory() - before:.0f}")


def main():
    print("| pieces | by towers | by calls |\n|---|---:|---:|")
    first = {}
    for pieces in PIECES:
        cells = []
        for loss in ("auto", "gather"):
            command = [sys.executable, __file__, str(pieces), loss]
            out = subprocess.run(command, capture_output=True, check=True)
            taken = int(out.stdout.split()[-1])
            share = taken / first.setdefault(loss, taken)
            cells.append(f"{taken} MiB ({share:.2f})")
        print(f"| {pieces} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    if len(sys.argv) == 3:
        measure(int(sys.argv[1]), sys.argv[2])
    else:
        main()
