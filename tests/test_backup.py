"""Interrupted trainings that go on, against ones that never stopped."""

import functools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import Backup, clone_model
from keras_clones.callbacks import backup_file, backup_plain

ROWS, BATCH, EPOCHS = 22, 4, 3
STEPS = 6
BATCHES = 8


class Fails(keras.callbacks.Callback):
    """Raises after so many batches of a process."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def on_train_batch_end(self, batch, logs=None):
        self.after -= self.model.steps_per_execution
        if self.after <= 0:
            raise InterruptedError


def rows():
    made = np.random.default_rng(3)
    return made.normal(size=(ROWS, 5)), made.normal(size=(ROWS, 1))


def mlp(dropout=0.0, clones=0, optimizer=None, metrics=("mae",), **compile_):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.BatchNormalization(),
            *([keras.layers.Dropout(dropout)] if dropout else []),
            keras.layers.Dense(1),
        ]
    )
    if clones:
        model = clone_model(model, num_clones=clones, clone_on_cpu=True)
    optimizer = optimizer or (lambda: keras.optimizers.Adam(0.05))
    model.compile(optimizer(), "mse", metrics=list(metrics), **compile_)
    return model


def arrays(**kwargs):
    x, y = rows()
    return {"x": x, "y": y, "batch_size": BATCH} | kwargs


def dataset(shuffled=True, unknown=False, repeated=False, **kwargs):
    made = tf.data.Dataset.from_tensor_slices(rows())
    if shuffled:
        made = made.shuffle(ROWS, seed=5)
    if unknown:
        made = made.filter(lambda x, y: True)
    made = made.batch(BATCH)
    return {"x": made.repeat() if repeated else made} | kwargs


class Sequence(keras.utils.PyDataset):
    """Shuffles its rows by itself, by a generator of its own."""

    def __init__(self):
        super().__init__()
        self.x, self.y = rows()
        self.made = np.random.default_rng(4)

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        taken = slice(index * BATCH, (index + 1) * BATCH)
        return self.x[taken], self.y[taken]

    def on_epoch_end(self):
        order = self.made.permutation(ROWS)
        self.x, self.y = self.x[order], self.y[order]


def generator():
    x, y = rows()
    while True:
        for i in range(0, ROWS, BATCH):
            yield x[i : i + BATCH], y[i : i + BATCH]


def train(folder, make, data, after=None, callbacks=list, save_freq=1):
    """Train a model, that is made here, until it fails or is done."""
    model = make()
    others = callbacks()
    fails = [] if after is None else [Fails(after)]
    arguments = {"epochs": EPOCHS, "verbose": 0} | data()
    # Whatever the state of other generators is, the order is the same.
    random.seed()
    tf.random.set_seed(random.randrange(1000))
    backup = Backup(folder, save_freq, seed=9)
    try:
        model.fit(**arguments, callbacks=[backup, *others, *fails])
    except InterruptedError:
        return None
    return model, others


def state(model):
    """Return all that a training comes to."""
    keras_variables = {
        id(v): v
        for v in (
            *model.variables,
            *model.optimizer.variables,
            *(v for m in model.metrics for v in m.variables),
        )
    }
    return [np.array(v.value) for v in keras_variables.values()]


def check_same(one, other):
    (model, others), (reference, theirs) = one, other
    assert model.history.history == reference.history.history
    assert model.history.epoch == reference.history.epoch
    for a, b in zip(state(model), state(reference), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(others, theirs, strict=True):
        for name in ("wait", "best", "best_epoch", "cooldown_counter"):
            assert getattr(a, name, 0) == getattr(b, name, 0), name
        kept = getattr(a, "best_weights", None) or []
        reference_kept = getattr(b, "best_weights", None) or []
        for left, right in zip(kept, reference_kept, strict=True):
            np.testing.assert_array_equal(left, right)


def interrupted(folder, *args, stops, **kwargs):
    for after in stops:
        assert train(folder, *args, after=after, **kwargs) is None
        assert os.path.exists(folder) == (after > 1)
    done = train(folder, *args, **kwargs)
    assert not os.path.exists(folder)
    return done


def dropping():
    return mlp(dropout=0.5)


def averaging():
    return mlp(
        optimizer=lambda: keras.optimizers.SGD(
            0.05,
            momentum=0.9,
            use_ema=True,
            ema_overwrite_frequency=4,
            gradient_accumulation_steps=2,
        )
    )


def two_at_once():
    return mlp(steps_per_execution=2)


def cloned():
    return mlp(dropout=0.5, clones=2)


def stopping():
    return [
        keras.callbacks.EarlyStopping(
            "mae", patience=2, min_delta=0.4, restore_best_weights=True
        ),
        keras.callbacks.ReduceLROnPlateau(
            "loss", patience=1, cooldown=1, min_delta=0.5
        ),
    ]


def scheduling():
    return [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
    ]


class OwnMetrics(keras.Model):
    """A train step of its own, whose logs are not its metrics."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.seen = keras.Variable(0, dtype="int64", trainable=False)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.seen.assign_add(tf.cast(tf.shape(x)[0], tf.int64))
        return {"own": loss, "seen": tf.cast(self.seen, tf.float64)}


