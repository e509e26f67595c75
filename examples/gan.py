"""Train a generative adversarial network with a step of its own, on clones.

Run it with `python examples/gan.py`; it needs no GPU and no download. It is a
WGAN with gradient penalty (Gulrajani et al., 2017) on handwritten digits. The
step draws noise, updates the critic three times and the generator once, with
an optimizer each. It runs once, on the global batch, and only its calls of
layers run on the clones: so it is written as for one device, and at the end
the weights are compared with those that one device comes to.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from machine import add_clones, add_training, check_folder, take_devices
from sklearn.datasets import load_digits

from keras_clones import clone_model, deployment


def load_data():
    images = load_digits().images[..., None] / 16  # (1797, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order].astype(keras.config.floatx())


def make_generator(latent):
    return keras.Sequential(
        [
            keras.Input((latent,)),
            keras.layers.Dense(4 * 4 * 32),
            keras.layers.Reshape((4, 4, 32)),
            keras.layers.LayerNormalization(),
            keras.layers.LeakyReLU(0.2),
            keras.layers.UpSampling2D(),  # (batch, 8, 8, 32)
            keras.layers.Conv2D(32, 3, padding="same"),
            keras.layers.LayerNormalization(),
            keras.layers.LeakyReLU(0.2),
            keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
        ]
    )


def make_critic():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same"),
            keras.layers.LeakyReLU(0.2),
            keras.layers.Conv2D(64, 3, strides=2, padding="same"),
            keras.layers.LeakyReLU(0.2),
            keras.layers.Flatten(),  # (batch, 1024)
            # A bias has no part in a difference of scores.
            keras.layers.Dense(1, use_bias=False),
        ]
    )


class WGAN(keras.Model):
    """A generator, and the critic that tells it from the data."""

    def __init__(self, latent=16, n_critic=3, penalty=10.0):
        super().__init__()
        self.latent = latent
        self.n_critic = n_critic
        self.penalty = penalty
        self.generator = make_generator(latent)
        self.critic = make_critic()
        self.seed = keras.random.SeedGenerator(0)
        self.critic_mean = keras.metrics.Mean(name="critic")
        self.generator_mean = keras.metrics.Mean(name="generator")

    @property
    def metrics(self):
        """Return the means that `fit` resets each epoch."""
        return [self.critic_mean, self.generator_mean]

    def compile(self, critic_optimizer, generator_optimizer):
        """Take an optimizer for each of the two."""
        super().compile()
        self.critic_optimizer = critic_optimizer
        self.generator_optimizer = generator_optimizer

    def call(self, noise):
        """Make images of noise."""
        return self.generator(noise)

    def noise(self, rows):
        """Draw noise: the same on clones as on one device."""
        return keras.random.normal((rows, self.latent), seed=self.seed)

    def train_step(self, real):  # (batch, 8, 8, 1)
        """Update the critic some times, and the generator once."""
        for _ in range(self.n_critic):
            self.critic_mean.update_state(self.update_critic(real))
        rows = tf.shape(real)[0]
        self.generator_mean.update_state(self.update_generator(rows))
        return {m.name: m.result() for m in self.metrics}

    def update_critic(self, real):
        """Let the critic tell generated images from real ones."""
        rows = tf.shape(real)[0]
        fake = self.generator(self.noise(rows), training=True)
        with tf.GradientTape() as tape:
            scores = self.critic(tf.concat([fake, real], axis=0))
            loss = tf.reduce_mean(scores[:rows]) - tf.reduce_mean(scores[rows:])
            total = loss + self.penalty * self.slope_penalty(real, fake)
        weights = self.critic.trainable_variables
        self.critic_optimizer.apply(tape.gradient(total, weights), weights)
        return loss

    def slope_penalty(self, real, fake):
        """Return how far the critic's slope is from one, between two images."""
        rows = tf.shape(real)[0]
        share = keras.random.uniform((rows, 1, 1, 1), seed=self.seed)
        between = real + share * (fake - real)
        with tf.GradientTape() as tape:
            tape.watch(between)
            scores = self.critic(between)
        slopes = tape.gradient(scores, between)  # (batch, 8, 8, 1)
        squares = tf.reduce_sum(tf.square(slopes), axis=[1, 2, 3])
        return tf.reduce_mean(tf.square(tf.sqrt(squares + 1e-12) - 1))

    def update_generator(self, rows):
        """Let the generator mislead the critic."""
        with tf.GradientTape() as tape:
            fake = self.generator(self.noise(rows), training=True)
            loss = -tf.reduce_mean(self.critic(fake))
        weights = self.generator.trainable_variables
        self.generator_optimizer.apply(tape.gradient(loss, weights), weights)
        return loss


