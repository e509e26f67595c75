"""What shards would let differ is called whole, and the first step runs again.

Trained with plain Keras beside it, in float64, on partial batches.
"""

import warnings

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
import test_rows_apart
import test_whole
from keras import layers as L  # noqa: N812
from keras import ops

from keras_clones import clone_model, deployment
from keras_clones.door import first_look

MIXING = test_rows_apart.MIXING
functional = test_rows_apart.functional


class Averaging(L.Layer):
    """Keeps an average of the largest entry of each batch."""

    def build(self, shape):
        self.largest = self.add_weight(shape=(), trainable=False, name="most")

    def call(self, x, training=False):
        if training:
            self.largest.assign(0.9 * self.largest + 0.1 * ops.max(x))
        return x / (1.0 + ops.abs(self.largest))


class Counting(L.Layer):
    """Counts rows, and keeps a metric that is no sum."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = self.add_weight(
            shape=(), dtype="int64", initializer="zeros", trainable=False
        )

    def call(self, x, training=False):
        if training:
            self.seen.assign_add(ops.cast(ops.shape(x)[0], "int64"))
        return x * ops.exp(-ops.cast(self.seen, x.dtype) / 100)


class Raw(L.Layer):
    """Counts calls in a variable of TensorFlow's."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = tf.Variable(0.0, trainable=False, dtype="float64")

    def call(self, x):
        self.calls.assign_add(1.0)
        return x / (1.0 + self.calls)


class Widest(keras.metrics.Metric):
    """The widest row of all, of which no sum tells."""

    def __init__(self):
        super().__init__(name="widest")
        self.width = self.add_weight(shape=(), initializer="zeros")

    def update_state(self, x):
        widest = ops.max(ops.sum(ops.abs(x), axis=1))
        self.width.assign(ops.maximum(self.width, ops.cast(widest, "float64")))

    def result(self):
        return self.width


