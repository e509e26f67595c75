"""The models that the benchmark times, and what their data looks like."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

CLASSES = 10
# Of the language model, whose outputs are as many for each word of a text.
WORDS = 20_000


class Task(NamedTuple):
    """A model to time, and its data.

    `shape` is that of an input, `batch` the rows of the global batch and
    `steps` how many are timed. Inputs are whole numbers below `ids`, or
    `None` for numbers between 0 and 1. `options` are those of `clone_model`.
    `own_step` says whether it has a train step of its own, which is written
    for TensorFlow. `masked` says whether inputs are texts of different
    lengths, padded with 0, and targets their words. `partial` says whether
    the last of its batches has fewer rows.
    """

    make: Callable[[], keras.Model]
    shape: tuple[int, ...]
    batch: int
    steps: int
    ids: int | None = None
    options: Mapping[str, Any] = {}
    own_step: bool = False
    masked: bool = False
    partial: bool = False


def mlp() -> keras.Model:
    """Return a small model, whose step is mostly overhead."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(128, "relu"),
            keras.layers.Dense(CLASSES, "softmax"),
        ]
    )


def normalized() -> keras.Model:
    """Return the small model, normalized over the batch."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(128, "relu"),
            keras.layers.BatchNormalization(),
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


def transformer(dropout: float = 0.0) -> keras.Model:
    """Return a classifier of sequences with two encoder layers."""
    width = 128
    inputs = keras.Input((64,), dtype="int32")
    x = keras.layers.Embedding(1000, width)(inputs)
    for _ in range(2):
        attention = keras.layers.MultiHeadAttention(
            4, width // 4, dropout=dropout
        )
        x = keras.layers.LayerNormalization()(x + attention(x, x))
        hidden = keras.layers.Dense(4 * width, "gelu")(x)
        hidden = keras.layers.Dense(width)(hidden)
        if dropout:
            hidden = keras.layers.Dropout(dropout)(hidden)
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


def language_model(blocks: int = 1, words: int = WORDS) -> keras.Model:
    """Return a model of padded texts, whose outputs are larger than it is."""
    width = 64
    inputs = keras.Input((32,), dtype="int32")
    x = keras.layers.Embedding(words, width, mask_zero=True)(inputs)
    for _ in range(blocks):
        attention = keras.layers.MultiHeadAttention(4, width // 4)
        # `Add` passes the mask on, which `+` would not.
        x = keras.layers.Add()([x, attention(x, x, use_causal_mask=True)])
        x = keras.layers.LayerNormalization()(x)
        hidden = keras.layers.Dense(4 * width, "gelu")(x)
        x = keras.layers.Add()([x, keras.layers.Dense(width)(hidden)])
        x = keras.layers.LayerNormalization()(x)
    return keras.Model(inputs, keras.layers.Dense(words, "softmax")(x))


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
            outputs = self(x, training=True)
            loss = self.compute_loss(x, y, outputs)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {**self.compute_metrics(x, y, outputs), "own_loss": loss}


def own() -> keras.Model:
    """Return the convolutional network, with a train step of its own."""
    plain = cnn()
    return OwnStep(plain.inputs, plain.outputs)


class MinibatchStd(keras.layers.Layer):
    """Adds to each row how far the rows of the batch are apart.

    Reference:

    - [Karras et al., 2018](https://arxiv.org/abs/1710.10196), section 3.
    """

    def call(self, x: Any) -> Any:
        """Return the rows with one feature more."""
        spread = keras.ops.mean(keras.ops.std(x, axis=0))
        return keras.ops.concatenate(
            [x, keras.ops.zeros_like(x[:, :1]) + spread], axis=1
        )


class Gan(keras.Model):
    """A GAN for 32 x 32 images whose critic sees how far rows are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(8 * 8 * 64, "relu"),
                keras.layers.Reshape((8, 8, 64)),
                keras.layers.Conv2DTranspose(
                    32, 4, 2, "same", activation="relu"
                ),
                keras.layers.Conv2DTranspose(3, 4, 2, "same"),
            ]
        )
        self.critic = keras.Sequential(
            [
                keras.Input((32, 32, 3)),
                keras.layers.Conv2D(32, 4, 2, "same", activation="relu"),
                keras.layers.Conv2D(64, 4, 2, "same", activation="relu"),
                keras.layers.Flatten(),
                MinibatchStd(name="minibatch_std"),
                keras.layers.Dense(1),
            ]
        )

    def train_step(self, data: Any) -> dict:
        """Train the critic and the generator on one batch."""
        images, _ = data
        noise = keras.random.normal((tf.shape(images)[0], 64))
        with tf.GradientTape(persistent=True) as tape:
            made = self.generator(noise, training=True)
            fake, real = self.critic(made), self.critic(images)
            critic_loss = tf.reduce_mean(fake - real)
            generator_loss = -tf.reduce_mean(fake)
        critic, generator = (
            self.critic.trainable_variables,
            self.generator.trainable_variables,
        )
        gradients = [
            *tape.gradient(critic_loss, critic),
            *tape.gradient(generator_loss, generator),
        ]
        self.optimizer.apply(gradients, [*critic, *generator])
        return {"critic_loss": critic_loss, "generator_loss": generator_loss}


# Twice each: as one device trains them, and with what differs by clone.
_EXACT = {
    "dropout": Task(lambda: transformer(0.1), (64,), 32, 40, 1000),
    "dropout-global": Task(
        lambda: transformer(0.1), (64,), 32, 40, 1000, {"random": "global"}
    ),
    "minibatch": Task(
        Gan,
        (32, 32, 3),
        64,
        30,
        options={"check_rows": False},
        own_step=True,
    ),
    "minibatch-whole": Task(
        Gan,
        (32, 32, 3),
        64,
        30,
        options={"whole": ["minibatch_std"]},
        own_step=True,
    ),
}
TASKS = {
    "mlp": Task(mlp, (784,), 256, 200),
    "mlp-norm": Task(normalized, (784,), 256, 200),
    "cnn": Task(cnn, (32, 32, 3), 64, 40),
    "own": Task(own, (32, 32, 3), 64, 40, own_step=True),
    "transformer": Task(transformer, (64,), 32, 40, 1000),
    "wide": Task(wide, (784,), 64, 30),
    "embedding": Task(embedding, (16,), 256, 20, 200_000),
    "masked": Task(language_model, (32,), 32, 10, WORDS, masked=True),
    "blocks": Task(
        lambda: language_model(6, 1000),
        (32,),
        32,
        20,
        1000,
        masked=True,
        partial=True,
    ),
    "mobilenet": Task(mobilenet, (96, 96, 3), 32, 10),
    **_EXACT,
}
