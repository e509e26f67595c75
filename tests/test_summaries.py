"""What TensorBoard shows of clones, against plain Keras on one device."""

import functools
import json
import pathlib
import time
import urllib.request

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard import program
from tensorboard.backend.event_processing import event_accumulator

from keras_clones import CloneSummaries, clone_model

STEPS = 3


def tensorboard(folder, update_freq=1):
    return keras.callbacks.TensorBoard(
        folder, update_freq=update_freq, write_graph=False
    )


def read(folder):
    """Return the steps and values of every tag, by TensorBoard's reader."""
    log = event_accumulator.EventAccumulator(
        str(pathlib.Path(folder) / "train"),
        size_guidance={event_accumulator.TENSORS: 0},
    )
    log.Reload()
    return {
        tag: {e.step: tf.make_ndarray(e.tensor_proto) for e in log.Tensors(tag)}
        for tag in log.Tags()["tensors"]
    }


def of_clones(log):
    """Return the tags that Keras's own callback does not write."""
    return {t for t in log if not t.startswith(("batch_", "epoch_"))}


def one_device(model, data):
    """Train a plain model, and return what each step came to."""
    found = []
    for x, y in data:
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        variables = model.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        found.append((loss, [tf.convert_to_tensor(g) for g in gradients]))
        model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return found


def shard_losses(model, x, y, sizes):
    """Return the losses of shards, each by itself, on one device."""
    pairs = zip(tf.split(x, sizes), tf.split(y, sizes), strict=True)
    return [float(model.compute_loss(a, b, model(a))) for a, b in pairs]


def data_of(name, rows=10, steps=STEPS):
    x, y = cases.arrays(rows * steps)[name]
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(
        rows, drop_remainder=True
    )


def fit(model, data, folder, summaries, update_freq=1, **kwargs):
    callbacks = [tensorboard(folder, update_freq)]
    if summaries is not None:
        callbacks.append(summaries)
    model.fit(data, callbacks=callbacks, verbose=0, **kwargs)
    return read(folder)


@pytest.mark.full_but("clones-False")
@pytest.mark.parametrize(
    ("loss", "eagerly"),
    [("clones", False), ("gather", False), ("clones", True)],
)
def test_losses_and_gradients_are_those_of_one_device(
    loss, eagerly, float64, tmp_path
):
    plain = cases.compiled("mlp")
    firsts = [
        shard_losses(plain, x, y, [4, 3, 3]) for x, y in data_of("mlp").take(1)
    ]
    expected = one_device(plain, data_of("mlp"))
    model = clone_model(
        cases.compiled("mlp", run_eagerly=eagerly), 3, loss=loss
    )
    log = fit(model, data_of("mlp"), tmp_path, CloneSummaries(True))
    assert cases.difference(cases.weights(plain), cases.weights(model)) < 1e-12
    received = [log[f"clone_{i}/loss"][1] for i in range(3)]
    np.testing.assert_allclose(received, firsts[0], rtol=1e-6)
    for step, (total, gradients) in enumerate(expected, start=1):
        losses = [log[f"clone_{i}/loss"][step] for i in range(3)]
        weighted = np.dot([0.4, 0.3, 0.3], losses)
        assert weighted == pytest.approx(float(total), rel=1e-6)
        norm = float(tf.linalg.global_norm(gradients))
        assert log["gradient_norm"][step] == pytest.approx(norm, rel=1e-6)
        for variable, gradient in zip(
            model.trainable_variables, gradients, strict=True
        ):
            norm = log[f"{variable.path}/gradient_norm"][step]
            assert norm == pytest.approx(np.linalg.norm(gradient), rel=1e-6)
            buckets = log[f"{variable.path}/gradient"][step]
            assert buckets[:, 2].sum() == tf.size(gradient).numpy()
            assert buckets[0, 0] == pytest.approx(np.min(gradient), rel=1e-6)
            assert buckets[-1, 1] == pytest.approx(np.max(gradient), rel=1e-6)
    assert len(of_clones(log)) == 3 + 1 + 2 * len(model.trainable_variables)


