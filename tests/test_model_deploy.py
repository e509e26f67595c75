"""Clones of a function train what one device trains on the whole batch."""

import collections
import contextlib
import dataclasses
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import difference, weights

import keras_clones
from keras_clones import (
    DeploymentConfig,
    PerClone,
    clone_model,
    create_clones,
    deploy,
    model_deploy,
    optimize_clones,
    split_batch,
)
from keras_clones.benchmark.transfers import count_transfers, traffic
from keras_clones.devices import placement
from keras_clones.model_deploy import clone_losses

CPUS = [f"CPU:{i}" for i in range(8)]


def config_of(num_clones):
    return DeploymentConfig(num_clones, devices=CPUS[1 : num_clones + 1])


def mlp(**kwargs):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh", **kwargs),
            keras.layers.Dense(1),
        ]
    )


def words():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(12, 3),
            keras.layers.GRU(5),
            keras.layers.Dense(1),
        ]
    )


def data(rows, integers=False, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6))
    if integers:
        x = rng.integers(0, 12, size=(rows, 4))
    return x, rng.normal(size=(rows, 1))


def squares(model):
    def model_fn(batch):
        x, y = batch
        return keras.ops.mean((model(x, training=True) - y) ** 2)

    return model_fn


def train_plainly(model, optimizer, batches):
    """The reference: one device, the whole batch, Keras and a tape."""
    totals = []
    for batch in batches:
        batch = tf.nest.map_structure(tf.constant, batch)
        with tf.GradientTape() as tape:
            total = squares(model)(batch) + sum(model.losses)
            loss = optimizer.scale_loss(total)
        grads = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(
            zip(grads, model.trainable_variables, strict=True)
        )
        totals.append(float(total))
    return totals


def train_clones(model, optimizer, batches, num_clones, **kwargs):
    config = config_of(num_clones)
    losses = kwargs.pop("losses", lambda: [])

    @tf.function(reduce_retracing=True)
    def step(batch):
        shards = split_batch(batch, num_clones)
        clones = create_clones(config, squares(model), [shards])
        total, pairs = optimize_clones(clones, optimizer, losses(), **kwargs)
        optimizer.apply_gradients(pairs)
        return total

    return [float(step(batch)) for batch in batches]


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.05, global_clipnorm=0.3),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), dynamic_growth_steps=2
    ),
}


class Recomputing(keras.layers.Dense):
    """Computes its outputs once more, to run backward."""

    def call(self, x):
        return tf.recompute_grad(super().call)(x)


def test_layers_that_compute_again_train(float64):
    def model():
        keras.utils.set_random_seed(3)
        head = keras.layers.Dense(1)
        return keras.Sequential([keras.Input((6,)), Recomputing(4), head])

    plain, cloned = model(), model()
    train_plainly(plain, keras.optimizers.SGD(0.1), [data(7)])
    train_clones(cloned, keras.optimizers.SGD(0.1), [data(7)], 3)
    assert difference(weights(plain), weights(cloned)) < 1e-10


@pytest.mark.full_but("adam-True")
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_equals_one_device(float64, optimizer, built):
    batches = [data(7), data(7, seed=1), data(4, seed=2)]
    plain, cloned = [mlp(kernel_regularizer="l2") for _ in range(2)]
    one, other = [OPTIMIZERS[optimizer]() for _ in range(2)]
    if built:
        other.build(cloned.trainable_variables)
    expected = train_plainly(plain, one, batches)
    totals = train_clones(
        cloned, other, batches, 3, losses=lambda: cloned.losses
    )
    assert difference(expected, totals) < 1e-10
    assert difference(weights(plain), weights(cloned)) < 1e-10
    assert difference(one.variables, other.variables) < 1e-10
    # The optimizer and what it keeps lives where the variables do.
    assert {v.value.device[-6:] for v in other.variables} == {":CPU:0"}


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_rows_of_embeddings_equal_one_device(float64, optimizer):
    batches = [data(7, True), data(5, True, seed=1)]
    plain, cloned = words(), words()
    one, other = [OPTIMIZERS[optimizer]() for _ in range(2)]
    expected = train_plainly(plain, one, batches)
    totals = train_clones(cloned, other, batches, 2)
    assert difference(expected, totals) < 1e-10
    assert difference(weights(plain), weights(cloned)) < 1e-10


def test_gradients_of_embeddings_stay_rows():
    model, config = words(), config_of(2)
    optimizer = keras.optimizers.SGD()

    @tf.function
    def gradients(batch):
        clones = create_clones(config, squares(model), [split_batch(batch, 2)])
        _, pairs = optimize_clones(clones, optimizer)
        return {variable.path: gradient for gradient, variable in pairs}

    x, y = data(5, True)
    found = gradients((x, y.astype("float32")))
    table = found[model.layers[0].embeddings.path]
    assert isinstance(table, tf.IndexedSlices)
    np.testing.assert_array_equal(table.indices, x.reshape(-1))


class Positions(keras.layers.Layer):
    """Embeds words and where they stand: the same ids in every clone."""

    def __init__(self):
        super().__init__()
        self.words = keras.layers.Embedding(12, 3)
        self.positions = keras.layers.Embedding(4, 3)

    def build(self, shape):
        self.words.build(shape)
        self.positions.build(shape)

    def call(self, ids):
        where = keras.ops.arange(ids.shape[1])
        # The first position twice: rows of one table from two look-ups.
        first = self.positions(keras.ops.zeros_like(where))
        return self.words(ids) + self.positions(where) * first


