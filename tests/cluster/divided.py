"""Train with a table that is divided by rows over hosts, and count its rows.

    python -m keras_clones launch --replicas 2 --ps 2 tests/cluster/divided.py

prints a line of JSON: by optimizer and homes of the weights, the largest
difference from one device; and by these homes what each link carries: how many
tensors of rows and of ids, the bytes of all that crosses it, and the bytes
that the summary says.
"""

import collections
import json
import math
import os
import tempfile

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import keras_clones
from keras_clones import DeploymentConfig, clone_model, deployment
from keras_clones.benchmark.transfers import count_transfers
from keras_clones.devices.hosts import host_name
from keras_clones.look import footprint
from keras_clones.look.links import bytes_by_link

ROWS, DIM, BATCH, LENGTH = 3001, 16, 8, 6
RANDOM = np.random.default_rng(0)
X = RANDOM.integers(0, ROWS, (43, LENGTH)).astype("int32")
Y = RANDOM.integers(0, 3, 43)
OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(
        0.01, global_clipnorm=0.1, use_ema=True, ema_overwrite_frequency=3
    ),
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.05),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
}


def make(name, **options):
    keras.utils.set_random_seed(1)
    ids = keras.Input((LENGTH,), dtype="int32")
    rows = keras.layers.Embedding(ROWS, DIM, name="items")(ids)
    pooled = keras.layers.GlobalAveragePooling1D()(rows)
    model = keras.Model(ids, keras.layers.Dense(3)(pooled))
    if options:
        clone_model(model, divided=["items"], **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[name](), loss)
    return model


def fit(model):
    history = model.fit(
        X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0
    )
    variables = [*model.variables, *model.optimizer.variables]
    return [v.numpy() for v in variables], history.history["loss"]


def difference(name, options):
    """Compare with one device, and a file with the model that it is of."""
    plain = make(name)
    plain.optimizer.build(plain.trainable_variables)
    model = make(name, **options)
    (expected, losses), (found, others) = fit(plain), fit(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        again = keras.models.load_model(f"{folder}/model.keras")
        found += fit(again)[0]
        expected += fit(plain)[0]
        again.save_weights(f"{folder}/model.weights.h5")
        model.load_weights(f"{folder}/model.weights.h5")
    found += model.get_weights()
    expected += plain.get_weights()
    pairs = zip([*expected, losses], [*found, others], strict=True)
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)


def links(options):
    """Return what each link carries in a step."""
    model = make("adam", **options)
    # Each clone looks up 12 rows at each home.
    ids = np.arange(BATCH * LENGTH, dtype="int32").reshape(BATCH, LENGTH)
    batch = ids, np.zeros(BATCH, "int32")
    iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
    step = tf.function(
        lambda: model.train_step(next(iterator)), autograph=False
    )
    shapes = {(None,): (12,), (None, DIM): (12, DIM)}

    def size(tensor):
        return math.prod(shapes[tuple(tensor.shape)]) * tensor.dtype.size

    made = deployment(model)
    said = bytes_by_link(
        made.clones,
        made.inputs_device,
        made.shard_sizes(BATCH),
        footprint.measure(model, made.step_options()),
    )
    found = collections.defaultdict(lambda: collections.defaultdict(int))
    for transfer in count_transfers(step, size):
        ends = [
            host_name(device.partition("/device:")[0])
            for device in (transfer.source, transfer.target)
        ]
        if ends[0] != ends[1]:
            link = found[" to ".join(ends)]
            link["bytes"] += transfer.bytes
            link["rows"] += transfer.bytes == 12 * DIM * 8
            link["ids"] += transfer.bytes == 12 * 4
    for ends, bytes_said in said.items():
        found[" to ".join(ends)]["said"] = bytes_said
    return found


def main():
    cluster = keras_clones.connect()
    keras.config.set_floatx("float64")
    config = DeploymentConfig(
        1,
        num_replicas=len(cluster.replicas),
        num_ps_tasks=len(cluster.ps),
    )
    homes = ["controller", "spread"] + ["greedy"] * bool(cluster.ps)
    found = {"differences": {}, "links": {}}
    for name, home in {
        *zip(OPTIMIZERS, homes, strict=False),
        ("adam", homes[-1]),
    }:
        options = {"config": config, "variables": home}
        worst = difference(name, options)
        found["differences"][f"{name} {home}"] = worst
    for home in homes:
        options = {"config": config, "variables": home}
        found["links"][home] = links(options)
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
