"""A batch splits into shards that join to the batch again."""

import numpy as np
import pytest
import tensorflow as tf

from keras_clones.tensors import sharding


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(8, [2, 2, 2, 2]), (10, [3, 3, 2, 2]), (4, [1] * 4), (2, [1, 1, 0, 0])],
)
def test_sizes_are_even_and_the_first_are_larger(rows, sizes):
    assert sharding.shard_sizes(rows, 4) == sizes
    dynamic = sharding.shard_sizes(tf.constant(rows), 4)
    assert [int(size) for size in dynamic] == sizes


def batch():
    return {
        "dense": tf.reshape(tf.range(21), (7, 3)),
        "flat": tf.range(7),
        "ragged": tf.ragged.constant([[1], [], [2, 3], [4], [], [5], [6, 7]]),
        "sparse": tf.sparse.from_dense(np.eye(7, 4) * np.arange(1, 8)[:, None]),
        "text": (tf.constant([f"row {i}" for i in range(7)]), None),
        "every": tf.constant(3.0),
    }


@pytest.mark.parametrize("sizes", [[7], [4, 3], [3, 2, 2], [6, 1]])
def test_join_undoes_split(sizes):
    whole = batch()
    shards = sharding.split(whole, sizes)
    assert [sharding.count_rows(shard) for shard in shards] == sizes
    assert all(float(shard["every"]) == 3 for shard in shards)
    joined = sharding.join([{**shard, "every": None} for shard in shards])
    assert joined["text"][1] is None
    for name in ("dense", "flat"):
        np.testing.assert_array_equal(joined[name], whole[name])
    np.testing.assert_array_equal(joined["text"][0], whole["text"][0])
    assert joined["ragged"].to_list() == whole["ragged"].to_list()
    np.testing.assert_array_equal(
        tf.sparse.to_dense(joined["sparse"]),
        tf.sparse.to_dense(whole["sparse"]),
    )


def test_rows_are_counted_from_every_leaf():
    assert sharding.count_rows(batch()) == 7
    assert sharding.count_rows((None, [tf.zeros((5, 2))])) == 5


def test_leaves_that_disagree_are_named():
    with pytest.raises(ValueError, match=r"'x\[1\]': \(4, 3\)"):
        sharding.count_rows({"x": [tf.zeros((5, 3)), tf.zeros((4, 3))]})


def test_leaves_that_disagree_when_the_step_runs_are_named():
    @tf.function(input_signature=[tf.TensorSpec([None])] * 2)
    def count(one, other):
        return sharding.count_rows({"x": one, "y": other})

    assert int(count(tf.zeros(4), tf.zeros(4))) == 4
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        count(tf.zeros(4), tf.zeros(3))
    message = sharding.disagreement(caught.value)
    assert "x 4 y 3" in message
    assert message.endswith("repeated for each row.")
    assert sharding.disagreement(ValueError("another")) is None


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="with a batch axis"):
        sharding.count_rows({"x": tf.constant(1.0), "y": None})
