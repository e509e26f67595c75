"""Interrupted trainings that go on, against ones that never stopped."""

import functools
import json
import os
import pathlib
import random
import re
import subprocess
import sys
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import Backup, clone_model
from keras_clones.callbacks import (
    backup_file,
    backup_plain,
    backup_variables,
)

ROWS, BATCH, EPOCHS = 22, 4, 3
STEPS = 6


class Fails(keras.callbacks.Callback):
    """Raises after so many batches of a process."""

    def __init__(self, after):
        super().__init__()
        # No plain number, which a backup would bring back.
        self.left = iter(range(after - 1))

    def on_train_batch_end(self, batch, logs=None):
        for _ in range(self.model.steps_per_execution):
            if next(self.left, None) is None:
                raise InterruptedError


class Noise(keras.layers.Layer):
    """Draws from the generator that all layers without a seed share."""

    def call(self, x):
        return x + 0.1 * keras.random.normal(keras.ops.shape(x), dtype=x.dtype)


def rows():
    made = np.random.default_rng(3)
    return made.normal(size=(ROWS, 5)), made.normal(size=(ROWS, 1))


def mlp(dropout=0.0, clones=0, optimizer=None, units=4, **options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(units, activation="tanh"),
            keras.layers.BatchNormalization(),
            *([keras.layers.Dropout(dropout), Noise()] if dropout else []),
            keras.layers.Dense(1),
        ]
    )
    if clones:
        model = clone_model(model, num_clones=clones, clone_on_cpu=True)
    optimizer = optimizer or (lambda: keras.optimizers.Adam(0.05))
    # Most models are made three times, and tracing takes longer than steps.
    options = {"run_eagerly": not clones} | options
    model.compile(optimizer(), "mse", metrics=["mae"], **options)
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


class Case(NamedTuple):
    """A training: functions that make what it needs, and where it stops."""

    make: Any
    data: Any
    stops: tuple = (3, 7)
    callbacks: Any = list
    save_freq: Any = 1


def train(folder, case, after=None):
    """Train a model, that is made here, until it fails or is done."""
    # As in a new process: `set_random_seed` leaves the generator that layers
    # share as it is on Keras 3.12.
    keras.backend.clear_session(free_memory=False)
    model = case.make()
    others = case.callbacks()
    fails = [] if after is None else [Fails(after)]
    arguments = {"epochs": EPOCHS, "verbose": 0} | case.data()
    # Whatever the state of other generators is, the order is the same.
    random.seed()
    tf.random.set_seed(random.randrange(1000))
    backup = Backup(folder, case.save_freq, seed=9)
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


def interrupted(folder, case):
    for after in case.stops:
        assert train(folder, case, after) is None
        assert os.path.exists(folder) == (after > 1)
    done = train(folder, case)
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
    return mlp(steps_per_execution=2, run_eagerly=False)


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
    model.compile("adam", "mse")
    return model


CASES = {
    "arrays": Case(mlp, arrays),
    "arrays_over_epochs": Case(
        mlp,
        functools.partial(arrays, steps_per_epoch=4, epochs=2),
        stops=(3, 4),
    ),
    "validated": Case(
        mlp, functools.partial(arrays, validation_split=0.2), stops=(3, 4, 3)
    ),
    "dataset": Case(mlp, dataset),
    # After the last batch of an epoch, too, before its end is known.
    "dataset_unknown": Case(
        mlp, functools.partial(dataset, unknown=True), stops=(7, 8)
    ),
    "dataset_unknown_over_epochs": Case(
        mlp,
        functools.partial(dataset, unknown=True, steps_per_epoch=2),
        stops=(2, 3),
    ),
    "sequence": Case(mlp, lambda: {"x": Sequence(), "shuffle": False}),
    "generator": Case(mlp, lambda: {"x": generator(), "steps_per_epoch": 4}),
    "dropout": Case(dropping, arrays),
    "averages": Case(averaging, arrays),
    "two_at_once": Case(
        two_at_once, functools.partial(dataset, unknown=True), stops=(4, 8)
    ),
    "clones": Case(cloned, arrays, stops=(8,)),
    "stopping": Case(
        mlp,
        functools.partial(arrays, epochs=12),
        callbacks=stopping,
        stops=(8, 15),
    ),
    "scheduling": Case(
        averaging, arrays, callbacks=scheduling, stops=(4, 4, 8)
    ),
    "own_step": Case(own, functools.partial(dataset, unknown=True), stops=(7,)),
    "epochs": Case(
        mlp,
        functools.partial(arrays, shuffle="batch"),
        save_freq="epoch",
        stops=(8, 8),
    ),
    "every_fourth": Case(mlp, arrays, save_freq=4, stops=(7, 7, 9)),
    "all_of_it": Case(
        averaging,
        functools.partial(arrays, validation_split=0.2),
        callbacks=scheduling,
        stops=(3, 6),
    ),
}


