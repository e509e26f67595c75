"""What trained otherwise, or failed in silence, and does so no more."""

import warnings

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import clone_model, deployment
from keras_clones.benchmark.transfers import count_transfers, traffic

SIZES = [12, 7, 12, 2]
CPUS = ["CPU:0", "CPU:1", "CPU:2"]


class OwnStep(keras.Model):
    """A step of one's own that does what that of Keras does."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        self._loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return self.compute_metrics(x, y, y_pred)


BOTH_STEPS = pytest.mark.parametrize("kind", [keras.Model, OwnStep])


def model_of(layer, kind=keras.Model):
    x = keras.Input((6,))
    y = keras.layers.Dense(1, name="head")(layer(x))
    return kind(x, y)


def data_of(sizes=SIZES):
    x = cases.arrays(sum(sizes))["mlp"][0]
    return cases.batches(x, x[:, :1] ** 2, sizes)


def fit(make, num_clones=None, sizes=SIZES, epochs=2, **clone):
    """Train a model, and return it with its history."""
    keras.utils.set_random_seed(7)
    model = make()
    if num_clones:
        clone_model(model, devices=CPUS[:num_clones], **clone)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    if not num_clones:
        # Keras traces a step twice that makes variables.
        model.optimizer.build(model.trainable_variables)
    data = data_of(sizes)
    # Keras warns of data sets that it is asked to shuffle.
    history = model.fit(data, epochs=epochs, shuffle=False, verbose=0)
    return model, history.history


def all_of(model, history):
    slots = [np.asarray(v) for v in model.optimizer.variables]
    return {"weights": cases.weights(model), "slots": slots, "logs": history}


def assert_same(make, num_clones=3, **clone):
    """Check that clones train what plain Keras trains; return their model."""
    expected = all_of(*fit(make))
    model, history = fit(make, num_clones, **clone)
    received = all_of(model, history)
    assert set(expected["logs"]) == set(received["logs"])
    assert cases.difference(expected, received) < 1e-10
    return model


@pytest.fixture
def strictly():
    """Let a test fail by any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def encoder_and_autoencoder(nested):
    x = keras.Input((6,))
    code = keras.layers.Dense(3, "tanh")(x)
    encoder = keras.Model(x, code)
    decoder = keras.layers.Dense(6)
    outputs = decoder(encoder(x) if nested else code)
    return encoder, keras.Model(x, outputs)


@pytest.mark.full
@pytest.mark.parametrize("nested", [True, False])
def test_models_that_share_moved_layers_see_them_train(nested, float64):
    x = cases.arrays(12)["mlp"][0]
    found = []
    for clone in (False, True):
        keras.utils.set_random_seed(7)
        with tf.device("CPU:1"):
            encoder, model = encoder_and_autoencoder(nested)
            encoder.compile(keras.optimizers.Adam(0.1), "mse")
            encoder.fit(x, x[:, :3], verbose=0)
            encoder.evaluate(x, x[:, :3], verbose=0)
            encoder.predict(x, verbose=0)
        if clone:
            clone_model(model, devices=CPUS)
        model.compile(keras.optimizers.Adam(0.1), "mse")
        model.fit(x, x, verbose=0)
        found.append(
            [
                encoder.predict(x, verbose=0),
                encoder.evaluate(x, x[:, :3], verbose=0),
                encoder.fit(x, x[:, :3], verbose=0).history["loss"],
                *cases.weights(model),
            ]
        )
    assert cases.difference(*found) < 1e-10


