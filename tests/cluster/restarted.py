"""Train on a cluster, be killed, go on, and train once more as a whole.

    python -m keras_clones launch --replicas 2 --restarts 1 \
        tests/cluster/restarted.py FOLDER BATCH

prints a line of JSON: the weights that both come to, and in which life. The
controller is killed at that batch of its first life.
"""

import json
import os
import pathlib
import signal
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np

import keras_clones
from keras_clones import Backup, clone_model


class Kill(keras.callbacks.Callback):
    """Kills the process when so many batches have been trained on."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations.numpy() == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, *callbacks):
    """Return the weights that a training comes to."""
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 6)), random.normal(size=(50, 1))
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1),
        ]
    )
    clone_model(model, exact=True, variables="spread")
    model.compile("adam", "mse")
    callbacks = [Backup(folder, save_freq=3), *callbacks]
    model.fit(x, y, batch_size=8, epochs=4, callbacks=callbacks, verbose=0)
    return [weight.tolist() for weight in model.get_weights()]


def main():
    keras_clones.connect()
    keras.config.set_floatx("float64")
    life = os.environ.get("KERAS_CLONES_RESTART", "0")
    folder = pathlib.Path(sys.argv[1])
    kill = [Kill(int(sys.argv[2]))] if life == "0" else []
    found = {
        "life": life,
        "killed": train(folder / "killed", *kill),
        "whole": train(folder / "whole"),
    }
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