def sentences():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            Positions(),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("num_clones", "deployed"), [(1, True), (3, False)])
def test_rows_by_position_add_up(float64, optimizer, num_clones, deployed):
    """On one device they are looked up once, whatever the batch."""
    batches = [data(7, True), data(5, True, seed=1)]
    plain, cloned = sentences(), sentences()
    one, other = [OPTIMIZERS[optimizer]() for _ in range(2)]
    expected = train_plainly(plain, one, batches)
    if deployed:
        made = deploy(config_of(num_clones), squares(cloned), optimizer=other)
        shards = [split_batch(batch, num_clones) for batch in batches]
        totals = [float(made.train_fn(shard)) for shard in shards]
    else:
        totals = train_clones(cloned, other, batches, num_clones)
    assert difference(expected, totals) < 1e-10
    assert difference(weights(plain), weights(cloned)) < 1e-10


def test_ids_that_clones_are_given_are_not_the_same(float64):
    """Constants of the graph, but others in each clone."""
    layer, other = keras.layers.Embedding(6, 2), keras.layers.Embedding(6, 2)
    for one in (layer, other):
        one.build((None,))
    other.set_weights(layer.get_weights())
    optimizers = [keras.optimizers.Adam(0.05) for _ in range(2)]
    ids = [[0, 1], [1, 5]]

    @tf.function
    def step():
        clones = create_clones(
            config_of(2),
            lambda i: tf.reduce_sum(layer(tf.constant(ids[i])) ** 2),
            [PerClone([0, 1])],
        )
        _, pairs = optimize_clones(clones, optimizers[0])
        optimizers[0].apply_gradients(pairs)

    step()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(other(tf.constant([*ids[0], *ids[1]])) ** 2) / 2
    gradients = tape.gradient(loss, other.trainable_variables)
    optimizers[1].apply_gradients(
        zip(gradients, other.trainable_variables, strict=True)
    )
    assert difference(layer.get_weights(), other.get_weights()) < 1e-10


def test_clones_that_do_different_things(float64):
    """One reads no bias, and looks up other rows, or as many times."""
    layer, table = keras.layers.Dense(2), keras.layers.Embedding(5, 3)
    layer.build((None, 3))
    table.build((None,))
    optimizer = keras.optimizers.SGD(1.0)

    def model_fn(is_first):
        rows = table(tf.constant([1, 2] if is_first else [4]))
        if is_first:
            return tf.reduce_sum(layer(rows))
        return tf.reduce_sum((rows + table(tf.constant([0]))) @ layer.kernel)

    @tf.function
    def gradients():
        clones = create_clones(config_of(2), model_fn, [PerClone([1, 0])])
        _, pairs = optimize_clones(clones, optimizer)
        return {v.path: tf.convert_to_tensor(g) for g, v in pairs}

    with tf.GradientTape() as tape:
        loss = (model_fn(1) + model_fn(0)) / 2
    variables = [*layer.variables, *table.variables]
    found = gradients()
    for variable, expected in zip(
        variables, tape.gradient(loss, variables), strict=True
    ):
        expected = tf.convert_to_tensor(expected)
        assert difference(expected, found[variable.path]) < 1e-10


def test_variables_without_a_gradient_have_none():
    """However small they are, and whatever they travel with."""
    used, unused = keras.layers.Dense(2), keras.layers.Dense(2)
    optimizer = keras.optimizers.SGD()
    for layer in (used, unused):
        layer.build((None, 6))

    def model_fn(x):
        return tf.reduce_sum(used(x)) + tf.stop_gradient(
            tf.reduce_sum(unused(x))
        )

    @tf.function
    def paths(x, losses=()):
        clones = create_clones(config_of(2), model_fn, [split_batch(x, 2)])
        extra = [clone.outputs for clone in clones] if losses else []
        _, pairs = optimize_clones(clones, optimizer, extra)
        return [variable.path for _, variable in pairs]

    expected = [variable.path for variable in used.variables]
    for losses in ((), True):
        found = paths(np.ones((4, 6), "float32"), losses)
        assert [path.numpy().decode() for path in found] == expected


def test_clones_are_known_in_any_list(float64):
    """Their shards count by rows in whatever list they are."""
    model, config = words(), config_of(2)
    optimizer = keras.optimizers.SGD()

    @tf.function
    def gradients(batch, copied):
        clones = create_clones(config, squares(model), [split_batch(batch, 2)])
        clones = clones[::-1] if copied else clones
        total, pairs = optimize_clones(clones, optimizer)
        return total, [tf.convert_to_tensor(g) for g, _ in pairs]

    batch = data(5, True)
    expected, found = (gradients(batch, copied) for copied in (False, True))
    assert difference(expected[0], found[0]) < 1e-10
    assert difference(expected[1], found[1]) < 1e-10


LOSS_FN = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def classify(model):
    def model_fn(batch):
        x, y = batch
        return LOSS_FN(y, model(x, training=True))

    return model_fn


def wide():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(300, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(300, "relu"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(3),
        ]
    )


