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
    metrics = [] if make is Own else ["accuracy"]
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_divided_table_trains_as_a_whole_one(name, float64):
    plain = compiled(pooled, OPTIMIZERS[name])
    cases.build_optimizer(plain)
    expected = train(plain)
    model = compiled(pooled, OPTIMIZERS[name])
    clone_model(model, devices=HOMES, divided=["items"])
    assert difference(expected, train(model)) < 1e-12


@pytest.mark.parametrize("make", [Tied, Own])
@pytest.mark.parametrize("eagerly", [False, True])
def test_all_ways_of_a_step_train_as_one_device(make, eagerly, float64):
    plain = compiled(make, OPTIMIZERS["adam"], run_eagerly=eagerly)
    if make is Tied:
        cases.build_optimizer(plain)
    expected = train(plain)
    model = compiled(make, OPTIMIZERS["adam"], run_eagerly=eagerly)
    clone_model(model, devices=HOMES, divided=["items"])
    assert difference(expected, train(model)) < 1e-12


@pytest.mark.parametrize("options", [{"loss": "gather"}, {"pieces": 2}])
def test_options(options, float64):
    plain = compiled(pooled, OPTIMIZERS["adam"])
    cases.build_optimizer(plain)
    expected = train(plain)
    model = compiled(pooled, OPTIMIZERS["adam"])
    clone_model(model, devices=HOMES, divided=["items"], **options)
    assert difference(expected, train(model)) < 1e-12


def test_files(tmp_path, float64):
    model = compiled(pooled, OPTIMIZERS["adamw"])
    clone_model(model, devices=HOMES, divided=["items"])
    got = train(model)
    model.save(tmp_path / "a.keras")
    plain = keras.models.load_model(tmp_path / "a.keras")
    expected = train(plain)
    after = train(model)
    assert difference(expected, after) < 1e-12
    unclone_model(model)
    assert difference([*train(model)],train(plain)) < 1e-12
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(tmp_path / "ckpt")
    other = compiled(pooled, OPTIMIZERS["adamw"])
    clone_model(other, devices=HOMES, divided=["items"])
    cases.build_optimizer(other)
    train(other)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)
    p2 = tf.train.Checkpoint(model=other, optimizer=other.optimizer).save(tmp_path / "ckpt2")
    assert difference(train(other)[:-2], train(model)[:-2]) < 1e-12
    print(deployment(other)); deployment(other).summary(8)
    try:
        other.export(tmp_path/"e")
    except Exception as e: print("EXPORT", repr(e)[:300])