class Measured(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.metric = Widest()

    def call(self, x):
        self.metric.update_state(x)
        return x * 2


class Sparsity(keras.regularizers.Regularizer):
    def __call__(self, x):
        return 0.1 * ops.sum(ops.square(ops.mean(x, axis=0) - 0.2))


class Gram(keras.Model):
    """Returns products of units over the batch, which have no rows."""

    def __init__(self):
        super().__init__()
        self.net, self.out = L.Dense(4, "tanh"), L.Dense(1)

    def call(self, x):
        hidden = self.net(x)
        gram = ops.matmul(ops.transpose(hidden), hidden)
        return {"y": self.out(hidden), "gram": gram}

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        error = ops.mean(ops.square(y - y_pred["y"]))
        return error + 0.01 * ops.sum(ops.square(y_pred["gram"]))


class OwnGram(Gram):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        weights = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


LAYERS = {
    "averaging": Averaging,
    "counting": Counting,
    "raw": Raw,
    "measured": Measured,
    "sparsity": lambda name: L.Dense(
        4, activity_regularizer=Sparsity(), name=name
    ),
    "summed": test_rows_apart.Sum,
}


def train(make, num_clones=None, compiled=None, loop=None, **options):
    """Return what training comes to, the model, and what was warned of."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    model = make()
    if num_clones:
        clone_model(model, num_clones, **options)
    model.compile(keras.optimizers.SGD(0.1), "mse", **(compiled or {}))
    batches = tf.data.Dataset.from_tensor_slices(test_rows_apart.data(22))
    batches = batches.batch(9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if loop is None:
            history = model.fit(batches, epochs=2, verbose=0).history
        else:
            history = [loop(model, batch) for batch in batches]
    found = [str(w.message) for w in caught if w.filename == __file__]
    raw = [v for one in model.layers for v in vars(one).values()]
    raw = [v.numpy() for v in raw if isinstance(v, tf.Variable)]
    values = [v.numpy() for v in model.variables]
    # A bias whose layer is centered has a gradient of rounding alone.
    values = [v for v in values if np.max(np.abs(v)) > 1e-12]
    return [values, raw, history], model, found


def assert_called_whole(make, names, compiled=None, loop=None, **options):
    expected, *_ = train(make, None, compiled, loop)
    received, model, found = train(make, 3, compiled, loop, **options)
    assert cases.difference(expected, received) < 1e-10
    whole = [one.name for one in deployment(model).whole]
    assert whole == names
    told = " ".join(text for text in found if "from now on" in text)
    assert f"So {whole} are called whole" in told
    return model, told


@pytest.mark.full_but("scores", "own_step")
@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_rows(name, float64):
    make, names = MIXING[name]
    # One of these also counts, and nothing says how its shards merge.
    whole = ["normalized", *names] if name == "two" else names
    model, told = assert_called_whole(make, whole, layer_losses="mean")
    assert f"Layers {names} mix the rows" in told
    assert f"`clone_model(..., whole={names})`" in told
    if name == "scores":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.fit(*test_rows_apart.data(10), verbose=0)


@pytest.mark.full_but("averaging", "raw")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_which_nothing_says_how_shards_merge(name, float64):
    make = LAYERS[name]
    assert_called_whole(
        lambda: functional(make(name="a")), ["a"], layer_losses="mean"
    )


@pytest.mark.full_but("Gram")
@pytest.mark.parametrize("make", [Gram, OwnGram])
def test_outputs_that_clones_cannot_join(make, float64):
    """Found while the step is traced, before it has taken its batch."""
    name = "gram" if make is Gram else "own_gram"
    model, _ = assert_called_whole(make, [name])
    assert f"Called whole, on the global batch: ['{name}']." in repr(
        deployment(model)._page()
    )


@pytest.mark.full_but("known")
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_inputs_with_rows_of_their_own(known, float64):
    nodes = np.random.default_rng(0).normal(size=(11, 4))
    x = {"nodes": nodes, "graph": np.repeat(np.arange(4), [2, 3, 1, 5])}
    batches = tf.data.Dataset.from_tensors((x, nodes[:4, :1]))
    if not known:
        spec = tf.nest.map_structure(
            lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype),
            batches.element_spec,
        )
        batches = tf.data.Dataset.from_generator(
            batches.__iter__, output_signature=spec
        )
    found = []
    for num_clones in (0, 3):
        keras.utils.set_random_seed(1)
        model = test_whole.Graphs()
        if num_clones:
            clone_model(model, num_clones)
        model.compile("sgd", "mse")
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            logs = model.fit(batches, epochs=2, verbose=0).history
        found.append((logs, model.weights))
    assert cases.difference(*found) < 1e-10
    whole = [type(one).__name__ for one in deployment(model).whole]
    assert whole == ["Graphs", "Pooled"]


@pytest.mark.full_but("eagerly-counting", "steps-lambda")
@pytest.mark.parametrize("name", ["counting", "lambda", "own_step"])
@pytest.mark.parametrize(
    "compiled",
    [{"run_eagerly": True}, {"steps_per_execution": 2}],
    ids=["eagerly", "steps"],
)
def test_other_ways_to_run(compiled, name, float64):
    """The step of one model is its own, and builds it."""
    if name in MIXING:
        assert_called_whole(*MIXING[name], compiled)
    else:
        make = LAYERS[name]
        assert_called_whole(lambda: functional(make(name="a")), ["a"], compiled)


def test_a_step_that_fails_in_any_case_changes_nothing():
    make, names = MIXING["lambda"]
    model = clone_model(make(), 3)
    model.compile("sgd", "mse")
    x, y = test_rows_apart.data(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="to have the same number of rows"):
            model.train_on_batch(x, y[:7])
    assert deployment(model).whole == ()
    with pytest.warns(UserWarning, match=r"So \['l'\] are called whole"):
        model.train_on_batch(x, y)
    assert [one.name for one in deployment(model).whole] == names


@pytest.mark.full_but("lambda-graph", "own_step-eagerly")
@pytest.mark.parametrize("eagerly", [False, True], ids=["graph", "eagerly"])
@pytest.mark.parametrize("name", ["lambda", "own_step"])
def test_models_that_are_not_trained(name, eagerly, float64):
    make, names = MIXING[name]
    x, y = test_rows_apart.data(22)
    found = []
    for num_clones in (0, 3):
        keras.utils.set_random_seed(1)
        model = make()
        if num_clones:
            clone_model(model, num_clones)
        model.compile("sgd", "mse", metrics=["mae"], run_eagerly=eagerly)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            predicted = model.predict(x, batch_size=9, verbose=0)
            judged = model.evaluate(x, y, batch_size=9, verbose=0)
        found.append((predicted, judged))
    assert cases.difference(*found) < 1e-10
    assert [one.name for one in deployment(model).whole] == names
    (told,) = [w for w in caught if w.filename == __file__]
    assert f"So {names} are called whole from now on" in str(told.message)


def test_batches_by_themselves(float64):
    def loop(model, batch):
        return model.train_on_batch(*batch)

    make, names = MIXING["spread"]
    assert_called_whole(make, names, loop=loop)


def test_the_batch_that_a_layer_cannot_run_on(float64):
    """The first batch comes again; it must not be left out."""

    def make():
        return functional(L.Lambda(of_nine_rows, name="nine"))

    def of_nine_rows(x):
        return ops.reshape(x, (9, 4)) * ops.arange(9.0, dtype=x.dtype)[:, None]

    def train_on(num_clones):
        keras.utils.set_random_seed(1)
        model = make()
        if num_clones:
            clone_model(model, num_clones)
        model.compile("adam", "mse")
        batches = tf.data.Dataset.from_tensor_slices(test_rows_apart.data(27))
        model.fit(batches.batch(9, drop_remainder=True), verbose=0)
        return [v.numpy() for v in model.variables]

    expected = train_on(None)
    with pytest.warns(UserWarning, match=r"So \['nine'\] are called whole"):
        received = train_on(3)
    assert cases.difference(expected, received) < 1e-10


def test_layers_that_cannot_be_called_whole_stay_on_shards(
    float64, monkeypatch
):
    make, _ = MIXING["lambda"]
    expected, *_ = train(make, 3, check_rows=False)

    def fail(made, layers):
        raise ValueError("no room")

    monkeypatch.setattr(
        "keras_clones.door.deployed.Deployment.call_whole", fail
    )
    received, model, (message,) = train(make, 3)
    assert cases.difference(expected, received) < 1e-10
    assert message.endswith("They cannot be called whole here: no room")
    assert deployment(model).whole == ()


@pytest.mark.full
@pytest.mark.parametrize(
    "options", [{"pieces": 2}, {"pieces": "auto"}], ids=["pieces", "auto"]
)
def test_pieces_are_warned_of(options, float64):
    make, names = MIXING["lambda"]
    _, model, (message,) = train(make, 3, **options)
    assert f"`clone_model(..., whole={names})`" in message
    assert "from now on" not in message
    assert deployment(model).whole == ()


@pytest.mark.full
def test_nothing_is_undone_where_nothing_is_found(float64):
    """A step runs once, and counts once."""
    make = test_rows_apart.APART["own_step"]
    _, model, found = train(make, 3, layer_losses="mean")
    assert found == [] and deployment(model).whole == ()
    assert int(model.optimizer.iterations) == 6
    assert deployment(model).looks.batches.kept == []


@pytest.mark.full
def test_batches_of_one_row_are_not_copied_for_ever(monkeypatch):
    made = []
    remember = first_look.Remembered

    def counted(step):
        made.append(step)
        return remember(step)

    monkeypatch.setattr(first_look, "Remembered", counted)
    make, _ = MIXING["lambda"]
    model = clone_model(make(), 3)
    model.compile("sgd", "mse")
    model.fit(*test_rows_apart.data(9), batch_size=1, verbose=0)
    assert len(made) == 3


class Shuffled(keras.utils.PyDataset):
    """Shuffled by Keras before each epoch, and drawn from itself."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x, y = test_rows_apart.data(24)
        rows = slice(6 * index, 6 * index + 6)
        return x[rows], y[rows] + np.random.random()


@pytest.mark.full_but("centered")
@pytest.mark.parametrize(
    "make",
    [lambda: test_whole.Centered(name="c"), lambda: L.Lambda(ops.abs)],
    ids=["centered", "apart"],
)
def test_data_draws_on(make, float64):
    """Neither a look nor a step that is undone takes the streams back."""
    found = []
    for num_clones in (0, 3):
        keras.utils.set_random_seed(1)
        model = functional(make())
        if num_clones:
            clone_model(model, num_clones)
        model.compile("sgd", "mse")
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            logs = model.fit(Shuffled(), epochs=4, verbose=0).history
        found.append((logs, model.weights))
    assert cases.difference(*found) < 1e-10


class Traced(keras.Model):
    """Counts how often its step is traced."""

    traces = 0

    def train_step(self, data):
        self.traces += 1
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        weights = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


@pytest.mark.full_but("Model")
@pytest.mark.parametrize("kind", [keras.Model, Traced])
def test_the_step_runs_again_as_it_was_traced(kind, float64):
    """With rows of which the trace knows no number."""
    x, y = test_rows_apart.data(22)
    found = []
    for num_clones in (0, 3):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4,))
        hidden = test_whole.Centered(name="c")(inputs)
        model = kind(inputs, [L.Dense(1, name=n)(hidden) for n in "pq"])
        if num_clones:
            clone_model(model, num_clones)
        model.compile("sgd", ["mse", "mae"])
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            logs = model.fit(x, [y, y], batch_size=9, shuffle=False, verbose=0)
        found.append((logs.history, model.weights))
        # Epochs end with fewer rows: Keras 3.16 traces for these.
        assert kind is keras.Model or model.traces <= 2
    assert cases.difference(*found) < 1e-10


