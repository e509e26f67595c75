"""A large table stays home, and trains as it does in plain Keras."""

import functools

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_clones import clone_model
from keras_clones.benchmark.transfers import count_transfers
from keras_clones.clone import tables
from keras_clones.update.update import writes_rows


def pooled():
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(5000, 64),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    )


def sparse():
    inputs = keras.Input((6,), dtype="int64", sparse=True)
    rows = layers.Embedding(5000, 64)(inputs)
    x = layers.GlobalAveragePooling1D()(rows)
    return keras.Model(inputs, layers.Dense(3)(x))


class Tied(keras.Model):
    """Looks rows up, and multiplies by the whole table."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(5000, 64)

    def call(self, x):
        hidden = ops.mean(self.table(x), axis=1)
        return ops.matmul(hidden, ops.transpose(self.table.embeddings))


def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, 5000, (22, 6)), rng.integers(0, 3, 22)


def train(make, eagerly, num_clones=None, loss="clones"):
    x, y = data()
    if make is sparse:
        x = tf.sparse.from_dense(x)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    keras.utils.set_random_seed(1)
    model = make()
    if num_clones:
        clone_model(model, num_clones, loss=loss)
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=eagerly,
    )
    if not num_clones:
        cases.build_optimizer(model)
    model.fit(batches, epochs=2, verbose=0)
    return cases.weights(model)


plain = functools.cache(train)


@pytest.mark.full_but(
    "False-pooled-clones",
    "False-Tied-gather",
    "True-pooled-gather",
    "False-sparse-clones",
)
@pytest.mark.parametrize("loss", ["clones", "gather"])
@pytest.mark.parametrize("make", [pooled, sparse, Tied])
@pytest.mark.parametrize("eagerly", [False, True])
def test_large_tables_train_the_same(make, loss, eagerly, float64):
    expected = plain(make, eagerly)
    received = train(make, eagerly, 3, loss)
    assert cases.difference(expected, received) < 1e-12


@pytest.mark.parametrize(
    ("optimizer", "by_rows"),
    [
        *(("sgd", True), ("adadelta", True), ("rmsprop", True)),
        *(("adam", False), (keras.optimizers.SGD(momentum=0.9), False)),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), True),
    ],
)
def test_a_table_that_is_written_by_rows_is_read_by_rows(optimizer, by_rows):
    """Else TensorFlow copies all of it whenever it is read."""
    model = clone_model(pooled(), 2)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy())
    assert writes_rows(model) == by_rows
    if optimizer not in ("adadelta", "adam"):
        return

    @tf.function
    def step(x, y):
        return model.train_step((x, y))

    x, y = (tf.constant(array) for array in data())
    library = step.get_concrete_function(x, y).graph.as_graph_def().library
    kinds = {n.op for f in library.function for n in f.node_def}
    assert ("ResourceGather" in kinds) == by_rows


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("limit", [1 << 20, 1 << 40])
def test_only_rows_of_a_large_table_travel(limit, dtype, monkeypatch):
    monkeypatch.setattr(tables, "LARGE_BYTES", limit)
    keras.config.set_dtype_policy(dtype)
    try:
        model = clone_model(pooled(), 2)
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy())

    @tf.function
    def step(x, y):
        return model.train_step((x, y))

    x, y = (tf.constant(array) for array in data())
    library = step.get_concrete_function(x, y).graph.as_graph_def().library
    (tower,) = (f for f in library.function if "tower" in f.signature.name)
    nodes = {n.name: n for n in tower.node_def}

    def source(name):
        """Return what a lookup reads, past a cast."""
        node = nodes.get(name.split(":")[0])
        return source(node.input[0]) if node and node.op == "Cast" else node

    lookups = [
        (n.device, source(n.input[0]))
        for n in tower.node_def
        if n.op == "GatherV2"
    ]
    whole = [a for a in tower.signature.input_arg if a.type == tf.float32]
    shapes = [
        [
            d.size
            for d in tower.arg_attr[i].attr["_output_shapes"].list.shape[0].dim
        ]
        for i, a in enumerate(tower.signature.input_arg)
        if a in whole
    ]
    assert ([5000, 64] in shapes) == (limit > 1 << 20)
    if limit > 1 << 20:
        assert not any(read for _, read in lookups)
    else:
        ((device, read),) = lookups
        # Which runs where its variable is.
        assert read.op == "ReadVariableOp"
        assert device == "/device:CPU:0"
    # Assignments of a variable that it looked up in copy it first.
    assert not any(n.op == "ResourceGather" for n in tower.node_def)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_only_rows_of_sparse_ids_travel(optimizer):
    model = clone_model(sparse(), devices=["CPU:1", "CPU:2"])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy())
    x, y = data()
    batch = tf.data.Dataset.from_tensors((tf.sparse.from_dense(x), y))
    transfers = count_transfers(lambda: model.fit(batch, verbose=0), unknown=0)
    table = model.layers[1].embeddings
    assert 0 < sum(t.bytes for t in transfers) < 0.1 * 4 * 5000 * 64
    # Rows, of a number that is not known before, travel from where they are.
    gathers = [t for t in transfers if t.bytes == 0]
    assert gathers
    assert tables.is_large(table)


def test_tables_that_are_read_whole_are_sent():
    small = layers.Embedding(10, 4)
    penalized = layers.Embedding(5000, 64, embeddings_regularizer="l2")
    adapted = layers.Embedding(5000, 64)
    large = layers.Embedding(5000, 64)
    model = keras.Sequential([small, penalized, adapted, large])
    for layer in model.layers:
        layer.build()
    adapted.enable_lora(2)
    assert tables.large_tables(model) == [large.embeddings]
    with tables.looked_up_at_home([large.embeddings]):
        assert hasattr(large.embeddings, "sparse_read")
    assert not hasattr(large.embeddings, "sparse_read")
