"""Layers that mix the rows of a batch are found in the first training step."""

import random
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import test_whole
from keras import layers as L  # noqa: N812
from keras import ops
from test_whole import functional

from keras_clones import clone_model, deployment


class Residual(L.Layer):
    """A block with normalization, dropout and a gate that starts at zero."""

    def build(self, shape):
        self.dense = L.Dense(shape[-1], activation="gelu")
        self.norm = L.BatchNormalization()
        self.drop = L.Dropout(0.3)
        self.dense.build(shape)
        self.norm.build(shape)
        self.gate = self.add_weight(shape=(), initializer="zeros")

    def call(self, x):
        return x + self.gate * self.drop(self.norm(self.dense(x)))


class Gated(L.Layer):
    """Mixes rows behind a gate that starts at zero."""

    def build(self, shape):
        self.gate = self.add_weight(shape=(), initializer="zeros")

    def call(self, x):
        return x + self.gate * ops.mean(x, axis=0)


class Block(L.Layer):
    """A transformer's block with positions of its own."""

    def build(self, shape):
        self.at = self.add_weight(shape=(1, *shape[1:]))
        self.attend = L.MultiHeadAttention(2, 3, dropout=0.1)
        self.attend.build(shape, shape)
        self.norm = L.LayerNormalization()
        self.norm.build(shape)
        self.dense = L.Dense(shape[-1], "relu")
        self.dense.build(shape)

    def call(self, x, training=False):
        x = x + self.at
        x = self.norm(x + self.attend(x, x, training=training))
        return x + self.dense(x)


class Normalized(L.Layer):
    """Normalizes each row, and counts its calls in a raw variable."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.count = tf.Variable(0)
        self.calls = []

    def call(self, x):
        self.count.assign_add(1)
        self.calls.append(random.random() + np.random.random())
        self.last = x
        mean = ops.mean(x, axis=-1, keepdims=True)
        return (x - mean) / (ops.std(x, axis=-1, keepdims=True) + 1e-3)


class TimeMajor(L.Layer):
    """Adds up over time, which it has first inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = L.Lambda(lambda x: ops.cumsum(x, axis=0))

    def call(self, x):
        x = ops.transpose(x, (1, 0, 2))
        return ops.transpose(self.inner(x), (1, 0, 2))


class RowCell(L.Layer):
    state_size = 3

    def build(self, shape):
        self.dense = L.Dense(3, "tanh")
        self.dense.build((shape[0], shape[1] + 3))

    def call(self, x, states):
        x = self.dense(ops.concatenate([x, states[0]], -1))
        return x, [x]


class Sum(L.Layer):
    """Adds a loss that is a sum over the rows."""

    def call(self, x):
        self.add_loss(0.1 * ops.sum(ops.square(x)))
        return x


class Mean(L.Layer):
    def call(self, x):
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x


class Noise(L.Layer):
    """Draws by TensorFlow itself."""

    def call(self, x):
        return x + 0.1 * tf.random.normal(tf.shape(x), dtype=x.dtype)


class Compared(keras.Model):
    """Returns rows by rows, which targets of one column broadcast to."""

    def __init__(self):
        super().__init__(name="compared")
        self.dense = L.Dense(3)

    def call(self, x):
        x = self.dense(x)
        return ops.matmul(x, ops.transpose(x))


class Outer(keras.Model):
    """Holds rows apart itself; a model inside of it does not."""

    def __init__(self, inner):
        super().__init__()
        self.first = L.Dense(4, "tanh")
        self.inner = inner
        self.last = L.Dense(1)

    def call(self, x):
        return self.last(self.inner(self.first(x)))


class OwnStep(Outer):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self.last(self.inner(self.first(x)))
            loss = self.compute_loss(y=y, y_pred=y_pred)
        weights = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


def sequence(layer):
    inputs = keras.Input((4,))
    x = layer(L.Reshape((2, 2))(L.Dense(4)(inputs)))
    return keras.Model(inputs, L.Dense(1)(L.Flatten()(x)))


def of_twelve_rows(x):
    return ops.reshape(x, (12, 4)) * 2


def centered(x):
    return x - ops.mean(x, axis=0)


