"""Data that each host reads trains as the joined batches on one device."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_cluster import run

from keras_clones import clone_model, worker_dataset
from keras_clones.devices import hosts
from keras_clones.exchange import from_hosts

RANDOM = np.random.default_rng(0)
# Host 1 runs out first, and has fewer rows than clones in its last batch.
ROWS, SIZES = (23, 13), (3, 4)


class Fake(hosts.Host):
    """A host that is a part of this process: three of its CPUs."""

    @property
    def cpu(self):
        return f"/job:localhost/replica:0/task:0/device:CPU:{3 * self.task}"


@pytest.fixture
def two_hosts(monkeypatch):
    """Let CPUs 0 to 2 be those of one host, and the next ones of another."""
    found = tuple(Fake("worker", i, "") for i in range(2))
    cluster = hosts.Cluster(found[0], found, ())
    seen = types.SimpleNamespace(
        host_of=lambda device: f"host {int(device[-1]) // 3}"
    )
    monkeypatch.setattr(from_hosts, "hosts", seen)

    def made(fn):
        with monkeypatch.context() as patch:
            patch.setattr(hosts, "cluster", lambda: cluster)
            return worker_dataset(fn)

    return made


def of_host(arrays, sizes=SIZES):
    """Return the function that makes a dataset of a host's arrays."""

    def fn(context):
        i = context.input_pipeline_id
        return tf.data.Dataset.from_tensor_slices(arrays[i]).batch(sizes[i])

    return fn


