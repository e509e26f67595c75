"""Train on handwritten digits in a loop of your own, on clones.

Run it with `python examples/custom_loop.py`; it needs no GPU and no download.
With `--logs FOLDER` it writes summaries for TensorBoard.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from machine import add_clones, positive, take_devices
from sklearn.datasets import load_digits

from keras_clones import (
    DeploymentConfig,
    create_clones,
    deploy,
    split_batch,
)


def load_data():
    digits = load_digits()
    images = digits.images[..., None].astype("float32") / 16  # (1797, 8, 8, 1)
    labels = digits.target  # (1797,)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def make_model():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.MaxPooling2D(),  # (batch, 4, 4, 32)
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),  # (batch, 1024)
            keras.layers.Dropout(0.4),
            keras.layers.Dense(
                10, kernel_regularizer=keras.regularizers.L2(1e-4)
            ),
        ]
    )


def train(num_clones, epochs, batch_size, logs=None):
    """Train, and return the test accuracy."""
    keras.utils.set_random_seed(0)
    (x, y), (x_test, y_test) = load_data()
    config = DeploymentConfig(num_clones)
    with tf.device(config.variables_device()):
        model = make_model()
        optimizer = keras.optimizers.Adam(2e-3)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def model_fn(batch):
        images, labels = batch  # a clone's shard of the batch
        return loss_fn(labels, model(images, training=True))

    deployed = deploy(
        config,
        model_fn,
        optimizer=optimizer,
        summarize_gradients=logs is not None,
        regularization_losses=lambda: model.losses,
    )

    @tf.function
    def predict(images):
        clones = create_clones(config, model, [split_batch(images, num_clones)])
        return tf.concat([clone.outputs for clone in clones], axis=0)

    writer = tf.summary.create_file_writer(logs) if logs else None
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=0)
    # The last batch of an epoch is smaller, and its rows count like all others.
    # It is left out only where it has not one row for each clone.
    too_small = len(x) % batch_size < num_clones
    batches = batches.batch(batch_size, drop_remainder=too_small)
    for epoch in range(epochs):
        losses = [
            float(deployed.train_fn(split_batch(batch, num_clones)))
            for batch in batches
        ]
        if writer:
            deployed.summary_fn(writer)
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}")

    for clone in deployed.clones:
        print(
            f"{clone.scope.rstrip('/') or 'clone_0'} on "
            f"{clone.device.removeprefix('/device:')}: "
            f"loss of its last shard {float(clone.outputs):.4f}"
        )
    logits = predict(x_test)  # (397, 10)
    accuracy = float(np.mean(np.argmax(logits, axis=-1) == y_test))
    print(f"test accuracy: {accuracy:.2%}")
    return accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_clones(parser, without_gpu=4)
    parser.add_argument("--epochs", type=positive, default=8, help="default: 8")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        help="rows of the global batch (default: 64)",
    )
    parser.add_argument("--logs", help="where to write summaries")
    args = parser.parse_args()
    if not (args.clones or 1) <= args.batch_size <= 1400:
        parser.error(
            "--batch-size must be from the number of clones to 1400, the "
            f"number of images. Received: --batch-size {args.batch_size} "
            f"--clones {args.clones}"
        )
    if args.logs and not hasattr(tf.summary, "scalar"):
        parser.error("--logs needs `pip install tensorboard`")
    clones = take_devices(args.clones, min(4, args.batch_size))
    train(clones, args.epochs, args.batch_size, args.logs)


if __name__ == "__main__":
    main()
