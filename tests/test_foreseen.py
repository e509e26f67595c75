"""With XLA, the rows of a large table are looked up before its clones run."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_clones import clone_model
from keras_clones.clone import tables
from keras_clones.exchange import foreseen

IDS, WIDTH = 50, 4
OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "sgd": keras.optimizers.SGD,
}


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch):
    monkeypatch.setattr(tables, "LARGE_BYTES", 0)


@pytest.fixture
def found(monkeypatch):
    """Return how many look-ups of which tables each step has foreseen."""
    seen = []

    def foresee(*args):
        one = whole(*args)
        seen.append(one and {i: len(ups) for i, ups in one.types.items()})
        return one

    whole = foreseen.foresee
    monkeypatch.setattr(foreseen, "foresee", foresee)
    return seen


class Model(keras.Model):
    """Has two tables, and a head over what `mix` makes of rows."""

    rate = 0.0

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(IDS, WIDTH)
        self.other = layers.Embedding(IDS, WIDTH)
        self.drop = layers.Dropout(self.rate)
        self.head = layers.Dense(3)

    def call(self, x, training=False):
        rows = self.drop(self.mix(x), training=training)
        return self.head(ops.mean(rows, axis=1))


class Twice(Model):
    """Looks up twice in one table, and by positions in the other."""

    def mix(self, x):
        mirrored = self.table(ops.flip(x, 1) // 2)
        return self.table(x) * ops.tanh(mirrored) + self.other(ops.arange(6))


class Dropping(Twice):
    """Draws for rows, which plain Keras does in another way by XLA."""

    rate = 0.3


class Own(Twice):
    """Has a step of its own, which calls the model twice."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            first = self(x, training=True)
            second = self(x // 3, training=True)
            loss = self.compute_loss(x, y, first + ops.tanh(second))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return self.compute_metrics(x, y, first)


class Half(Model):
    """Reads its table in half precision, and computes in single."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(IDS, WIDTH, dtype="mixed_bfloat16")

    def mix(self, x):
        return ops.cast(self.table(x), "float32")


class OfRows(Model):
    """Looks up by what it has computed of rows."""

    def mix(self, x):
        rows = self.table(x)
        return rows + self.other(ops.argmax(rows, axis=-1))


class Tied(Model):
    """Takes one of two tables whole."""

    def mix(self, x):
        return self.table(x) + self.other(x) @ self.other.embeddings[:WIDTH]


class Drawn(Model):
    """Looks up by what it has drawn."""

    rate = 0.3

    def mix(self, x):
        zeros = ops.zeros_like(x, "float32")
        return self.table(ops.cast(10 * self.drop(1 + zeros), "int32"))


class Changing(Model):
    """Looks up once more when that has not been foreseen."""

    more = False

    def mix(self, x):
        rows = self.table(x)
        return rows + self.table(x // 2) if self.more else rows


def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, IDS, (14, 6)), rng.integers(0, 3, 14)


def train(make, optimizer, num_clones=None, **options):
    batches = tf.data.Dataset.from_tensor_slices(data()).batch(8)
    keras.utils.set_random_seed(1)
    model = make()
    if num_clones:
        clone_model(model, num_clones, random="global", **options)
    model.compile(
        OPTIMIZERS[optimizer](),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=bool(num_clones or make.rate),
    )
    if not num_clones:
        cases.build_optimizer(model)
    logs = model.fit(batches, verbose=0).history
    slots = [np.asarray(v) for v in model.optimizer.variables]
    if keras.config.floatx() == "float32":
        # Kernels take 1 - 0.999 of Adam's in float32, which is 1.3e-5 off.
        slots = []
    return [*cases.weights(model), *slots, *logs.values()]


@pytest.mark.full_but("Twice-adam-2-float64")
@pytest.mark.parametrize(
    ("make", "optimizer", "num_clones", "floatx"),
    [
        *((Twice, "adam", n, "float64") for n in (1, 2)),
        (Twice, "momentum", 3, "float64"),
        (Twice, "sgd", 3, "float32"),
    ],
    indirect=["floatx"],
)
def test_clones_train_the_same(make, optimizer, num_clones, floatx, found):
    expected = train(make, optimizer)
    received = train(make, optimizer, num_clones)
    assert cases.difference(expected, received) < cases.TOLERANCE[floatx]
    # It was traced once for batches of all sizes.
    assert found == [{0: 2, 1: 1}]


@pytest.mark.full
def test_pieces_do(found, float64):
    expected = train(Twice, "adam")
    received = train(Twice, "adam", 2, pieces=2)
    assert cases.difference(expected, received) < 1e-10
    assert found == [{0: 2, 1: 1}]


@pytest.mark.full_but("Own-2-float64")
@pytest.mark.parametrize(
    ("make", "num_clones", "floatx"),
    [
        *((Own, 2, "float64"), (Dropping, 3, "float64")),
    ],
    indirect=["floatx"],
)
def test_steps_by_calls_do(make, num_clones, floatx, found):
    options = {} if make is Own else {"loss": "gather"}
    expected = train(make, "adam")
    received = train(make, "adam", num_clones, **options)
    assert cases.difference(expected, received) < cases.TOLERANCE[floatx]
    # Two calls of one kind are foreseen once.
    assert found == [{0: 2, 1: 1}]


@pytest.mark.full_but("Tied-expected1")
@pytest.mark.parametrize(
    ("make", "expected"),
    [(OfRows, {0: 1}), (Tied, {0: 1}), (Drawn, None)],
)
def test_a_table_is_sent_if_data_do_not_tell_its_look_ups(
    make, expected, found, float64
):
    whole = train(make, "adam")
    assert cases.difference(whole, train(make, "adam", 2)) < 1e-10
    assert found == [expected]


def test_a_table_is_sent_if_it_is_looked_up_in_another_way(monkeypatch):
    def stepped(changes):
        keras.utils.set_random_seed(1)
        model = Changing()
        model(x)  # Which builds it.
        model.more = not changes
        clone_model(model, 2)
        model.compile("sgd", "mse", jit_compile=True)
        whole = foreseen.foresee

        def foresee(*args):
            one = whole(*args)
            model.more = True
            return one

        with monkeypatch.context() as patch:
            patch.setattr(foreseen, "foresee", foresee)
            model.train_on_batch(x, y)
        return cases.weights(model)

    x, y = data()[0][:4], np.ones((4, 3), "float32")
    assert cases.difference(stepped(False), stepped(True)) < 1e-6


@pytest.mark.full
def test_rows_travel_in_the_type_that_a_layer_reads(monkeypatch):
    kinds = []
    look_up = foreseen.Foreseen.look_up

    def looked_up(*args):
        one = look_up(*args)
        kinds.extend(up.rows.dtype for ups in one.values() for up in ups)
        return one

    monkeypatch.setattr(foreseen.Foreseen, "look_up", looked_up)
    expected = train(Half, "sgd")
    assert cases.difference(expected, train(Half, "sgd", 2)) < 1e-6
    assert set(kinds) == {tf.bfloat16}
