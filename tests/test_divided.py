"""A table that is divided by rows over homes trains as it does whole."""

import copy

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_clones import (
    DeploymentConfig,
    _keras,
    clone_model,
    deployment,
    unclone_model,
)
from keras_clones.benchmark.transfers import count_transfers
from keras_clones.callbacks import backup_variables
from keras_clones.devices import moving

ROWS, DIM = 31, 4
HOMES = ("/device:CPU:0", "/device:CPU:1", "/device:CPU:2")


def pooled(rows=ROWS):
    """A table that is looked up twice, beside one that stays whole."""
    ids = keras.Input((6,), dtype="int32")
    table = layers.Embedding(rows, DIM, name="items")
    other = layers.Embedding(9, DIM, name="kinds")
    found = [table(ids), table(ids[:, :2]), other(ids % 9)]
    pooled = [layers.GlobalAveragePooling1D()(one) for one in found]
    scores = layers.Dense(3)(layers.Concatenate()(pooled))
    return keras.Model(ids, scores)


class Tied(keras.Model):
    """Looks rows up, and multiplies by the whole table."""

    def __init__(self):
        super().__init__()
        self.items = layers.Embedding(ROWS, DIM, name="items")
        self.items.build()

    def call(self, x):
        hidden = ops.mean(self.items(x), axis=1)
        return ops.matmul(hidden, ops.transpose(self.items.embeddings))


class Own(keras.Model):
    """A step of its own, with a loss by rows."""

    def __init__(self):
        super().__init__()
        self.items = layers.Embedding(ROWS, DIM, name="items")
        self.items.build()
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(ops.mean(self.items(x), axis=1))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(
                y, self(x, training=True), from_logits=True
            )
            loss = ops.sum(losses) / 10
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, ROWS, (22, 6)), rng.integers(0, 3, 22)


def compiled(make, optimizer, **options):
    keras.utils.set_random_seed(1)
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metrics = None if make is Own else ["accuracy"]
    model.compile(optimizer(), loss, metrics=metrics, **options)
    return model


def train(model, epochs=2):
    x, y = data()
    history = model.fit(
        x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0
    )
    variables = [*model.variables, *model.optimizer.variables]
    return [*(v.numpy() for v in variables), *history.history.values()]


def difference(one, other):
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(one, other, strict=True)
    )


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(
        0.01, amsgrad=True, global_clipnorm=0.1
    ),
    "adamw": lambda: keras.optimizers.AdamW(
        0.01, use_ema=True, ema_overwrite_frequency=2, clipvalue=0.01
    ),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1, clipnorm=0.05),
    "accumulated": lambda: keras.optimizers.RMSprop(
        0.01, gradient_accumulation_steps=2
    ),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Ftrl(0.1)
    ),
    "adamax": lambda: keras.optimizers.Adamax(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01, clipnorm=0.02),
    "lion": lambda: keras.optimizers.Lion(0.01),
}


def trained_alike(make, optimizer, options, **compile_options):
    """Return the largest difference of a divided table from a whole one."""
    plain = compiled(make, optimizer, **compile_options)
    if make is not Own:
        cases.build_optimizer(plain)
    expected = train(plain)
    model = compiled(make, optimizer, **compile_options)
    clone_model(model, devices=HOMES, divided=["items"], **options)
    return difference(expected, train(model))


@pytest.mark.full_but("adamw")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_divided_table_trains_as_a_whole_one(name, float64):
    assert trained_alike(pooled, OPTIMIZERS[name], {}) < 1e-12


@pytest.mark.full_but("False-Own", "True-Tied")
@pytest.mark.parametrize("make", [Tied, Own])
@pytest.mark.parametrize("eagerly", [False, True])
def test_all_ways_of_a_step_train_as_one_device(make, eagerly, float64):
    adam = OPTIMIZERS["adam"]
    assert trained_alike(make, adam, {}, run_eagerly=eagerly) < 1e-12


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [{"loss": "gather"}, {"pieces": 2}, {"exact": True}, {"update": "keras"}],
)
def test_options_train_as_one_device(options, float64):
    assert trained_alike(pooled, OPTIMIZERS["adamax"], options) < 1e-12


