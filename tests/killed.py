"""A training that is killed, life after life, each time by a signal."""

import itertools
import os
import pathlib
import random
import signal
import stat
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np

from keras_clones import Backup
from keras_clones.callbacks import backup_file


class Batches(keras.callbacks.Callback):
    """Kills its own process at the end of a batch, before it is backed up."""

    def __init__(self, number):
        super().__init__()
        self._left = itertools.count(1 - number)

    def on_train_batch_end(self, batch, logs=None):
        if next(self._left) == 0:
            die()


class Slow(keras.callbacks.Callback):
    """Leaves time for a signal."""

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.01)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(number):
    """Kill this process where half of a backup is written."""
    left, fsync = itertools.count(1 - number), os.fsync

    def half(descriptor):
        fsync(descriptor)
        written = os.fstat(descriptor)
        if stat.S_ISREG(written.st_mode) and next(left) == 0:
            os.ftruncate(descriptor, written.st_size // 2)
            die()

    backup_file.os = Some(os, fsync=half)


def die_between(number):
    """Kill this process where one file has its new name, another not."""
    left, replace = itertools.count(1 - number), os.replace

    def and_die(source, target):
        replace(source, target)
        if target.endswith(backup_file.PREVIOUS) and next(left) == 0:
            die()

    backup_file.os = Some(os, replace=and_die)


class Some:
    """A module with some of its functions replaced."""

    def __init__(self, module, **replaced):
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name):
        return getattr(self._module, name)


WAYS = {"write": die_while_writing, "between": die_between}


def train(folder, result, callbacks=()):
    """Train a small model, and write what it came to."""
    keras.config.set_floatx("float64")
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    made = np.random.default_rng(3)
    x, y = made.normal(size=(42, 6)), made.normal(size=(42, 1))
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse", metrics=["mae"])
    backup = Backup(folder, save_freq=1, seed=5)
    history = model.fit(
        *(x, y, 4, 3), verbose=0, callbacks=[*callbacks, backup]
    )
    held = [*model.get_weights(), *history.history.values(), history.epoch]
    values = [*held, *(v.numpy() for v in model.optimizer.variables)]
    np.savez(result, *values)


def live(folder, result, way):
    """Train in a process of its own; return how that ended."""
    kind, _, number = way.partition(":")
    child = os.fork()
    if not child:
        callbacks = [Slow()] if kind == "time" else []
        if kind == "batch":
            callbacks = [Batches(int(number))]
        elif kind in WAYS:
            WAYS[kind](int(number))
        train(folder, result, callbacks)
        os._exit(0)
    if kind == "time":
        # Building takes a second, and what is to be seen comes after it.
        while not os.path.exists(os.path.join(folder, backup_file.NAME)):
            time.sleep(0.001)
        time.sleep(random.random() * float(number))
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder, result, *ways):
    """Let it be killed in each of the ways, and then come to its end."""
    codes = [live(folder, result, way) for way in (*ways, "end")]
    print(*codes)
    left = pathlib.Path(folder)
    print(sorted(p.name for p in left.iterdir()) if left.exists() else "gone")


if __name__ == "__main__":
    main(*sys.argv[1:])
