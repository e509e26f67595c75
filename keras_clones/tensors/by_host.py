"""A global batch whose rows are where they were read: some on each host."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_clones import _tf
from keras_clones.tensors import sharding


class ByHostSpec(tf.TypeSpec):
    """The type of something of which each host has a part.

    Args:
        element: Nest of type specs, of what all hosts have together.
        devices: Tuple of device strings, the CPU of each host.
        parts: Nest of the type specs of the parts.
    """

    def __init__(self, element: Any, devices: Any, parts: Any) -> None:
        self.element = element
        self.devices = devices
        self._parts = parts

    @property
    def value_type(self) -> type:
        """The class of what it is the type of."""
        return HostBatch

    def _serialize(self) -> tuple[Any, ...]:
        return self.element, self.devices, self._parts

    @property
    def _component_specs(self) -> Any:
        return self._parts

    def _to_components(self, value: Any) -> Any:
        return value.parts

    def _from_components(self, components: Any) -> Any:
        return self.value_type(self.element, self.devices, components)


class OfHosts:
    """Something of which each host has a part.

    Args:
        element: Nest of type specs, of what all hosts have together: the rows
            of the first host, of the second, and so on. First axes are open.
        devices: Tuple of device strings, the CPU of each host.
        parts: Nest of what the hosts have, tensors or composites of them.
    """

    def __init__(self, element: Any, devices: Any, parts: Any) -> None:
        self.element = element
        self.devices = devices
        self.parts = parts


class HostBatch(OfHosts, _tf.CompositeTensor):
    """A global batch whose rows are where they were read.

    Its `parts` are a tuple `(counts, leaves)`: a tuple of scalar int32
    tensors, how many rows each host has, and a tuple with a tuple of leaves
    for each host. What is no tensor is left out, and `None` stands for it.
    """

    @property
    def _type_spec(self) -> ByHostSpec:
        return ByHostSpec(self.element, self.devices, self.part_specs())

    def part_specs(self) -> Any:
        """Return the types of the parts, whatever the number of rows.

        So a step is traced once for all.
        """
        leaves = tuple(filter(is_leaf, tf.nest.flatten(self.element)))
        num = len(self.devices)
        return (tf.TensorSpec([], tf.int32),) * num, (leaves,) * num

    @property
    def counts(self) -> Sequence[tf.Tensor]:
        """How many rows each host has."""
        return self.parts[0]

    @property
    def rows(self) -> tf.Tensor:
        """How many rows there are, as a scalar int32 tensor."""
        return tf.add_n(list(self.counts))

    def of_each_host(self) -> list[Any]:
        """Return one nest a host: its rows."""
        return [packed(self.element, leaves) for leaves in self.parts[1]]

    def joined(self) -> Any:
        """Return the rows of all hosts as one nest, on the current device."""
        columns = zip(*self.parts[1], strict=True)
        leaves = [self.joined_leaf(column) for column in columns]
        return packed(self.element, leaves)

    def joined_leaf(self, column: Sequence[Any]) -> Any:
        """Join one leaf of each host; one without rows is the first's."""
        if sharding.has_rows(column[0]):
            return sharding.join_leaf(tuple(column))
        first = tf.argmax(tf.stack(self.counts) > 0)
        return tf.gather(tf.stack(column), first)


def joined(data: Any) -> Any:
    """Return data whose rows are all in one place, as most data is."""
    return data.joined() if isinstance(data, HostBatch) else data


def count_rows(data: Any, batch: Any) -> sharding.Rows:
    """Return how many rows data has, without joining those of several hosts.

    Args:
        data: What a step of Keras is called with.
        batch: The nest of tensors in it, joined.
    """
    if isinstance(data, HostBatch):
        return data.rows
    return sharding.count_rows(batch)


def is_leaf(spec: Any) -> bool:
    """Say whether a type is of a tensor; else nothing stands for it."""
    kinds = (tf.TensorSpec, tf.RaggedTensorSpec, tf.SparseTensorSpec)
    return isinstance(spec, kinds)


def packed(element: Any, leaves: Sequence[Any]) -> Any:
    """Return leaves as a nest, with `None` where there is none."""
    rest = iter(leaves)
    return tf.nest.pack_sequence_as(
        element,
        [
            next(rest) if is_leaf(spec) else None
            for spec in tf.nest.flatten(element)
        ],
    )


def flat(element: Any, value: Any) -> list[Any]:
    """Return the leaves of a nest for which there is a type."""
    pairs = zip(tf.nest.flatten(element), tf.nest.flatten(value), strict=True)
    return [leaf for spec, leaf in pairs if is_leaf(spec)]


def empty_leaf(spec: Any) -> Any:
    """Return a tensor of a type with no rows, on the current device."""
    if isinstance(spec, tf.RaggedTensorSpec):
        inner = _known(spec.shape[spec.ragged_rank + 1 :])
        values = tf.zeros([0, *inner], spec.dtype)
        for _ in range(spec.ragged_rank):
            values = tf.RaggedTensor.from_row_splits(
                values, tf.zeros([1], spec.row_splits_dtype), validate=False
            )
        return values
    if isinstance(spec, tf.SparseTensorSpec):
        rank = spec.shape.rank
        return tf.SparseTensor(
            tf.zeros([0, rank], tf.int64),
            tf.zeros([0], spec.dtype),
            [0, *_known(spec.shape[1:])],
        )
    return tf.zeros(_known(spec.shape), spec.dtype)


def _known(shape: tf.TensorShape) -> list[int]:
    return [size or 0 for size in shape.as_list()]


def fitted(batch: HostBatch) -> HostBatch:
    """Let what hosts without rows have fit to what the others have.

    Where a size besides the rows is not known before a step runs, only those
    that have rows tell it.
    """
    counts, leaves = batch.parts
    specs = filter(is_leaf, tf.nest.flatten(batch.element))
    columns = [
        _fitted_leaf(spec, column, counts, batch.devices)
        for spec, column in zip(specs, zip(*leaves, strict=True), strict=True)
    ]
    rows = tuple(zip(*columns, strict=True))
    return HostBatch(batch.element, batch.devices, (counts, rows))


def _fitted_leaf(
    spec: Any, column: Sequence[Any], counts: Any, devices: Any
) -> Sequence[Any]:
    open_sizes = spec.shape.rank and not spec.shape[1:].is_fully_defined()
    if isinstance(spec, tf.RaggedTensorSpec) or not open_sizes:
        return column
    shapes = [tf.shape(leaf, out_type=tf.int64) for leaf in column]
    inner = tf.reduce_max(tf.stack(shapes), axis=0)[1:]
    wanted = tf.concat([[tf.constant(0, tf.int64)], inner], axis=0)
    found = []
    for i, leaf in enumerate(column):
        with tf.device(devices[i]):
            shape = tf.where(counts[i] > 0, shapes[i], wanted)
            if isinstance(leaf, tf.SparseTensor):
                leaf = tf.SparseTensor(leaf.indices, leaf.values, shape)
            else:
                leaf = tf.ensure_shape(tf.reshape(leaf, shape), spec.shape)
        found.append(leaf)
    return found
