"""Whole layers see the global batch; what is in and around them is cloned."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L  # noqa: N812
from keras import ops

from keras_clones import clone_model, deployment
from keras_clones.calls import sharded_call
from keras_clones.plan.plan import plan_step

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


def train(make, cloned, whole=(), compiled=None, evaluated=False, **options):
    """Train on batches of 10, 10 and 7 rows of no known number."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    model = make()
    if cloned:
        model = clone_model(model, 3, whole=whole, **options)
    model.compile("adam", "mse", metrics=["mae"], **(compiled or {}))
    if not cloned:
        cases.build_optimizer(model)
    batches = tf.data.Dataset.from_tensor_slices(data()).batch(10)
    history = model.fit(batches, epochs=2, verbose=0, shuffle=False)
    found = [
        *(np.array(v) for v in model.variables),
        *(np.array(v) for v in history.history.values()),
    ]
    if evaluated:
        found += map(np.array, model.evaluate(batches, verbose=0))
        found.append(model.predict(batches, verbose=0))
    return found


def gap(ones, others):
    pairs = list(zip(ones, others, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(
        float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-2))
        for a, b in pairs
    )


@pytest.mark.full_but("nested", "operation")
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_plain_keras(name, float64):
    make, whole = MODELS[name]
    evaluated = name in ("nested", "operation", "counted")
    plain = train(make, False, evaluated=evaluated)
    options = {"layer_losses": "mean", "check_rows": False}
    cloned = train(make, True, whole, evaluated=evaluated, **options)
    assert gap(plain, cloned) < 1e-10


@pytest.mark.full
@pytest.mark.parametrize("name", ["counted", "nested"])
def test_trains_as_plain_keras_eagerly(name, float64):
    make, whole = MODELS[name]
    eagerly = {"run_eagerly": True}
    plain = train(make, False, compiled=eagerly)
    cloned = train(
        make, True, whole, eagerly, layer_losses="mean", check_rows=False
    )
    assert gap(plain, cloned) < 1e-10


