"""A table that is divided by rows over homes trains as it does whole."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_clones import clone_model, deployment, unclone_model

ROWS, DIM = 31, 4
HOMES = ("/device:CPU:0", "/device:CPU:1", "/device:CPU:2")


def pooled():
    """A table that is looked up twice, beside one that stays whole."""
    ids = keras.Input((6,), dtype="int32")
    table = layers.Embedding(ROWS, DIM, name="items")
    other = layers.Embedding(9, DIM, name="kinds")
    found = [table(ids), table(ids[:, :2]), other(ids // 4)]
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
    "adam": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True, clipnorm=0.02),
    "adamw": lambda: keras.optimizers.AdamW(
        0.01, use_ema=True, ema_overwrite_frequency=2, clipvalue=0.01
    ),
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1, clipnorm=0.05),
    "accumulated": lambda: keras.optimizers.RMSprop(
        0.01, gradient_accumulation_steps=2
    ),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Ftrl(0.1)
    ),
    "adamax": lambda: keras.optimizers.Adamax(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adadelta": lambda: keras.optimizers.Adadelta(0.1),
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


@pytest.mark.full_but("adamw", "adagrad", "momentum")
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
    """Adds rows of a table that do not depend on the batch, and a mask."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.items = layers.Embedding(ROWS, DIM, name="items")
        self.items.build()

    def call(self, x):
        return x + self.items(ops.arange(ops.shape(x)[1]))


def positions():
    ids = keras.Input((6,), dtype="int64")
    x = layers.Embedding(ROWS, DIM, mask_zero=True)(ids)
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


def sparse():
    ids = keras.Input((6,), dtype="int64", sparse=True)
    rows = layers.Embedding(ROWS, DIM, name="items")(ids)
    return keras.Model(ids, layers.Dense(3)(rows[:, 0]))


@pytest.mark.full_but("positions")
@pytest.mark.parametrize("make", [positions, frozen, masked])
def test_look_ups_train_as_one_device(make, float64):
    assert trained_alike(make, OPTIMIZERS["amsgrad"], {}) < 1e-12


def test_a_saved_file_is_that_of_a_plain_embedding(tmp_path, float64):
    model = compiled(pooled, OPTIMIZERS["adamw"])
    clone_model(model, devices=HOMES, divided=["items"])
    train(model)
    model.save(tmp_path / "model.keras")
    plain = keras.models.load_model(tmp_path / "model.keras")
    assert difference(train(plain), train(model)) < 1e-12
    x, y = data()
    assert np.abs(plain.predict(x, verbose=0) - model.predict(x, verbose=0)).max() < 1e-12
    plain.save_weights(tmp_path / "plain.weights.h5")
    other = clone_model(
        compiled(pooled, OPTIMIZERS["adamw"]),
        devices=HOMES[:2],
        divided=["items"],
    )
    other.load_weights(tmp_path / "plain.weights.h5")
    assert difference(plain.get_weights(), other.get_weights()) == 0


def test_checkpoints(tmp_path):
    model = compiled(pooled, OPTIMIZERS["adam"])
    clone_model(model, devices=HOMES, divided=["items"])
    train(model)
    held = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = held.save(tmp_path / "divided")
    expected = train(model)
    plain = compiled(pooled, OPTIMIZERS["adam"])
    cases.build_optimizer(plain)
    tf.train.Checkpoint(model=plain, optimizer=plain.optimizer).restore(path)
    assert difference(expected[:-2], train(plain)[:-2]) < 1e-5
    path = tf.train.Checkpoint(model=plain, optimizer=plain.optimizer).save(
        tmp_path / "plain"
    )
    held.restore(path)
    assert difference(model.get_weights(), plain.get_weights()) == 0
    print(deployment(model))
    import copy, pickle
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), keras.models.clone_model(model)):
        assert deployment(one) is None
        train(one)
    m2 = compiled(sparse, OPTIMIZERS["adam"])
    clone_model(m2, devices=HOMES, divided=["items"])
    x, y = data()
    ds = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(x), y)).batch(8)
    m1 = compiled(sparse, OPTIMIZERS["adam"]); cases.build_optimizer(m1)
    m1.fit(ds, verbose=0); m2.fit(ds, verbose=0)
    print("sparse", difference(m1.get_weights(), m2.get_weights()))
    from keras_clones import Backup, CloneSummaries
    model.fit(*data(), batch_size=8, verbose=0, callbacks=[Backup(str(tmp_path/"b"), save_freq=1), CloneSummaries(str(tmp_path/"s"))])
    model.compile("adagrad", "sparse_categorical_crossentropy")
    train(model)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"], steps_per_execution=3)
    train(model)
    clone_model(model, devices=HOMES[1:], divided=[model.get_layer("items")])
    train(model)
    clone_model(model, 2)
    train(model)
    unclone_model(model)
    train(model)