@keras.saving.register_keras_serializable("divided")
class Positions(layers.Layer):
    """Adds rows of a table that do not depend on the batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.items = layers.Embedding(ROWS, DIM, name="items")
        self.items.build()

    def call(self, x):
        return x + self.items(ops.arange(ops.shape(x)[1]))


def positions():
    ids = keras.Input((6,), dtype="int64")
    x = layers.Embedding(ROWS, DIM)(ids)
    x = layers.GlobalAveragePooling1D()(Positions()(x))
    return keras.Model(ids, layers.Dense(3)(x))


def frozen():
    model = pooled()
    model.get_layer("items").trainable = False
    return model


def masked():
    ids = keras.Input((6,), dtype="int32")
    x = layers.Embedding(ROWS, DIM, mask_zero=True, name="items")(ids)
    x = layers.LSTM(3)(x)
    return keras.Model(ids, layers.Dense(3)(x))


@pytest.mark.full_but("positions")
@pytest.mark.parametrize("make", [positions, frozen, masked])
def test_look_ups_train_as_one_device(make, float64):
    assert trained_alike(make, OPTIMIZERS["adam"], {}) < 1e-12


def divided(make=pooled, optimizer="adam", homes=HOMES, **options):
    model = compiled(make, OPTIMIZERS[optimizer], **options)
    return clone_model(model, devices=homes, divided=["items"])


def test_a_saved_file_is_that_of_a_plain_embedding(tmp_path, float64):
    model = divided(optimizer="adamw")
    train(model)
    items = model.get_layer("items").embeddings
    slots = [v for v in model.optimizer.variables if v.shape == items.shape]
    assert {moving.home_of(v) for v in [items, *slots]} == {HOMES}
    assert len(slots) == 3
    model.save(tmp_path / "model.keras")
    plain = keras.models.load_model(tmp_path / "model.keras")
    assert difference(train(plain), train(model)) < 1e-12
    plain.save_weights(tmp_path / "plain.weights.h5")
    other = divided(homes=HOMES[:2])
    other.load_weights(tmp_path / "plain.weights.h5")
    assert difference(plain.get_weights(), other.get_weights()) == 0
    unclone_model(model)
    assert moving.home_of(items) == moving.home_of(slots[0]) == HOMES[0]
    assert difference(train(plain), train(model)) < 1e-12


@pytest.mark.full
def test_checkpoints_are_those_of_a_plain_embedding(tmp_path, float64):
    model = divided()
    train(model)
    held = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = held.save(tmp_path / "divided")
    expected = train(model)
    plain = compiled(pooled, OPTIMIZERS["adam"])
    cases.build_optimizer(plain)
    other = tf.train.Checkpoint(model=plain, optimizer=plain.optimizer)
    other.restore(path)
    assert difference(expected[:-2], train(plain)[:-2]) < 1e-12
    path = other.save(tmp_path / "plain")
    train(model)
    held.restore(path)
    assert difference(model.get_weights(), plain.get_weights()) == 0
    # Backups and copies have the values of the whole, too.
    values = backup_variables.values(model)[1]
    assert difference(values[:1], plain.get_weights()[:1]) == 0
    copied = copy.deepcopy(model)
    assert deployment(copied) is None
    assert difference(train(copied), train(plain)) < 1e-12
    with pytest.raises(NotImplementedError, match="unclone_model"):
        model.export(tmp_path / "exported")


@pytest.mark.full
def test_a_table_is_divided_anew_and_joined(float64):
    plain = compiled(pooled, OPTIMIZERS["adam"])
    cases.build_optimizer(plain)
    model = divided()
    items = model.get_layer("items")
    for again in (
        lambda: clone_model(model, devices=HOMES[1:], divided=[items]),
        lambda: clone_model(model, 2),
        lambda: divided(lambda: model),
    ):
        assert difference(train(plain), train(model)) < 1e-12
        again()
    assert moving.home_of(items.embeddings) == HOMES
    # A plain loop trains it as well, the rows put together for that.
    x = data()[0]
    for one in (plain, model):
        one.compile(keras.optimizers.SGD(0.1))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(one(x) ** 2)
        gradients = tape.gradient(loss, one.trainable_variables)
        one.optimizer.apply(gradients, one.trainable_variables)
    assert difference(plain.get_weights(), model.get_weights()) < 1e-12


def test_rows_and_their_gradients_are_all_that_travels():
    model = divided(lambda: pooled(3001), homes=HOMES[:2])
    ids = np.arange(48, dtype="int32").reshape(8, 6)
    batch = ids, np.zeros(8, "int32")
    iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
    step = tf.function(
        lambda: model.train_step(next(iterator)), autograph=False
    )
    of_rows = []

    def size(tensor):
        of_rows.append(tuple(tensor.shape))
        return -1

    found = count_transfers(step, size)
    for ends in (HOMES[:2], HOMES[1::-1]):
        sizes = [t.bytes for t in found if (t.source, t.target) == ends]
        # Ids and rows of two look-ups, and of the gradient of each.
        assert sizes.count(-1) == 8
        assert max(sizes) < 500
    assert sorted(of_rows) == [(None,)] * 8 + [(None, DIM)] * 8
    assert "items/embeddings are divided over CPU:0, CPU:1." in repr(
        deployment(model)._page()
    )


def layer(**options):
    return layers.Embedding(ROWS, DIM, name="items", **options)


def of(table, build=True):
    model = keras.Sequential([table, layers.Flatten(), layers.Dense(3)])
    if build:
        model.build((None, 6))
    return model


def adapted():
    model = of(layer())
    model.layers[0].enable_lora(2)
    return model


def quantized():
    model = of(layer())
    model.layers[0].quantize("int8")
    return model


def of_lamb():
    model = pooled()
    model.compile(keras.optimizers.Lamb())
    return model


ALONE = DeploymentConfig(num_replicas=2, sync=False)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (pooled, {"divided": "items"}, "must be a list of `Embedding`"),
        (pooled, {"divided": [3]}, r"Received: divided=\[3\]"),
        (pooled, {"divided": ["no"]}, r"no layer 'no'.*\['items', 'kinds'\]"),
        (pooled, {"divided": ["dense"]}, "'dense' is a `Dense`"),
        (pooled, {"devices": ["CPU:0"]}, "at least two homes"),
        (pooled, {"jit_compile": True}, "leave `jit_compile` out"),
        (lambda: of(layer(), False), {}, "not built"),
        (lambda: pooled(2), {}, "has 2 rows, and there are 3 homes"),
        (lambda: of(layer(embeddings_regularizer="l2")), {}, "regularizer"),
        (
            lambda: of(layer(embeddings_constraint="non_neg")),
            {},
            "constraint",
        ),
        (adapted, {}, "LoRA"),
        (quantized, {}, "quantized"),
        (of_lamb, {}, "Received: optimizer 'Lamb'"),
        (pooled, {"devices": None, "config": ALONE}, "step by themselves"),
    ],
)
def test_what_cannot_be_divided_leaves_the_model_as_it_was(
    make, options, message
):
    model = make()
    held = {name: id(value) for name, value in vars(model).items()}
    values = [id(_keras.tf_variable(v)) for v in model.variables]
    with pytest.raises((TypeError, ValueError), match=message):
        clone_model(
            model, **{"devices": HOMES, "divided": ["items"], **options}
        )
    assert held == {name: id(value) for name, value in vars(model).items()}
    assert values == [id(_keras.tf_variable(v)) for v in model.variables]


def test_an_optimizer_that_goes_by_the_whole_table_is_named():
    model = divided()
    model.compile(keras.optimizers.Lamb(), "mse")
    with pytest.raises(ValueError, match=r"optimizer 'Lamb'.*leave `divided`"):
        model.fit(*data(), verbose=0)
