"""The models that the benchmark times, and what their data looks like."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

CLASSES = 10


class Task(NamedTuple):
    """A model to time, and its data.

    `shape` is that of an input, `batch` the rows of the global batch and
    `steps` how many are timed. Inputs are whole numbers below `ids`, or
    `None` for numbers between 0 and 1.
    """

    make: Callable[[], keras.Model]
    shape: tuple[int, ...]
    batch: int
    steps: int
    ids: int | None = None


def mlp() -> keras.Model:
    """Return a small model, whose step is mostly overhead."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(128, "relu"),
            keras.layers.Dense(CLASSES, "softmax"),
        ]
    )


def cnn() -> keras.Model:
    """Return a convolutional network of three blocks."""
    layers = [keras.Input((32, 32, 3))]
    for filters in (32, 64, 128):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
        ]
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dense(CLASSES, "softmax"),
    ]
    return keras.Sequential(layers)


def transformer() -> keras.Model:
    """Return a classifier of sequences with two encoder layers."""
    width = 128
    inputs = keras.Input((64,), dtype="int32")
    x = keras.layers.Embedding(1000, width)(inputs)
    for _ in range(2):
        attended = keras.layers.MultiHeadAttention(4, width // 4)(x, x)
        x = keras.layers.LayerNormalization()(x + attended)
        hidden = keras.layers.Dense(4 * width, "gelu")(x)
        hidden = keras.layers.Dense(width)(hidden)
        x = keras.layers.LayerNormalization()(x + hidden)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, "softmax")(x))


def wide() -> keras.Model:
    """Return a model that is mostly parameters: ten million."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(2048, "relu"),
            keras.layers.Dense(2048, "relu"),
            keras.layers.Dense(2048, "relu"),
            keras.layers.Dense(CLASSES, "softmax"),
        ]
    )


def embedding() -> keras.Model:
    """Return a model with a table of which a step needs few rows."""
    return keras.Sequential(
        [
            keras.Input((16,), dtype="int32"),
            keras.layers.Embedding(200_000, 64),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(64, "relu"),
            keras.layers.Dense(CLASSES, "softmax"),
        ]
    )


def mobilenet() -> keras.Model:
    """Return MobileNetV2, which has many small variables."""
    return keras.applications.MobileNetV2(
        weights=None, input_shape=(96, 96, 3), classes=CLASSES
    )


class OwnStep(keras.Model):
    """A model with a train step of its own, as published examples have it."""

    def train_step(self, data: Any) -> dict:
        """Train on one batch."""
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"own_loss": loss}


def own() -> keras.Model:
    """Return the convolutional network, with a train step of its own."""
    plain = cnn()
    return OwnStep(plain.inputs, plain.outputs)


TASKS = {
    "mlp": Task(mlp, (784,), 256, 200),
    "cnn": Task(cnn, (32, 32, 3), 64, 40),
    "own": Task(own, (32, 32, 3), 64, 40),
    "transformer": Task(transformer, (64,), 32, 40, 1000),
    "wide": Task(wide, (784,), 64, 30),
    "embedding": Task(embedding, (16,), 256, 20, 200_000),
    "mobilenet": Task(mobilenet, (96, 96, 3), 32, 10),
}
