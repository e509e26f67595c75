"""What a step moves and how large its graph is: counted, so it cannot slip."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import clone_model
from keras_clones.benchmark.transfers import count_transfers, traffic
from keras_clones.exchange import tracing

HOME = "/device:CPU:0"
CLONE = "/device:CPU:1"


def away(model, num_clones, xla=False):
    """Put every clone on a device that is not the variables' home."""
    devices = [f"CPU:{i + 1}" for i in range(num_clones)]
    return clone_model(model, num_clones, devices=devices, jit_compile=xla)


def compiled(model, num_clones, xla=False, **kwargs):
    away(model, num_clones, xla)
    options = {**cases.DEFAULT_COMPILE, **kwargs}
    model.compile(optimizer="adam", jit_compile=False, **options)
    return model


def stack(width, depth):
    hidden = [keras.layers.Dense(width, "relu") for _ in range(depth)]
    head = keras.layers.Dense(3, "softmax")
    return keras.Sequential([keras.Input((6,)), *hidden, head])


def step_of(model, shape, rows=16, dtype="float32", name="train"):
    """Return a step function that has not run yet, on batches in memory."""
    x = np.ones((rows, *shape), dtype)
    data = tf.data.Dataset.from_tensors((x, np.zeros(rows, "int32"))).repeat()
    step = getattr(model, f"{name}_step")
    iterator = iter(data)
    return tf.function(lambda: step(next(iterator)), autograph=False)


def bytes_of(variables):
    return sum(
        v.shape.num_elements() * tf.as_dtype(v.dtype).size for v in variables
    )


@pytest.mark.full_but("metrics0-2", "None-4")
@pytest.mark.parametrize("num_clones", [1, 2, 4])
@pytest.mark.parametrize("metrics", [["accuracy"], None])
def test_a_clone_gets_the_parameters_and_gives_the_gradients(
    num_clones, metrics
):
    model = compiled(stack(512, 3), num_clones, metrics=metrics)
    moved = traffic(count_transfers(step_of(model, (6,))))[CLONE]
    parameters = bytes_of(model.trainable_variables)
    both = moved.bytes_received + moved.bytes_sent
    assert 2 * parameters <= both <= 1.02 * 2 * parameters


def test_outputs_leave_a_clone_only_for_metrics_that_see_all_rows():
    def sent(metric):
        model = compiled(stack(4, 1), 2, metrics=[metric])
        step = step_of(model, (6,), rows=4000, name="test")
        return traffic(count_transfers(step))[CLONE].bytes_sent

    outputs = 2000 * 3 * 4
    assert sent("accuracy") < 100
    assert sent(lambda y, p: keras.ops.max(p)) >= outputs


def test_transfers_do_not_grow_with_the_number_of_small_variables():
    def counted(depth):
        model = compiled(stack(8, depth), 2)
        moved = traffic(count_transfers(step_of(model, (6,))))[CLONE]
        return moved.sent, moved.received

    assert counted(2) == counted(12)


@pytest.mark.full
def test_graph_hardly_grows_with_the_clones():

    def nodes(num_clones):
        keras.backend.clear_session(free_memory=False)
        model = keras.applications.MobileNetV2(
            weights=None, input_shape=(32, 32, 3), alpha=0.35, classes=3
        )
        clone_model(model, num_clones)
        model.compile("adam", **cases.DEFAULT_COMPILE, jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        step = step_of(model, (32, 32, 3))
        graph = step.get_concrete_function().graph.as_graph_def()
        functions = sum(len(f.node_def) for f in graph.library.function)
        return len(graph.node) + functions

    assert nodes(8) <= 1.2 * nodes(1)


@pytest.mark.full_but("False-16", "False-15", "True-15")
@pytest.mark.parametrize("rows", [16, 15])
@pytest.mark.parametrize("xla", [False, True])
def test_only_the_rows_of_a_large_embedding_travel(xla, rows):
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(200_000, 64),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3, "softmax"),
        ]
    )
    compiled(model, 2, xla)
    step = step_of(model, (5,), rows=rows, dtype="int32")
    moved = traffic(count_transfers(step))[CLONE]
    needed = 8 * 5 * 64 * 4
    rest = 2_000
    assert needed <= moved.bytes_received <= needed + rest
    assert needed <= moved.bytes_sent <= needed + rest


