"""Clones train, evaluate and predict what plain Keras does on one device."""

import functools
import traceback

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import clone_model, unclone_model

# Twenty steps; one of five has a single row, fewer than there are clones.
SIZES = [16, 16, 11, 16, 1]
EPOCHS = 4


def train(name, num_clones=None, eagerly=False):
    x, y = cases.arrays(sum(SIZES))[name]
    model = cases.make(name)
    assert model.compute_dtype == keras.config.floatx()
    if num_clones:
        clone_model(model, num_clones)
    cases.compiled(name, model, run_eagerly=eagerly)
    if not num_clones:
        cases.build_optimizer(model)
    data = cases.batches(x, y, SIZES)
    history = model.fit(data, epochs=EPOCHS, verbose=0).history
    return {
        "weights": cases.weights(model),
        "optimizer": [np.asarray(v) for v in model.optimizer.variables],
        "history": history,
        "evaluate": model.evaluate(data, verbose=0, return_dict=True),
        "predict": model.predict(data, verbose=0),
    }


@functools.cache
def plain(name, floatx):
    return train(name, eagerly=floatx == "float32")


# Eagerly once a model: `test_equivalence.py` has float32 in a graph.
WAYS = [
    *((name, "float64", n) for name in cases.MODELS for n in (1, 3)),
    ("two_by_two", "float64", 8),
    *((name, "float32", 3) for name in ("mlp", "two_by_two")),
]


@pytest.mark.full_but("two_by_two-float64-3")
@pytest.mark.parametrize(
    ("name", "floatx", "num_clones"), WAYS, indirect=["floatx"]
)
def test_clones_train_the_same_model(name, num_clones, floatx):
    # Tracing takes most of the time, and float64 has shown the graph right.
    # Plain Keras weighs the logged losses of outputs otherwise in a graph.
    eagerly = floatx == "float32"
    expected = plain(name, floatx)
    received = train(name, num_clones, eagerly)
    assert set(expected["history"]) == set(received["history"])
    for part, value in expected.items():
        assert cases.difference(value, received[part]) < cases.TOLERANCE[floatx]


def test_the_comparison_sees_a_wrong_weight(float64):
    expected = plain("mlp", "float64")["weights"]
    received = [w.copy() for w in expected]
    received[0][0, 0] += 1e-9
    assert cases.difference(expected, received) > 1e-10


def noisy():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.RandomFlip(),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3, "softmax"),
        ]
    )


@pytest.mark.full_but("float32")
def test_one_clone_is_plain_keras_bit_for_bit(floatx):
    x, y = cases.arrays(40)["convnet"]
    trained = []
    for cloned in (False, True):
        keras.utils.set_random_seed(3)
        model = noisy()
        if cloned:
            clone_model(model, 1, update="keras")
        model.compile("adam", **cases.DEFAULT_COMPILE)
        history = model.fit(x, y, batch_size=16, epochs=5, verbose=0).history
        state = [np.asarray(v) for v in model.variables]
        trained.append([*state, *history["loss"], *history["accuracy"]])
    for one, other in zip(*trained, strict=True):
        np.testing.assert_array_equal(one, other)


def test_augmentation_differs_from_clone_to_clone_and_is_reproducible():
    outputs = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        augment = keras.Sequential(
            [
                keras.Input((4, 4, 3)),
                keras.layers.RandomBrightness(0.9, value_range=(0, 1)),
                keras.layers.Flatten(),
            ]
        )
        model = clone_model(cases.Recorder(augment), 4)
        model.compile("sgd", "mse")
        model.train_on_batch(np.full((8, 4, 4, 3), 0.5), np.zeros((8, 48)))
        outputs.append(np.asarray(model.seen))
    np.testing.assert_array_equal(*outputs)
    assert len({row[0] for row in outputs[0].tolist()}) == 8


def test_dropout_differs_from_clone_to_clone_and_is_reproducible():
    outputs = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        ones = keras.Sequential([keras.Input((50,)), keras.layers.Dropout(0.5)])
        ones = cases.Recorder(ones)
        clone_model(ones, 4)
        ones.compile("sgd", "mse")
        ones.train_on_batch(np.ones((8, 50)), np.zeros((8, 50)))
        outputs.append(np.asarray(ones.seen))
    np.testing.assert_array_equal(*outputs)
    shards = outputs[0].reshape(4, 2, 50)
    for i in range(4):
        for j in range(i):
            assert (shards[i] != shards[j]).any()
    assert 0.35 < (outputs[0] == 0).mean() < 0.65


