"""Callbacks, resuming, search and ready-made models work on clones."""

import csv
import re

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import clone_model, deployment


def learn(num_clones, callbacks, epochs=5, optimizer=None, model=None, **fit):
    x, y = cases.arrays(43)["mlp"]
    model = model or cases.make("mlp")
    if num_clones:
        clone_model(model, num_clones)
    if not model.compiled:
        cases.compiled("mlp", model, optimizer=optimizer or "adam")
    fit = {"validation_split": 0.2, "shuffle": False, "verbose": 0, **fit}
    history = model.fit(
        x, y, batch_size=8, epochs=epochs, callbacks=callbacks, **fit
    )
    return model, history.history


def stopping(folder):
    return [
        keras.callbacks.EarlyStopping(
            "loss", patience=0, min_delta=10.0, restore_best_weights=True
        )
    ]


def logging(folder):
    """Return callbacks that do not get in each other's way."""
    return [
        keras.callbacks.ReduceLROnPlateau(
            "loss", patience=0, min_delta=10.0, min_lr=1e-5
        ),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.CSVLogger(folder / "log.csv"),
        keras.callbacks.TensorBoard(
            folder / "logs", histogram_freq=1, update_freq="batch"
        ),
    ]


def averaging(folder):
    return [
        keras.callbacks.SwapEMAWeights(),
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1)),
    ]


CALLBACKS = {
    "stopping": stopping,
    "logging": logging,
    "averaging": averaging,
    "checkpoints": lambda folder: [
        keras.callbacks.ModelCheckpoint(
            folder / "best.keras", monitor="loss", save_best_only=True
        )
    ],
    "backup": lambda folder: [
        keras.callbacks.BackupAndRestore(folder / "backup")
    ],
}


@pytest.mark.full_but("checkpoints")
@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks(name, tmp_path, float64):
    runs = []
    for num_clones in (None, 3):
        folder = tmp_path / str(num_clones)
        folder.mkdir()
        optimizer = keras.optimizers.Adam(0.01, use_ema=name == "averaging")
        model, history = learn(
            num_clones, CALLBACKS[name](folder), epochs=3, optimizer=optimizer
        )
        runs.append((cases.weights(model), history))
    (expected, logs), (received, clone_logs) = runs
    assert cases.difference(expected, received) < 1e-10
    assert cases.difference(logs, clone_logs) < 1e-10
    if name == "stopping":
        assert len(clone_logs["loss"]) == 2
    if name == "checkpoints":
        plain = keras.models.load_model(tmp_path / "3" / "best.keras")
        assert deployment(plain) is None
        assert cases.difference(expected, cases.weights(plain)) < 1e-10
    if name == "logging":
        rows = list(csv.DictReader((tmp_path / "3" / "log.csv").open()))
        assert float(rows[-1]["loss"]) == pytest.approx(logs["loss"][-1])
        assert list((tmp_path / "3" / "logs" / "train").glob("events*"))


def test_not_a_number_ends_training():
    x, _ = cases.arrays(16)["mlp"]
    x[9] = np.nan
    for num_clones in (None, 2):
        model = cases.make("mlp")
        if num_clones:
            clone_model(model, num_clones)
        model.compile("sgd", "mse")
        callback = keras.callbacks.TerminateOnNaN()
        model.fit(x, x[:, :3], batch_size=8, callbacks=[callback], verbose=0)
        assert model.stop_training


@pytest.mark.full
def test_training_goes_on_where_it_stopped_on_other_clones(tmp_path, float64):
    model, _ = learn(None, [], epochs=6)
    backup = keras.callbacks.BackupAndRestore(
        tmp_path / "backup", delete_checkpoint=False
    )
    learn(2, [backup], epochs=3)
    resumed, history = learn(4, [backup], epochs=6)
    assert len(history["loss"]) == 3
    assert cases.difference(cases.weights(model), cases.weights(resumed)) < (
        1e-10
    )
    assert int(resumed.optimizer.iterations) == int(model.optimizer.iterations)


@pytest.mark.full_but("unknown size")
@pytest.mark.parametrize("kind", ["infinite generator", "unknown size"])
def test_data_without_a_length(kind, float64):
    x, y = cases.arrays(40)["mlp"]

    def forever():
        while True:
            for start in range(0, 40, 8):
                yield x[start : start + 8], y[start : start + 8]

    data = cases.batches(x, y, [8, 8, 8, 8, 8])
    unknown = data.filter(lambda x, y: True)
    assert unknown.cardinality() == tf.data.UNKNOWN_CARDINALITY
    trained = []
    for num_clones in (None, 3):
        model = cases.make("mlp")
        if num_clones:
            clone_model(model, num_clones)
        cases.compiled("mlp", model)
        if kind == "unknown size":
            model.fit(unknown, epochs=2, verbose=0)
        else:
            model.fit(forever(), steps_per_epoch=5, epochs=2, verbose=0)
        trained.append(cases.weights(model))
    assert cases.difference(*trained) < 1e-10


class Remembers(keras.layers.Layer):
    """Keeps the mean of its inputs, without saying how clones merge it."""

    def build(self, shape):
        self.kept = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="kept"
        )

    def call(self, x):
        self.kept.assign(keras.ops.mean(x))
        self.add_loss(keras.ops.mean(x))
        return x