@pytest.mark.full
def test_gathered_losses_of_several_outputs(tmp_path):
    x, y = cases.arrays(20)["two_by_two"]
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(10, True)
    still = {"optimizer": keras.optimizers.SGD(0.0)}
    plain = cases.compiled("two_by_two", run_eagerly=True, **still)
    both = plain.evaluate(data, return_dict=True, verbose=0)
    second = plain.evaluate(data.skip(1), return_dict=True, verbose=0)
    model = clone_model(cases.compiled("two_by_two", **still), 4, loss="gather")
    log = fit(model, data, tmp_path, CloneSummaries(), update_freq=2)
    losses = [log[f"clone_{i}/loss"][2] for i in range(4)]
    weighted = np.dot([0.3, 0.3, 0.2, 0.2], losses)
    assert weighted == pytest.approx(second["loss"], rel=1e-5)
    tags = {*(f"clone_{i}/loss" for i in range(4)), "gradient_norm"}
    assert of_clones(log) == tags
    # The steps that are written count no more than others for Keras.
    for name, value in both.items():
        assert log[f"epoch_{name}"][0] == pytest.approx(value, rel=1e-5)


def words():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(40, 4, mask_zero=True),
            keras.layers.Dense(40, "softmax"),
        ]
    )


def test_masks_and_sparse_gradients(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 40, (2, 8, 5)).astype("int32")
    data = tf.data.Dataset.from_tensors((x, y))
    plain, model = words(), clone_model(words(), 2)
    for one in (plain, model):
        # The loss scale is no part of the gradient that is written.
        one.compile(
            keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(), initial_scale=64.0
            ),
            "sparse_categorical_crossentropy",
        )
    with tf.GradientTape() as tape:
        loss = plain.compute_loss(x, y, plain(x))
    gradients = [
        np.asarray(tf.convert_to_tensor(g))
        for g in tape.gradient(loss, [v.value for v in plain.weights])
    ]
    expected = shard_losses(plain, x, y, [4, 4])
    log = fit(model, data, tmp_path, CloneSummaries(True))
    received = [log[f"clone_{i}/loss"][1] for i in range(2)]
    np.testing.assert_allclose(received, expected, rtol=1e-5)
    norms = [np.linalg.norm(g) for g in gradients]
    assert log["gradient_norm"][1] == pytest.approx(
        np.linalg.norm(norms), rel=1e-5
    )
    for variable, norm in zip(model.weights, norms, strict=True):
        found = log[f"{variable.path}/gradient_norm"][1]
        assert found == pytest.approx(norm, rel=1e-5)
    # Only the rows that were looked up are in the histogram.
    table = model.weights[0]
    buckets = log[f"{table.path}/gradient"][1]
    assert buckets[:, 2].sum() == 4 * len(np.unique(x))
    assert buckets[-1, 1] == pytest.approx(gradients[0].max(), rel=1e-5)


@pytest.mark.full
def test_clones_without_rows_write_no_loss(tmp_path):
    x, y = cases.arrays(6)["mlp"]
    model = clone_model(cases.compiled("mlp"), 4)
    data = cases.batches(x, y, [4, 2])
    log = fit(model, data, tmp_path, CloneSummaries())
    assert [*log["clone_0/loss"]] == [1, 2]
    assert [*log["clone_1/loss"]] == [1, 2]
    assert [*log["clone_2/loss"]] == [*log["clone_3/loss"]] == [1]
    assert [*log["gradient_norm"]] == [1, 2]


