"""Uneven shares of the rows: the same model, other shards."""

import re
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import (
    COMPILE,
    DEFAULT_COMPILE,
    arrays,
    compiled,
    difference,
    make,
    weights,
)
from cases import batches as batches_of

from keras_clones import clone_model, deployment
from keras_clones.devices import balance
from keras_clones.tensors import sharding


@pytest.mark.parametrize(
    ("rows", "shares", "expected"),
    [
        (12, [2, 1], [8, 4]),
        (10, [1, 1, 2], [2, 3, 5]),
        (3, [100, 1, 1], [1, 1, 1]),
        (5, [1, 100, 1], [1, 3, 1]),
        (2, [1, 1000], [1, 1]),
        (7, [1, 1], [4, 3]),
    ],
)
def test_shards_go_by_the_shares_and_none_is_empty(rows, shares, expected):
    fractions = balance.check_shares(shares, len(shares))
    known = sharding.shard_sizes(rows, len(shares), fractions)
    assert known == expected
    running = sharding.shard_sizes(tf.constant(rows), len(shares), fractions)
    assert [int(size) for size in running] == expected


@pytest.mark.full_but("mlp")
@pytest.mark.parametrize("name", ["mlp", "two_by_two"])
def test_uneven_shares_train_the_same_model(name, float64):
    x, y = arrays(40)[name]
    sizes = [16, 2, 11, 3, 8]

    def train(model):
        model.compile("adam", **COMPILE.get(name, DEFAULT_COMPILE))
        logs = model.fit(batches_of(x, y, sizes), verbose=0).history
        return weights(model), logs

    plain = train(make(name))
    cloned = clone_model(make(name), 3, shares=[3, 1, 2])
    assert difference(plain, train(cloned)) <= 1e-12
    assert deployment(cloned).shard_sizes(12) == [6, 2, 4]
    assert deployment(cloned).shard_sizes(2) == [1, 1, 0]
    clone_model(cloned, 3)
    assert deployment(cloned).shard_sizes(12) == [4, 4, 4]


class _SlowInOneClone(keras.layers.Layer):
    """Take 4 ms a row in the second clone, 1 ms in the first."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, x):
        def sleep(x, seed):
            time.sleep(len(x) * (4e-3 if seed[0] else 1e-3))
            return x

        slow = tf.numpy_function(sleep, [x, self.seeds.next()], x.dtype)
        return x + 0 * tf.ensure_shape(slow, x.shape)


def test_auto_measures_settles_and_says_so(capsys, float64):
    x, y = arrays(600)["mlp"]

    def train(layers, **kwargs):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [keras.Input((6,)), *layers, keras.layers.Dense(3, "softmax")]
        )
        if kwargs:
            clone_model(model, 2, **kwargs)
        model.compile("sgd", "sparse_categorical_crossentropy")
        model.fit(x, y, batch_size=30, shuffle=False, verbose=0)
        return model

    cloned = train([_SlowInOneClone()], shares="auto")
    printed = capsys.readouterr().out
    line = re.search(r"the clones get ([\d.]+)%, ([\d.]+)% of the r", printed)
    first, second = map(float, line.groups())
    # 80 % would even the clones out; a busy machine takes longer to sleep.
    assert first > 60 and first + second == pytest.approx(100, abs=0.2)
    assert printed.count("shares='auto'") == 1
    sizes = deployment(cloned).shard_sizes(30)
    # What is printed is rounded to a tenth of a percent.
    assert sum(sizes) == 30 and abs(sizes[0] - 0.3 * first) <= 0.5 + 0.3 * 0.05
    before = deployment(cloned).balance.fractions.numpy()
    cloned.fit(x[:60], y[:60], batch_size=30, shuffle=False, verbose=0)
    np.testing.assert_array_equal(
        deployment(cloned).balance.fractions.numpy(), before
    )
    plain = train([])
    plain.fit(x[:60], y[:60], batch_size=30, shuffle=False, verbose=0)
    assert difference(weights(plain), weights(cloned)[:2]) <= 1e-12


def test_auto_measures_no_batch_with_fewer_rows_than_clones(float64):
    x, y = arrays(8)["mlp"]
    batches = tf.data.Dataset.from_tensor_slices((x, y))
    model = clone_model(compiled("mlp"), 3, shares="auto")
    model.fit(batches.batch(2, drop_remainder=True), verbose=0)
    assert int(deployment(model).balance.steps.numpy()) == 0


def test_shares_settle_where_the_clones_take_as_long():
    fractions = tf.constant([0.5, 0.5], tf.float64)
    for _ in range(balance.MEASURED_STEPS):
        # Three times as fast, with a fixed cost in each step.
        seconds = fractions * [1.0, 3.0] + 0.1
        fractions = balance.next_fractions(fractions, seconds)
    np.testing.assert_allclose(fractions, [0.75, 0.25], atol=0.01)


@pytest.mark.parametrize(
    ("shares", "error"),
    [
        ([1], "one number a clone: 2"),
        ([1, 2, 3], "which has 3"),
        ([1, 0], "positive"),
        ([1, -1], "positive"),
        ([1, float("nan")], "positive"),
        ([1, float("inf")], "positive"),
        ([1, True], "positive"),
        ([1, "2"], "positive"),
        ([1, None], "positive"),
        ("even", "'auto' or None"),
        (2, "'auto' or None"),
    ],
)
def test_wrong_shares(shares, error):
    model = compiled("mlp")
    with pytest.raises((ValueError, TypeError), match=re.escape(error)):
        clone_model(model, 2, shares=shares)
    assert deployment(model) is None


def test_auto_refuses_a_step_of_the_users_own():
    class Own(keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    with pytest.raises(ValueError, match="has its own"):
        clone_model(Own([keras.layers.Dense(1)]), 2, shares="auto")
