"""Train on digits with replicas that step by themselves.

    python -m keras_clones launch --replicas 2 --ps 1 \
        tests/cluster/asynchronous.py (none|hosts|max_staleness) ...

prints a line of JSON: of each training the accuracy, and the rows that each
epoch counted. In one of `hosts`, each reads its own part of the rows. Where
there is a folder `FAULT_FOLDER`, worker 1 is killed in the second epoch.
"""

import json
import os
import pathlib
import signal
import sys
import warnings

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_clones
from keras_clones import DeploymentConfig, clone_model

EPOCHS = 10


@keras.saving.register_keras_serializable("cluster")
class Rows(keras.metrics.Metric):
    """Counts the rows that it is given."""

    def __init__(self, name="rows"):
        super().__init__(name=name, dtype="float64")
        self.count = self.add_weight(initializer="zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(
            keras.ops.cast(keras.ops.shape(y_true)[0], "float64")
        )

    def result(self):
        # A value of its own, not the variable, which counts on.
        return self.count + 0.0


@keras.saving.register_keras_serializable("cluster")
class Least(Rows):
    """The least number of times that any row to train on was given.

    Targets are labels and, times ten, the numbers of the rows.
    """

    def __init__(self, name="least"):
        keras.metrics.Metric.__init__(self, name=name, dtype="float64")
        self.count = self.add_weight(
            shape=(1797,), initializer="zeros", name="count"
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        rows = keras.ops.cast(keras.ops.reshape(y_true, [-1]) // 10, "int32")
        self.count.assign_add(
            keras.ops.sum(keras.ops.one_hot(rows, 1797, dtype="float64"), 0)
        )

    def result(self):
        return keras.ops.min(self.count[:1400])


def loss(y_true, y_pred):
    return keras.losses.sparse_categorical_crossentropy(y_true % 10, y_pred)


def right(y_true, y_pred):
    return keras.metrics.sparse_categorical_accuracy(y_true % 10, y_pred)


class Kill(keras.callbacks.Callback):
    """Kills a task of the cluster in the second epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations.numpy() >= 60 and self.waiting:
            self.waiting = False
            pid = pathlib.Path(os.environ["FAULT_FOLDER"], "1").read_text()
            os.kill(int(pid), signal.SIGKILL)

    waiting = True


def main():
    if folder := os.environ.get("FAULT_FOLDER"):
        task = json.loads(os.environ["TF_CONFIG"])["task"]
        if task["type"] == "worker":
            path = pathlib.Path(folder, str(task["index"]))
            path.write_text(str(os.getpid()))
    cluster = keras_clones.connect()
    found = {how: train(cluster, how) for how in sys.argv[1:]}
    print("FOUND", json.dumps(found), flush=True)


def train(cluster, how):
    """Return what a training comes to."""
    keras.utils.set_random_seed(0)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = digits.images[order, ..., None] / 16, digits.target[order]
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.4),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    config = DeploymentConfig(
        1,
        num_replicas=len(cluster.replicas),
        num_ps_tasks=len(cluster.ps),
        sync=False,
        max_staleness=int(how) if how.isdigit() else None,
    )
    clone_model(model, config=config)
    model.compile(
        keras.optimizers.Adam(2e-3),
        loss,
        metrics=[right, Rows(), Least()],
    )
    y = y + 10 * np.arange(len(y))
    data = (x[:1400], y[:1400])
    if how == "hosts":

        def read(context):
            own = slice(
                context.input_pipeline_id, 1400, context.num_input_pipelines
            )
            rows = tf.data.Dataset.from_tensor_slices((x[own], y[own]))
            return rows.shuffle(700, seed=1).batch(32)

        data = (keras_clones.worker_dataset(read),)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        history = model.fit(
            *data,
            batch_size=None if how == "hosts" else 32,
            epochs=EPOCHS if "FAULT_FOLDER" not in os.environ else 5,
            verbose=0,
            callbacks=[Kill()] if "FAULT_FOLDER" in os.environ else [],
            validation_data=(x[1400:], y[1400:]),
        ).history
    accuracy = model.evaluate(x[1400:], y[1400:], verbose=0)[1]
    return {
        "accuracy": accuracy,
        "rows": history["rows"],
        "least": history["least"],
        "steps": int(model.optimizer.iterations),
        "told": [str(one.message) for one in told if "lost" in str(one)],
    }


if __name__ == "__main__":
    main()
