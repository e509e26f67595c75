"""Train a small convolutional network on handwritten digits, on clones.

Run it with `python examples/digits.py`; it needs no GPU and no download. It
takes every GPU there is, or four virtual CPU devices where there is none.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib
import numpy as np
from machine import add_clones, add_training, check_folder, take_devices
from sklearn.datasets import load_digits

from keras_clones import clone_model, deployment


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
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),  # (batch, 4, 4, 32)
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),  # (batch, 1024)
            keras.layers.Dropout(0.4),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def train(num_clones, epochs, batch_size, folder, verbose="auto"):
    """Train, save and reload; return the test accuracy."""
    keras.utils.set_random_seed(0)
    (x, y), (x_test, y_test) = load_data()
    model = clone_model(make_model(), num_clones=num_clones)
    model.compile(
        keras.optimizers.Adam(2e-3),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    deployment(model).summary(batch_size)
    history = model.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=epochs,
        validation_split=0.1,
        verbose=verbose,
    ).history
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"test accuracy: {accuracy:.2%}")

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "digits.keras")
    print(f"saved: {folder / 'digits.keras'}")
    plot(history, folder / "digits.png")
    print(f"picture: {folder / 'digits.png'}")

    reloaded = keras.models.load_model(folder / "digits.keras")
    np.testing.assert_allclose(
        model.predict(x_test, verbose=0),  # (397, 10)
        reloaded.predict(x_test, verbose=0),
        atol=1e-5,
    )
    print("reloaded in plain Keras: the predictions agree")
    return accuracy


def plot(history, path):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        epochs = range(1, len(history[name]) + 1)
        axis.plot(epochs, history[name], label="training")
        axis.plot(epochs, history[f"val_{name}"], label="validation")
        axis.set(xlabel="epoch", ylabel=name)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_clones(parser, without_gpu=4)
    add_training(parser, epochs=12, folder="digits")
    args = parser.parse_args()
    check_folder(args.folder)
    clones = take_devices(args.clones, without_gpu=4)
    train(clones, args.epochs, args.batch_size, args.folder)


if __name__ == "__main__":
    main()