MIXING = {
    "spread": (lambda: functional(test_whole.Spread(name="s")), ["s"]),
    "rows": (lambda: functional(test_whole.Rows(name="r")), ["r"]),
    "scores": (test_whole.scores, ["scores"]),
    "gated": (lambda: functional(Gated(name="g")), ["g"]),
    "lambda": (lambda: functional(L.Lambda(centered, name="l")), ["l"]),
    "activation": (
        lambda: functional(L.Dense(4, activation=centered, name="d")),
        ["d"],
    ),
    "along_rows": (lambda: functional(L.Softmax(axis=0, name="x")), ["x"]),
    "from_the_last": (lambda: functional(L.Softmax(axis=-2, name="x")), ["x"]),
    "nested": (test_whole.Nested, ["centered"]),
    "model": (test_whole.Mixing, ["mixing"]),
    "compared": (Compared, ["compared"]),
    "cell": (
        lambda: test_whole.wrapped(L.RNN(test_whole.Cell(name="cell"))),
        ["cell"],
    ),
    "inner": (
        lambda: Outer(
            keras.Sequential([Residual(), test_whole.Centered(name="c")])
        ),
        ["c"],
    ),
    "own_step": (lambda: OwnStep(test_whole.Centered(name="c")), ["c"]),
    "two": (
        lambda: functional(
            test_whole.Centered(name="a"),
            Normalized(),
            test_whole.Spread(name="b"),
        ),
        ["a", "b"],
    ),
}

APART = {
    "residual": lambda: functional(Residual(), Residual()),
    "normalized": lambda: functional(Normalized(), L.BatchNormalization()),
    "block": lambda: sequence(Block()),
    "time_major": lambda: sequence(TimeMajor()),
    "row_cell": lambda: test_whole.wrapped(L.RNN(RowCell())),
    "spectral": lambda: functional(
        L.SpectralNormalization(L.Dense(4)), L.Lambda(lambda x: x * 2)
    ),
    "noise": lambda: functional(Noise()),
    "mean": lambda: functional(Mean()),
    "outer": lambda: Outer(keras.Sequential([Residual(), L.Dropout(0.5)])),
    "own_step": lambda: OwnStep(Residual()),
}


def data(rows=27):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, 4)), rng.normal(size=(rows, 1))


