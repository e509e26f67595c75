"""With `random="global"`, layers draw what they draw on one device."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops, random

from keras_clones import _tf, clone_model, unclone_model
from keras_clones.clone import draws
from tests import cases

RNG = np.random.default_rng(0)
# Batches of 10, 10 and 7: of no known number of rows, and not even.
X, Y = RNG.normal(size=(27, 8)), RNG.normal(size=(27, 1))
TIMES = RNG.normal(size=(27, 6, 4))
IMAGES = RNG.uniform(size=(27, 8, 8, 3))


class Drawing(layers.Layer):
    """A layer with a seed generator of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = random.SeedGenerator(5)


class Functions(Drawing):
    """Everything of `keras.random` that draws row by row."""

    def call(self, x):
        shape, seed = ops.shape(x), self.seed
        x = x + random.normal(shape, seed=seed)
        x = x + random.uniform(shape, -1, 2, seed=seed)
        x = x + random.truncated_normal(shape, seed=seed)
        x = x + ops.cast(random.randint(shape, 0, 9, seed=seed), x.dtype)
        x = x + ops.cast(random.categorical(x, 8, seed=seed), x.dtype)
        # Fewer draws a row than there are classes to draw.
        x = x + ops.cast(random.categorical(x, 1, seed=seed), x.dtype)
        x = random.dropout(x, 0.3, seed=seed)
        # The global generator, which counts in another way.
        x = x + random.normal((shape[0], 1), seed=None)
        return ops.sin(x)


