"""Losses whose entries count unevenly stay in the clones, and are exact."""

import functools

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_clones import clone_model
from keras_clones.benchmark.transfers import count_transfers, traffic
from keras_clones.step import by_towers, steps

SGD = functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9)
SIZES = (10, 7, 2, 1)
ROWS, LENGTH, WORDS = sum(SIZES), 5, 9


def ids(seed=0):
    """Return texts that end in padding; the first rows are padding alone."""
    random = np.random.default_rng(seed)
    found = random.integers(1, WORDS, (ROWS, LENGTH))
    lengths = random.integers(0, LENGTH + 1, ROWS)
    lengths[:4] = 0
    lengths[-1] = 0
    return found * (np.arange(LENGTH) < lengths[:, None])


def words(seed=1):
    return np.random.default_rng(seed).integers(0, WORDS, (ROWS, LENGTH))


def weights(*shape):
    return np.random.default_rng(2).uniform(0.1, 2, (ROWS, *shape))


def texts(*middle):
    return keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(WORDS, 4, mask_zero=True),
            *middle,
            layers.Dense(WORDS, kernel_regularizer="l2"),
        ]
    )


def loss(**options):
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, **options
    )


def masked():
    model = texts(layers.GRU(6, return_sequences=True, use_cudnn=False))
    model.compile(SGD(), loss(), metrics=["accuracy"])
    return model, (ids(), words())


def weighted():
    model = texts()
    data = tf.one_hot(words(), WORDS).numpy()
    model.compile(SGD(), "mse", weighted_metrics=["mae"])
    return model, (ids(), data, weights(LENGTH))


def by_weights():
    model = texts()
    model.compile(SGD(), loss(reduction="mean_with_sample_weight"))
    return model, (ids(), words(), weights(LENGTH))


def by_weights_of_rows():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    model.compile(SGD(), loss(reduction="mean_with_sample_weight"))
    x = np.random.default_rng(0).normal(size=(ROWS, 6))
    return model, (x, words()[:, 0] % 3, weights())


def ignoring():
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(WORDS, 4),
            layers.Dense(WORDS),
        ]
    )
    model.compile(SGD(), loss(ignore_class=2))
    return model, (ids(), words())


def two_outputs():
    """Masks of two inputs, a third output without, weights and L2."""
    one = keras.Input((LENGTH,), dtype="int32")
    two = keras.Input((LENGTH,), dtype="int32")
    outputs = [
        layers.Dense(WORDS, name=name)(
            layers.Embedding(WORDS, 3, mask_zero=masks)(x)
        )
        for name, x, masks in [
            ("a", one, True),
            ("b", two, True),
            ("c", two, 0),
        ]
    ]
    model = keras.Model([one, two], outputs)
    model.compile(
        SGD(clipnorm=0.1),
        [loss(), loss(reduction="mean_with_sample_weight"), loss()],
        loss_weights=[1.0, 0.3, 2.0],
        metrics=[["accuracy"]] * 3,
    )
    return model, ((ids(), ids(3)), (words(), words(4), words(5)))


class Adding(layers.Layer):
    """Adds losses, and leaves a tensor on itself."""

    supports_masking = True

    def call(self, x):
        self.seen = x
        self.add_loss(0.1 * ops.mean(x**2))
        self.add_loss(0.1 * ops.mean(x, axis=(1, 2)))
        return x


def with_losses_and_draws():
    model = texts(Adding(), layers.Dropout(0.3))
    model.compile(SGD(), loss(), metrics=["accuracy"])
    return model, (ids(), words())


CASES = {
    case.__name__: case
    for case in (
        *(masked, weighted, by_weights, by_weights_of_rows, ignoring),
        *(two_outputs, with_losses_and_draws),
    )
}


def train(make, num_clones=None, **options):
    keras.utils.set_random_seed(3)
    model, data = make()
    if num_clones:
        clone_model(model, num_clones, **options)
    found = model.fit(
        cases.dataset(data, SIZES), epochs=2, verbose=0, shuffle=False
    )
    logs = model.evaluate(cases.dataset(data, SIZES), verbose=0)
    values = [*model.variables, *model.optimizer.variables]
    return [*map(np.array, values), *found.history.values(), logs]


@pytest.fixture
def in_clones(monkeypatch):
    """Learn of each step whether it went by towers."""
    found, held = [], by_towers.trace_towers

    def trace_towers(step):
        traced = held(step)
        found.append(traced is not None)
        return traced

    monkeypatch.setattr(steps, "trace_towers", trace_towers)
    return found


@functools.cache
def plain(name, floatx):
    return train(CASES[name])


WAYS = [
    *((name, "float64", 3) for name in CASES),
    ("weighted", "float32", 2),
]


@pytest.mark.full_but("two_outputs-float64-3")
@pytest.mark.parametrize(
    ("name", "floatx", "num_clones"), WAYS, indirect=["floatx"]
)
def test_entries_count_as_on_one_device(name, num_clones, floatx, in_clones):
    expected = plain(name, floatx)
    options = {"layer_losses": "mean", "random": "global"}
    received = train(CASES[name], num_clones, **options)
    assert cases.difference(expected, received) < cases.TOLERANCE[floatx]
    assert in_clones and all(in_clones)


@pytest.mark.full
def test_masks_made_of_weights_are_not_known_before(float64, in_clones):
    class Picking(layers.Layer):
        supports_masking = True

        def build(self, shape):
            self.least = self.add_weight(shape=(shape[-1],), name="least")

        def compute_mask(self, x, mask=None):
            return ops.sum(x * self.least, -1) > 0

        def call(self, x):
            return x

    def make():
        model = keras.Sequential(
            [
                keras.Input((LENGTH,), dtype="int32"),
                layers.Embedding(WORDS, 4),
                Picking(),
                layers.Dense(WORDS),
            ]
        )
        model.compile("sgd", loss())
        return model, (ids(), words())

    assert cases.difference(train(make), train(make, 3)) < 1e-10
    assert in_clones and not any(in_clones)


def test_outputs_with_masks_stay_on_the_clones():
    """Of a clone of a language model come its gradients, and a few numbers."""
    sent = {}
    for way in ("auto", "gather"):
        model, (x, y, _) = by_weights()
        model.compile(SGD(), loss(), metrics=["accuracy"])
        clone_model(model, devices=["CPU:0", "CPU:1"], loss=way)
        data = tf.data.Dataset.from_tensors((x, y)).repeat()
        model.fit(data, steps_per_epoch=2, verbose=0)
        model.make_train_function(force=True)
        step = functools.partial(model.train_function, iter(data))
        found = traffic(count_transfers(step))
        sent[way] = found["/device:CPU:1"].bytes_sent
    dense = sum(4 * int(np.prod(v.shape)) for v in model.weights[1:])
    # The embedding's gradient is by rows: four numbers, and which row.
    rows = ROWS // 2 * LENGTH * (4 * 4 + 8)
    assert dense < sent["auto"] <= dense + rows + 64
    # The logits of the clone's rows leave it, too.
    logits = 4 * ROWS // 2 * LENGTH * WORDS
    assert sent["gather"] >= sent["auto"] + logits - 64
