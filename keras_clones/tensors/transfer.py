"""Packing small tensors, and sending nests of tensors between devices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_clones.tensors.merging import merge

# A tensor of up to this many bytes travels packed with others. A copy of this
# size costs less than the fixed cost of a transfer of its own.
PACK_BYTES = 1 << 16


class PackSpec(NamedTuple):
    """How tensors are packed: groups of positions, and the tensors' shapes."""

    groups: list[list[int]]
    shapes: list[tf.TensorShape]


def pack_spec(*tensors: Sequence[tf.Tensor]) -> PackSpec:
    """Choose what travels packed: small tensors of known shape, by dtype.

    Args:
        *tensors: Sequences of as many tensors, one for each time that the
            spec is to be used.
    """
    by_dtype: dict[tf.DType, list[int]] = {}
    columns = list(zip(*tensors, strict=True))
    for position, column in enumerate(columns):
        first = column[0]
        size = first.shape.num_elements()
        fixed = all(tensor.shape == first.shape for tensor in column)
        if fixed and size is not None and size * first.dtype.size <= PACK_BYTES:
            by_dtype.setdefault(first.dtype, []).append(position)
    return PackSpec(
        groups=[group for group in by_dtype.values() if len(group) > 1],
        shapes=[column[0].shape for column in columns],
    )


def pack(tensors: Sequence[tf.Tensor], spec: PackSpec) -> list[tf.Tensor]:
    """Join the tensors of each group into one flat buffer.

    Args:
        tensors: Sequence of the tensors of all groups, in their order.
        spec: `PackSpec`.
    """
    rest, buffers = iter(tensors), []
    for group in spec.groups:
        shapes = [spec.shapes[p] for p in group]
        flat = [_flat(next(rest), shape) for shape in shapes]
        # Shapes are not known to be fixed in every function's graph.
        size = sum(shape.num_elements() for shape in shapes)
        buffers.append(tf.ensure_shape(tf.concat(flat, axis=0), [size]))
    return buffers


def unpack(buffers: Sequence[tf.Tensor], spec: PackSpec) -> list[tf.Tensor]:
    """Return the tensors that `pack` was given, in their order."""
    tensors: list[tf.Tensor] = []
    for buffer, group in zip(buffers, spec.groups, strict=True):
        shapes = [spec.shapes[p] for p in group]
        parts = tf.split(buffer, [shape.num_elements() for shape in shapes])
        tensors += [
            part if shape.rank == 1 else tf.reshape(part, shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]
    return tensors


def _flat(tensor: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """Return a tensor as one of rank 1, with no node for what is one."""
    return tensor if shape.rank == 1 else tf.reshape(tensor, [-1])


def send_to_all(values: Any, source: str, targets: Sequence[str]) -> list[Any]:
    """Send a nest of tensors from one device to several.

    Args:
        values: A nest of tensors, `IndexedSlices` and `None`s.
        source: Device string, where the tensors are.
        targets: Sequence of device strings. On `source` itself the values
            stay as they are.

    Returns:
        A list with one nest a target.
    """
    if all(target == source for target in targets):
        return [values] * len(targets)
    transfer = _Transfer([values])
    buffers = transfer.pack(values, source)
    return [
        values if target == source else transfer.unpack(buffers, values, target)
        for target in targets
    ]


def collect(
    values: list[Any], sources: Sequence[str], target: str
) -> list[Any]:
    """Send one nest of tensors a device to one device.

    Args:
        values: A list of nests of one structure, one a source.
        sources: Sequence of device strings.
        target: Device string. What is there stays as it is.

    Returns:
        A list with the nests, in their order.
    """
    transfer = _Transfer(values)
    return [
        value
        if source == target
        else transfer.unpack(transfer.pack(value, source), value, target)
        for value, source in zip(values, sources, strict=True)
    ]


def add_up(values: list[Any], sources: Sequence[str], target: str) -> Any:
    """Send one nest of tensors a device to one device, which adds them up.

    Small tensors are added up as they travel, packed.

    Args:
        values: A list of nests of dense tensors of one structure, one a
            source.
        sources: Sequence of device strings.
        target: Device string.

    Returns:
        A nest with the sums.
    """
    if len(values) == 1:
        return collect(values, sources, target)[0]
    if all(source == target for source in sources):
        return tf.nest.map_structure(lambda *column: merge(column), *values)
    transfer = _Transfer(values)
    packed = [
        transfer.pack(value, source)
        for value, source in zip(values, sources, strict=True)
    ]
    with tf.device(target):
        buffers = [tf.add_n(column) for column in zip(*packed, strict=True)]
        columns = zip(*map(_tensors, values), strict=True)
        large = [
            column[0] if position in transfer.small else tf.add_n(column)
            for position, column in enumerate(columns)
        ]
    return transfer.unpack(buffers, _like(values[0], large), target)


class _Transfer:
    """Sends nests of one structure, their small tensors packed.

    A large tensor goes by itself, as soon as it is there. Packing and
    unpacking are functions that are traced once, so that the graph does not
    grow by a node a tensor a device.
    """

    def __init__(self, nests: list[Any]) -> None:
        spec = pack_spec(*(_tensors(nest) for nest in nests))
        self.small = [position for group in spec.groups for position in group]
        self._pack = _out_of_line(lambda *tensors: pack(tensors, spec))
        self._unpack = _out_of_line(lambda *buffers: unpack(buffers, spec))

    def pack(self, values: Any, source: str) -> list[tf.Tensor]:
        if not self.small:
            return []
        tensors = _tensors(values)
        with tf.device(source), _scope_of(source):
            return self._pack(*(tensors[p] for p in self.small))

    def unpack(self, buffers: list[tf.Tensor], like: Any, target: str) -> Any:
        tensors = dict(enumerate(_tensors(like)))
        if self.small:
            with tf.device(target), _scope_of(target):
                unpacked = self._unpack(*buffers)
            tensors.update(zip(self.small, unpacked, strict=True))
        return _like(like, list(tensors.values()))


def _scope_of(device: str) -> Any:
    """Return a name scope that shows the device in a profile."""
    spec = tf.DeviceSpec.from_string(device)
    return tf.name_scope(f"on_{spec.device_type}_{spec.device_index}")


def _tensors(values: Any) -> list[tf.Tensor]:
    leaves = tf.nest.flatten(values, expand_composites=True)
    return [leaf for leaf in leaves if leaf is not None]


def _like(values: Any, tensors: Sequence[tf.Tensor]) -> Any:
    """Return a nest of the structure of another, with other tensors."""
    rest = iter(tensors)
    return tf.nest.pack_sequence_as(
        values,
        [
            None if leaf is None else next(rest)
            for leaf in tf.nest.flatten(values, expand_composites=True)
        ],
        expand_composites=True,
    )


def _out_of_line(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a function whole in a graph; leave it as it is outside of one."""
    if tf.executing_eagerly():
        return function
    return tf.function(
        function,
        autograph=False,
        experimental_attributes={"_noinline": True},
    )
