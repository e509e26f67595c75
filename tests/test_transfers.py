"""Transfers are counted with the bytes that graphs made by hand must send."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import clone_model
from keras_clones.benchmark.transfers import (
    Traffic,
    Transfer,
    count_transfers,
    traffic,
)
from keras_clones.devices.naming import canonical_device
from keras_clones.tensors import transfer

HERE, THERE = "/device:CPU:0", "/device:CPU:1"


def out_of_line(function):
    return tf.function(
        function,
        autograph=False,
        experimental_attributes={"_noinline": True},
    )


def counted(function, *inputs):
    """Return the source, target and bytes of what a new graph sends."""
    traced = tf.function(function, autograph=False)
    found = count_transfers(lambda: traced(*inputs))
    return [(t.source, t.target, t.bytes) for t in found]


def test_a_tensor_goes_there_and_a_number_comes_back():
    def step(x):
        with tf.device(THERE):
            total = tf.reduce_sum(x)
        with tf.device(HERE):
            return total + 1.0

    # 3 * 5 float32 numbers go, one comes back.
    found = counted(step, tf.ones((3, 5)))
    assert sorted(found) == [(HERE, THERE, 60), (THERE, HERE, 4)]


def test_a_tensor_used_twice_goes_once():
    def step(x):
        with tf.device(THERE):
            return tf.reduce_sum(x), tf.reduce_max(x)

    assert counted(step, tf.ones((7,), tf.float64)) == [(HERE, THERE, 56)]


def test_a_variable_that_is_read_goes_as_its_value():
    with tf.device(HERE):
        variable = tf.Variable(tf.ones((4, 6)))

    def step():
        with tf.device(HERE):
            value = variable.read_value()
        with tf.device(THERE):
            return tf.reduce_sum(value)

    assert counted(step) == [(HERE, THERE, 96)]


def test_nothing_goes_where_all_is_on_one_device():
    def step(x):
        with tf.device(HERE):
            return tf.reduce_sum(x * x)

    assert counted(step, tf.ones((3,))) == []


def test_results_of_a_function_out_of_line_have_their_own_sizes():
    @out_of_line
    def several(x):
        return tf.reduce_sum(x), tf.concat([x, x], 0), tf.reduce_max(x, 1)

    def step(x):
        with tf.device(THERE):
            _, double, largest = several(x)
        with tf.device(HERE):
            return double + 1.0, largest + 1.0

    # The sum is not used: TensorFlow takes it out, and the rest moves up.
    found = counted(step, tf.ones((2, 5)))
    assert sorted(found) == [
        (HERE, THERE, 40),
        (THERE, HERE, 8),
        (THERE, HERE, 80),
    ]


def test_devices_inside_a_function_out_of_line_count():
    with tf.device(HERE):
        table = tf.Variable(tf.ones((100, 8)))

    @out_of_line
    def look_up(ids):
        with tf.device(HERE):
            rows = table.sparse_read(ids)
        return tf.reduce_sum(rows, 0), tf.reduce_max(rows, 0)

    def step(ids):
        with tf.device(THERE):
            largest = look_up(tf.reverse(ids, [0]))[1]
        with tf.device(HERE):
            return largest + 1.0

    # The ids go, come back for the rows, the rows go, the largest comes.
    found = counted(step, tf.constant([3, 1, 4, 1, 5]))
    assert sorted(found) == [
        (HERE, THERE, 20),
        (HERE, THERE, 160),
        (THERE, HERE, 20),
        (THERE, HERE, 32),
    ]


def test_gradients_of_a_convolution_have_their_own_sizes():
    def step(x, filters, bias):
        with tf.device(HERE), tf.GradientTape() as tape:
            tape.watch([filters, bias])
            y = tf.nn.conv2d(x, filters, 1, "SAME")
            y = tf.nn.relu(tf.nn.bias_add(y, bias))
        with tf.device(HERE):
            gradients = tape.gradient(y, [filters, bias])
        with tf.device(THERE):
            return [gradient + 1.0 for gradient in gradients]

    inputs = tf.ones((2, 4, 4, 3)), tf.ones((3, 3, 3, 5)), tf.ones((5,))
    found = counted(step, *inputs)
    assert sorted(found) == [(HERE, THERE, 20), (HERE, THERE, 540)]


def test_a_clone_gets_the_parameters_and_gives_the_gradients(monkeypatch):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5)])
    clone_model(model, devices=["CPU:0", "CPU:1"])
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensor_slices(
        (np.ones((8, 6), "float32"), np.ones((8, 5), "float32"))
    ).batch(8, drop_remainder=True)
    clone = traffic(
        count_transfers(lambda: model.fit(data, epochs=1, verbose=0))
    )[THERE]
    parameters, shard, share, loss = 35 * 4, 4 * 11 * 4, 24, 4
    assert clone.bytes_received - parameters - shard in range(share + 1)
    assert clone.bytes_sent - parameters in range(loss + 1)


def test_traffic_adds_up_by_device():
    found = traffic(
        [
            Transfer(HERE, THERE, 10, "a"),
            Transfer(HERE, THERE, 5, "b"),
            Transfer(THERE, HERE, 1, "c"),
        ]
    )
    assert found == {
        HERE: Traffic(15, 1, sent=2, received=1),
        THERE: Traffic(1, 15, sent=1, received=2),
    }


def test_a_size_that_is_not_static_is_an_error():
    def step(x):
        with tf.device(HERE):
            some = tf.boolean_mask(x, x > 1.0)
        with tf.device(THERE):
            return tf.reduce_sum(some)

    with pytest.raises(ValueError, match=r"static size.*drop_remainder=True"):
        counted(step, tf.range(4.0))
    traced = tf.function(step, autograph=False)
    x = tf.range(4.0)
    (found,) = count_transfers(lambda: traced(x), unknown=-1)
    assert (found.source, found.target, found.bytes) == (HERE, THERE, -1)


def test_a_graph_that_was_counted_before_is_an_error():
    function = tf.function(lambda: tf.ones(()))
    assert count_transfers(function) == []
    with pytest.raises(ValueError, match="for the first time"):
        count_transfers(function)


def test_gpus_take_what_they_get_from_a_copy_that_is_made_once():
    """There is no GPU here, but a graph may have operations for one."""
    gpus = ["/device:GPU:0", "/device:GPU:1"]

    def snapshots(targets):
        with tf.Graph().as_default() as graph, tf.device(HERE):
            large = [tf.ones((200, 200)), tf.ones((300, 300), tf.float64)]
            small = [tf.ones((3,)), tf.ones((4,))]
            sent = transfer.send_to_all([*large, *small], HERE, targets)
            for target, nest in zip(targets, sent, strict=True):
                for value in nest[: len(large)]:
                    with tf.device(target):
                        tf.identity(value)
        used = [op for op in graph.get_operations() if op.type == "Snapshot"]
        assert {canonical_device(op.device) for op in used} <= {HERE}
        for one in used:
            users = {op.device for op in one.outputs[0].consumers()}
            assert {canonical_device(user) for user in users} <= {*targets}
        return used

    # Two large ones, and the small ones in one buffer.
    assert len(snapshots(gpus)) == 3
    assert len(snapshots([HERE, *gpus])) == 3
    assert snapshots([HERE, THERE]) == []