def joined(arrays, sizes=SIZES):
    """Return the same rows as batches of one device."""
    flat = [tf.nest.flatten(one) for one in arrays]
    steps = max(
        -(-len(one[0]) // size) for one, size in zip(flat, sizes, strict=True)
    )

    def batches():
        for step in range(steps):
            leaves = [
                np.concatenate(
                    [
                        rows[step * size : (step + 1) * size]
                        for rows, size in zip(column, sizes, strict=True)
                    ]
                )
                for column in zip(*flat, strict=True)
            ]
            yield tf.nest.pack_sequence_as(arrays[0], leaves)

    signature = tf.nest.map_structure(
        lambda rows: tf.TensorSpec([None, *rows.shape[1:]], rows.dtype),
        arrays[0],
    )
    dataset = tf.data.Dataset.from_generator(
        batches, output_signature=signature
    )
    return dataset.apply(tf.data.experimental.assert_cardinality(steps))


def plain_arrays():
    return [
        (RANDOM.normal(size=(n, 6)), RANDOM.integers(0, 3, n)) for n in ROWS
    ]


def nested_arrays():
    return [
        (
            {"a": RANDOM.normal(size=(n, 2)), "b": RANDOM.normal(size=(n, 4))},
            RANDOM.integers(0, 3, n),
            RANDOM.uniform(size=n),
        )
        for n in ROWS
    ]


def dense(*more):
    layers = [keras.Input((6,)), keras.layers.Dense(8, "tanh"), *more]
    return keras.Sequential([*layers, keras.layers.Dense(3)])


class Penalty(keras.layers.Layer):
    """A mean over the rows, which is none of no rows."""

    def call(self, x):
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return x


def two_inputs():
    inputs = {
        "a": keras.Input((2,), name="a"),
        "b": keras.Input((4,), name="b"),
    }
    x = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def fit(make, data, clones=None, metrics=lambda: ["accuracy"], **options):
    """Return what training and evaluating come to."""
    keras.utils.set_random_seed(1)
    model = make()
    if clones is not None:
        clone_model(model, **clones)
    compiled = {
        name: options.pop(name)
        for name in ("run_eagerly", "steps_per_execution", "loss")
        if name in options
    }
    compiled.setdefault(
        "loss", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.compile("adam", metrics=metrics(), **compiled)
    history = model.fit(
        data, epochs=2, verbose=0, validation_data=data, **options
    )
    return [
        *model.get_weights(),
        *(v.numpy() for v in model.optimizer.variables),
        *history.history.values(),
    ]


def check(one, other):
    # Unlike that of Python, this maximum is no number if any of them is none.
    worst = np.max(
        [
            np.abs(np.asarray(a) - np.asarray(b)).max()
            for a, b in zip(one, other, strict=True)
        ]
    )
    assert worst < 1e-10


def contrastive(y, z):
    """A loss that sees the pairs of all rows."""
    scores = keras.ops.matmul(z, keras.ops.transpose(z))
    return keras.ops.logsumexp(scores, axis=1) - z[:, 0]


class Spread(keras.metrics.MeanMetricWrapper):
    """A metric that does not add up: it sees all rows of a batch."""

    def __init__(self):
        super().__init__(
            lambda y, z: keras.ops.repeat(
                keras.ops.std(z)[None], keras.ops.shape(z)[0]
            ),
            name="spread",
        )


CASES = {
    "towers": (dense, plain_arrays, {}, {}),
    "shares": (
        lambda: dense(Penalty()),
        plain_arrays,
        {"shares": [1, 2, 3, 1, 2], "layer_losses": "mean"},
        {},
    ),
    "nested": (two_inputs, nested_arrays, {}, {}),
    "home metrics": (dense, plain_arrays, {}, {"metrics": lambda: [Spread()]}),
    "gathered": (dense, plain_arrays, {}, {"loss": contrastive}),
    "synchronized": (
        lambda: dense(keras.layers.BatchNormalization()),
        plain_arrays,
        {"exact": True},
        {},
    ),
    "draws": (
        lambda: dense(keras.layers.Dropout(0.3, seed=4)),
        plain_arrays,
        {"exact": True},
        {},
    ),
    "some steps": (dense, plain_arrays, {}, {"steps_per_epoch": 3}),
    "several steps": (dense, plain_arrays, {}, {"steps_per_execution": 3}),
    "eager": (dense, plain_arrays, {}, {"run_eagerly": True}),
}


@pytest.mark.full_but("home metrics")
@pytest.mark.parametrize("case", CASES)
def test_rows_of_hosts_train_as_one_device(case, two_hosts, float64):
    make, arrays_of, clones, options = CASES[case]
    arrays = arrays_of()
    plain = fit(make, joined(arrays), **options)
    data = two_hosts(of_host(arrays))
    check(plain, fit(make, data, {"num_clones": 5, **clones}, **options))


@pytest.mark.full
def test_hosts_whose_clones_are_elsewhere(two_hosts, float64):
    arrays = plain_arrays()
    data = two_hosts(of_host(arrays))
    clones = {"devices": ["CPU:4", "CPU:1", "CPU:5"]}
    check(fit(dense, joined(arrays)), fit(dense, data, clones))


def test_predicted_rows_are_in_order_and_each_once(two_hosts, float64):
    arrays = [(np.arange(n)[:, None] + 100.0 * (n == 13),) for n in ROWS]
    model = clone_model(
        keras.Sequential([keras.layers.Identity()]), num_clones=5
    )
    found = model.predict(two_hosts(of_host(arrays)), verbose=0)
    expected = np.concatenate([batch for (batch,) in joined(arrays)])
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) == sum(ROWS)


def test_an_iterator_does_not_end_another(two_hosts, float64):
    data = two_hosts(of_host(plain_arrays()))
    one, other = iter(data), iter(data)
    first = next(one)
    assert len(list(other)) == 8
    assert len(list(one)) == 7
    assert first.rows == sum(SIZES)


def test_leaves_of_any_kind(two_hosts):
    def fn(context):
        rows = [3, 1][context.input_pipeline_id]
        texts = [f"{context.input_pipeline_id} {i}" for i in range(rows)]
        ragged = tf.ragged.constant(
            [list(range(i)) for i in range(rows)], dtype="int32"
        )
        sparse = tf.sparse.from_dense(np.eye(rows, 4))
        parts = (np.array(texts), ragged, sparse, np.ones((rows, 2)))
        dataset = tf.data.Dataset.from_tensor_slices(parts).batch(2)
        return dataset.map(
            # An axis whose size only rows tell: two, as texts have three signs.
            lambda a, b, c, d: (
                *(a, b, c, d, 7.0),
                tf.ones([tf.shape(d)[0], tf.strings.length(a[0]) - 1]),
            )
        )

    one, other = two_hosts(fn)
    text, ragged, sparse, dense, scalar, open_axis = one.joined()
    assert text.numpy().tolist() == [b"0 0", b"0 1", b"1 0"]
    assert ragged.to_list() == [[], [0], []]
    assert sparse.dense_shape.numpy().tolist() == [3, 4]
    assert dense.shape == (3, 2)
    text, ragged, sparse, dense, scalar, open_axis = other.joined()
    assert text.numpy().tolist() == [b"0 2"]
    assert ragged.to_list() == [[0, 1]]
    assert tf.sparse.to_dense(sparse).numpy().tolist() == [[0, 0, 1, 0]]
    assert open_axis.numpy().tolist() == [[1, 1]]
    assert scalar == 7


def test_without_a_cluster_it_is_the_dataset_itself():
    seen = []

    def fn(context):
        seen.append(context)
        return tf.data.Dataset.range(3).batch(2)

    assert [b.shape[0] for b in worker_dataset(fn)] == [2, 1]
    (context,) = seen
    assert context.num_input_pipelines == context.num_replicas_in_sync == 1
    assert context.input_pipeline_id == 0


def test_what_is_wrong_is_said(two_hosts):
    with pytest.raises(TypeError, match=r"Received: fn=3 \(of type int\)"):
        worker_dataset(3)
    with pytest.raises(TypeError, match=r"fn\(context\)=4 .* this machine"):
        worker_dataset(lambda context: 4)
    data = two_hosts(of_host(plain_arrays()))
    with pytest.raises(TypeError, match="inside of `fn`"):
        data.map(lambda x, y: x)
    model = clone_model(dense(), num_clones=2)
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match="return sample weights"):
        model.fit(data, class_weight={0: 1.0})


@pytest.mark.full
def test_processes_read_rows_of_their_own():
    found = run("worker_input.py", "DIFFERENCES", ps=0)
    assert len(found["differences"]) == 4
    assert np.max(list(found["differences"].values())) < 1e-10
    raised, no_dataset, other_types, while_read = found["errors"]
    assert "worker_1" in while_read
    assert "OSError: No such folder" in raised
    assert "made the dataset of worker 1" in raised
    assert "fn(context)=[1, 2] (of type list) for worker 1" in no_dataset
    for host in "worker 0", "worker 1":
        assert f"for {host}" in other_types
    # Nothing but what a host without rows gets, which is none as a rule; all
    # rows where the loss has to see them.
    by_towers, gathered = found["cross"]
    assert [name for name in by_towers if "spare_row" not in name] == []
    assert [name for name in gathered if "spare_row" not in name] != []
