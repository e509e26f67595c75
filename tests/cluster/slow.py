"""Train on a cluster whose other replicas are slower than the controller.

    python -m keras_clones launch --replicas 2 tests/cluster/slow.py FOLDER

prints a line of JSON: what the profiler says of the replicas, which shares of
the rows they get with `shares="auto"`, and how far the weights are from those
of plain Keras.
"""

import json
import os
import pathlib
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import keras_clones
from keras_clones import (
    CloneProfiler,
    DeploymentConfig,
    clone_model,
    deployment,
)

ROWS, BATCH = 800, 40
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(ROWS, 6))
Y = RANDOM.integers(0, 3, ROWS)


class Slow(keras.layers.Layer):
    """Multiplies matrices for each row, forty times as many after clone 0.

    So much that it shows while other processes use the cores.

    A clone's draws are offset by its number.
    """

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, x):
        rounds = tf.shape(x)[0] * tf.where(self.seeds.next()[0] > 0, 40, 1)
        begin = tf.zeros([120, 120]) + tf.cast(rounds, tf.float32) * 1e-9
        _, found = tf.while_loop(
            lambda i, _: i < rounds,
            lambda i, z: (i + 1, tf.tanh(z @ z)),
            (0, begin),
        )
        nothing = tf.stop_gradient(tf.reduce_sum(found) * 0)
        return x + tf.cast(nothing, x.dtype)


@keras.saving.register_keras_serializable("cluster")
class Own(keras.Sequential):
    """A model with a step of its own."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def train(slow=True, callbacks=(), kind=keras.Sequential, **options):
    keras.utils.set_random_seed(1)
    layers = [Slow()] if slow else []
    model = kind(
        [
            keras.Input((6,)),
            *layers,
            keras.layers.Dense(8, "tanh"),
            keras.layers.Dense(3, "softmax"),
        ]
    )
    if options:
        clone_model(model, **options)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(
        X,
        Y,
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )
    return model


def difference(model, plain):
    return max(
        float(np.abs(one - other).max())
        for one, other in zip(
            (v.numpy() for v in model.trainable_variables),
            (v.numpy() for v in plain.trainable_variables),
            strict=True,
        )
    )


def main():
    cluster = keras_clones.connect()
    keras.config.set_floatx("float64")
    config = DeploymentConfig(
        1, num_replicas=len(cluster.replicas), num_ps_tasks=len(cluster.ps)
    )
    plain = train(slow=False)
    profiler = CloneProfiler((6, 16), pathlib.Path(sys.argv[1], "step"))
    even = train(config=config, callbacks=[profiler])
    own = CloneProfiler((6, 16), pathlib.Path(sys.argv[1], "own"))
    train(config=config, callbacks=[own], kind=Own)
    shared = train(config=config, shares="auto")
    report = profiler.report
    found = {
        "verdict": report.verdict,
        "hosts": report.hosts,
        "own": own.report.hosts,
        "phases": report.phases,
        "bounds": report.bounds,
        "sizes": deployment(shared).shard_sizes(BATCH),
        "differences": [difference(even, plain), difference(shared, plain)],
    }
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