@pytest.mark.parametrize(
    ("update_freq", "per_execution", "steps"),
    [(2, 1, [2, 4, 6]), ("batch", 3, [1, 2])],
)
def test_steps_are_those_of_the_tensorboard_callback(
    update_freq, per_execution, steps, tmp_path
):
    model = cases.compiled("mlp", steps_per_execution=per_execution)
    clone_model(model, 2)
    data = data_of("mlp")
    log = fit(
        *(model, data, tmp_path, CloneSummaries(True), update_freq),
        epochs=2,
        validation_data=data if per_execution == 1 else None,
    )
    if update_freq == 2 and keras.__version__.startswith("3.12."):
        # This Keras writes each step, whatever `update_freq` is.
        steps = [1, 2, 3, 4, 5, 6]
    # Keras leaves its own losses out at the end of some epochs.
    assert {*log["batch_loss"]} <= {*steps}
    for tag in of_clones(log):
        assert [*log[tag]] == steps, tag
    # Steps that are written differ.
    assert len({float(v) for v in log["gradient_norm"].values()}) == len(steps)


def num_nodes(model):
    step = tf.function(model.train_step, autograph=False)
    graph = step.get_concrete_function(next(iter(data_of("mlp")))).graph
    definition = graph.as_graph_def()
    inner = sum(len(f.node_def) for f in definition.library.function)
    return len(definition.node) + inner


def test_no_cost_when_off(tmp_path):
    model = clone_model(cases.compiled("mlp"), 3)
    model.optimizer.build(model.trainable_variables)
    before = num_nodes(model)
    summaries = CloneSummaries()
    summaries.set_model(model)
    writer = tf.summary.create_file_writer(str(tmp_path))
    with writer.as_default(step=0):
        summaries.on_train_begin()
    watched = num_nodes(model)
    summaries.on_train_end()
    assert num_nodes(model) == before < watched


@pytest.mark.full
def test_training_is_the_same_with_and_without(float64, tmp_path):
    summaries = CloneSummaries(True)
    without, model = (clone_model(cases.compiled("mlp"), 2) for _ in range(2))
    without.fit(data_of("mlp"), epochs=2, verbose=0)
    one, two = (
        fit(model, data_of("mlp"), tmp_path / name, summaries)["gradient_norm"]
        for name in ("one", "two")
    )
    assert cases.difference(cases.weights(without), cases.weights(model)) == 0
    # A callback that is used again writes into the new log.
    assert [*one] == [*two] == [1, 2, 3]
    assert one[1] != two[1]