def test_batch_norm_statistics_are_averaged_by_rows(float64):
    x = cases.arrays(5)["mlp"][0]
    layer = keras.layers.BatchNormalization(momentum=0.0)
    model = keras.Sequential([keras.Input((6,)), layer])
    clone_model(model, 2).compile("sgd", "mse")
    model.train_on_batch(x, x)
    shards = np.split(x, [3])
    mean = (3 * shards[0].mean(0) + 2 * shards[1].mean(0)) / 5
    var = (3 * shards[0].var(0) + 2 * shards[1].var(0)) / 5
    assert cases.difference(mean, layer.moving_mean) < 1e-12
    assert cases.difference(var, layer.moving_variance) < 1e-12


def test_batch_norm_statistics_of_the_first_clone(float64):
    x = cases.arrays(5)["mlp"][0]
    layer = keras.layers.BatchNormalization(momentum=0.0)
    model = keras.Sequential([keras.Input((6,)), layer])
    clone_model(model, 2, batch_norm="first").compile("sgd", "mse")
    model.train_on_batch(x, x)
    assert cases.difference(x[:3].mean(0), layer.moving_mean) < 1e-12
    assert cases.difference(x[:3].var(0), layer.moving_variance) < 1e-12


def fit_both(make, x, y, clone=clone_model, fit=None, **compiled):
    """Train a model plain and on clones; return what both came to."""
    results = []
    for cloned in (False, True):
        keras.utils.set_random_seed(5)
        model = make()
        if cloned:
            clone(model, 3)
        model.compile(**{"optimizer": "adam", **compiled})
        if not cloned:
            cases.build_optimizer(model)
        options = {"batch_size": 8, "epochs": 3, "verbose": 0, **(fit or {})}
        history = model.fit(x, y, **options).history
        results.append((cases.weights(model), history))
    return results


def assert_same(results, tolerance=1e-10):
    (expected, logs), (received, clone_logs) = results
    assert set(logs) == set(clone_logs)
    assert cases.difference(expected, received) < tolerance
    assert cases.difference(logs, clone_logs) < tolerance


@pytest.mark.full_but("scalar")
@pytest.mark.parametrize(
    "compiled",
    [
        {"loss": "sparse_categorical_crossentropy"},
        {"loss": keras.losses.SparseCategoricalCrossentropy(reduction="sum")},
        {"loss": lambda y, p: keras.ops.mean((p - 0.3) ** 2)},
        {
            "loss": "sparse_categorical_crossentropy",
            "weighted_metrics": ["accuracy"],
        },
    ],
    ids=["by row", "sum", "scalar", "weighted metric"],
)
def test_sample_weight_and_class_weight(compiled, float64):
    x, y = cases.arrays(27)["mlp"]
    weight = np.linspace(0, 2, 27)
    for fit in (
        {"sample_weight": weight},
        {"class_weight": {0: 1.0, 1: 0.2, 2: 3.0}},
    ):
        assert_same(fit_both(cases.mlp, x, y, fit=fit, **compiled))


@pytest.mark.full_but("3")
@pytest.mark.parametrize("steps", [1, 3])
def test_validation_and_steps_per_execution(steps, float64):
    x, y = cases.arrays(50)["mlp"]
    results = fit_both(
        cases.mlp,
        x,
        y,
        fit={"validation_split": 0.3},
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        steps_per_execution=steps,
    )
    assert "val_accuracy" in results[1][1]
    assert_same(results)


@pytest.mark.full_but("True")
@pytest.mark.parametrize("jit_compile", [True, False])
def test_xla_compiles_the_clones_and_not_the_step(jit_compile, float64):
    x, y = cases.arrays(24)["mlp"]
    results = fit_both(
        cases.mlp,
        x,
        y,
        loss="sparse_categorical_crossentropy",
        jit_compile=jit_compile,
    )
    assert_same(results)


