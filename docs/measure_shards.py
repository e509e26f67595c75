"""Time the passes of the benchmark's wide model as a whole and in shards.

    python docs/measure_shards.py

prints what forward and backward passes take in plain TensorFlow, without this
package's clones and without an update: of the batch as a whole, of four shards
of it side by side, and of these with their gradients added up. In turns in one
process, relative to the first. No design of clones that share a processor can
be faster than the second.
"""

import os
import statistics
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import tensorflow as tf

from keras_clones import use_virtual_devices
from keras_clones.benchmark.models import CLASSES, TASKS

SHARDS, ROUNDS, WARM_UP = 4, 60, 5


def passes(model, shards, added):
    """Return a function that runs the passes of some shards of a batch."""
    x = tf.random.uniform([TASKS["wide"].batch, 784])
    y = tf.random.uniform([len(x)], 0, CLASSES, tf.int32)
    losses = keras.losses.SparseCategoricalCrossentropy()

    @tf.function
    def run():
        parts = []
        pairs = zip(tf.split(x, shards), tf.split(y, shards), strict=True)
        for i, (rows, targets) in enumerate(pairs):
            with tf.device(f"CPU:{i}"), tf.GradientTape() as tape:
                loss = losses(targets, model(rows, training=True))
            with tf.device(f"CPU:{i}"):
                parts.append(tape.gradient(loss, model.trainable_weights))
        with tf.device("CPU:0"):
            if added:
                parts = [[tf.add_n(one) for one in zip(*parts, strict=True)]]
            # A step reads one number of each, so that nothing is left out.
            return [tf.reshape(g, [-1])[0] for part in parts for g in part]

    return run


def main():
    use_virtual_devices(SHARDS)
    model = TASKS["wide"].make()
    functions = {
        "whole": passes(model, 1, False),
        f"{SHARDS} shards": passes(model, SHARDS, False),
        f"{SHARDS} shards, added up": passes(model, SHARDS, True),
    }
    taken = {name: [] for name in functions}
    for turn in range(WARM_UP + ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= WARM_UP:
                taken[name].append(time.perf_counter() - start)
    whole = statistics.median(taken["whole"])
    print("| passes | ms | of the whole |\n|---|---:|---:|")
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"| {name} | {1000 * median:.1f} | {median / whole:.2f} |")


if __name__ == "__main__":
    main()