class Adversarial(keras.Model):
    """A GAN whose discriminator sees how alike the images of a batch are."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential(
            [keras.Input((4,)), L.Dense(6, "relu"), L.Dense(4)]
        )
        self.discriminator = keras.Sequential(
            [
                keras.Input((4,)),
                L.Dense(6, "tanh"),
                Spread(name="spread"),
                L.BatchNormalization(name="norm"),
                L.Dense(1),
            ]
        )
        self.other = keras.optimizers.Adam(0.01)

    def call(self, x):
        return self.discriminator(x)

    def train_step(self, data):
        real, _ = data
        judge, make = self.discriminator, self.generator
        with tf.GradientTape(persistent=True) as tape:
            fake = make(real[:, ::-1], training=True)
            good, bad = judge(real, training=True), judge(fake, training=True)
            d_loss = ops.mean(ops.softplus(-good) + ops.softplus(bad))
            g_loss = ops.mean(ops.softplus(-bad))
        for loss, part, optimizer in (
            (d_loss, judge, self.optimizer),
            (g_loss, make, self.other),
        ):
            weights = part.trainable_weights
            optimizer.apply(tape.gradient(loss, weights), weights)
        return {"d": d_loss, "g": g_loss}


def test_an_own_step(float64):
    def run(cloned):
        keras.utils.set_random_seed(1)
        model = Adversarial()
        if cloned:
            whole = ["spread", L.BatchNormalization]
            model = clone_model(model, 3, whole=whole)
        model.compile("adam")
        batches = tf.data.Dataset.from_tensor_slices(data()).batch(10)
        model.fit(batches, epochs=2, verbose=0, shuffle=False)
        return model.get_weights()

    assert gap(run(False), run(True)) < 1e-10


class Late(keras.Model):
    """Makes its layers when it is built."""

    def build(self, shape):
        self.layer = Centered(name="late")
        self.dense = L.Dense(1)
        self.dense.build(shape)
        self.built = True

    def call(self, x):
        return self.dense(self.layer(x))


class LateStep(Late):
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.full
@pytest.mark.parametrize("make", [Late, LateStep])
def test_a_layer_that_is_made_late(make, float64):
    plain, cloned = train(make, False), train(make, True, ["late"])
    assert gap(plain, cloned) < 1e-10
    with pytest.raises(ValueError, match="no layer or operation named 'no'"):
        train(make, True, ["no"])


def test_by_object_and_what_is_cloned(float64, monkeypatch):
    called = []
    call = sharded_call._call

    def noting(calls, one):
        called.append(one.layer.name)
        return call(calls, one)

    monkeypatch.setattr(sharded_call, "_call", noting)
    model = Nested()
    centered = model.first.layers[1]
    train(lambda: model, True, [centered])
    assert "centered" not in called
    first, _, second = model.first.layers
    assert set(called) == {first.name, second.name, model.last.name}


def test_operations_by_rows_stay_in_the_clones(monkeypatch):
    monkeypatch.setattr(sharded_call, "_call", None)
    inputs = keras.Input((4,))
    x = ops.concatenate([inputs, ops.sqrt(ops.abs(inputs))], axis=-1)
    x = ops.reshape(x * ops.mean(x, axis=1, keepdims=True), (-1, 2, 4))
    x = ops.cast(ops.argmax(x, axis=1), "float32") + ops.max(x, axis=1)
    model = clone_model(keras.Model(inputs, L.Dense(1)(x[:, :2])), 3)
    model.compile("sgd", "mse")
    model.fit(*data(), batch_size=10, verbose=0)


@pytest.mark.full
@pytest.mark.parametrize(
    "mix",
    [
        lambda x: ops.cumsum(x, axis=0),
        lambda x: x - ops.take(x, [0], axis=0),
        lambda x: ops.matmul(x, ops.matmul(ops.transpose(x), x)),
        lambda x: x / ops.max(x),
        lambda x: ops.roll(x, 1, axis=0),
    ],
)
def test_operations_that_mix_rows(mix, float64):
    def make():
        inputs = keras.Input((4,))
        return keras.Model(inputs, L.Dense(1)(mix(L.Dense(4)(inputs))))

    plain, cloned = train(make, False), train(make, True)
    assert gap(plain, cloned) < 1e-10


def test_a_fixed_batch_size_runs_whole(float64):
    def make():
        inputs = keras.Input((4,), batch_size=12)
        x = ops.reshape(L.Dense(4)(inputs), (12, 2, 2))
        return keras.Model(inputs, L.Dense(1)(L.Flatten()(x)))

    def run(cloned):
        keras.utils.set_random_seed(1)
        model = clone_model(make(), 3) if cloned else make()
        model.compile("adam", "mse")
        if not cloned:
            cases.build_optimizer(model)
        x, y = (value[:24] for value in data())
        model.fit(x, y, batch_size=12, shuffle=False, verbose=0)
        return model.get_weights()

    assert gap(run(False), run(True)) < 1e-10


def test_a_stateful_layer_runs_whole_by_itself(float64):
    def make():
        inputs = keras.Input((4,), batch_size=9)
        x = L.LSTM(3, stateful=True, name="lstm")(L.Reshape((2, 2))(inputs))
        return keras.Model(inputs, L.Dense(1)(x))

    def run(cloned):
        keras.utils.set_random_seed(1)
        model = make()
        if cloned:
            model = clone_model(model, 3)
        model.compile("adam", "mse")
        if not cloned:
            cases.build_optimizer(model)
        model.fit(*data(), batch_size=9, shuffle=False, verbose=0)
        return model.get_weights()

    assert gap(run(False), run(True)) < 1e-10


@pytest.mark.full
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_in_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        plain = train(MODELS["nested"][0], False)
        cloned = train(*MODELS["nested"][:1], True, ["centered"])
    finally:
        keras.config.set_dtype_policy("float32")
    assert gap(plain[:6], cloned[:6]) < 0.1


@pytest.mark.full
def test_xla(float64):
    make, whole = MODELS["nested"]
    plain = train(make, False)
    cloned = train(make, True, whole, jit_compile=True)
    assert gap(plain, cloned) < 1e-10


def test_a_whole_layer_on_one_clone_stays_in_it(float64, monkeypatch):
    monkeypatch.setattr(sharded_call, "_call", None)
    model = clone_model(functional(Spread(name="s")), 1, whole=["s"])
    model.compile("sgd", "mse")
    model.fit(*data(), verbose=0)


@pytest.mark.parametrize("loss", ["auto", "clones"])
def test_the_plan_says_why(loss):
    model = functional(Spread(name="s"))
    model = clone_model(model, 3, whole=["s"], loss=loss)
    model.compile("sgd", "mse")
    plan = plan_step(model, deployment(model).step_options(), True, 3)
    assert plan.reason == "layer 's' is called whole"
    assert not plan.loss_in_clones


@pytest.mark.parametrize(
    ("whole", "error", "message"),
    [
        ("s", TypeError, "Argument `whole` must be a list of layers"),
        (Spread, TypeError, "Argument `whole` must be a list of layers"),
        ([1], TypeError, "with 1"),
        ([int], TypeError, "with <class 'int'>"),
        (["spred"], ValueError, r"Names that are close: \['spread'\]"),
        (["what"], ValueError, "Its layers are"),
        ([L.Conv2D], ValueError, "no layer of class `Conv2D`"),
        ([L.Dense(1, name="other")], ValueError, "Layer 'other' is not one"),
    ],
)
def test_bad_input(whole, error, message):
    model = functional(Spread(name="spread"))
    with pytest.raises(error, match=message) as caught:
        clone_model(model, 3, whole=whole)
    assert "Received: whole=" in str(caught.value)
    assert deployment(model) is None


class Pooled(L.Layer):
    """Averages the nodes of each graph."""

    def call(self, nodes, graph):
        return tf.math.segment_mean(nodes, graph)


class Graphs(keras.Model):
    """Takes nodes, and of which graph each one is: rows of another kind."""

    def __init__(self):
        super().__init__()
        self.node, self.pool = L.Dense(5, "tanh"), Pooled(name="pool")
        self.head = L.Dense(1)

    def call(self, x):
        return self.head(self.pool(self.node(x["nodes"]), x["graph"]))


def test_inputs_with_rows_of_their_own(float64):
    nodes = np.random.default_rng(0).normal(size=(11, 4))
    x = {"nodes": nodes, "graph": np.repeat(np.arange(4), [2, 3, 1, 5])}
    batch = tf.data.Dataset.from_tensors((x, nodes[:4, :1]))
    found = []
    for clones in (0, 3):
        keras.utils.set_random_seed(1)
        model = Graphs()
        if clones:
            clone_model(model, clones, whole=["pool"])
        model.compile("sgd", "mse")
        logs = model.fit(batch, epochs=2, verbose=0).history
        found.append((logs, model.predict(batch, verbose=0), model.weights))
    assert cases.difference(*found) < 1e-10
