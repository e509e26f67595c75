"""Train on handwritten digits, on all processes of a cluster.

    python -m keras_clones launch --replicas 2 --ps 1 examples/cluster_digits.py

starts three processes on this machine that train together. Without `launch`,
and without a cluster that `TF_CONFIG` or Slurm tells of, it trains alone. It
needs no GPU and no download. A training that was stopped goes on at the batch
it was at, from what `--folder` has of it.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from digits import load_data, make_model
from machine import add_training, check_folder

import keras_clones
from keras_clones import Backup, clone_model, deployment


def train(epochs, batch_size, folder, variables=None, verbose="auto"):
    """Train on every device of the cluster; return the test accuracy."""
    keras.utils.set_random_seed(0)
    (x, y), (x_test, y_test) = load_data()  # (1400, 8, 8, 1), (1400,)
    # Draws are those of one device, so any cluster trains the same model.
    model = clone_model(make_model(), exact=True, variables=variables)
    model.compile(
        keras.optimizers.Adam(2e-3),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    deployment(model).summary(batch_size)
    folder = pathlib.Path(folder)
    model.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=epochs,
        callbacks=[Backup(folder / "backup")],
        verbose=verbose,
    )
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"test accuracy: {accuracy:.2%}")
    model.save(folder / "digits.keras")
    print(f"saved: {folder / 'digits.keras'}")
    sums = [float(np.sum(weight)) for weight in model.get_weights()]
    print(f"sum of the weights: {sum(sums):.4f}")
    return accuracy


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_training(parser, epochs=6, folder="cluster_digits")
    parser.add_argument(
        "--variables",
        choices=["controller", "spread", "greedy", "round_robin"],
        help="where the weights are (default: on parameter servers, if any)",
    )
    args = parser.parse_args()
    # All other processes stay in here until the training is done.
    cluster = keras_clones.connect()
    check_folder(args.folder)
    print(
        f"{len(cluster.replicas)} replica(s), {len(cluster.ps)} parameter "
        "server(s)"
    )
    train(args.epochs, args.batch_size, args.folder, args.variables)


if __name__ == "__main__":
    main()