def lookup():
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(200_000, 64),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3),
        ]
    )


def iterator(rows=16, dtype="float32"):
    batch = np.ones((rows, 6), dtype), np.zeros(rows, "int32")
    return iter(tf.data.Dataset.from_tensors(batch).repeat())


def count_own_step(model, num_clones, batches):
    config, optimizer = config_of(num_clones), keras.optimizers.Adam()

    @tf.function(autograph=False)
    def step():
        shards = split_batch(next(batches), num_clones)
        clones = create_clones(config, classify(model), [shards])
        total, pairs = optimize_clones(clones, optimizer)
        with tf.device(config.optimizer_device()):
            optimizer.apply_gradients(pairs)
        return total

    return traffic(count_transfers(step))


def count_keras_step(model, num_clones, batches):
    devices = CPUS[1 : num_clones + 1]
    clone_model(model, num_clones, devices=devices, batch_norm="first")
    model.compile("adam", LOSS_FN, jit_compile=False)
    step = tf.function(lambda: model.train_step(next(batches)), autograph=False)
    return traffic(count_transfers(step))


# Keras's step says each clone's share, scale and index: three float64.
NUMBERS = 24


@pytest.mark.full_but("mlp-float32-2", "lookup-int32-2")
@pytest.mark.filterwarnings("ignore:Layers.*normalize")
@pytest.mark.parametrize("num_clones", [1, 2, 3])
@pytest.mark.parametrize(
    ("make", "dtype"), [(mlp, "float32"), (wide, "float32"), (lookup, "int32")]
)
def test_as_much_travels_as_in_a_step_of_keras(make, dtype, num_clones):
    expected = count_keras_step(make(), num_clones, iterator(dtype=dtype))
    found = count_own_step(make(), num_clones, iterator(dtype=dtype))
    for i in range(num_clones):
        device = f"/device:CPU:{i + 1}"
        one, other = expected[device], found[device]
        if make is lookup:
            # There, ids of rows travel that a table at home does not need,
            # and transfers that only say what comes after what.
            ids = one.bytes_sent - other.bytes_sent
            assert 0 <= ids <= 16 * 6 * 4 + 8
            assert other.sent <= one.sent
            assert other.received <= one.received - 1
        else:
            assert other.bytes_sent == one.bytes_sent
            assert other.sent == one.sent
            assert other.received == one.received - 1
        assert other.bytes_received == one.bytes_received - NUMBERS


def test_a_large_table_stays_home():
    moved = count_own_step(lookup(), 2, iterator(dtype="int32"))
    needed = 8 * 6 * 64 * 4
    for i in (1, 2):
        clone = moved[f"/device:CPU:{i}"]
        assert needed <= clone.bytes_received <= needed + 2_000
        assert needed <= clone.bytes_sent <= needed + 2_000


@pytest.mark.full
def test_deploy_sends_what_it_saw_read():
    def count(num_clones):
        deployed = deploy(
            config_of(num_clones),
            classify(lookup()),
            optimizer=keras.optimizers.Adam(),
        )
        shards = split_batch(next(iterator(dtype="int32")), num_clones)
        return traffic(count_transfers(lambda: deployed.train_fn(shards)))

    moved = count(2)
    own = count_own_step(lookup(), 2, iterator(dtype="int32"))
    for i in (1, 2):
        device = f"/device:CPU:{i}"
        # The loss of a clone comes home, and is given back.
        assert moved[device].bytes_received == own[device].bytes_received + 4
        assert moved[device].received == own[device].received + 1


def test_a_variable_that_was_not_foreseen(float64):
    """It gets a mirror of its own, and a gradient."""
    first, rest = keras.layers.Dense(1), keras.layers.Dense(1)
    for layer in (first, rest):
        layer.build((None, 6))
    optimizer, calls = keras.optimizers.SGD(), []

    def model_fn(x):
        calls.append(x)
        layer = first if len(calls) < 2 else rest
        return tf.reduce_sum(layer(x))

    @tf.function
    def gradients(x):
        clones = create_clones(config_of(2), model_fn, [split_batch(x, 2)])
        _, pairs = optimize_clones(
            clones, optimizer, var_list=[first.kernel, rest.kernel]
        )
        return [(variable.path, gradient) for gradient, variable in pairs]

    x, _ = data(4)
    [(path, gradient)] = gradients(x)
    assert path.numpy().decode() == rest.kernel.path
    assert difference(x.sum(axis=0)[:, None] / 2, gradient) < 1e-10


@pytest.mark.full
def test_losses_count_alike_without_shards_and_by_weights(float64):
    model, config = mlp(), config_of(2)
    (x, y), (x2, y2) = data(3), data(5, seed=1)
    optimizer = keras.optimizers.SGD()
    batches = PerClone([(tf.constant(x), y), (tf.constant(x2), y2)])

    @tf.function
    def total(weights=None):
        clones = create_clones(config, squares(model), [batches])
        total, _ = optimize_clones(clones, optimizer, weights=weights)
        return total

    one, other = (float(squares(model)(b)) for b in batches.values)
    assert float(total()) == pytest.approx((one + other) / 2, rel=1e-12)
    joined = (3 * one + 5 * other) / 8
    assert float(total([3, 5])) == pytest.approx(joined, rel=1e-12)
    assert float(total([0.0, 2.0])) == pytest.approx(other, rel=1e-12)
    tensors = [tf.constant(6), tf.constant(10)]
    assert float(total(tensors)) == pytest.approx(joined, rel=1e-12)


