"""Train cases on the clones of a cluster and on one device, and compare.

    python -m keras_clones launch --replicas 2 --ps 1 tests/cluster/train.py \
        --clones 2 --variables spread --floatx float64

prints a line of JSON with the largest difference of each case, which takes
`--each` of the homes in turn.
"""

import argparse
import functools
import itertools
import json
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import keras_clones
from keras_clones import DeploymentConfig, clone_model, use_virtual_devices

ROWS, BATCH, EPOCHS = 43, 10, 4
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(ROWS, 6))
Y = RANDOM.integers(0, 3, ROWS)


def dense(optimizer=None, norm=False):
    layers = [keras.layers.Dense(8, "tanh", kernel_regularizer="l2")]
    if norm:
        layers.append(keras.layers.BatchNormalization())
    layers += [keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or "adam", loss, metrics=["accuracy"])
    return model, X, Y


def batch_norm():
    return dense(norm=True)


def clipped():
    return dense(
        keras.optimizers.AdamW(
            0.01, global_clipnorm=0.3, use_ema=True, ema_overwrite_frequency=3
        )
    )


def clipped_each():
    return dense(keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.05))


def accumulated():
    return dense(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2))


def contrastive():
    """A loss that sees the pairs of all rows."""

    def loss(y, z):
        z = z / keras.ops.norm(z, axis=1, keepdims=True)
        scores = z @ keras.ops.transpose(z) * 5
        labels = keras.ops.arange(keras.ops.shape(scores)[0])
        return keras.losses.sparse_categorical_crossentropy(
            labels, scores, from_logits=True
        )

    model, _, _ = dense()
    model.compile("adam", loss)
    return model, X, Y


def masked():
    """A look-up of ids, of which zeros are no tokens."""
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(9, 4, mask_zero=True),
            keras.layers.SimpleRNN(4, return_sequences=True),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile("rmsprop", "sparse_categorical_crossentropy")
    random = np.random.default_rng(1)
    ids = random.integers(0, 9, (ROWS, 5)) * (np.arange(5) < 4)
    return model, ids, random.integers(0, 2, (ROWS, 5))


@keras.saving.register_keras_serializable("cluster")
class Own(keras.Model):
    """A step of its own, with noise and a loss by rows."""

    def __init__(self):
        super().__init__()
        self.body = keras.layers.Dense(8, "tanh")
        self.head = keras.layers.Dense(3)
        self.seed = keras.random.SeedGenerator(3)

    def call(self, x):
        return self.head(self.body(x))

    def train_step(self, data):
        x, y = data
        noise = keras.random.normal(
            keras.ops.shape(x), dtype=x.dtype, seed=self.seed
        )
        with tf.GradientTape() as tape:
            found = self(x + 0.1 * noise, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(
                y, found, from_logits=True
            )
            loss = keras.ops.sum(losses) / 10
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def own_step():
    model = Own()
    model.compile("adam")
    return model, X, Y


CASES = (
    *(dense, batch_norm, clipped, clipped_each, accumulated, contrastive),
    *(masked, own_step),
)


def fit(case, **options):
    """Return what a training comes to: variables and logs."""
    keras.utils.set_random_seed(1)
    model, x, y = case()
    if options:
        clone_model(model, **options)
    history = model.fit(
        x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0
    )
    variables = [*model.variables, *model.optimizer.variables]
    assert np.isfinite(history.history["loss"]).all()
    return [
        *(keras.ops.convert_to_numpy(v.value) for v in variables),
        *map(np.array, history.history.values()),
    ]


@functools.cache
def plain_fit(case):
    return fit(case)


def difference(case, **options):
    plain, clones = plain_fit(case), fit(case, batch_norm="sync", **options)
    assert all(np.isfinite(one).all() for one in clones)
    return max(
        float(np.abs(one - other).max() / max(1, np.abs(one).max()))
        for one, other in zip(plain, clones, strict=True)
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--clones", type=int, default=2)
    parser.add_argument("--variables", default="")
    parser.add_argument("--each", type=int, default=1)
    parser.add_argument("--floatx", default="float64")
    parser.add_argument("--cases", default=",".join(c.__name__ for c in CASES))
    options = parser.parse_args()
    use_virtual_devices(options.clones)
    cluster = keras_clones.connect()
    keras.config.set_floatx(options.floatx)
    config = DeploymentConfig(
        options.clones,
        num_replicas=len(cluster.replicas),
        num_ps_tasks=len(cluster.ps),
    )
    found = {}
    names = options.cases.split(",")
    cases = [case for case in CASES if case.__name__ in names]
    homes = itertools.cycle(options.variables.split(","))
    for case in cases:
        for variables in itertools.islice(homes, options.each):
            found[f"{case.__name__} {variables}"] = difference(
                case, config=config, variables=variables or None
            )
    print("DIFFERENCES", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