class Maximum(keras.layers.Layer):
    """Updates a metric of its own, whose state is no sum."""

    def __init__(self):
        super().__init__()
        self.largest = keras.metrics.MeanMetricWrapper(
            lambda y, p: p, name="wrapped"
        )
        self.other = Largest()

    def call(self, x):
        self.other.update_state(x)
        return x


class Largest(keras.Metric):
    def __init__(self):
        super().__init__(name="largest")
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, x):
        self.value.assign(keras.ops.maximum(self.value, keras.ops.max(x)))

    def result(self):
        return self.value


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            lambda: keras.layers.BatchNormalization(name="norm"),
            r"\['norm'\] normalize each clone's shard",
        ),
        (Remembers, r"kept'\] are assigned in the forward pass"),
        (Remembers, r"\['remembers'\] pass scalars to `add_loss`"),
        (Maximum, r"\['largest'\] are updated in a layer"),
    ],
)
def test_what_cannot_be_exact_is_named_when_it_is_used(layer, message):
    x, y = cases.arrays(8)["mlp"]
    model = keras.Sequential(
        [keras.Input((6,)), layer(), keras.layers.Dense(3, "softmax")]
    )
    cases.compiled("mlp", clone_model(model, 2))
    with pytest.warns(UserWarning, match=message):
        model.train_on_batch(x, y)


@pytest.mark.full
def test_many_layers_are_counted_and_three_of_them_named():
    x, y = cases.arrays(8)["mlp"]
    norms = [keras.layers.BatchNormalization(name=f"n{i}") for i in range(5)]
    head = keras.layers.Dense(3, "softmax")
    model = clone_model(keras.Sequential([keras.Input((6,)), *norms, head]), 2)
    cases.compiled("mlp", model)
    first = re.escape("5 layers, ['n0', 'n1', 'n2'] among them, normalize")
    with pytest.warns(UserWarning, match=first) as caught:
        model.fit(x, y, verbose=0)
    for warning in caught:
        assert "n3" not in str(warning.message)
        # The call of `fit` is the user's, not what Keras calls in it.
        assert warning.filename == __file__


def test_what_is_exact_is_not_warned_of(recwarn):
    x, y = cases.arrays(8)["mlp"]
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(3, "softmax", kernel_regularizer="l2"),
        ]
    )
    clone_model(model, 2, clone_on_cpu=True, batch_norm="sync")
    cases.compiled("mlp", model).train_on_batch(x, y)
    assert not [w for w in recwarn if w.category is UserWarning]


@pytest.mark.full
def test_a_search_over_cloned_models(tmp_path):
    keras_tuner = pytest.importorskip("keras_tuner")
    x, y = cases.arrays(40)["mlp"]

    def build(choices):
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(choices.Int("units", 4, 8, step=4)),
                keras.layers.Dense(3, "softmax"),
            ]
        )
        return cases.compiled("mlp", clone_model(model, 2))

    tuner = keras_tuner.GridSearch(
        build, "val_accuracy", directory=tmp_path, overwrite=True
    )
    tuner.search(x, y, epochs=1, validation_split=0.25, verbose=0)
    best = tuner.get_best_models(1)[0]
    assert len(deployment(best).clones) == 2
    assert np.isfinite(best.predict(x, verbose=0)).all()


@pytest.mark.full
@pytest.mark.parametrize("frozen", [True, False])
def test_ready_made_models_train(frozen, float64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 32, 32, 3))
    y = rng.integers(0, 3, 6)
    trained = []
    for num_clones in (None, 2):
        keras.utils.set_random_seed(2)
        base = keras.applications.MobileNet(
            (32, 32, 3), alpha=0.25, weights=None, include_top=False
        )
        base.trainable = not frozen
        model = keras.Sequential(
            [
                base,
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(3, "softmax"),
            ]
        )
        if num_clones:
            policy = "mean" if frozen else "sync"
            clone_model(model, num_clones, batch_norm=policy)
        cases.compiled("mlp", model, optimizer="sgd")
        for _ in range(2):
            model.train_on_batch(x, y)
        trained.append(cases.weights(model))
    # Through 27 normalizations of six rows, rounding grows by some powers of
    # ten a step.
    assert cases.difference(*trained) < (1e-12 if frozen else 1e-6)


@pytest.mark.full
def test_a_keras_hub_model_trains(float64):
    keras_hub = pytest.importorskip("keras_hub")
    ids = np.random.default_rng(0).integers(1, 50, (6, 8))
    features = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    trained = []
    for num_clones in (None, 2):
        keras.utils.set_random_seed(2)
        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=50,
            num_layers=2,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            dropout=0.0,
            max_sequence_length=8,
        )
        model = keras_hub.models.GPT2CausalLM(backbone)
        if num_clones:
            clone_model(model, num_clones)
        model.compile(
            "sgd",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        for _ in range(3):
            model.train_on_batch(features, np.roll(ids, -1, axis=1))
        trained.append(cases.weights(model))
    # The bias of attention keys has a zero gradient, and so only rounding.
    trained = [[w for w in ws if np.abs(w).max() > 1e-9] for ws in trained]
    assert cases.difference(*trained) < 1e-10
