"""Time a step on the processes of this machine beside one in plain Keras.

    python -m keras_clones launch --replicas 2 docs/measure_cluster.py

prints, by model and home of the weights, the milliseconds of a step in plain
Keras and on a clone of each replica, in turns in one process.
"""

import os
import statistics
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np

import keras_clones
from keras_clones import clone_model

STEPS, ROUNDS, BATCH = 20, 5, 64
MODELS = {"0.02 M": 64, "12.8 M": 2510}


def made(width):
    """Return a compiled model, of which two layers are that wide."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((width,)),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dense(10, "softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def milliseconds(model, data):
    start = time.perf_counter()
    model.fit(*data, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
    return (time.perf_counter() - start) / STEPS * 1e3


def main():
    cluster = keras_clones.connect()
    homes = ["controller"] + ["spread"] * (len(cluster.replicas) > 1)
    homes += ["greedy"] * (len(cluster.ps) > 0)
    for name, width in MODELS.items():
        data = (
            np.random.default_rng(0).normal(size=(STEPS * BATCH, width)),
            np.zeros(STEPS * BATCH, "int32"),
        )
        models = {"plain": made(width)}
        for home in homes:
            models[home] = clone_model(made(width), variables=home)
        times = {home: [] for home in models}
        for _ in range(ROUNDS + 1):
            for home, model in models.items():
                times[home].append(milliseconds(model, data))
        for home in homes:
            # The first of each traces.
            best = min(times[home][1:])
            plain = min(times["plain"][1:])
            print(
                f"{name} parameters, {len(cluster.replicas)} replica(s), "
                f"{len(cluster.ps)} ps, {home}: {best:.1f} ms, plain Keras "
                f"{plain:.1f} ms, ratio {best / plain:.2f} (medians "
                f"{statistics.median(times[home][1:]):.1f}, "
                f"{statistics.median(times['plain'][1:]):.1f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