class Pos(keras.layers.Layer):
    """Keeps a count where clones cannot merge it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = tf.Variable(0, trainable=False)

    def call(self, x):
        self.calls.assign_add(1)
        return x * 2


class Reading(Pos):
    """Reads its count in a branch, and assigns nothing."""

    def call(self, x):
        return tf.cond(self.calls > 0, lambda: x + 1.0, lambda: x * 2.0)


class InBranch(Pos):
    def call(self, x):
        def count():
            return self.calls.assign_add(1)

        tf.cond(tf.reduce_sum(x) > 0, count, self.calls.read_value)
        return x * 2


@pytest.mark.full_but("InBranch-OwnStep")
@BOTH_STEPS
@pytest.mark.parametrize("layer", [Pos, InBranch])
def test_a_raw_variable_that_a_layer_assigns_is_named(layer, kind, float64):
    name = layer.__name__
    with pytest.warns(UserWarning, match=rf"{name}\.calls.*add_weight"):
        fit(lambda: model_of(layer(), kind), 3)


@pytest.mark.full_but("OwnStep")
@BOTH_STEPS
def test_a_raw_variable_that_is_only_read_is_no_matter(kind, float64, strictly):
    assert_same(lambda: model_of(Reading(), kind))


class Recomputing(keras.layers.Layer):
    """Gives back what inner layers come to, and computes it twice."""

    def build(self, shape):
        self.inner = keras.layers.Dense(shape[-1], "tanh")
        self.inner.build(shape)

    def call(self, x):
        return x + tf.recompute_grad(self.inner)(x)


class ByHand(Recomputing):
    """Has gradients of its own: by the order of names, and by a tape."""

    def build(self, shape):
        super().build(shape)
        self.scale = self.add_weight((shape[-1],), "ones", name="a_scale")
        self.kernel = self.add_weight((shape[-1], shape[-1]), name="b_kernel")

    def call(self, x):
        @tf.custom_gradient
        def product(x):
            kernel = tf.convert_to_tensor(self.kernel)

            def gradient(upstream, variables):
                by_kernel = tf.transpose(x) @ upstream
                found = [2 * tf.reduce_sum(by_kernel, 0), 0.5 * by_kernel]
                return upstream @ tf.transpose(kernel), found

            return x @ kernel * self.scale, gradient

        @tf.custom_gradient
        def inner(x):
            def gradient(upstream, variables):
                with tf.GradientTape() as tape:
                    y = self.inner(x)
                found = tape.gradient(y, variables, upstream)
                return upstream, found

            return self.inner(x), gradient

        return inner(product(x))


@pytest.mark.full_but("ByHand-OwnStep", "Recomputing-Model")
@BOTH_STEPS
@pytest.mark.parametrize("layer", [Recomputing, ByHand])
def test_own_gradients_of_weights_that_are_read(layer, kind, float64, strictly):
    assert_same(lambda: model_of(layer(), kind))


class Waves(keras.layers.Layer):
    """Has complex outputs, of real inputs or of complex ones."""

    def build(self, shape):
        self.real = self.add_weight((shape[-1], 3))
        self.imaginary = self.add_weight((shape[-1], 3))

    def call(self, x):
        parts = map(tf.convert_to_tensor, (self.real, self.imaginary))
        return tf.cast(x, tf.complex128) @ tf.complex(*parts)


class WavesStep(keras.Model):
    """Calls its layers by themselves: what is between them is complex."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Waves(), Waves()
        self.first.build((None, 6))
        self.second.build((None, 3))
        self.built = True

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = tf.abs(self.second(self.first(x)))
            loss = tf.reduce_mean((y_pred - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        return {"loss": loss}


def test_complex_values_between_calls_have_gradients(float64, strictly):
    assert_same(WavesStep)


class Writing(keras.layers.Layer):
    def call(self, x):
        tf.summary.scalar("rows", tf.reduce_sum(x))
        return x * 2


@pytest.mark.full_but("Model")
@BOTH_STEPS
def test_a_summary_is_written_once(kind, float64, tmp_path):
    pytest.importorskip("tensorboard")
    with tf.summary.create_file_writer(str(tmp_path)).as_default(step=0):
        fit(lambda: model_of(Writing(), kind), 3, epochs=1)
    [path] = tmp_path.iterdir()
    events = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    written = [
        value.tag.rpartition("/")[2]
        for event in events
        for value in tf.compat.v1.Event.FromString(event).summary.value
    ]
    assert written == ["rows"] * len(SIZES)


class Counter(keras.layers.Layer):
    """Counts batches, or rows."""

    def __init__(self, of="batches", aggregation=None, **kwargs):
        super().__init__(**kwargs)
        self.of = of
        self.count = self.add_weight(
            shape=(),
            dtype="int64",
            initializer="zeros",
            trainable=False,
            aggregation=aggregation,
            name="count",
        )

    def call(self, x):
        rows = keras.ops.shape(x)[0]
        added = rows if self.of == "rows" else 1
        self.count.assign_add(keras.ops.cast(added, "int64"))
        return x * 2


@pytest.mark.full
@BOTH_STEPS
def test_a_count_of_batches_is_that_of_one_device(kind, float64, strictly):
    assert_same(lambda: model_of(Counter(), kind))


@pytest.mark.full_but("OwnStep")
@BOTH_STEPS
def test_a_count_of_rows_that_adds_up(kind, float64, strictly):
    assert_same(lambda: model_of(Counter("rows", "sum"), kind))


@pytest.mark.full_but("fit-Model")
@BOTH_STEPS
@pytest.mark.parametrize("how", ["fit", "train_on_batch", "drop_remainder"])
def test_a_count_of_rows_is_warned_of(kind, how, float64):
    model = model_of(Counter("rows", name="counter"), kind)
    clone_model(model, devices=CPUS).compile("sgd", "mse")
    x = np.ones((12, 6))
    with pytest.warns(UserWarning, match="counter/count.*aggregation='sum'"):
        if how == "fit":
            model.fit(data_of(), verbose=0)
        elif how == "train_on_batch":
            model.train_on_batch(x, x[:, :1])
        else:
            data = tf.data.Dataset.from_tensor_slices((x, x[:, :1]))
            model.fit(data.batch(6, drop_remainder=True), verbose=0)


def mixed(kind):
    """A model with state, noise and a loss of a layer."""

    def make():
        regularizer = keras.layers.ActivityRegularization(0.1)
        layers = [Counter("rows", "sum"), regularizer]
        return model_of(keras.Sequential(layers), kind)

    return make


WITH_EMPTY = [0, 12, 0, 7, 2, 0]


@pytest.mark.full_but("auto-3")
@pytest.mark.parametrize("num_clones", [1, 3])
@pytest.mark.parametrize("loss", ["auto", "gather"])
def test_a_batch_of_no_rows_changes_nothing(num_clones, loss, float64):
    make = mixed(keras.Model)
    expected = all_of(*fit(make, sizes=[12, 7, 2]))
    received = fit(make, num_clones, sizes=WITH_EMPTY, loss=loss)
    assert cases.difference(expected, all_of(*received)) < 1e-10


@pytest.mark.full_but("3")
@pytest.mark.parametrize("num_clones", [1, 3])
def test_an_own_step_does_what_it_does_with_no_rows(num_clones, float64):
    make = mixed(OwnStep)
    try:
        expected = all_of(*fit(make, sizes=WITH_EMPTY))
    except ValueError as error:
        if "equal rank" not in str(error):
            raise
        pytest.skip("Keras 3.16 itself does not add up losses of no rows")
    received = all_of(*fit(make, num_clones, sizes=WITH_EMPTY))
    assert cases.difference(expected, received) < 1e-10


class Sum(keras.layers.Layer):
    def call(self, x):
        self.add_loss(0.01 * keras.ops.sum(keras.ops.square(x)))
        return x


class Mean(keras.layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
        return x


def regularized(kind):
    def make():
        hidden = keras.layers.Dense(4, "tanh", activity_regularizer="l2")
        layers = [hidden, Sum(name="total")]
        return model_of(keras.Sequential(layers), kind)

    return make


@pytest.mark.full
@BOTH_STEPS
@pytest.mark.parametrize("how", ["sum", {"total": "sum"}])
def test_losses_that_are_sums_beside_activity_regularizers(
    kind, how, float64, strictly
):
    assert_same(regularized(kind), layer_losses=how)


def of_ones_own(kind, *regularizers):
    """Return a model whose layers have activity regularizers of one's own."""

    def make():
        layers = [
            keras.layers.Dense(
                4, "tanh", activity_regularizer=one, name=f"hidden_{i}"
            )
            for i, one in enumerate(regularizers)
        ]
        return model_of(keras.Sequential(layers), kind)

    return make


def mean_size(x):
    return 0.5 * keras.ops.mean(keras.ops.abs(x))


def total_size(x):
    return 0.1 * keras.ops.sum(keras.ops.abs(x))


def size_by_row(x):
    return 0.1 * keras.ops.sum(keras.ops.abs(x), axis=-1)


def sparseness(x):
    """Wants units to be small on the average of a batch."""
    return keras.ops.sum(keras.ops.mean(x, axis=0) ** 2)


@pytest.mark.full_but("Model")
@BOTH_STEPS
def test_activity_regularizers_of_ones_own(kind, float64, strictly):
    assert_same(of_ones_own(kind, mean_size, total_size, size_by_row))


@pytest.mark.full_but("Model")
@BOTH_STEPS
def test_one_that_looks_at_the_whole_batch_is_named(kind, float64):
    make = of_ones_own(kind, mean_size, sparseness)
    with pytest.warns(UserWarning, match=r"\['hidden_1'\] look at the whole"):
        fit(make, 3, epochs=1)
    with pytest.raises(ValueError, match=r"whole=\['hidden_1'\]"):
        fit(make, 3, epochs=1, exact=True)


@pytest.mark.full
@BOTH_STEPS
def test_one_that_sees_the_whole_batch(kind, float64, strictly):
    make = of_ones_own(kind, mean_size, sparseness)
    assert_same(make, whole=["hidden_1"])


def sums_and_means(kind):
    def make():
        dense = keras.layers.Dense(4, "tanh")
        layers = [dense, Sum(name="total"), Mean(name="average")]
        return model_of(keras.Sequential(layers), kind)

    return make


@pytest.mark.full_but("Model")
@BOTH_STEPS
def test_losses_are_sums_or_means_by_layer(kind, float64, strictly):
    how = {"total": "sum", "average": "mean"}
    model = assert_same(sums_and_means(kind), layer_losses=how)
    assert deployment(model).layer_losses == how


def test_a_layer_left_out_is_warned_of(float64):
    with pytest.warns(UserWarning, match=r"\['average'\] pass scalars"):
        fit(sums_and_means(keras.Model), 3, layer_losses={"total": "sum"})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("median", ValueError, "Argument `layer_losses` must be"),
        (3, TypeError, "Argument `layer_losses` must be"),
        ({"total": "median"}, ValueError, "'total': 'median'"),
        ({3: "sum"}, TypeError, "Argument `layer_losses` must be"),
        ({"totals": "sum"}, ValueError, r"totals.*'total'"),
    ],
)
def test_layer_losses_are_checked(value, error, message):
    with pytest.raises(error, match=message):
        clone_model(regularized(keras.Model)(), 2, layer_losses=value)


def test_layers_of_a_model_that_is_not_built_may_have_any_name():
    clone_model(cases.subclassed(), 2, layer_losses={"total": "sum"})


class Keeper(keras.layers.Layer):
    """Keeps what a function makes of its old value and of its rows."""

    def __init__(self, function, dtype_of="float64", **kwargs):
        super().__init__(**kwargs)
        self.function = function
        self.kept = self.add_weight(
            shape=(), dtype=dtype_of, initializer="ones", name="kept"
        )
        self.kept.trainable = False

    def call(self, x):
        value = self.function(tf.convert_to_tensor(self.kept.value), x)
        self.kept.assign(value)
        return x * 2


KEEPERS = {
    "mean": lambda old, x: 0.9 * old + 0.1 * tf.reduce_mean(x),
    "sum": lambda old, x: old + tf.reduce_sum(x),
    "max": lambda old, x: tf.maximum(old, tf.reduce_max(x)),
    "min": lambda old, x: tf.minimum(old, tf.reduce_min(x)),
    "first": lambda old, x: 0.5 * old + x[0, 0],
}


@pytest.mark.full_but("OwnStep")
@BOTH_STEPS
def test_states_merge_as_they_are_said_to(kind, float64, strictly):
    def make():
        keepers = [Keeper(KEEPERS[name], name=name) for name in KEEPERS]
        counter = Counter("rows", name="rows")
        return model_of(keras.Sequential([*keepers, counter]), kind)

    patterns = {f"*{name}/k*": name for name in KEEPERS}
    patterns |= {"*rows/count": "sum", "*": "mean"}
    model = assert_same(make, state=patterns)
    assert deployment(model).state == patterns


@pytest.mark.full
@BOTH_STEPS
@pytest.mark.parametrize("policy", KEEPERS)
def test_state_merges_as_it_is_said_to(policy, kind, float64, strictly):
    def make():
        return model_of(Keeper(KEEPERS[policy], name="keeper"), kind)

    patterns = {"*/other": "mean", "keeper/k*": policy, "*": "mean"}
    model = assert_same(make, state=patterns)
    assert deployment(model).state == patterns


@pytest.mark.full
@BOTH_STEPS
def test_whole_numbers_merge_as_they_are_said_to(kind, float64, strictly):
    assert_same(
        lambda: model_of(Counter("rows", name="rows"), kind),
        state={"rows/count": "sum"},
    )


class Averaging(keras.layers.Layer):
    """Keeps an average of the weights of a layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(4)

    def build(self, shape):
        self.dense.build(shape)
        self.average = self.add_weight(
            shape=(shape[-1], 4), initializer="zeros", trainable=False
        )

    def call(self, x):
        self.average.assign(0.9 * self.average + 0.1 * self.dense.kernel)
        return self.dense(x)


def spectral():
    dense = keras.layers.Dense(4)
    return keras.layers.SpectralNormalization(dense, power_iterations=2)


@pytest.mark.full_but("Averaging-OwnStep")
@BOTH_STEPS
@pytest.mark.parametrize("make_layer", [Averaging, spectral])
def test_state_that_is_alike_in_all_clones_is_not_warned_of(
    make_layer, kind, float64, strictly
):
    assert_same(lambda: model_of(make_layer(), kind))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("sum", TypeError, "Argument `state` must be a dict"),
        ({3: "sum"}, TypeError, "Argument `state` must be a dict"),
        ({"*": "median"}, ValueError, r"one of \('mean', .*'median'"),
    ],
)
def test_state_is_checked(value, error, message):
    with pytest.raises(error, match=message):
        clone_model(cases.mlp(), 2, state=value)


class Fixed(keras.layers.Layer):
    """Has a batch size of 12 written down."""

    def call(self, x):
        return x * keras.ops.ones((12, 1))


class Pairs(keras.layers.Layer):
    """Compares all rows with all rows."""

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(x))


class Refusing(keras.layers.Layer):
    """Refuses rows that begin with a large number."""

    def call(self, x):
        check = tf.debugging.Assert(tf.reduce_all(x[:, 0] < 100), [x[:, 0]])
        with tf.control_dependencies([check]):
            return tf.identity(x)


def error_of(layer, kind, y, known, eagerly=False, **clone):
    """Return the message of what a batch of unknown size comes to.

    Nothing is looked at: else such layers would be called whole.
    """
    clone["check_rows"] = False
    keras.utils.set_random_seed(7)
    x = np.ones((12, 6))
    x[5] = 200
    inputs = keras.Input((6,))
    model = clone_model(kind(inputs, layer(inputs)), devices=CPUS, **clone)
    model.compile("sgd", "mse", run_eagerly=eagerly)
    data = tf.data.Dataset.from_tensors((x, y))
    if not known:
        data = cases.batches(x, y, [len(x)])
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)) as caught:
        model.fit(data, verbose=0, shuffle=False)
    return str(caught.value)


MAY_MEAN = "an output with as many columns as the batch has rows."
OF_ROWS = "while clone {} of 3 ran on 4 of 12 rows of the batch. "
# Steps of Keras 3.16 know their rows, whatever is known of the data set.
KNOW_ROWS = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 16)
AT_RUN = "while one of 3 clones ran on its rows of the batch. "


@pytest.mark.full_but("True-Model", "False-OwnStep", "False-Model")
@BOTH_STEPS
@pytest.mark.parametrize("known", [True, False])
def test_an_error_of_a_fixed_batch_size_says_so(kind, known):
    found = error_of(Fixed(), kind, np.ones((12, 6)), known)
    assert found.endswith(MAY_MEAN)
    traced = "what each of 3 clones runs was traced for any number of rows"
    own = traced if kind is OwnStep else AT_RUN
    assert (OF_ROWS.format(0) if known or KNOW_ROWS else own) in found


@pytest.mark.parametrize("known", [True, False])
def test_an_error_of_rows_by_rows_says_so(known):
    found = error_of(Pairs(), keras.Model, np.ones((12, 12)), known)
    assert found.endswith(MAY_MEAN)
    assert (OF_ROWS.format(0) if known or KNOW_ROWS else AT_RUN) in found


@pytest.mark.full_but("True-OwnStep")
@BOTH_STEPS
@pytest.mark.parametrize("eagerly", [True, False])
def test_an_error_of_a_running_clone_says_so(kind, eagerly):
    y = np.ones((12, 6))
    found = error_of(Refusing(), kind, y, eagerly, eagerly)
    assert ("to be true" if eagerly else "assertion failed") in found
    assert found.endswith(MAY_MEAN)
    assert (OF_ROWS.format(1) if eagerly else AT_RUN) in found


@pytest.mark.full
def test_an_error_of_a_clone_with_operations_of_its_own_names_it():
    layers = [Refusing(), keras.layers.BatchNormalization()]
    y = np.ones((12, 6))
    clone = {"batch_norm": "sync", "loss": "clones"}
    layer = keras.Sequential(layers)
    found = error_of(layer, keras.Model, y, False, **clone)
    assert "while clone 1 of 3 ran on its rows of the batch" in found
    assert found.endswith(MAY_MEAN)


def test_an_error_outside_of_clones_says_nothing_of_them():
    found = error_of(Pairs(), OwnStep, np.ones((12, 12)), False)
    traced = "with input shapes: [12,12], [12,4]"
    at_run = "Incompatible shapes: [12,12] vs. [12,4]"
    assert (traced if KNOW_ROWS else at_run) in found
    assert "This was raised while" not in found


class Mine(keras.Model):
    """A loss of one's own, which has to see all outputs."""

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred, sample_weight, training)