def test_regularization_counts_once_either_way(float64):
    """In the losses of the clones, or beside them."""
    batches = [data(7)]
    plain = mlp(kernel_regularizer="l2")
    train_plainly(plain, keras.optimizers.SGD(0.1), batches)
    beside, within = [mlp(kernel_regularizer="l2") for _ in range(2)]
    train_clones(
        beside,
        keras.optimizers.SGD(0.1),
        batches,
        2,
        losses=lambda: beside.losses,
    )

    def model_fn(batch):
        return squares(within)(batch) + sum(within.losses)

    deployed = deploy(
        config_of(2),
        model_fn,
        optimizer=keras.optimizers.SGD(0.1),
        regularization_losses=[],
    )
    deployed.train_fn(split_batch(batches[0], 2))
    assert difference(weights(plain), weights(beside)) < 1e-10
    assert difference(weights(plain), weights(within)) < 1e-10


def test_regularizers_are_not_dropped_in_silence():
    model = mlp(kernel_regularizer="l2")
    with pytest.warns(UserWarning, match=r"dense/kernel.*have regularizers"):
        train_clones(
            model,
            keras.optimizers.SGD(0.1),
            [tf.nest.map_structure(np.float32, data(4))],
            2,
            losses=lambda: None,
        )


def test_scopes_and_devices_in_the_graph():
    model, config = mlp(), config_of(2)
    optimizer = keras.optimizers.SGD()

    @tf.function
    def step(batch):
        clones = create_clones(config, squares(model), [split_batch(batch, 2)])
        assert [c.scope for c in clones] == ["clone_0/", "clone_1/"]
        assert [c.device for c in clones] == ["/device:CPU:1", "/device:CPU:2"]
        total, pairs = optimize_clones(clones, optimizer)
        assert all(gradient.device[-6:] == ":CPU:0" for gradient, _ in pairs)
        return total, [gradient for gradient, _ in pairs]

    batch = tf.nest.map_structure(np.float32, data(4))
    graph = step.get_concrete_function(batch).graph
    found = collections.defaultdict(set)
    types = collections.defaultdict(collections.Counter)
    for op in graph.get_operations():
        scope = op.name.partition("/")[0]
        found[scope].add(op.device[-6:])
        types[scope][op.type] += 1
    assert found["clone_0"] == {":CPU:1"}
    assert found["clone_1"] == {":CPU:2"}
    assert found["home"] == {":CPU:0"}
    # Two layers: once forward, twice backward.
    assert types["clone_0"]["MatMul"] == types["clone_1"]["MatMul"] == 6
    # Every variable is read once, for both clones.
    assert types["home"]["ReadVariableOp"] == 4
    assert not types["clone_0"]["ReadVariableOp"]


def test_scopes_in_a_profile(tmp_path):
    deployed = deploy(
        config_of(2), squares(mlp()), optimizer=keras.optimizers.SGD(0.1)
    )
    shards = split_batch(tf.nest.map_structure(np.float32, data(4)), 2)
    deployed.train_fn(shards)
    with tf.profiler.experimental.Profile(str(tmp_path)):
        float(deployed.train_fn(shards))
    [profile] = tmp_path.rglob("*.xplane.pb")
    recorded = profile.read_bytes()
    for scope in (b"clone_0/", b"clone_1/"):
        assert scope in recorded


def test_one_clone_has_no_scope():
    clones = create_clones(config_of(1), lambda: tf.constant(1.0))
    assert clones == [model_deploy.Clone(1.0, "", "/device:CPU:1")]


def test_statistics_are_the_first_clones(float64):
    layer = keras.layers.BatchNormalization(momentum=0.9)
    model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(1)])
    x, y = data(7)
    train_clones(model, keras.optimizers.SGD(0.1), [(x, y)], 2)
    mean, variance = x[:4].mean(axis=0), x[:4].var(axis=0)
    assert difference(0.1 * mean, layer.moving_mean.numpy()) < 1e-10
    expected = 0.9 + 0.1 * variance
    assert difference(expected, layer.moving_variance.numpy()) < 1e-10


def test_a_graph_function_may_assign_as_any_other(float64):
    """Only what it calls may not."""
    layer = keras.layers.BatchNormalization(momentum=0.9)
    layer.build((None, 6))
    x, _ = data(6)
    model_fn = tf.function(lambda x: layer(x, training=True))
    create_clones(config_of(2), model_fn, [split_batch(x, 2)])
    expected = 0.1 * x[:3].mean(axis=0)
    assert difference(expected, layer.moving_mean.numpy()) < 1e-10


def test_metrics_count_the_rows_of_all_clones(float64):
    model, metric = mlp(), keras.metrics.MeanSquaredError()
    x, y = data(7)

    def model_fn(batch):
        x, y = batch
        metric.update_state(y, model(x))

    @tf.function
    def evaluate(batch):
        create_clones(config_of(3), model_fn, [split_batch(batch, 3)])

    for _ in range(2):
        evaluate((x, y))
    expected = float(np.mean((model(x).numpy() - y) ** 2))
    assert float(metric.result()) == pytest.approx(expected, rel=1e-10)
    assert float(metric.count) == 14


