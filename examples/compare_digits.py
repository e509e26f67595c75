"""Compare clones of a network for handwritten digits with plain Keras.

Run it with `python examples/compare_digits.py`; it needs no GPU and no
download. The network has dropout and BatchNormalization, which clones train
otherwise than one device does unless `exact=True` says that they must not.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from machine import positive
from sklearn.datasets import load_digits

from keras_clones import compare, use_virtual_devices


def load_data():
    digits = load_digits()
    images = digits.images[..., None].astype("float32") / 16  # (1797, 8, 8, 1)
    return images, digits.target  # (1797,)


def make_model():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("relu"),  # (batch, 8, 8, 16)
            keras.layers.MaxPooling2D(),  # (batch, 4, 4, 16)
            keras.layers.Flatten(),  # (batch, 256)
            keras.layers.Dropout(0.4),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(2e-3),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def make_model_and_data():
    """Return what the command `python -m keras_clones compare` takes."""
    return make_model(), load_data()


def report(num_clones, batch_size, steps, folder, verbose=1):
    """Compare as it is and with `exact=True`; return both comparisons."""
    keras.utils.set_random_seed(0)
    model = make_model()
    x, y = load_data()
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for exact in (False, True):
        print(f"\nexact={exact}\n")
        found[exact] = compare(
            model,
            x,
            y,
            batch_size=batch_size,
            num_clones=num_clones,
            steps=steps,
            verbose=verbose,
            exact=exact,
        )
        found[exact].summary()
        path = folder / f"compare_{'exact' if exact else 'default'}.png"
        found[exact].plot(path)
        print(f"picture: {path}")
    return found[False], found[True]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clones", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument("--folder", default="digits", help="where to save")
    args = parser.parse_args()
    use_virtual_devices(max(args.clones))
    report(args.clones, args.batch_size, args.steps, args.folder)


if __name__ == "__main__":
    main()