class OwnMetrics(keras.Model):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, y, y_pred, sample_weight)


def classifier(kind=keras.Model, flat=False, normalize=False):
    x = keras.Input((50,))
    y = keras.layers.BatchNormalization()(x) if normalize else x
    y = keras.layers.Dense(1 if flat else 40, "softmax")(y)
    return kind(x, keras.layers.Reshape(())(y) if flat else y)


def largest(y, y_pred):
    return keras.ops.max(y_pred)


CROSSENTROPY = "sparse_categorical_crossentropy"
PLANS = {
    "in clones": (classifier, CROSSENTROPY, ["accuracy"], {}),
    "gathered": (classifier, CROSSENTROPY, None, {"loss": "gather"}),
    "a metric": (classifier, CROSSENTROPY, ["accuracy"], {"loss": "gather"}),
    "no logits": (classifier, "mse", None, {"loss": "gather"}),
    "own loss": (lambda: classifier(Mine), CROSSENTROPY, None, {}),
    "own metrics": (
        lambda: classifier(OwnMetrics),
        CROSSENTROPY,
        ["accuracy"],
        {},
    ),
    "sum": (classifier, "sum", ["accuracy"], {}),
    "metric of all rows": (classifier, CROSSENTROPY, [largest], {}),
    "flat": (lambda: classifier(flat=True), "mse", ["mae"], {}),
    "synchronized": (
        lambda: classifier(normalize=True),
        CROSSENTROPY,
        ["accuracy"],
        {"batch_norm": "sync"},
    ),
}