@pytest.mark.full_but("auto")
@pytest.mark.parametrize("loss", ["auto", "gather"])
def test_run_eagerly(loss, float64):
    x, y = cases.arrays(19)["mlp"]
    seen = []

    class Watched(cases.Subclassed):
        def call(self, x, training=False):
            if hasattr(x, "numpy"):
                seen.append(x.shape[0])
            return super().call(x)

    clone = functools.partial(clone_model, loss=loss)
    results = fit_both(
        Watched,
        x,
        y,
        clone=clone,
        loss="sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    assert_same(results)
    assert 3 in seen and 2 in seen  # shards of 8 rows over 3 clones


def embedding():
    return keras.Sequential(
        [
            keras.layers.Embedding(20, 4, mask_zero=True),
            keras.layers.LSTM(5, return_sequences=True),
            keras.layers.Dense(2),
        ]
    )


@pytest.mark.full
def test_masked_losses_are_gathered(float64):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, size=(22, 1))
    x = np.where(np.arange(6) < lengths, rng.integers(1, 20, size=(22, 6)), 0)
    y = rng.normal(size=(22, 6, 2))
    assert_same(fit_both(embedding, x, y, loss="mse", metrics=["mae"]))


@pytest.mark.full
def test_gather_and_clones_can_be_forced(float64):
    x, y = cases.arrays(30)["mlp"]
    for loss in ("gather", "clones"):
        clone = functools.partial(clone_model, loss=loss)
        assert_same(
            fit_both(
                cases.mlp,
                x,
                y,
                clone=clone,
                loss="sparse_categorical_crossentropy",
            )
        )


def test_forcing_clones_where_it_is_not_exact_warns():
    x, y = cases.arrays(8)["mlp"]
    model = clone_model(cases.mlp(), 2, loss="clones")
    model.compile("sgd", lambda y, p: keras.ops.mean(p))
    with pytest.warns(UserWarning, match="may look at the whole batch"):
        model.train_on_batch(x, y)


@pytest.mark.full_but("gather-compiled2")
@pytest.mark.parametrize(
    "compiled",
    [{"metrics": []}, {"metrics": {}}, {"weighted_metrics": [], "metrics": []}],
)
@pytest.mark.parametrize("loss", ["auto", "gather"])
def test_metrics_that_are_none(compiled, loss, float64):
    x, y = cases.arrays(10)["mlp"]
    compiled = {"loss": "sparse_categorical_crossentropy", **compiled}
    clone = functools.partial(clone_model, loss=loss)
    assert_same(fit_both(cases.mlp, x, y, clone=clone, **compiled))