def test_clones_draw_other_random_numbers_and_the_first_the_plain_ones():
    layers = [keras.layers.Dropout(0.5, seed=5) for _ in range(2)]
    x = tf.ones((8, 16))

    @tf.function
    def draw(x):
        clones = create_clones(
            config_of(3), lambda x: layers[0](x, training=True), [x]
        )
        return [clone.outputs for clone in clones]

    for _ in range(2):
        first, *others = draw(x)
        plain = layers[1](x, training=True)
        np.testing.assert_array_equal(first, plain)
        assert not any(np.array_equal(first, other) for other in others)
        assert not np.array_equal(*others)


def test_an_iterator_gives_each_clone_a_batch():
    iterator = iter(tf.data.Dataset.range(6).map(float))

    @tf.function
    def draw():
        clones = create_clones(config_of(3), next, [iterator])
        return [clone.outputs for clone in clones]

    assert sorted(map(float, draw())) == [0, 1, 2]
    assert sorted(map(float, draw())) == [3, 4, 5]


def test_outside_of_a_graph_clones_run_at_once(float64):
    model = mlp()
    x, y = data(5)
    clones = create_clones(
        config_of(2), squares(model), [], {"batch": split_batch((x, y), 2)}
    )
    for clone, rows in zip(clones, (slice(0, 3), slice(3, 5)), strict=True):
        expected = float(squares(model)((x[rows], y[rows])))
        assert float(clone.outputs) == pytest.approx(expected, rel=1e-12)
    assert clones[1].outputs.device[-6:] == ":CPU:2"
    with pytest.raises(RuntimeError, match=r"inside a function.*or use"):
        optimize_clones(clones, keras.optimizers.SGD())