def make_model(n_critic=3):
    """Make the same model each time it is called."""
    keras.utils.set_random_seed(0)
    with tf.device("CPU:0"):
        model = WGAN(n_critic=n_critic)
    model.compile(
        keras.optimizers.Adam(1e-3, beta_1=0.5, beta_2=0.9),
        keras.optimizers.Adam(1e-3, beta_1=0.5, beta_2=0.9),
    )
    return model


def train(num_clones, epochs, batch_size, images, verbose="auto"):
    """Train on clones.

    Returns:
        The model, and rows for `plot`: data, and what was made of noise.
    """
    model = clone_model(make_model(), num_clones=num_clones)
    deployment(model).summary(batch_size)
    noise = np.random.default_rng(1).normal(size=(10, model.latent))
    noise = noise.astype(keras.config.floatx())
    stages = {round(share * epochs) for share in (0, 0.1, 0.25, 0.5, 1)}
    drawn = [("data", images[:10])]

    def draw(epoch, logs=None):
        if epoch in stages:
            made = model.generator(noise, training=False)  # (10, 8, 8, 1)
            drawn.append((f"epoch {epoch}", np.asarray(made)))

    draw(0)
    model.fit(
        images,
        batch_size=batch_size,
        epochs=epochs,
        verbose=verbose,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: draw(epoch + 1)
            )
        ],
    )
    return model, drawn


def plot(rows, folder):
    """Draw ten images a row into `gan.png` in a folder."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    size = (8, 0.9 * len(rows))
    figure, axes = plt.subplots(len(rows), 10, figsize=size)
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    path = pathlib.Path(folder) / "gan.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"picture: {path}")


def compare(num_clones, epochs, batch_size, images):
    """Train anew on clones and on one device, and compare the weights.

    Returns:
        The largest difference of any weight, over the largest weight of its
        variable.
    """
    found = []
    for cloned in (False, True):
        model = make_model()
        if cloned:
            clone_model(model, num_clones=num_clones)
        model.fit(
            images,
            batch_size=batch_size,
            epochs=epochs,
            shuffle=False,
            verbose=0,
        )
        found.append(model.get_weights())
    return max(
        float(np.max(np.abs(one - other)) / max(np.max(np.abs(one)), 1e-3))
        for one, other in zip(*found, strict=True)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_clones(parser, without_gpu=4)
    add_training(parser, epochs=20, folder="gan")
    parser.add_argument(
        "--float64",
        action="store_true",
        help="train in float64, where rounding hides nothing",
    )
    args = parser.parse_args()
    check_folder(args.folder)
    clones = take_devices(args.clones, without_gpu=4)
    keras.config.set_floatx("float64" if args.float64 else "float32")
    images = load_data()
    _, drawn = train(clones, args.epochs, args.batch_size, images)
    plot(drawn, args.folder)
    gap = compare(clones, 1, args.batch_size, images)
    print(
        f"an epoch on {clones} clones and on one device, in "
        f"{keras.config.floatx()}: the weights differ by at most {gap:.1e}, "
        "relative to the largest of their variable"
    )
    if not args.float64:
        print("float32 rounds, and training magnifies it: see --float64")


if __name__ == "__main__":
    main()