class OwnStep(keras.Sequential):
    """Keras's step, as users write it down."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def test_an_own_step_moves_what_the_gathered_step_moves():
    def moved(make, **kwargs):
        model = make(stack(300, 3).layers)
        clone_model(model, 2, devices=["CPU:1", "CPU:2"], **kwargs)
        model.compile("adam", cases.DEFAULT_COMPILE["loss"], jit_compile=False)
        return traffic(count_transfers(step_of(model, (6,))))[CLONE]

    own = moved(OwnStep)
    assert own == moved(keras.Sequential, loss="gather")
    parameters = bytes_of(stack(300, 3).trainable_variables)
    assert own.bytes_received + own.bytes_sent <= 1.02 * 2 * parameters
    assert own.sent + own.received <= 12


@pytest.mark.parametrize("xla", [False, True])
def test_a_large_table_stays_home_in_an_own_step(xla):
    layers = [
        keras.Input((5,), dtype="int32"),
        keras.layers.Embedding(200_000, 64),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(3, "softmax"),
    ]
    model = compiled(OwnStep(layers), 2, xla, metrics=None)
    moved = traffic(count_transfers(step_of(model, (5,), dtype="int32")))
    assert moved[CLONE].bytes_received + moved[CLONE].bytes_sent < 25_000


def test_mirrors_are_sent_once_between_assignments():
    class Calls(keras.Sequential):
        """Calls its layers three times, and assigns in between if asked to."""

        assigns = False

        def train_step(self, data):
            x, _ = data
            variables = self.trainable_variables
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(self(x)) + keras.ops.mean(self(2 * x))
            if self.assigns:
                self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss + keras.ops.mean(self(x))}

    def received(assigns):
        model = Calls(stack(300, 3).layers)
        model.assigns = assigns
        compiled(model, 2)
        moved = traffic(count_transfers(step_of(model, (6,))))[CLONE]
        return moved.bytes_received

    parameters = bytes_of(stack(300, 3).trainable_variables)
    assert parameters <= received(False) < 1.1 * parameters
    assert 2 * parameters <= received(True) < 2.1 * parameters


def test_a_mirror_of_the_next_step_waits_for_its_own_update_only():
    model = compiled(stack(300, 3), 2)
    batch = (tf.ones((4, 6)), tf.zeros((4,), tf.int32))
    two_steps = tf.function(
        lambda: [model.train_step(batch), model.train_step(batch)],
        autograph=False,
    )
    operations = two_steps.get_concrete_function().graph.get_operations()
    *_, second = (
        op
        for op in operations
        if op.name.startswith("clone_0") and "PartitionedCall" in op.type
    )
    mirrors = [t.op for t in second.inputs if t.shape == (300, 300)]
    assert len(mirrors) == 2
    for mirror in mirrors:
        updates = {
            op.inputs[0].ref()
            for op in before(mirror)
            if op.type == "ResourceApplyAdam"
        }
        assert len(updates) == 1


def before(operation):
    """Return all operations that one waits for."""
    found, todo = set(), [operation]
    while todo:
        op = todo.pop()
        earlier = {*op.control_inputs, *(t.op for t in op.inputs)} - found
        found |= earlier
        todo += earlier
    return found


@pytest.mark.full_but("True")
@pytest.mark.parametrize("small", [False, True])
def test_gradients_leave_a_small_clone_as_they_are_made(small, monkeypatch):
    if not small:
        monkeypatch.setattr(tracing, "INLINE_VARIABLES", 0)
    model = compiled(stack(300, 3), 2)
    sent = [
        transfer.name
        for transfer in count_transfers(step_of(model, (6,)))
        if transfer.source == CLONE and transfer.bytes == 300 * 300 * 4
    ]
    assert len(sent) == 2
    for name in sent:
        assert ("MatMul" in name) == small


def test_towers_are_inlined_where_it_helps():
    cpus = ["/device:CPU:0", "/device:CPU:1"]
    assert tracing.inlines(cpus, 20)
    assert not tracing.inlines(cpus, 300)
    assert tracing.inlines(cpus[:1], 300)
    assert tracing.inlines(["/device:GPU:0", "/device:GPU:1"], 300)