class Sums(CloneSummaries):
    """Summaries of a user's own, which keep what they wrote."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.seen = []

    def _write(self, watch):
        self.seen.append([*watch.losses.numpy(), *watch.norms.numpy()])


@pytest.mark.full
@pytest.mark.parametrize("loss", ["clones", "gather"])
def test_several_summaries_at_once(loss, float64, tmp_path):
    make = functools.partial(clone_model, num_clones=2, loss=loss)
    alone, first, second = Sums(), Sums(), Sums(True)
    fit(make(cases.compiled("mlp")), data_of("mlp"), tmp_path / "a", alone)
    model = make(cases.compiled("mlp"))
    callbacks = [tensorboard(tmp_path / "b"), first, second]
    model.fit(data_of("mlp"), callbacks=callbacks, verbose=0)
    assert len(alone.seen) == STEPS and np.all(alone.seen)
    assert first.seen == second.seen == alone.seen


@pytest.mark.full
def test_each_summaries_ends_by_itself(tmp_path):
    model = clone_model(cases.compiled("mlp"), 2)
    model.optimizer.build(model.trainable_variables)
    before = num_nodes(model)
    first, second = Sums(), Sums()
    batch = next(iter(data_of("mlp")))
    with tf.summary.create_file_writer(str(tmp_path)).as_default(step=0):
        for summaries in (first, second):
            summaries.set_model(model)
            summaries.on_train_begin()
        both = num_nodes(model)
        first.on_train_end()
        assert before < num_nodes(model) < both
        second.on_train_batch_begin(0)
        model.train_on_batch(*batch)
        second.on_train_batch_end(0)
    assert np.all(second.seen)
    second.on_train_end()
    assert num_nodes(model) == before


def test_summaries_of_a_failed_training_are_forgotten(tmp_path):
    model = clone_model(cases.compiled("mlp"), 2)
    model.optimizer.build(model.trainable_variables)
    writer = tf.summary.create_file_writer(str(tmp_path))
    nodes = []
    for _ in range(2):
        # Nothing ends this training, and nothing keeps the callback.
        summaries = CloneSummaries()
        summaries.set_model(model)
        with writer.as_default(step=0):
            summaries.on_train_begin()
        nodes.append(num_nodes(model))
        del summaries
    assert nodes[0] == nodes[1]


class Own(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def own():
    model = Own([keras.Input((6,)), keras.layers.Dense(3, "softmax")])
    return clone_model(model, 2)


@pytest.mark.parametrize(
    ("make", "callbacks", "message"),
    [
        (cases.mlp, lambda f: [tensorboard(f)], r"`clone_model\(model\)` fir"),
        (own, lambda f: [tensorboard(f)], "has its own"),
        (lambda: clone_model(cases.mlp(), 2), lambda f: [], "update_freq=100"),
        (
            lambda: clone_model(cases.mlp(), 2),
            lambda f: [tensorboard(f, "epoch")],
            "'epoch' by default",
        ),
    ],
    ids=["plain", "own_step", "no_tensorboard", "epochs"],
)
def test_trainings_that_have_no_summaries(make, callbacks, message, tmp_path):
    model = cases.compiled("mlp", make())
    before = cases.weights(model)
    both = [*callbacks(tmp_path), CloneSummaries()]
    with pytest.raises(ValueError, match=message):
        model.fit(data_of("mlp"), callbacks=both, verbose=0)
    for callback in both[:-1]:
        # Keras does not end the callbacks of a training that failed.
        callback.on_train_end()
    assert cases.difference(before, cases.weights(model)) == 0


def test_summaries_before_tensorboard_are_refused(tmp_path):
    model = clone_model(cases.compiled("mlp"), 2)
    with pytest.raises(ValueError, match="stands before it"):
        model.fit(
            data_of("mlp"),
            callbacks=[CloneSummaries(), tensorboard(tmp_path)],
            verbose=0,
        )


@pytest.mark.parametrize("bad", [1, None, "yes"])
def test_summarize_gradients_of_a_wrong_type(bad):
    with pytest.raises(TypeError, match="`summarize_gradients` must"):
        CloneSummaries(bad)


def test_no_tensorboard_at_all(monkeypatch):
    monkeypatch.delattr(tf.summary, "scalar")
    model = clone_model(cases.compiled("mlp"), 2)
    with pytest.raises(ImportError, match="`pip install tensorboard`"):
        model.fit(data_of("mlp"), callbacks=[CloneSummaries()], verbose=0)


@pytest.mark.full
def test_tensorboard_itself_shows_them(tmp_path):
    model = clone_model(cases.compiled("mlp"), 2)
    log = fit(model, data_of("mlp"), tmp_path, CloneSummaries(True))
    server = program.TensorBoard()
    server.configure(
        logdir=str(tmp_path), port=0, load_fast="false", reload_interval=1
    )
    address = server.launch()

    def ask(path):
        with urllib.request.urlopen(f"{address}data/plugin/{path}") as answer:
            return json.load(answer)

    deadline = time.monotonic() + 20
    while not ask("scalars/tags").get("train"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    scalars = ask("scalars/tags")["train"]
    assert {"clone_0/loss", "clone_1/loss", "gradient_norm"} <= {*scalars}
    for tag in ("clone_1/loss", "gradient_norm"):
        shown = ask(f"scalars/scalars?run=train&tag={tag}")
        assert [(step, value) for _, step, value in shown] == [
            (step, pytest.approx(float(value)))
            for step, value in log[tag].items()
        ]
    histograms = ask("histograms/tags")["train"]
    assert {f"{v.path}/gradient" for v in model.trainable_variables} <= {
        *histograms
    }
