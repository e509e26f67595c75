"""Gradients merge to their sum, and small tensors travel together."""

import numpy as np
import pytest
import tensorflow as tf

from keras_clones.tensors import merging, packing, transfer
from keras_clones.tensors.traced import RowGradient


def test_dense_gradients_add_up():
    merged = merging.merge([tf.constant([1.0, 2.0]), tf.constant([3.0, 5.0])])
    np.testing.assert_array_equal(merged, [4.0, 7.0])


def test_missing_gradients_are_left_out():
    assert merging.merge([None, None]) is None
    np.testing.assert_array_equal(
        merging.merge([None, tf.constant([2.0])]), [2.0]
    )


def slices(values, indices):
    return tf.IndexedSlices(
        tf.constant(values), tf.constant(indices), tf.constant([4, 1])
    )


def test_slices_keep_their_repeated_rows():
    merged = merging.merge(
        [slices([[1.0], [2.0]], [0, 3]), slices([[5.0]], [3])]
    )
    assert isinstance(merged, tf.IndexedSlices)
    np.testing.assert_array_equal(merged.indices, [0, 3, 3])
    np.testing.assert_array_equal(merged.values, [[1.0], [2.0], [5.0]])


def test_rows_merge_by_how_they_were_looked_up():
    def of_clone(offset):
        return RowGradient(
            repeated=[slices([[1.0 + offset]], [0])],
            constant=[slices([[10.0], [20.0 + offset]], [1, 2])],
            unique=[slices([[1.0], [2.0 + offset]], [0, 3 + offset])],
        )

    merged = merging.merge([of_clone(0), of_clone(1)])
    # The repeated rows, those at the same positions, those with the same id.
    np.testing.assert_array_equal(merged.indices, [0, 0, 1, 2, 0, 3, 4])
    np.testing.assert_array_equal(
        merged.values[:, 0], [1.0, 2.0, 20.0, 41.0, 2.0, 2.0, 3.0]
    )


def test_slices_and_dense_gradients_of_one_variable_add_up():
    merged = merging.merge([slices([[1.0]], [2]), tf.ones((4, 1))])
    np.testing.assert_array_equal(merged, [[1.0], [1.0], [2.0], [1.0]])


def tensors():
    return [
        tf.range(3.0),
        tf.constant(7),
        tf.zeros((300, 300)),
        tf.ones((2, 2)),
        tf.constant([[1, 2], [3, 4]]),
        tf.constant(9.0),
    ]


def test_unpack_undoes_pack():
    spec = packing.pack_spec(tensors())
    assert spec.groups == [[0, 3, 5], [1, 4]]  # the large tensor is in none
    small = [tensors()[p] for group in spec.groups for p in group]
    unpacked = packing.unpack(packing.pack(small, spec), spec)
    for one, other in zip(small, unpacked, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("in_graph", [True, False])
def test_send_brings_a_nest_as_it_was(in_graph):
    nest = {"a": tensors(), "b": [None, slices([[1.0]], [2])]}
    received = []

    def send():
        arrived = transfer.send_to_all(
            nest, "/device:CPU:0", ["/device:CPU:1", "/device:CPU:0"]
        )
        arrived += transfer.collect(
            arrived, ["/device:CPU:1", "/device:CPU:0"], "/device:CPU:2"
        )
        received.extend(arrived)
        return arrived

    for arrived in (tf.function(send) if in_graph else send)():
        tf.nest.assert_same_structure(nest, arrived, expand_composites=True)
        for one, other in zip(
            tf.nest.flatten(nest, expand_composites=True),
            tf.nest.flatten(arrived, expand_composites=True),
            strict=True,
        ):
            if one is not None:
                np.testing.assert_array_equal(one, other)
    if in_graph:
        packed = received[0]["a"][0].op
        assert packed.device == "/device:CPU:1"
        assert packed.type in ("PartitionedCall", "StatefulPartitionedCall")


@pytest.mark.parametrize("num_small", [2, 40])
def test_transfers_do_not_grow_with_the_small_tensors(num_small):
    small = [tf.ones(i + 1) for i in range(num_small)]
    spec = packing.pack_spec([*small, tf.zeros((300, 300))])
    assert len(packing.pack(small, spec)) == 1