class NoHash:
    """A loss that is an object: what defines `__eq__` has no hash."""

    def __eq__(self, other):
        return isinstance(other, NoHash)

    def __call__(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


def test_a_loss_without_a_hash(float64):
    x, y = cases.arrays(10)["mlp"]
    assert_same(fit_both(cases.mlp, x, np.eye(3)[y], loss=NoHash()))


class WithLosses(keras.Model):
    """A model with every kind of loss that a layer can add."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(8, activity_regularizer="l2")
        self.head = keras.layers.Dense(3, "softmax", bias_regularizer="l2")

    def call(self, x):
        hidden = self.hidden(x)
        self.add_loss(keras.ops.mean(keras.ops.square(hidden)))
        self.add_loss(keras.ops.sum(hidden, axis=-1))
        return self.head(hidden)


@pytest.mark.full_but("clones")
@pytest.mark.parametrize("loss", ["clones", "gather"])
def test_losses_of_layers(loss, float64):
    x, y = cases.arrays(30)["mlp"]
    clone = functools.partial(clone_model, loss=loss)
    results = fit_both(
        WithLosses, x, y, clone=clone, loss="sparse_categorical_crossentropy"
    )
    assert_same(results)


@pytest.mark.full
def test_a_model_that_trained_goes_on_on_clones(float64):
    x, y = cases.arrays(30)["mlp"]
    trained = []
    for changes in ((None, None, None), (None, 3, 2), (4, 0, 1)):
        model = cases.compiled("mlp")
        if not changes[0]:
            cases.build_optimizer(model)
        for num_clones in changes:
            if num_clones:
                clone_model(model, num_clones)
            elif num_clones == 0:
                unclone_model(model)
            model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
        assert int(model.optimizer.iterations) == 12
        trained.append(cases.weights(model))
    assert cases.difference(trained[0], trained[1]) < 1e-12
    assert cases.difference(trained[0], trained[2]) < 1e-12


def test_on_batch_methods(float64):
    x, y = cases.arrays(7)["mlp"]
    plain_model = cases.compiled("mlp")
    cases.build_optimizer(plain_model)
    cloned = clone_model(cases.compiled("mlp"), 3)
    for method, args in (
        ("train_on_batch", (x, y)),
        ("test_on_batch", (x, y)),
        ("predict_on_batch", (x,)),
    ):
        expected = getattr(plain_model, method)(*args)
        received = getattr(cloned, method)(*args)
        assert cases.difference(expected, received) < 1e-12


@pytest.mark.full_but("pydataset")
@pytest.mark.parametrize("kind", ["generator", "pydataset", "tf.data"])
def test_kinds_of_data(kind, float64):
    x, y = cases.arrays(22)["mlp"]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            rows = slice(8 * index, 8 * index + 8)
            return x[rows], y[rows]

    def generate():
        while True:
            for index in range(3):
                yield Batches()[index]

    data = {
        "generator": generate,
        "pydataset": Batches,
        "tf.data": lambda: tf.data.Dataset.from_tensor_slices((x, y)).batch(8),
    }[kind]
    trained = []
    for num_clones in (None, 3):
        model = cases.compiled("mlp")
        if num_clones:
            clone_model(model, num_clones)
        else:
            cases.build_optimizer(model)
        model.fit(data(), steps_per_epoch=3, epochs=1, verbose=0)
        trained.append(cases.weights(model))
    assert cases.difference(*trained) < 1e-12


def test_ragged_inputs(float64):
    x = tf.ragged.constant(
        [[1, 2], [3], [4, 5, 6], [7], [8, 1]], dtype=tf.int64
    )
    y = np.arange(5.0)[:, None]

    class Pooled(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = keras.layers.Embedding(10, 4)
            self.head = keras.layers.Dense(1)

        def call(self, x):
            return self.head(tf.reduce_mean(self.table(x), axis=1))

    results = []
    for num_clones in (None, 2):
        keras.utils.set_random_seed(2)
        model = Pooled()
        if num_clones:
            clone_model(model, num_clones)
        model.compile("adam", "mse")
        data = tf.data.Dataset.from_tensors((x, y)).repeat(3)
        model.fit(data, verbose=0)
        results.append([*cases.weights(model), model.predict(data, verbose=0)])
    assert cases.difference(*results) < 1e-12


@pytest.mark.full
def test_sparse_inputs(float64):
    dense = cases.arrays(7)["mlp"][0] * (np.arange(6) < 3)
    sparse = tf.sparse.from_dense(dense)
    results = []
    for num_clones in (None, 3):
        keras.utils.set_random_seed(2)
        model = keras.Sequential(
            [keras.Input((6,), sparse=True), keras.layers.Dense(2)]
        )
        if num_clones:
            clone_model(model, num_clones)
        model.compile("adam", "mse")
        data = tf.data.Dataset.from_tensors((sparse, dense[:, :2])).repeat(3)
        model.fit(data, verbose=0)
        results.append(cases.weights(model))
    assert cases.difference(*results) < 1e-12


@pytest.mark.full
def test_mixed_precision_and_loss_scaling():
    x, y = cases.arrays(24)["mlp"]
    keras.config.set_dtype_policy("mixed_float16")
    try:
        results = fit_both(
            cases.mlp, x, y, loss="sparse_categorical_crossentropy"
        )
    finally:
        keras.config.set_dtype_policy("float32")
    # A shard of another size rounds its float16 matmuls in another order.
    assert_same(results, tolerance=5e-3)


def test_step_is_traced_once_a_signature():
    x, y = cases.arrays(50)["mlp"]
    traces = []

    class Counted(cases.Subclassed):
        def call(self, x, training=False):
            traces.append(x.shape)
            return super().call(x)

    model = clone_model(Counted(), 4)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(cases.batches(x, y, [16, 3, 16, 7]), epochs=3, verbose=0)
    traced = len(traces)
    model.fit(cases.batches(x, y, [9, 2, 30, 1]), epochs=3, verbose=0)
    assert len(traces) == traced


def test_a_tower_that_asserts_is_traced_no_more_often():
    """As losses by time step of logits do, where rows are not known."""

    class Counted(keras.layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return x

    x, y = cases.arrays(26)["mlp"][0], np.zeros((26, 2), int)
    traces, found = [], []
    for from_logits in (False, True):
        inner = [keras.layers.Reshape((2, 3)), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((6,)), Counted(), *inner])
        clone_model(model, 3, check_rows=False)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits)
        model.compile("adam", loss)
        traces.clear()
        model.fit(cases.batches(x, y, [16, 7, 3]), verbose=0)
        found.append(len(traces))
    assert found[1] == found[0] <= 2


@pytest.mark.full_but("4")
@pytest.mark.parametrize("num_clones", [1, 4])
def test_first_step_is_traced_once(num_clones):
    model = cases.compiled("mlp")
    clone_model(model, num_clones)
    traces = []
    step = model.train_step
    model.train_step = lambda data: [traces.append(data), step(data)][1]
    x, y = cases.arrays(40)["mlp"]
    model.fit(x, y, batch_size=20, verbose=0)
    # TensorFlow would trace a step again that makes the optimizer's variables.
    assert len(traces) == 1


@pytest.mark.full_but("4")
@pytest.mark.parametrize("num_clones", [1, 4])
def test_first_own_step_is_traced_once(num_clones):
    """Also where it makes the variables of several optimizers and metrics."""

    class Own(keras.Sequential):
        def train_step(self, data):
            traces.append(data)
            logs = super().train_step(data)
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(self(data[0]) ** 2)
            variables = self.trainable_variables
            self.second.apply(tape.gradient(loss, variables), variables)
            return logs

    traces = []
    model = Own([keras.layers.Dense(4), keras.layers.Dense(2)])
    model.second = keras.optimizers.Adam()
    model.compile("adam", "mse", metrics=["mae"])
    clone_model(model, num_clones)
    model.fit(np.ones((40, 3)), np.ones((40, 2)), batch_size=20, verbose=0)
    assert len(traces) == 1
    assert "build" not in vars(model.second)
    assert model.second.variables[2].shape == (3, 4)


def test_clones_with_a_state_do_not_wait_for_each_other():
    draw = keras.layers.Lambda(lambda x: x + tf.random.normal(tf.shape(x)))
    inner = keras.Sequential(
        [keras.Input((6,)), draw, keras.layers.Dense(3, "softmax")]
    )
    model = clone_model(cases.compiled("mlp", inner), 3)
    data = (tf.ones((9, 6)), tf.zeros((9,), tf.int32))
    step = tf.function(lambda: model.train_step(data), autograph=False)
    calls = {
        op
        for op in step.get_concrete_function().graph.get_operations()
        if op.type == "StatefulPartitionedCall" and op.name.startswith("clone_")
    }
    assert len(calls) == 3
    for call in calls:
        before, found = [call], set()
        while before:
            op = before.pop()
            earlier = [*op.control_inputs, *(t.op for t in op.inputs)]
            before += [o for o in earlier if o not in found]
            found.update(earlier)
        assert not found & calls


@pytest.mark.parametrize("name", ["train_step", "predict_step"])
def test_autograph_converts_no_step_of_keras(name):
    """It would take seconds, in a `tf.function` of the user's."""
    found = set()

    class Noting(keras.layers.Layer):
        def call(self, x):
            found.update(frame.name for frame in traceback.extract_stack())
            return x

    model = keras.Sequential([keras.Input((6,)), Noting()])
    model = clone_model(cases.compiled("mlp", model), 2)
    x, y = (tf.constant(value) for value in cases.arrays(8)["mlp"])
    data = (x, y) if name == "train_step" else (x,)
    tf.function(getattr(model, name)).get_concrete_function(data)
    assert {one for one in found if one.startswith("tf__")} == {f"tf__{name}"}
