"""Train on data that each host reads, and on the same batches on one device.

    python -m keras_clones launch --replicas 2 tests/cluster/worker_input.py

prints a line of JSON with the largest difference of each case, what is raised
of a dataset that cannot be made, and what a step moves between the hosts.
"""

import json
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import keras_clones
from keras_clones import DeploymentConfig, clone_model, worker_dataset
from keras_clones.benchmark.transfers import count_transfers

RANDOM = np.random.default_rng(0)
# Host 0 has more rows a batch and runs out first.
ROWS, SIZES = (23, 28), (5, 3)
X = [RANDOM.normal(size=(rows, 6)) for rows in ROWS]
Y = [RANDOM.integers(0, 3, rows) for rows in ROWS]
STEPS = 10


def of_host(context):
    i = context.input_pipeline_id
    return tf.data.Dataset.from_tensor_slices((X[i], Y[i])).batch(SIZES[i])


def uncounted(context):
    return of_host(context).filter(lambda x, y: True)


def joined():
    def batches():
        for step in range(STEPS):
            yield tuple(
                np.concatenate(
                    [
                        rows[step * size : (step + 1) * size]
                        for rows, size in zip(data, SIZES, strict=True)
                    ]
                )
                for data in (X, Y)
            )

    types = (
        tf.TensorSpec([None, 6], "float64"),
        tf.TensorSpec([None], "int64"),
    )
    return tf.data.Dataset.from_generator(batches, output_signature=types)


@keras.saving.register_keras_serializable("worker_input")
class Own(keras.Sequential):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(
                y, self(x, training=True), from_logits=True
            )
            loss = keras.ops.sum(losses) / 10
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def made(kind=keras.Sequential, norm=True):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((6,)), keras.layers.Dense(8, "tanh")]
    layers += [keras.layers.BatchNormalization()] * norm
    return kind([*layers, keras.layers.Dense(3)])


def fit(data, config=None, kind=keras.Sequential, norm=True, **options):
    """Return what training, evaluating and predicting come to."""
    model = made(kind, norm)
    if config is not None:
        clone_model(model, config=config, batch_norm="sync")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    several = options.pop("steps_per_execution", 1)
    metrics = None if kind is Own else ["accuracy"]
    model.compile("adam", loss, metrics=metrics, steps_per_execution=several)
    history = model.fit(
        data, epochs=3, verbose=0, validation_data=data, **options
    )
    return [
        *model.get_weights(),
        *(v.numpy() for v in model.optimizer.variables),
        *history.history.values(),
        *([] if norm else [model.predict(data, verbose=0)]),
    ]


def difference(config, fn=of_host, **options):
    known = tf.data.experimental.assert_cardinality(STEPS)
    batches = joined().apply(known) if fn is of_host else joined()
    plain = fit(batches, **options)
    clones = fit(worker_dataset(fn), config, **options)
    differences = [
        np.abs(np.asarray(one) - np.asarray(other)).max()
        for one, other in zip(plain, clones, strict=True)
    ]
    return float(np.max(differences))


def raised(fn):
    """Return what is raised of a function of a context."""
    try:
        worker_dataset(fn)
    except (KeyError, TypeError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fails(context):
    if context.input_pipeline_id == 1:
        raise OSError("No such folder")
    return of_host(context)


def no_dataset(context):
    return of_host(context) if context.input_pipeline_id == 0 else [1, 2]


def other_types(context):
    dataset = of_host(context)
    if context.input_pipeline_id == 1:
        return dataset.map(lambda x, y: (x, tf.cast(y, "int32")))
    return dataset


def raised_while_read(config):
    """Return what a file that one host lacks comes to, in `evaluate`."""
    model = clone_model(made(norm=False), config=config)
    model.compile("adam", "mse")

    def fn(context):
        name = f"no file of {context.input_pipeline_id}"
        lines = tf.data.TextLineDataset(name)
        read = lines.map(lambda line: (tf.zeros([6]), tf.zeros([3])))
        known = tf.data.Dataset.from_tensors((tf.zeros([6]), tf.zeros([3])))
        return (read if context.input_pipeline_id else known).batch(2)

    try:
        model.evaluate(worker_dataset(fn), verbose=0)
    except tf.errors.NotFoundError as error:
        return str(error)
    return "nothing"


def unknown_sizes(config, loss):
    """Return the tensors of no static size that cross between hosts.

    Rows are among those: nobody knows how many there are before a step.
    """
    model = made(norm=False)
    clone_model(model, config=config)
    model.compile("adam", loss)
    iterator = iter(worker_dataset(of_host))
    step = tf.function(
        lambda: model.train_step(iterator.get_next()), autograph=False
    )
    return [
        transfer.name
        for transfer in count_transfers(step, unknown=-1)
        if transfer.bytes == -1
        and transfer.source.split("/device:")[0]
        != transfer.target.split("/device:")[0]
    ]


def pairs(y, z):
    return keras.ops.matmul(z, keras.ops.transpose(z))


def main():
    cluster = keras_clones.connect()
    keras.config.set_floatx("float64")
    config = DeploymentConfig(num_replicas=len(cluster.replicas))
    errors = [raised(fn) for fn in (fails, no_dataset, other_types)]
    # What comes next is not harmed by it.
    errors.append(raised_while_read(config))
    found = {
        "by towers": difference(config, fn=uncounted, norm=False),
        "synchronized": difference(config, steps_per_epoch=4),
        "own step": difference(config, kind=Own),
        "several": difference(config, norm=False, steps_per_execution=3),
    }
    cross = [
        unknown_sizes(config, loss)
        for loss in ("sparse_categorical_crossentropy", pairs)
    ]
    found = {"differences": found, "errors": errors, "cross": cross}
    print("DIFFERENCES", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