@pytest.mark.full_but(
    "in clones",
    "gathered",
    "synchronized",
)
@pytest.mark.parametrize("name", PLANS)
def test_the_bytes_of_a_plan_are_those_that_move(name):
    make, loss, metrics, clone = PLANS[name]
    if loss == "sum":
        loss = keras.losses.SparseCategoricalCrossentropy(reduction="sum")
    model = clone_model(make(), devices=CPUS, **clone)
    model.compile("adam", loss, metrics=metrics)
    shape = {"mse": model.output_shape[1:]}.get(loss, ())
    data = (np.ones((600, 50), "float32"), np.zeros((600, *shape), "int64"))
    if loss == "mse":
        data = (data[0], data[1].astype("float32"))
    data = tf.data.Dataset.from_tensors(data)
    found = [deployment(model)._footprint()[0]]
    moved = traffic(
        count_transfers(lambda: model.fit(data, verbose=0, shuffle=False))
    )
    found.append(deployment(model)._footprint()[0])
    real = moved["/device:CPU:1"]
    for size in found:
        assert size.received.of(200) == pytest.approx(
            real.bytes_received, rel=0.02
        )
        assert size.sent.of(200) == pytest.approx(real.bytes_sent, rel=0.02)


def masked(layers=()):
    keras.utils.set_random_seed(7)
    embedding = keras.layers.Embedding(9, 4, mask_zero=True)
    words = keras.Input((5,), dtype="int32")
    head = keras.layers.Dense(3, "softmax")
    return keras.Sequential([words, embedding, *layers, head])