def fit(make, rows=27, compiled=None, epochs=1, batch=10, **options):
    """Train on clones, and return the model and what was warned of."""
    num = options.pop("num", 3)
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    model = clone_model(make(), num, **options) if num else make()
    model.compile("adam", "mse", **(compiled or {}))
    batches = tf.data.Dataset.from_tensor_slices(data(rows)).batch(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(batches, epochs=epochs, verbose=0)
    found = [w for w in caught if "calls a layer on its own" in str(w.message)]
    assert all(w.filename == __file__ for w in found)
    return model, [str(w.message) for w in found]


@pytest.mark.full_but("residual-float32")
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *((name, "float32") for name in APART),
        *(("block", "mixed_float16"), ("residual", "bfloat16")),
    ],
)
def test_says_nothing_of_rows_that_are_apart(name, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model, found = fit(APART[name], layer_losses="mean")
    finally:
        keras.config.set_dtype_policy("float32")
    assert found == []
    assert deployment(model).looks.given_up == []


@pytest.mark.full
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_finds_them_in_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        _, (message,) = fit(MIXING["nested"][0])
    finally:
        keras.config.set_dtype_policy("float32")
    assert message.startswith("Layers ['centered'] mix the rows")


@pytest.mark.full
def test_says_nothing_twice_or_when_told_not_to():
    make, _ = MIXING["spread"]
    assert len(fit(make, epochs=3)[1]) == 1
    assert fit(make, check_rows=False)[1] == []
    assert fit(make, whole=["s"])[1] == []
    model, _ = fit(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(*data(10), verbose=0)


@pytest.mark.full
def test_looks_again_when_cloned_again():
    model, found = fit(MIXING["spread"][0])
    model = clone_model(model, 2)
    with pytest.warns(UserWarning, match="mix the rows"):
        model.fit(*data(10), verbose=0)
    assert len(found) == 1


@pytest.mark.full
def test_one_row_tells_nothing():
    make, _ = MIXING["nested"]
    model, found = fit(make, rows=5, batch=1)
    assert found == []
    with pytest.warns(UserWarning, match="mix the rows"):
        model.fit(*data(10), verbose=0)


@pytest.mark.full
def test_losses_that_are_sums():
    _, (message,) = fit(lambda: functional(Sum(name="s")), layer_losses="mean")
    assert message.startswith("Layers ['s'] pass losses to `add_loss` that")
    assert fit(lambda: functional(Sum()), layer_losses="sum")[1] == []


@pytest.mark.full_but("graph-centered", "eagerly-twelve")
@pytest.mark.parametrize(
    ("make", "start"),
    [
        (MIXING["nested"][0], "Layers ['centered'] mix the rows"),
        (MIXING["own_step"][0], "Layers ['c'] mix the rows"),
        (
            lambda: functional(L.Lambda(of_twelve_rows, name="twelve")),
            "Layers ['twelve'] run on the rows of a whole batch",
        ),
    ],
    ids=["centered", "own_step", "twelve"],
)
@pytest.mark.parametrize(
    "compiled", [{}, {"run_eagerly": True}], ids=["graph", "eagerly"]
)
def test_exact_refuses_and_changes_nothing(make, start, compiled):
    keras.utils.set_random_seed(1)
    model = make()
    model(data(12)[0])
    model = clone_model(model, 3, exact=True)
    model.compile("adam", "mse", **compiled)
    for _ in range(2):
        before = [np.array(v) for v in model.variables]
        batches = tf.data.Dataset.from_tensor_slices(data(12)).batch(12)
        with pytest.raises(ValueError) as error:
            model.fit(batches, verbose=0)
        assert str(error.value).startswith(start)
        after = [np.array(v) for v in model.variables]
        assert all(map(np.array_equal, before, after))
        assert int(model.optimizer.iterations) == 0
        assert all(
            not np.any(v) for v in model.optimizer.variables[2:] if v.shape
        )


@pytest.mark.full
def test_exact_trains_what_is_apart():
    apart = L.Lambda(lambda x: x - ops.mean(x, axis=-1, keepdims=True))
    _, found = fit(lambda: functional(apart), exact=True)
    assert found == []


def test_leaves_nothing_behind():
    found = []
    for num in (None, 3):
        layer = Normalized()
        model = functional(layer)
        fit(
            lambda model=model: model,
            compiled={"run_eagerly": True},
            rows=10,
            num=num,
        )
        after = random.random(), np.random.random()
        found.append((int(layer.count), len(layer.calls), after))
        assert "call" not in vars(layer)
    assert found[0] == found[1]


@pytest.mark.full
def test_several_steps_at_once():
    _, (message,) = fit(
        MIXING["spread"][0], compiled={"steps_per_execution": 2}
    )
    assert message.startswith("Layers ['s'] mix")


@pytest.mark.full
def test_other_loops_of_the_user():
    make, _ = MIXING["spread"]
    model = clone_model(make(), 3)
    model.compile("adam", "mse")
    with pytest.warns(UserWarning, match="mix the rows"):
        model.train_on_batch(*data(6))
    model = clone_model(make(), 3)
    model.compile("adam", "mse")
    step = tf.function(model.train_step)
    x, y = (tf.constant(value, "float32") for value in data(6))
    with pytest.warns(UserWarning, match="mix the rows"):
        step((x, y))


def test_nothing_in_the_graph_of_layers_that_are_known():
    model, found = fit(lambda: functional(L.Dropout(0.1)))
    assert found == []
    assert deployment(model).looks.is_settled("train_function")
    assert not list(deployment(model).looks._waiting)


def test_code_that_needs_a_graph_is_given_up():
    class Graph(L.Layer):
        def call(self, x):
            if tf.executing_eagerly():
                raise RuntimeError("Not here.")
            return x - ops.mean(x, axis=0)

    model, found = fit(lambda: functional(Graph()))
    assert found == []
    ((name, error),) = deployment(model).looks.given_up
    assert "Not here." in str(error)
    assert name == model.name


class Moded(L.Layer):
    """Keeps rows apart, but in one of its modes."""

    def call(self, x, mode=None):
        return x if mode is None else x - ops.mean(x, axis=0)


class Kept(L.Layer):
    """Keeps a sum over the rows for the step."""

    def call(self, x):
        self.kept = 0.1 * ops.sum(ops.square(x))
        return x


class Helped(keras.Model):
    """Calls a layer in a function of the step's own."""

    def __init__(self, layer, **kwargs):
        super().__init__()
        self.dense, self.layer, self.kwargs = L.Dense(3), layer, kwargs

    @tf.function
    def loss_of(self, x):
        y = self.layer(self.layer(self.dense(x)), **self.kwargs)
        return ops.mean(ops.square(y)) + getattr(self.layer, "kept", 0.0)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(data[0])
        weights = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


@pytest.mark.full_but("moded")
@pytest.mark.parametrize(
    ("layer", "kwargs", "start"),
    [
        (Moded, {"mode": "centered"}, "Layers ['x'] mix the rows"),
        (Kept, {}, "Layers ['x'] keep scalars on themselves"),
        (Moded, {}, None),
    ],
    ids=["moded", "kept", "apart"],
)
def test_looks_at_what_a_step_does_with_layers(layer, kwargs, start):
    _, found = fit(lambda: Helped(layer(name="x"), **kwargs))
    assert len(found) == bool(start)
    assert all(message.startswith(start) for message in found)