@pytest.mark.full_but("clones", "own_step")
@pytest.mark.parametrize("name", CASES)
def test_goes_on_as_if_never_interrupted(name, tmp_path, float64):
    one = interrupted(str(tmp_path / "a"), CASES[name])
    other = train(str(tmp_path / "b"), CASES[name])
    check_same(one, other)
    if name == "stopping":
        assert len(one[0].history.epoch) < 12
        assert len(set(one[0].history.history["learning_rate"])) > 1


@pytest.mark.full
def test_the_training_is_that_without_it(tmp_path, float64):
    data = functools.partial(arrays, shuffle=False, validation_split=0.2)
    model, _ = train(str(tmp_path), Case(dropping, data))
    plain = dropping()
    plain.fit(**data(), epochs=EPOCHS, verbose=0)
    assert model.history.history == plain.history.history
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_epoch_has_an_order_of_its_own(tmp_path):
    """Keras's own is the same in each, if there is a global seed."""

    class Seen(keras.Model):
        def train_step(self, data):
            return {"first": data[0, 0]}

    class First(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            found.append(int(logs["first"]))

    found, model = [], Seen()
    model.compile()
    x = np.arange(8.0).reshape(8, 1)
    model.fit(x, None, 1, 3, verbose=0, callbacks=[Backup(tmp_path), First()])
    orders = np.reshape(found, (3, 8))
    assert (np.sort(orders) == np.arange(8)).all()
    assert len({tuple(order) for order in orders}) == 3


def killed(folder, *ways):
    """Train in processes that are killed; return how they ended."""
    script = pathlib.Path(__file__).with_name("killed.py")
    paths = [str(folder / "backup"), str(folder / "result.npz")]
    done = subprocess.run(
        [sys.executable, str(script), *paths, *ways],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    codes, left = done.stdout.splitlines()
    assert left == "gone"
    with np.load(paths[1]) as held:
        return codes.split(), [held[name] for name in held.files]


def check_killed(folder, *ways):
    codes, found = killed(folder, *ways)
    assert codes == [*(["-9"] * len(ways)), "0"]
    kept = keras.config.floatx()
    try:
        import killed as script

        script.train(str(folder / "other"), str(folder / "other.npz"))
    finally:
        keras.config.set_floatx(kept)
    with np.load(folder / "other.npz") as held:
        for a, name in zip(found, held.files, strict=True):
            np.testing.assert_array_equal(a, held[name])


@pytest.mark.full
def test_nothing_is_lost_by_kills(tmp_path):
    check_killed(tmp_path, "batch:5", "write:4", "between:3")


@pytest.mark.full
def test_nothing_is_lost_by_kills_at_random(tmp_path):
    check_killed(tmp_path, *(["time:0.1"] * 5))


def some(value):
    return backup_file.Content({"value": value}, [np.arange(3.0), np.ones(())])


def test_the_one_before_takes_the_place_of_a_broken_file(tmp_path):
    folder = str(tmp_path)
    assert backup_file.read(folder) is None
    for value in range(3):
        backup_file.write(folder, some(value))
    assert backup_file.read(folder).data["value"] == 2
    path = tmp_path / backup_file.NAME
    whole = path.read_bytes()
    for wrong in (b"", whole[: len(whole) // 2], b"nothing", whole[:-9]):
        path.write_bytes(wrong)
        assert backup_file.read(folder).data["value"] == 1
    middle = whole.index(np.arange(3.0).tobytes()) + 8
    path.write_bytes(whole[:middle] + b"\x07" + whole[middle + 1 :])
    found = backup_file.read(folder)
    assert found.data["value"] == 1
    np.testing.assert_array_equal(found.arrays[0], np.arange(3.0))
    path.unlink()
    assert backup_file.read(folder).data["value"] == 1
    (tmp_path / backup_file.PREVIOUS).write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"previous\.npz.*begin anew"):
        backup_file.read(folder)


def test_a_newer_format_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(backup_file, "FORMAT", 2)
    backup_file.write(str(tmp_path), some(1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="its format is 2, not 1"):
        train(str(tmp_path), Case(mlp, arrays))
    backup_file.write(str(tmp_path), some(2))
    assert backup_file.read(str(tmp_path)).data["value"] == 2


def test_only_its_own_files_are_removed(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    train(str(tmp_path), Case(mlp, functools.partial(arrays, epochs=1)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "value",
    [
        *(1, 0.1, float("inf"), "a", None, True, [1, [2]], (1, (2,)), {}),
        *({"a": [1.5]}, {1: "a", (1, 2): {"b": None}}),
        *(np.arange(6.0).reshape(2, 3), np.float32(0.1), np.array("a")),
        *([np.ones(2), {"a": np.int64(3)}], {"tuple": [1]}),
    ],
    ids=repr,
)
def test_plain_values_come_back(value):
    kept = []
    text = json.dumps(backup_plain.encode(value, kept))
    back = backup_plain.decode(json.loads(text), kept)
    assert repr(back) == repr(value)
    assert type(back) is type(value)


@pytest.mark.parametrize("value", [len, {1}, [object()], np.array([None])])
def test_other_values_are_left_out(value):
    with pytest.raises(backup_plain.NotPlainError):
        backup_plain.encode(value, [])


def test_values_of_small_floats_come_back():
    held = keras.Variable([1.0, -0.5], dtype="bfloat16")
    raw = backup_variables._raw(np.asarray(held.value))
    assert raw.dtype == np.uint16
    assert backup_variables._raw(np.ones(2)).dtype == np.float64


@pytest.mark.full
def test_a_finished_training_can_be_prolonged(tmp_path, float64):
    def fit(epochs, folder):
        model = averaging()
        x, y = rows()
        backup = Backup(str(tmp_path / folder), "epoch", False, seed=2)
        model.fit(x, y, BATCH, epochs, verbose=0, callbacks=[backup])
        return model

    fit(2, "a")
    assert fit(2, "a").history.epoch == [0, 1]
    one, other = fit(3, "a"), fit(3, "b")
    assert one.history.epoch == [0, 1, 2]
    check_same((one, []), (other, []))


def test_a_training_that_was_stopped_stays_so(tmp_path):
    def fit():
        stopping = keras.callbacks.EarlyStopping("loss", 10.0, 1)
        backup = Backup(tmp_path, delete_checkpoint=False)
        model = mlp()
        model.fit(**arrays(), epochs=9, verbose=0, callbacks=[backup, stopping])
        return model

    one, other = fit(), fit()
    assert other.history.epoch == [0, 1]
    check_same((one, []), (other, []))


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Return the folder of a training that was interrupted."""
    folder = tmp_path_factory.mktemp("left")
    # Made before a test begins: of the type of numbers that all others have.
    keras.backend.clear_session(free_memory=False)
    assert train(str(folder), Case(mlp, arrays), 6) is None
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.5}, "'seed_generator/seed_generator_state' of shape"),
        (
            {"optimizer": keras.optimizers.SGD},
            "/iteration' of shape () and int64, where the "
            "backup has 'adam/iteration' of shape () and int64. Make and",
        ),
        (
            {"optimizer": lambda: keras.optimizers.Adam(use_ema=True)},
            "where the backup has ",
        ),
        ({"units": 3}, "dense/kernel' of shape (5, 3) and float32, where"),
        (
            {"steps_per_execution": 2},
            "steps_per_execution=2, and a backup after 5 batches",
        ),
        ({"seed": 3}, "seed=3, where the backup has 9"),
    ],
    ids=["layer", "optimizer", "ema", "units", "executions", "seed"],
)
def test_the_backup_of_another_training_is_an_error(options, message, left):
    options = dict(options)
    backup = Backup(left, seed=options.pop("seed", None))
    model = mlp(**options)
    weights = model.get_weights()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.fit(**arrays(), verbose=0, callbacks=[backup])
    for a, b in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert backup_file.NAME in os.listdir(left)


def test_data_that_end_too_early_are_an_error(tmp_path):
    def less():
        return {"x": dataset()["x"].take(2).repeat(1)}

    assert train(str(tmp_path), Case(mlp, dataset), 6) is None
    with pytest.raises(ValueError, match="data with 2 batches, of which"):
        train(str(tmp_path), Case(mlp, less))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"folder": ""}, TypeError, "folder=''"),
        ({"folder": 3}, TypeError, "folder=3"),
        ({"folder": __file__}, ValueError, "is a file"),
        ({"folder": f"{__file__}/inside"}, ValueError, "is a file"),
        ({"save_freq": 0}, ValueError, "save_freq=0"),
        ({"save_freq": "batch"}, TypeError, "save_freq='batch'"),
        ({"save_freq": True}, TypeError, "save_freq=True"),
        ({"save_freq": 1.5}, TypeError, "save_freq=1.5"),
        ({"delete_checkpoint": 1}, TypeError, "delete_checkpoint=1"),
        ({"seed": 1.5}, TypeError, "seed=1.5"),
        ({"seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Backup(**{"folder": "backup"} | arguments)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="no file can be made in"):
        Backup(tmp_path)


def test_it_needs_a_fit():
    callbacks = keras.callbacks.CallbackList([Backup("backup")], model=mlp())
    with pytest.raises(ValueError, match="among the callbacks of `fit`"):
        callbacks.on_train_begin()


def test_workers_that_shuffle_are_told_of(tmp_path):
    class Working(Sequence):
        def __init__(self):
            super().__init__()
            self.workers = 2

    with pytest.warns(UserWarning, match="workers of a `PyDataset`"):
        data = {"x": Working(), "epochs": 1}
        train(str(tmp_path), Case(mlp, lambda: data))