class InPython(keras.layers.Layer):
    """Runs Python code that has a gradient."""

    supports_masking = True

    def call(self, x):
        y = tf.py_function(lambda x: x * 2, [x], x.dtype)
        y.set_shape(x.shape)
        return y


@pytest.mark.full_but("python")
@pytest.mark.parametrize("how", ["eagerly", "python"])
def test_masks_count_where_a_tower_is_no_function(how, float64):
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 9, (12, 5)), rng.integers(0, 3, (12, 5))
    x[:4, 1:] = 0
    found = []
    for clone in (False, True):
        model = masked([InPython()] if how == "python" else [])
        if clone:
            clone_model(model, devices=CPUS)
        eagerly = how == "eagerly"
        model.compile("adam", CROSSENTROPY, run_eagerly=eagerly)
        model.fit(x, y, batch_size=12, epochs=3, verbose=0)
        found.append(cases.weights(model))
    assert cases.difference(*found) < 1e-10


class Codes(keras.Model):
    """Returns a table of codes beside what has rows."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(6)
        self.codes = self.add_weight(shape=(5, 3), name="codes")

    def call(self, x):
        return {"out": self.dense(x), "codes": keras.ops.tanh(self.codes)}


class Squares(keras.Metric):
    def __init__(self):
        super().__init__(name="squares")
        self.total = self.add_variable((), "zeros", name="total")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign_add(keras.ops.sum(keras.ops.square(y_pred)))

    def result(self):
        return self.total


def test_a_metric_of_an_output_without_rows(float64):
    x = cases.arrays(12)["mlp"][0]
    found = []
    for devices in (None, CPUS):
        keras.utils.set_random_seed(7)
        model = Codes()
        if devices:
            clone_model(model, devices=devices)
        model.compile(
            "sgd",
            {"out": "mse", "codes": None},
            metrics={"out": [], "codes": [Squares()]},
        )
        targets = {"out": x, "codes": x}
        history = model.fit(x, targets, batch_size=7, shuffle=False, verbose=0)
        found.append((history.history, cases.weights(model)))
    assert cases.difference(*found) < 1e-10


class Tokens(keras.layers.Layer):
    """Gives every row the same learned tokens."""

    def build(self, shape):
        self.tokens = self.add_weight(shape=(1, 2), name="tokens")

    def call(self, x):
        return keras.ops.broadcast_to(self.tokens, (keras.ops.shape(x)[0], 2))


class Folded(keras.layers.Layer):
    """Returns two rows for each of the batch."""

    def call(self, x):
        return keras.ops.reshape(x, (-1, x.shape[-1] // 2))


def test_rows_whose_number_is_known(float64):
    """Only a trace that knows of no number tells them from a table's."""
    x = cases.arrays(12)["mlp"][0]
    found = []
    for devices in (None, CPUS):
        keras.utils.set_random_seed(7)
        inputs = keras.Input((6,))
        centered = inputs - keras.ops.mean(inputs, axis=0)
        folded = keras.ops.reshape(Folded()(centered), (-1, 6))
        both = keras.ops.concatenate([Tokens()(centered), folded], axis=-1)
        model = keras.Model(inputs, keras.layers.Dense(1)(both))
        if devices:
            clone_model(model, devices=devices)
        model.compile("sgd", "mse")
        loss = model.train_on_batch(x, x[:, :1])
        found.append((loss, cases.weights(model)))
    assert cases.difference(*found) < 1e-10


class Decorated(keras.layers.Layer):
    """Its `call` is a function of TensorFlow's, with a branch and a count."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")
        self.steps = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="steps"
        )

    @tf.function
    def call(self, x, training=None):
        if training:
            self.steps.assign_add(1.0)
        if tf.reduce_sum(x) > 1e6:
            x = x / 2
        return tf.tanh(x @ tf.convert_to_tensor(self.kernel)) / self.steps


@pytest.mark.full_but("Model")
@BOTH_STEPS
def test_a_call_that_is_a_function_of_tensorflow(kind, float64, strictly):
    def make():
        return model_of(keras.Sequential([Decorated(), Decorated()]), kind)

    model = assert_same(make)
    x = cases.arrays(12)["mlp"][0]
    predicted = model.predict(x, verbose=0)
    assert cases.difference(model(x, training=False), predicted) < 1e-10


class Logging(keras.Model):
    """Adds an entry to the logs that no metric keeps, as Keras's example."""

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**logs, "largest": keras.ops.max(y_pred)}


def test_logs_that_no_metric_keeps(float64):
    assert_same(lambda: model_of(keras.layers.Dense(3, "tanh"), Logging))