def own():
    keras.utils.set_random_seed(1)
    model = OwnMetrics()
    model.compile("adam", "mse", metrics=["mae"])
    return model


CASES = {
    "arrays": (mlp, arrays, {}),
    "arrays_by_batch": (mlp, functools.partial(arrays, shuffle="batch"), {}),
    "arrays_in_order": (mlp, functools.partial(arrays, shuffle=False), {}),
    "arrays_over_epochs": (
        mlp,
        functools.partial(arrays, steps_per_epoch=4, epochs=2),
        {},
    ),
    "validated": (
        mlp,
        functools.partial(arrays, validation_split=0.2),
        {"stops": (3, 4, 3)},
    ),
    "dataset": (mlp, dataset, {}),
    "dataset_unknown": (
        mlp,
        functools.partial(dataset, unknown=True),
        # After the last batch of an epoch, too, before its end is known.
        {"stops": (7, 8)},
    ),
    "dataset_over_epochs": (
        mlp,
        functools.partial(dataset, repeated=True, steps_per_epoch=5),
        {},
    ),
    "dataset_unknown_over_epochs": (
        mlp,
        functools.partial(dataset, unknown=True, steps_per_epoch=2, epochs=3),
        {"stops": (2, 3)},
    ),
    "sequence": (mlp, lambda: {"x": Sequence()}, {}),
    "sequence_in_order": (mlp, lambda: {"x": Sequence(), "shuffle": False}, {}),
    "generator": (mlp, lambda: {"x": generator(), "steps_per_epoch": 4}, {}),
    "dropout": (dropping, arrays, {}),
    "averages": (averaging, arrays, {}),
    "two_at_once": (two_at_once, arrays, {"stops": (4, 6)}),
    "two_at_once_unknown": (
        two_at_once,
        functools.partial(dataset, unknown=True),
        {"stops": (8, 8)},
    ),
    "clones": (cloned, arrays, {}),
    "stopping": (
        mlp,
        functools.partial(arrays, epochs=12),
        {"callbacks": stopping, "stops": (8, 15)},
    ),
    "scheduling": (
        averaging,
        arrays,
        {"callbacks": scheduling, "stops": (4, 4, 8)},
    ),
    "own_step": (own, functools.partial(dataset, unknown=True), {"stops": (7,)}),
    "epochs": (mlp, arrays, {"save_freq": "epoch", "stops": (8, 8)}),
    "every_fourth": (mlp, arrays, {"save_freq": 4, "stops": (7, 7, 9)}),
}


@pytest.mark.parametrize("name", CASES)
def test_goes_on_as_if_never_interrupted(name, tmp_path, float64):
    make, data, options = CASES[name]
    options = {"stops": (3, 7)} | options
    stops = options.pop("stops")
    one = interrupted(str(tmp_path / "a"), make, data, stops=stops, **options)
    other = train(str(tmp_path / "b"), make, data, **options)
    check_same(one, other)
