"""Time the update of each optimizer, Keras's own and `update="auto"`.

    python docs/measure_update.py

prints, by optimizer, how long the update of a weight of 12.8 M and of 25 M
numbers and of a table of 200,000 x 64 by 4,096 rows takes relative to Keras's
own, best of a few, in turns in one process, and how long the first one takes.
"""

import os
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf
from keras import optimizers

from keras_clones.update.update import faster

ROUNDS, ROWS = 3, 4096
SIZES = {"12.8 M": (200_000, 64), "25 M": (5000, 5000)}
OPTIMIZERS = {
    "Adadelta": optimizers.Adadelta,
    "Adagrad": optimizers.Adagrad,
    "Adam": optimizers.Adam,
    "Adam(amsgrad=True)": lambda: optimizers.Adam(amsgrad=True),
    "AdamW": optimizers.AdamW,
    "Adamax": optimizers.Adamax,
    "Ftrl": optimizers.Ftrl,
    "Lion": optimizers.Lion,
    "Nadam": optimizers.Nadam,
    "RMSprop": optimizers.RMSprop,
    "RMSprop(momentum=0.9)": lambda: optimizers.RMSprop(momentum=0.9),
    "SGD": optimizers.SGD,
    "SGD(momentum=0.9)": lambda: optimizers.SGD(momentum=0.9),
    "SGD(momentum=0.9, nesterov=True)": lambda: optimizers.SGD(
        momentum=0.9, nesterov=True
    ),
}


def update_of(make, how, shape, by_rows):
    """Return a function that makes one update, and what it gets."""
    optimizer = make()
    variable = keras.Variable(np.ones(shape, "float32"), trainable=True)
    optimizer.build([variable])
    rng = np.random.default_rng(0)
    ids = tf.constant(rng.integers(0, shape[0], size=ROWS))
    rows = (ROWS, shape[1]) if by_rows else shape
    values = tf.constant(rng.normal(size=rows).astype("float32"))

    @tf.function(autograph=False)
    def update(values):
        gradient = values
        if by_rows:
            gradient = tf.IndexedSlices(values, ids, tf.constant(shape))
        with faster([optimizer], how):
            optimizer.apply([gradient], [variable])

    return lambda: update(values)


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compared(make, shape, by_rows):
    """Return Keras's milliseconds, the ratio, and the seconds of the first."""
    updates = [
        update_of(make, how, shape, by_rows) for how in ("keras", "auto")
    ]
    first = [seconds(one) for one in updates]
    taken = [[seconds(one) for one in updates] for _ in range(ROUNDS)]
    own, fast = (min(column) for column in zip(*taken, strict=True))
    return f"{1000 * own:.0f}", f"{fast / own:.2f}", f"{first[1]:.1f}"


def main():
    cases = [(name, shape, False) for name, shape in SIZES.items()]
    cases.append((f"{ROWS:,} rows", SIZES["12.8 M"], True))
    names = "".join(f" {n}: Keras, ms | ratio |" for n, *_ in cases)
    print(f"| optimizer |{names} slowest first update, s |")
    print("|---" + "|---:" * 7 + "|")
    for name in sys.argv[1:] or OPTIMIZERS:
        cells, slowest = [], 0.0
        for _, shape, by_rows in cases:
            own, ratio, first = compared(OPTIMIZERS[name], shape, by_rows)
            cells += [own, ratio]
            slowest = max(slowest, float(first))
        print(f"| {name} | {' | '.join(cells)} | {slowest} |", flush=True)


if __name__ == "__main__":
    main()