class NoiseShapes(Drawing):
    """Draws of which rows share some, and draws for no rows."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(4, shape[-1]))

    def call(self, x):
        seed, shape = self.seed, ops.shape(x)
        for noise in ((None, 1), (1, None), (1, 1), (None, 8)):
            x = random.dropout(x, 0.3, noise_shape=noise, seed=seed)
        x = x + random.normal((4, 8), seed=seed)[0]
        x = x + ops.sum(random.dropout(self.kernel + 1, 0.3, seed=seed), 0)
        x = x + random.normal((1, 8), seed=seed)
        keep = random.uniform((shape[0], 1), seed=seed)
        return x * ops.cast(keep > 0.2, x.dtype)


class Distributions(Drawing):
    """What draws by numbers of the rows."""

    def call(self, x):
        shape, seed = ops.shape(x), self.seed
        some = ops.exp(ops.sin(x))
        x = x + random.gamma(shape, some, seed=seed)
        x = x + random.gamma(shape, 2.0, seed=seed)
        x = x + random.beta(shape, some, some + 1, seed=seed)
        x = x + random.binomial(shape, 4.0, ops.sigmoid(x), seed=seed)
        x = x + random.binomial(shape, 4.0, 0.3, seed=seed)
        x = x + tf.random.stateless_poisson(shape, (1, 2), 2.0, x.dtype)
        return ops.sin(x)


class Axes(Drawing):
    """Several draws a row, and an axis of no known size that is not theirs."""

    def call(self, x):
        seed = self.seed
        time = ops.cast(tf.shape(x)[1] // 4, "int32")
        x = tf.reshape(x, tf.stack([tf.shape(x)[0], time, 4]))
        x = x + random.normal((tf.shape(x)[1], 4), seed=seed)
        flat = random.dropout(tf.reshape(x, (-1, 4)), 0.3, seed=seed)
        x = tf.reshape(flat, tf.shape(x))
        swapped = tf.transpose(x, (1, 0, 2))
        x = x + random.normal((tf.shape(swapped)[1], 1, 4), seed=seed)
        return ops.sin(tf.reshape(x, (-1, 8)))


class Inside(Drawing):
    """Draws in functions and in loops."""

    @tf.function
    def nested(self, x):
        return x + random.normal(tf.shape(x), seed=3)

    def call(self, x):
        def body(i, x):
            seed = tf.stack([i, 2])
            noise = tf.random.stateless_normal(tf.shape(x), seed, dtype=x.dtype)
            return i + 1, x + noise

        return self.nested(tf.while_loop(lambda i, x: i < 3, body, (0, x))[1])


def of_rows(*kinds, batch_norm=False, model=keras.Model):
    inputs = keras.Input((8,))
    x = layers.Dense(8)(inputs)
    for kind in kinds:
        x = kind()(x)
    if batch_norm:
        x = layers.BatchNormalization()(x)
    x = layers.Dropout(0.3, seed=1)(x)
    return model(inputs, layers.Dense(1)(x))


def of_times(recurrent=()):
    inputs = keras.Input((6, 4))
    x = layers.Dense(4)(inputs)
    x = layers.SpatialDropout1D(0.3, seed=2)(x)
    x = layers.GaussianNoise(0.3, seed=3)(x)
    x = layers.GaussianDropout(0.3, seed=4)(x)
    x = layers.AlphaDropout(0.3, seed=5)(x)
    x = layers.Dropout(0.3, noise_shape=(None, 1, 4), seed=6)(x)
    for seed, kind in enumerate(recurrent, 7):
        shares = {"dropout": 0.2, "recurrent_dropout": 0.2}
        x = kind(4, **shares, return_sequences=True, seed=seed)(x)
    # The bias of keys has a gradient of nothing but rounding.
    attention = layers.MultiHeadAttention(
        2, 4, dropout=0.3, use_bias=False, seed=9
    )
    x = x + attention(x, x)
    return keras.Model(inputs, layers.Dense(1)(layers.Flatten()(x)))


AUGMENTATIONS = (
    ("RandomFlip", {}),
    ("RandomRotation", {"factor": 0.2}),
    ("RandomZoom", {"height_factor": 0.2}),
    ("RandomTranslation", {"height_factor": 0.2, "width_factor": 0.2}),
    ("RandomContrast", {"factor": 0.2}),
    ("RandomBrightness", {"factor": 0.2, "value_range": (0, 1)}),
    ("RandomCrop", {"height": 7, "width": 7}),
    ("RandomErasing", {"value_range": (0, 1)}),
    ("RandomShear", {"x_factor": 0.2}),
    ("RandomSaturation", {"factor": 0.7, "value_range": (0, 1)}),
    ("RandomHue", {"factor": 0.2, "value_range": (0, 1)}),
    ("RandomGrayscale", {}),
    ("RandomPosterization", {"factor": 4, "value_range": (0, 1)}),
    ("RandomInvert", {"value_range": (0, 1)}),
)


def of_images(augmentations=AUGMENTATIONS):
    inputs = keras.Input((8, 8, 3))
    x = inputs
    for i, (name, arguments) in enumerate(augmentations):
        # Some came after Keras 3.12.
        if hasattr(layers, name):
            x = getattr(layers, name)(**arguments, seed=i)(x)
    x = layers.Conv2D(4, 3)(x)
    x = layers.SpatialDropout2D(0.3, seed=50)(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(1)(x))


class PenaltyModel(keras.Model):
    """A step of its own, with gradients of gradients."""

    def train_step(self, data):
        x, y = data[:2]
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                outputs = self(x, training=True)
            penalty = tf.reduce_mean(inner.gradient(outputs, x) ** 2)
            loss = self.compute_loss(x, y, outputs) + penalty
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def cloned(make, num_clones, **options):
    # Draws without a seed: Keras 3.12 goes on with them after a new seed.
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    model = make()
    if num_clones:
        clone_model(model, num_clones, random="global", **options)
    return model


def trained(make, x, num_clones, *, steps=None, compiled=None, **options):
    """Train, and return the weights and what layers draw outside of steps."""
    model = cloned(make, num_clones, **options)
    model.compile(keras.optimizers.Adam(0.01), "mse", **(compiled or {}))
    if not num_clones:
        cases.build_optimizer(model)
    if steps:
        for _ in range(steps):
            model.train_on_batch(x[:10], Y[:10])
    else:
        model.fit(x, Y, batch_size=10, epochs=2, shuffle=False, verbose=0)
    return cases.weights(model)


def compare(make, x, *, num_clones=(3,), compiled=None, steps=None, **options):
    tolerance = cases.TOLERANCE[keras.config.floatx()]
    given = {"compiled": compiled, "steps": steps}
    expected = trained(make, x, 0, **given)
    for number in num_clones:
        found = trained(make, x, number, **given, **options)
        assert cases.difference(expected, found) < tolerance


ROWS = (Functions, NoiseShapes, Distributions, Axes, Inside)
FUNCTIONS = (Functions, NoiseShapes)


@pytest.mark.full_but("functions")
@pytest.mark.parametrize(
    "kinds", [FUNCTIONS, ROWS[2:]], ids=["functions", "others"]
)
def test_rows(kinds, float64, recwarn):
    compare(lambda: of_rows(*kinds), X)
    assert not [w for w in recwarn if "random=" in str(w.message)]


@pytest.mark.full
def test_any_number_of_clones():
    """In float32, which layers draw in by default."""
    compare(lambda: of_rows(*FUNCTIONS), X, num_clones=(1, 4))


@pytest.mark.full
def test_rows_of_a_known_number(float64):
    compare(lambda: of_rows(*FUNCTIONS), X, steps=2)


@pytest.mark.full
def test_rows_gathered(float64):
    compare(lambda: of_rows(*FUNCTIONS), X, loss="gather")


@pytest.mark.full
def test_uneven_shares(float64):
    kinds = (Functions, Distributions)
    shares = [0.5, 0.1, 0.4]
    compare(lambda: of_rows(*kinds), X, shares=shares)


@pytest.mark.full
def test_times(float64):
    compare(of_times, TIMES)


@pytest.mark.full
def test_recurrent_layers(float64):
    kinds = (layers.LSTM, layers.GRU)
    compare(lambda: of_times(kinds), TIMES)


@pytest.mark.full
def test_images():
    """`RandomRotation` of Keras takes float32 only."""
    compare(lambda: of_images(AUGMENTATIONS[:3]), IMAGES)


@pytest.mark.full
def test_all_augmentations():
    compare(of_images, IMAGES)


@pytest.mark.full
def test_compiled(float64):
    """Compiled draws are others, in plain Keras too."""
    # Its sizes are those of shards that are looked at, by chance, and what is
    # called whole is not compiled.
    options = {"compiled": {"jit_compile": True}, "jit_compile": True}
    options["check_rows"] = False
    compare(lambda: of_rows(Axes), X, **options)


@pytest.mark.full
@pytest.mark.parametrize(
    ("steps", "kinds"),
    [(2, [NoiseShapes]), (None, [Functions])],
    ids=["of_known_rows", "of_any_rows"],
)
def test_own_step(steps, kinds, float64):
    compare(lambda: of_rows(*kinds, model=PenaltyModel), X, steps=steps)


@pytest.mark.full
@pytest.mark.parametrize(("loss", "steps"), [("auto", 2), ("clones", None)])
def test_synchronized(loss, steps, float64):
    def make():
        return of_rows(NoiseShapes, batch_norm=True)

    compare(make, X, steps=steps, loss=loss, batch_norm="sync")


@pytest.mark.full
def test_outside_of_a_graph(float64):
    def make():
        return of_rows(Functions, Inside)

    compare(make, X, compiled={"run_eagerly": True})


@pytest.mark.full
def test_several_steps_at_once(float64):
    compare(lambda: of_rows(), X, compiled={"steps_per_execution": 2})


class AlwaysDrawing(Drawing):
    def call(self, x):
        return random.dropout(x, 0.3, seed=self.seed)


def test_predictions_and_losses(float64):
    """Layers may draw outside of training, too."""
    found = []
    for num_clones in (0, 3):
        model = cloned(lambda: of_rows(AlwaysDrawing), num_clones)
        model.compile("sgd", "mse")
        loss = model.evaluate(X, Y, batch_size=10, verbose=0)
        outputs = model.predict(X, batch_size=10, verbose=0)
        found.append((loss, outputs))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-10)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-10)


@pytest.mark.full
def test_fewer_rows_than_clones(float64):
    found = []
    for num_clones in (0, 4):
        model = cloned(lambda: of_rows(Functions), num_clones)
        model.compile("adam", "mse")
        data = cases.dataset((X, Y), [2, 10, 1, 3])
        model.fit(data, verbose=0)
        found.append(cases.weights(model))
    assert cases.difference(*found) < 1e-10


@pytest.mark.full
def test_sparse_rows(float64):
    def make():
        inputs = keras.Input((8,), sparse=True)
        x = layers.Dropout(0.3, seed=1)(layers.Dense(8)(inputs))
        return keras.Model(inputs, layers.Dense(1)(x))

    rows = tf.sparse.from_dense(X * (X > 0))
    data = tf.data.Dataset.from_tensor_slices((rows, Y)).batch(10)
    found = []
    for num_clones in (0, 3):
        model = cloned(make, num_clones)
        model.compile("adam", "mse")
        model.fit(data, epochs=2, verbose=0)
        found.append(cases.weights(model))
    assert cases.difference(*found) < 1e-10


@pytest.mark.full
def test_a_saved_model_goes_on_with_other_clones(tmp_path, float64):
    def fit(model):
        model.fit(X, Y, batch_size=10, epochs=1, shuffle=False, verbose=0)

    def simple():
        inputs = keras.Input((8,))
        x = layers.Dropout(0.3, seed=1)(layers.Dense(8)(inputs))
        x = layers.GaussianNoise(0.3, seed=2)(x)
        return keras.Model(inputs, layers.Dense(1)(x))

    def saved(model):
        # Keras saves no states of generators: loaded, layers begin anew.
        model.save(tmp_path / "model.keras")
        return keras.models.load_model(tmp_path / "model.keras")

    plain, model = cloned(simple, 0), cloned(simple, 3)
    for one in (plain, model):
        one.compile("adam", "mse")
        fit(one)
    plain, model = saved(plain), saved(model)
    clone_model(model, 2, random="global")
    fit(plain)
    fit(model)
    unclone_model(model)
    fit(plain)
    fit(model)
    assert cases.difference(cases.weights(plain), cases.weights(model)) < 1e-10


class FixedRows(keras.Model):
    """A model that has to know how many rows there are."""

    def __init__(self):
        super().__init__()
        self.seed = random.SeedGenerator(5)
        self.dense = layers.Dense(1)

    def call(self, x):
        if x.shape[0] is None:
            raise ValueError("No number of rows.")
        return self.dense(x + random.normal(x.shape, seed=self.seed))


@pytest.mark.full
def test_models_that_must_know_the_rows(float64):
    compare(FixedRows, X, num_clones=(2,), steps=2)


class Stateful(layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x), dtype=x.dtype)


class Generated(layers.Layer):
    def build(self, shape):
        self.generator = tf.random.Generator.from_seed(1)

    def call(self, x):
        return x + self.generator.normal(tf.shape(x), dtype=x.dtype)


class Doubled(Drawing):
    def call(self, x):
        both = random.dropout(ops.concatenate([x, x], 0), 0.3, seed=self.seed)
        return both[: ops.shape(x)[0]]


@pytest.mark.full_but("Doubled-batch axis first")
@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (Stateful, "SeedGenerator"),
        (Generated, "SeedGenerator"),
        (Doubled, "batch axis first"),
    ],
)
def test_what_cannot_be_had_is_named(kind, remedy):
    model = cloned(lambda: of_rows(kind), 3)
    model.compile("adam", "mse")
    with pytest.warns(UserWarning, match=f"{kind.__name__} '.*{remedy}"):
        model.train_on_batch(X, Y)
    model = cloned(lambda: of_rows(kind), 3, exact=True)
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=f"{kind.__name__} '.*{remedy}"):
        model.train_on_batch(X, Y)


@pytest.mark.full
def test_nothing_else_is_named(recwarn):
    """A layer may make a generator when it is called, outside of the graph."""
    model = cloned(lambda: of_rows(Functions, Axes, Inside), 3)
    model.compile("adam", "mse")
    model.fit(X, Y, batch_size=10, verbose=0)
    assert not [w for w in recwarn if "random=" in str(w.message)]


def test_nothing_stays_swapped():
    functions = _tf.drawing_functions()
    test = draws._functions()
    assert all(
        getattr(module, name) is function
        for (module, name), (function, _) in test.items()
    )
    assert "stateless_random_normal_v2" in functions