class Assigns(keras.layers.Layer):
    """Reads a weight after assigning it, as `SpectralNormalization` does."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 1), initializer="ones")

    def call(self, x):
        self.w.assign(self.w * self.w + 0.5)
        return x @ self.w.value


def test_gradients_of_variables_that_are_assigned(float64):
    plain, cloned = [
        keras.Sequential([keras.Input((6,)), Assigns()]) for _ in range(2)
    ]
    batches = [data(4), data(4, seed=1)]
    train_plainly(plain, keras.optimizers.SGD(0.1), batches)
    train_clones(cloned, keras.optimizers.SGD(0.1), batches, 2)
    assert difference(weights(plain), weights(cloned)) < 1e-10


def test_functions_inside_of_functions(float64):
    """A `tf.function` is traced once, whichever clone or step calls it."""
    plain, cloned = mlp(), mlp()
    one, other = [keras.optimizers.SGD(0.1) for _ in range(2)]
    expected = train_plainly(plain, one, [data(6), data(6, seed=1)])

    @tf.function
    def model_fn(batch):
        return inner(*batch)

    @tf.function
    def inner(x, y):
        branch = tf.cond(
            tf.reduce_sum(x) > 1e9, lambda: tf.zeros_like(y), lambda: cloned(x)
        )
        return tf.reduce_mean((branch - y) ** 2)

    def step(batch):
        clones = create_clones(config_of(2), model_fn, [split_batch(batch, 2)])
        total, pairs = optimize_clones(clones, other)
        other.apply_gradients(pairs)
        return total

    # Two steps: the second finds what the first traced.
    totals = [
        tf.function(step)(data(6)),
        tf.function(step)(data(6, seed=1)),
    ]
    assert difference(expected, totals) < 1e-10
    assert difference(weights(plain), weights(cloned)) < 1e-10


def test_reading_first_in_a_branch_or_a_loop(float64):
    """What a branch or a loop reads first is there for the rest."""
    layer = keras.layers.Dense(6, use_bias=False)
    layer.build((None, 6))
    start = layer.get_weights()[0]
    optimizer = keras.optimizers.SGD(1.0)

    def model_fn(x):
        _, doubled = tf.while_loop(
            lambda i, _: i < 2,
            lambda i, x: (i + 1, layer(x)),
            (0, tf.cond(tf.shape(x)[0] > 0, lambda: layer(x), lambda: x)),
        )
        return tf.reduce_mean(layer(doubled))

    @tf.function
    def step(x):
        clones = create_clones(config_of(2), model_fn, [split_batch(x, 2)])
        total, pairs = optimize_clones(clones, optimizer)
        return total, [gradient for gradient, _ in pairs]

    x, _ = data(4)
    total, [gradient] = step(x)
    kernel = tf.Variable(start)
    with tf.GradientTape() as tape:
        result = x @ kernel @ kernel @ kernel @ kernel
        expected = tf.reduce_mean(result)
    assert difference(expected, total) < 1e-10
    assert difference(tape.gradient(expected, kernel), gradient) < 1e-10
    graph = step.get_concrete_function(tf.constant(x)).graph
    reads = [op for op in graph.get_operations() if op.type == "ReadVariableOp"]
    assert len(reads) == 1


def test_assigning_where_clones_cannot_bring_it_home():
    counter = keras.Variable(0.0, trainable=False)

    @tf.function
    def inside():
        counter.assign_add(1.0)

    with pytest.raises(ValueError, match=r"assigned inside of `tf\.cond`"):
        create_clones(config_of(2), lambda: inside())


def test_batches_of_unknown_rows(float64):
    plain, cloned = mlp(), mlp()
    batches = [data(7), data(3, seed=1)]
    train_plainly(plain, keras.optimizers.SGD(0.1), batches)
    optimizer, config = keras.optimizers.SGD(0.1), config_of(3)
    signature = [
        (
            tf.TensorSpec((None, 6), tf.float64),
            tf.TensorSpec((None, 1), tf.float64),
        )
    ]

    @tf.function(input_signature=signature)
    def step(batch):
        clones = create_clones(config, squares(cloned), [split_batch(batch, 3)])
        _, pairs = optimize_clones(clones, optimizer)
        optimizer.apply_gradients(pairs)

    for batch in batches:
        step(batch)
    assert difference(weights(plain), weights(cloned)) < 1e-10
    before = weights(cloned)
    with pytest.raises(tf.errors.InvalidArgumentError, match="one row a clone"):
        step(data(2))
    assert difference(before, weights(cloned)) == 0


@pytest.mark.parametrize(
    ("rows", "num_clones", "error", "message"),
    [
        (2, 3, ValueError, r"one row a clone.*batch of 2 rows"),
        (2, 0, ValueError, "`num_clones` must be a positive integer"),
        (2, 1.0, TypeError, "`num_clones` must be a positive integer"),
    ],
)
def test_batches_that_cannot_be_split(rows, num_clones, error, message):
    with pytest.raises(error, match=message):
        split_batch(np.ones((rows, 2)), num_clones)


def test_leaves_that_disagree():
    with pytest.raises(ValueError, match="same number of rows"):
        split_batch((np.ones((4, 2)), np.ones(3)), 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("2", print), TypeError, "`config` must be a `DeploymentConfig`"),
        ((config_of(2), 1), TypeError, "`model_fn` must be a function"),
        ((config_of(2), print, 1), TypeError, "`args` must be a list"),
        (
            (config_of(2), print, PerClone([1, 2])),
            TypeError,
            r"`args` must be a list.*write `\[batch\]`",
        ),
        ((config_of(2), print, [], [1]), TypeError, "`kwargs` must be a dict"),
        (
            (config_of(2), print, [PerClone([1, 2, 3])]),
            ValueError,
            "num_clones=2, and a `PerClone` of 3",
        ),
        (
            (config_of(2), print, [PerClone([1, 2], [1])]),
            ValueError,
            "num_clones=2, and a `PerClone` of 1",
        ),
        (
            (DeploymentConfig(2, num_ps_tasks=1), print),
            ValueError,
            "keras_clones.connect",
        ),
    ],
)
@pytest.mark.parametrize("function", [create_clones, deploy])
def test_arguments_that_make_no_clones(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


def test_variables_must_be_there():
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=r"variables to be there.*kernel"):
        create_clones(config_of(2), model, [tf.ones((2, 3))])


Named = collections.namedtuple("Named", ["extra", "loss"])
LOSS = tf.constant(3.0)


@pytest.mark.parametrize(
    "outputs",
    [
        LOSS,
        (LOSS, "rest"),
        [LOSS],
        {"rest": 1, "loss": LOSS},
        Named("rest", LOSS),
        keras.Variable(3.0),
    ],
)
def test_where_a_loss_is(outputs):
    assert float(clone_losses.find_loss(outputs)) == 3.0


@pytest.mark.parametrize(
    "outputs",
    [
        None,
        (),
        {"total": LOSS},
        tf.ones((3,)),
        tf.constant(3),
        3.0,
        Named(LOSS, None),
        [tf.ones((2, 2)), LOSS],
    ],
)
def test_where_no_loss_is(outputs):
    with pytest.raises(ValueError, match="`model_fn` to return a loss"):
        deploy(
            config_of(2),
            lambda unused: outputs,
            [1],
            optimizer=keras.optimizers.SGD(),
        )


def optimize(error, message, clones=None, optimizer="sgd", **kwargs):
    made = clones

    @tf.function
    def step():
        model = made_model
        clones = made
        if clones is None:
            x = tf.ones((2, 6))
            clones = create_clones(
                config_of(2), lambda: tf.reduce_sum(model(x))
            )
        optimize_clones(
            clones,
            keras.optimizers.get(optimizer) if optimizer else None,
            **kwargs,
        )

    made_model = mlp()
    with pytest.raises(error, match=message):
        step()


def test_what_optimize_clones_refuses():
    clone = model_deploy.Clone(tf.constant(1.0), "", "/device:CPU:1")
    refused = ValueError, "`weights` must have 2 numbers"
    for weights_ in ([1], [1, -1], [0, 0], [1, np.nan], [1, np.inf]):
        optimize(*refused, weights=weights_)
    optimize(ValueError, "at least one clone", clones=[])
    optimize(TypeError, "`clones` must be a list", clones=clone)
    optimize(TypeError, "`clones` must be a list", clones=[tf.constant(1.0)])
    optimize(TypeError, "`optimizer` must be", optimizer=None)
    optimize(TypeError, "`var_list` must be", var_list=[tf.Variable(1.0)])
    optimize(ValueError, "Pass `var_list=`", clones=[clone])
    other = keras.Variable(1.0, name="other")
    optimize(ValueError, r"without a gradient.*other", var_list=[other])
    optimize(
        ValueError,
        "`regularization_losses` must be a list of scalars",
        regularization_losses=[tf.ones((2,))],
    )


def test_deploy_trains_evaluates_and_writes(float64, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    plain, cloned = mlp(kernel_regularizer="l2"), mlp(kernel_regularizer="l2")
    batches = [data(7), data(5, seed=1)]
    one = keras.optimizers.Adam(0.05)
    expected = train_plainly(plain, one, batches)
    other = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05))
    deployed = deploy(
        config_of(2),
        squares(cloned),
        [split_batch(batches[0], 2)],
        optimizer=other,
        summarize_gradients=True,
        regularization_losses=lambda: cloned.losses,
    )
    assert deployed.clones == [
        (None, "clone_0/", "/device:CPU:1"),
        (None, "clone_1/", "/device:CPU:2"),
    ]
    writer = tf.summary.create_file_writer(str(tmp_path))
    with pytest.raises(RuntimeError, match="before the first run"):
        deployed.summary_fn(writer)
    with pytest.raises(TypeError, match="`writer` must be a summary writer"):
        deployed.summary_fn(str(tmp_path))

    before = weights(cloned)
    untrained = float(deployed.total_loss())
    assert difference(before, weights(cloned)) == 0
    totals = [float(deployed.train_fn())]
    assert untrained == pytest.approx(totals[0], rel=1e-12)
    deployed.summary_fn(writer)
    totals.append(float(deployed.train_fn(batch=split_batch(batches[1], 2))))
    assert difference(expected, totals) < 1e-10
    assert difference(weights(plain), weights(cloned)) < 1e-10

    clone_losses = [float(clone.outputs) for clone in deployed.clones]
    writer.close()
    events = event_accumulator.EventAccumulator(
        str(tmp_path), {"tensors": 0}
    ).Reload()
    tags = events.Tags()["tensors"]
    assert sum("/gradient_norm" in tag for tag in tags) == 4
    assert sum(tag.endswith("/gradient") for tag in tags) == 4

    def scalar(tag):
        [event] = events.Tensors(tag)
        assert event.step == 1
        return float(tf.make_ndarray(event.tensor_proto))

    assert scalar("total_loss") == pytest.approx(totals[0], rel=1e-6)
    x, y = batches[0]
    fresh = mlp()
    assert scalar("clone_0/loss") == pytest.approx(
        float(squares(fresh)((x[:4], y[:4]))), rel=1e-6
    )
    regularized = mlp(kernel_regularizer="l2")
    extra = float(sum(regularized.losses))
    assert scalar("regularization_loss") == pytest.approx(extra, rel=1e-6)
    assert clone_losses[0] != clone_losses[1]
    with tf.GradientTape() as tape:
        total = squares(regularized)((x, y)) + sum(regularized.losses)
    grads = tape.gradient(total, regularized.trainable_variables)
    for variable, gradient in zip(
        cloned.trainable_variables, grads, strict=True
    ):
        norm = float(tf.norm(gradient))
        found = scalar(f"{variable.path}/gradient_norm")
        assert found == pytest.approx(norm, rel=1e-6)


@pytest.mark.full
def test_norms_of_rows_that_repeat():
    model = words()
    deployed = deploy(
        config_of(2),
        squares(model),
        optimizer=keras.optimizers.SGD(0.0),
        summarize_gradients=True,
    )
    x, y = data(6, True)
    y = y.astype("float32")
    deployed.train_fn(split_batch((x, y), 2))
    run = deployed.train_fn.__self__._last
    with tf.GradientTape() as tape:
        total = squares(model)((x, y))
    table = tape.gradient(total, model.layers[0].embeddings.value)
    expected = float(tf.norm(tf.convert_to_tensor(table)))
    assert float(tf.norm(run.gradients[0])) == pytest.approx(expected, rel=1e-5)


def test_deploy_builds_and_moves_what_the_function_uses():
    with tf.device("/device:CPU:3"):
        head = keras.layers.Dense(1)
        head.build((None, 8))
        optimizer = keras.optimizers.SGD(0.1)
    body = keras.layers.Dense(8)

    def model_fn(batch):
        x, y = batch
        return {"loss": tf.reduce_mean((head(body(x)) - y) ** 2), "x": x}

    deployed = deploy(config_of(2), model_fn, optimizer=optimizer)
    assert not body.built
    batch = tf.nest.map_structure(np.float32, data(5))
    before = float(deployed.train_fn(split_batch(batch, 2)))
    assert float(deployed.total_loss(split_batch(batch, 2))) < before
    variables = [*head.variables, *body.variables, *optimizer.variables]
    assert {v.value.device[-6:] for v in variables} == {":CPU:0"}
    assert deployed.clones[0].outputs["x"].shape == (3, 6)
    assert len(optimizer.variables) == 2


def test_deploy_keeps_state_but_not_when_it_evaluates(float64):
    layer = keras.layers.BatchNormalization(momentum=0.5)
    model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(1)])
    x, y = data(6)
    shards = split_batch((x, y), 2)
    deployed = deploy(
        config_of(2), squares(model), [shards], optimizer=keras.optimizers.SGD()
    )
    deployed.total_loss()
    assert not np.any(layer.moving_mean.numpy())
    deployed.train_fn()
    expected = 0.5 * x[:3].mean(axis=0)
    assert difference(expected, layer.moving_mean.numpy()) < 1e-10


def test_deploy_without_an_optimizer(tmp_path):
    model = mlp()
    x, _ = tf.nest.map_structure(np.float32, data(5))
    deployed = deploy(config_of(2), model, [split_batch(x, 2)])
    assert deployed.train_fn is None
    assert deployed.total_loss() is None
    outputs = [clone.outputs for clone in deployed.clones]
    np.testing.assert_allclose(tf.concat(outputs, 0), model(x), atol=1e-6)
    writer = tf.summary.create_file_writer(str(tmp_path))
    with pytest.raises(ValueError, match="`step` must be an integer"):
        deployed.summary_fn(writer)
    deployed.summary_fn(writer, step=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": "sgd"}, TypeError, "`optimizer` must be a `keras"),
        (
            {"regularization_losses": [LOSS]},
            TypeError,
            "`regularization_losses` must be a function",
        ),
    ],
)
def test_what_deploy_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        deploy(config_of(2), print, **arguments)


def test_deploy_is_not_for_graphs():
    @tf.function
    def step():
        deploy(config_of(2), print)

    with pytest.raises(RuntimeError, match=r"outside of every"):
        step()


def first_of(*args, **kwargs):
    return tf.reduce_sum(tf.nest.flatten((args, kwargs))[0])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ([np.ones((4, 2))], {}),
        ([], {"batch": (tf.ones((4, 2)), tf.ones(4))}),
        ([tf.ragged.constant([[1.0], [2.0, 3.0]]), 0.5], {}),
    ],
)
@pytest.mark.parametrize("when", ["deploy", "call"])
def test_a_batch_that_is_not_split_is_warned_of(args, kwargs, when):
    with pytest.warns(UserWarning, match=r"2 clones .*split_batch") as caught:
        if when == "deploy":
            deployed = deploy(config_of(2), first_of, args, kwargs)
        else:
            deployed = deploy(config_of(2), first_of)
            deployed.total_loss(*args, **kwargs)
        deployed.total_loss(*args, **kwargs)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("num_clones", "args"),
    [
        (1, [np.ones((4, 2))]),
        (2, [split_batch(np.ones((4, 2)), 2), np.ones(3)]),
        (2, [PerClone([1.0, 2.0])]),
        (2, [0.5, tf.constant(2.0), np.float32(3), "name", None]),
        (2, [keras.Variable([1.0, 2.0]), tf.Variable([1.0])]),
        (2, [iter(tf.data.Dataset.from_tensors([1.0]).repeat()), np.ones(3)]),
    ],
)
def test_what_clones_may_share_is_not_warned_of(num_clones, args, recwarn):
    deployed = deploy(config_of(num_clones), lambda *args: tf.zeros(()))
    deployed.total_loss(*args)
    assert not recwarn.list


def test_a_run_that_failed_can_be_repeated():
    deployed = deploy(
        config_of(2), squares(mlp()), optimizer=keras.optimizers.SGD(0.1)
    )
    with contextlib.suppress(Exception):
        deployed.train_fn(split_batch((np.ones((4, 5)), np.ones((4, 1))), 2))
    batch = tf.nest.map_structure(np.float32, data(4))
    assert np.isfinite(float(deployed.train_fn(split_batch(batch, 2))))


def test_every_name_of_the_original_is_there():
    names = {
        *("create_clones", "deploy", "optimize_clones"),
        *("DeployedModel", "DeploymentConfig", "Clone"),
    }
    assert names <= set(model_deploy.__all__)
    assert model_deploy.Clone._fields == ("outputs", "scope", "device")


def test_seed_states_are_known_by_their_name():
    generator = keras.random.SeedGenerator(1)
    assert keras_clones._keras.is_seed_state(generator.state)
    assert not keras_clones._keras.is_seed_state(keras.Variable([1, 2]))


def test_every_name_of_the_original_is_in_the_table_of_porting():
    page = pathlib.Path(__file__).parents[1] / "docs" / "porting.md"
    section = page.read_text()
    names = {
        *("create_clones", "optimize_clones", "deploy", "Clone"),
        *("train_op", "summary_op", "total_loss", "clones"),
        *("clone_device", "clone_scope", "variables_device", "inputs_device"),
        *("optimizer_device", "caching_device", "worker_device", "ps_device"),
        *(field.name for field in dataclasses.fields(DeploymentConfig)),
        *model_deploy.__all__,
    }
    assert not [name for name in names if name not in section]


@pytest.mark.parametrize("make", [create_clones, deploy])
def test_clones_of_several_replicas_are_named_as_devices(make, monkeypatch):
    config = DeploymentConfig(1, num_replicas=2)
    found = [
        placement.PlacedClone(f"clone_{i}", "/device:CPU:0") for i in range(2)
    ]
    monkeypatch.setattr(placement, "place_clones", lambda config: found)
    with pytest.raises(ValueError, match="Pass the devices of all replicas"):
        make(config, lambda: tf.ones(()))
