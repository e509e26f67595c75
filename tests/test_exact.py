"""`exact=True`: what it accepts trains as plain Keras does; the rest it names.

Cases of `test_equivalence.py` with dropout put in are right.
"""

import functools
import warnings

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
import test_equivalence as equivalence
from keras import layers as L  # noqa: N812
from keras import ops

from keras_clones import clone_model, deployment

X = np.random.default_rng(0).normal(size=(20, 6))
Y = np.random.default_rng(1).normal(size=(20, 2))


def network(*middle):
    inputs = keras.Input((6,))
    hidden = L.Dense(8, "tanh")(inputs)
    for layer in middle:
        hidden = layer(hidden)
    return keras.Model(inputs, L.Dense(2)(hidden))


def fit(make, num_clones=None, **options):
    keras.utils.set_random_seed(3)
    model = make()
    if num_clones:
        clone_model(model, num_clones, **options)
    model.compile("adam", "mse", jit_compile=False)
    data = cases.dataset((X, Y), (8, 8, 4))
    model.fit(data, epochs=2, verbose=0, shuffle=False)
    return model


class Kept(L.Layer):
    """Assigns what it gets the mean of, or how many rows it has seen."""

    def __init__(self, aggregation="none", count=False, raw=False, **kwargs):
        super().__init__(**kwargs)
        self.aggregation, self.count, self.raw = aggregation, count, raw

    def build(self, shape):
        dtype = "int32" if self.count else None
        self.seen = self.add_weight(
            shape=(),
            initializer="zeros",
            trainable=False,
            dtype=dtype,
            aggregation=self.aggregation,
            name="seen",
        )
        self.plain = tf.Variable(0.0, trainable=False) if self.raw else None

    def call(self, x):
        if self.raw:
            self.plain.assign_add(tf.cast(tf.shape(x)[0], tf.float32))
        elif self.count:
            self.seen.assign_add(tf.shape(x)[0])
        else:
            self.seen.assign(ops.mean(x))
        return x


class Adding(L.Layer):
    def call(self, x):
        self.add_loss(0.1 * ops.mean(x**2))
        return x


class Centered(L.Layer):
    def call(self, x):
        return x - ops.mean(x, axis=0)


class Fixed(L.Layer):
    def call(self, x):
        return ops.reshape(ops.reshape(x, (8, 8)), (-1, 8))


class Drawing(L.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x), dtype=x.dtype)


REFUSED = {
    "state without a policy": (Kept, "seen"),
    "rows counted": (lambda: Kept(count=True), "seen|kept"),
    "raw variable": (lambda: Kept(raw=True), r"Kept\.plain"),
    "scalar loss": (lambda: Adding(name="adding"), "adding"),
    "rows mixed": (lambda: Centered(name="centered"), "centered"),
    "rows mixed in a Lambda": (
        lambda: L.Lambda(lambda x: x - ops.mean(x, 0), name="lambda"),
        "lambda",
    ),
    "batch size fixed": (lambda: Fixed(name="fixed"), "fixed"),
    "tf.random": (lambda: Drawing(name="drawing"), "drawing"),
}


ALL = pytest.mark.full
WAYS = [
    ("dropout", False),
    pytest.param("batch_norm", False, marks=ALL),
    pytest.param("batch_norm", True, marks=ALL),
]


@pytest.mark.parametrize(("beside", "eagerly"), WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_could_differ_is_refused(name, beside, eagerly, float64):
    make, named = REFUSED[name]
    other = L.Dropout(0.5) if beside == "dropout" else L.BatchNormalization()
    model = clone_model(network(other, make()), 3, exact=True)
    model.compile("adam", "mse", jit_compile=False, run_eagerly=eagerly)
    before = [np.array(v) for v in model.variables]
    with pytest.raises(ValueError, match=named):
        model.fit(cases.dataset((X, Y), (8, 8, 4)), verbose=0)
    for variable, value in zip(model.variables, before, strict=True):
        # Seeds aside, which say nothing of the model.
        if "seed" not in variable.path:
            np.testing.assert_array_equal(variable, value)
    assert int(model.optimizer.iterations) == 0


ACCEPTED = {
    "dropout and normalization": (
        lambda: network(L.BatchNormalization(), L.Dropout(0.5)),
        {},
    ),
    "state with a policy": (lambda: network(Kept("mean"), Kept("mean")), {}),
    "rows counted": (lambda: network(Kept("sum", count=True)), {}),
    "a scalar loss": (
        lambda: network(Adding(), L.GaussianNoise(0.3)),
        {"layer_losses": "mean"},
    ),
    "a whole layer": (
        lambda: network(Centered(), L.Dropout(0.2)),
        {"whole": [Centered]},
    ),
}


@pytest.mark.full_but("dropout and normalization")
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_trains_the_same(name, float64):
    make, options = ACCEPTED[name]
    plain = fit(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model = fit(make, 3, exact=True, **options)
    for one, other in zip(plain.variables, model.variables, strict=True):
        assert cases.difference(np.array(one), np.array(other)) < 1e-10
    assert deployment(model).exact


def test_one_clone_refuses_nothing():
    fit(lambda: network(Adding(), Centered(), Kept(raw=True)), 1, exact=True)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_norm": "mean"},
        {"random": "clones"},
        {"loss": "clones"},
        {"check_rows": False},
    ],
)
def test_contradictions(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`exact=True` needs `{name}="):
        clone_model(network(), 2, exact=True, **options)


WITHOUT_DENSE = ("optimizer_tied_embedding", "input_and_output_of_rank_1")


def drop_in_dense(monkeypatch):
    """Put dropout before every `Dense`; return the layers that have it."""
    build, call, found = L.Dense.build, L.Dense.call, []

    @functools.wraps(build)
    def build_with_seed(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.seed_generator = keras.random.SeedGenerator(5)
        found.append(self)

    @functools.wraps(call)
    def call_on_dropped(self, inputs, *args, **kwargs):
        if not isinstance(inputs, tf.SparseTensor):
            seed = self.seed_generator
            inputs = keras.random.dropout(inputs, 0.2, seed=seed)
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(L.Dense, "build", build_with_seed)
    monkeypatch.setattr(L.Dense, "call", call_on_dropped)
    return found


def exactly(name, num_clones):
    """Train a case of `test_equivalence.py` on clones with `exact=True`."""
    made = equivalence.CASES[name]()
    clone = {**made.clone, "exact": True}
    for key in ("batch_norm", "random", "loss"):
        if clone.get(key) not in ("gather", "sync"):
            clone.pop(key, None)
    return equivalence.train(made._replace(clone=clone), num_clones)


# One of each way that a loss, state and a step go.
NAMES = [
    "loss_masked_and_weighted_by_time_step",
    "loss_contrastive_over_the_batch",
    "loss_added_sum",
    "table_of_constant_ids_and_of_tokens",
    "layer_batch_norm_sync_masked",
    "step_of_a_gan_with_noise_and_gradient_penalty",
    "step_gets_four_tensors",
    "optimizer_tied_embedding",
]


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_case_with_dropout(name, float64, monkeypatch):
    """Every case is right; `run_exact.py` runs all of them, all ways."""
    dropping = drop_in_dense(monkeypatch)
    received = exactly(name, 3)
    expected = equivalence.train(equivalence.CASES[name](), None)
    equivalence.compare(expected, received, equivalence.CASES[name]().float64)
    assert bool(dropping) == (name not in WITHOUT_DENSE)