class Noisy(L.Layer):
    """Draws by a state of TensorFlow's what makes no difference."""

    def call(self, x):
        return x + 1e-6 * tf.random.normal(tf.shape(x), dtype=x.dtype)


class Calls(L.Layer):
    """Counts its calls, and centers rows."""

    count = 0

    def call(self, x):
        self.count += 1
        return (x - ops.mean(x, axis=0)) * (1 + self.count / 10)


@pytest.mark.full
def test_what_differs_from_run_to_run_hides_nothing():
    def make():
        layers = [Noisy(), test_whole.Centered(name="c")]
        return functional(keras.Sequential(layers))

    _, model, (message,) = train(make, 3)
    assert [one.name for one in deployment(model).whole] == ["c"]
    assert "random='global'" not in message


@pytest.mark.full
def test_python_counters_of_layers(float64):
    make = lambda: functional(Calls(name="c"))  # noqa: E731
    assert_called_whole(make, ["c"], {"run_eagerly": True})


@pytest.mark.full
def test_raw_variables_that_xla_does_not_reach(float64):
    make = lambda: functional(Raw(name="r"))  # noqa: E731
    assert_called_whole(make, ["r"], {"jit_compile": True})


@pytest.mark.full
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_clones_with_threads_of_their_own_warn_once(run_eagerly, float64):
    def make():
        normalized = L.BatchNormalization(synchronized=True)
        return functional(keras.Sequential([normalized, Raw(name="r")]))

    _, model, (message,) = train(make, 3, {"run_eagerly": run_eagerly})
    assert [one.name for one in deployment(model).whole] == ["r"]
    assert message.count("A layer assigns") == 1
