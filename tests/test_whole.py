"""Whole layers see the global batch; what is in and around them is cloned."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L  # noqa: N812
from keras import ops

from keras_clones import clone_model

ROWS = 27


@keras.saving.register_keras_serializable("whole")
class Spread(L.Layer):
    """Minibatch standard deviation, as discriminators have it."""

    def call(self, x):
        spread = ops.mean(ops.std(x, axis=0))
        return ops.concatenate([x, ops.zeros_like(x[:, :1]) + spread], -1)


class Centered(L.Layer):
    def call(self, x):
        return x - ops.mean(x, axis=0)

    def compute_output_shape(self, shape):
        return shape


class Scores(L.Layer):
    """Compares every query with every item of the batch."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, queries, items):
        return self.scale * ops.matmul(queries, ops.transpose(items))


class Rows(L.Layer):
    """Mixes the rows by a product of the whole batch with itself."""

    def call(self, x):
        both = ops.tensordot(x, x, axes=[[0], [0]])
        return ops.matmul(x, both) / 10


class Counted(L.Layer):
    """Keeps the largest mean it has seen, and adds losses."""

    def build(self, shape):
        self.dense = L.Dense(4, "tanh", activity_regularizer="l2")
        self.dense.build(shape)
        self.top = self.add_weight(
            shape=(), trainable=False, initializer="zeros"
        )

    def call(self, x, training=False):
        y = self.dense(self.dense(x))
        mean = ops.mean(y, axis=0)
        self.add_loss(ops.sum(ops.square(mean)))
        if training:
            self.top.assign(ops.maximum(self.top, ops.max(mean)))
        return y - mean


class Nested(keras.Model):
    """Layers to be cloned around and inside of one that mixes rows."""

    def __init__(self):
        super().__init__()
        self.first = keras.Sequential(
            [L.Dense(4, "tanh"), Centered(name="centered"), L.Dense(4)]
        )
        self.last = L.Dense(1)

    def call(self, x):
        return self.last(self.first(x))


class Mixing(keras.Model):
    """Mixes rows in its own `call`, between layers."""

    def __init__(self):
        super().__init__(name="mixing")
        self.first = L.Dense(4, "tanh", kernel_regularizer="l2")
        self.last = L.Dense(1)

    def call(self, x):
        x = self.first(x)
        x = x - ops.mean(x, axis=0)
        return self.last(x)


def functional(*between):
    inputs = x = keras.Input((4,))
    for layer in (L.Dense(4, "tanh"), *between, L.Dense(1)):
        x = layer(x)
    return keras.Model(inputs, x)


def scores():
    inputs = keras.Input((4,))
    found = Scores(name="scores")(L.Dense(3)(inputs), L.Dense(3)(inputs))
    return keras.Model(inputs, ops.mean(found, axis=1, keepdims=True))


def operation():
    inputs = keras.Input((4,))
    x = L.Dense(4, "tanh")(inputs)
    x = x - ops.mean(x, axis=0)
    return keras.Model(inputs, L.Dense(1)(x))


def nested_operation():
    inputs = keras.Input((4,))
    return keras.Model(inputs, L.Dense(1)(operation()(inputs)))


def wrapped(cell):
    inputs = keras.Input((4,))
    x = L.Reshape((2, 2))(inputs)
    return keras.Model(inputs, L.Dense(1)(cell(x)))


@keras.saving.register_keras_serializable("whole")
class Cell(L.Layer):
    """A recurrent cell that centers its rows."""

    state_size = 3

    def build(self, shape):
        self.dense = L.Dense(3, "tanh")
        self.dense.build((shape[0], shape[1] + 3))

    def call(self, x, states):
        x = self.dense(ops.concatenate([x, states[0]], -1))
        x = x - ops.mean(x, axis=0)
        return x, [x]


MODELS = {
    "spread": (lambda: functional(Spread(name="s")), ["s"]),
    "by_class": (lambda: functional(Spread(), Centered()), [Spread, Centered]),
    "scores": (scores, ["scores"]),
    "rows": (lambda: functional(Rows(name="r")), ["r"]),
    "normalized": (
        lambda: functional(L.BatchNormalization(name="n")),
        [L.BatchNormalization],
    ),
    "counted": (lambda: functional(Counted(name="c")), ["c"]),
    "nested": (Nested, ["centered"]),
    "model": (Mixing, ["mixing"]),
    "operation": (operation, []),
    "nested_operation": (nested_operation, []),
    "named_operation": (operation, ["mean"]),
    "time": (
        lambda: wrapped(
            keras.Sequential([L.TimeDistributed(Centered()), L.Flatten()])
        ),
        [Centered],
    ),
    "cell": (lambda: wrapped(L.RNN(Cell(name="cell"))), ["cell"]),
    "both_ways": (
        lambda: wrapped(L.Bidirectional(L.RNN(Cell(name="cell")))),
        [Cell],
    ),
    "called_twice": (
        lambda: functional(*[Centered(name="c")] * 2),
        ["c"],
    ),
}


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, 4)), rng.normal(size=(ROWS, 1))


def train(make, cloned, whole=(), compiled=None, **options):
    """Train on batches of 10, 10 and 7 rows of no known number."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(1)
    model = make()
    if cloned:
        model = clone_model(model, 3, whole=whole, **options)
    model.compile("adam", "mse", metrics=["mae"], **(compiled or {}))
    batches = tf.data.Dataset.from_tensor_slices(data()).batch(10)
    history = model.fit(batches, epochs=2, verbose=0, shuffle=False)
    return [
        *(np.array(v) for v in model.variables),
        *(np.array(v) for v in history.history.values()),
        *(np.array(v) for v in model.evaluate(batches, verbose=0)),
        model.predict(batches, verbose=0),
    ]


def gap(ones, others):
    pairs = list(zip(ones, others, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(
        float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-2))
        for a, b in pairs
    )


@pytest.mark.parametrize("name", MODELS)
def test_trains_as_plain_keras(name, float64):
    make, whole = MODELS[name]
    plain = train(make, False)
    cloned = train(make, True, whole, layer_losses="mean", check_rows=False)
    assert gap(plain, cloned) < 1e-10


@pytest.mark.parametrize("name", ["counted", "nested", "operation"])
def test_trains_as_plain_keras_eagerly(name, float64):
    make, whole = MODELS[name]
    eagerly = {"run_eagerly": True}
    plain = train(make, False, compiled=eagerly)
    cloned = train(
        make, True, whole, eagerly, layer_losses="mean", check_rows=False
    )
    assert gap(plain, cloned) < 1e-10
