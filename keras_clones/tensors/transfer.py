"""Packing small tensors, and sending nests of tensors between devices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_clones.devices.hosts import host_of
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

    What several devices of another host get crosses the network once: to that
    host's CPU, and from there to them.

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
    arrived = {
        cpu: transfer.pass_on(buffers, values, cpu)
        for cpu in _relays(targets, source)
    }
    sent = []
    for target in targets:
        relayed = arrived.get(cpu_of_host(target))
        here, nest = (buffers, values) if relayed is None else relayed
        stays = target == source
        sent.append(values if stays else transfer.unpack(here, nest, target))
    return sent


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
        _Packed(transfer.pack(value, source), _tensors(value), source)
        for value, source in zip(values, sources, strict=True)
    ]
    for cpu in _relays(sources, target):
        there = [one for one in packed if cpu_of_host(one.device) == cpu]
        rest = [one for one in packed if cpu_of_host(one.device) != cpu]
        packed = [*rest, transfer.add(there, cpu)]
    total = transfer.add(packed, target)
    return transfer.unpack(
        total.buffers, _like(values[0], total.tensors), target
    )


def cpu_of_host(device: str) -> str:
    """Return the first CPU of the host that has a device."""
    return f"{host_of(device)}/device:CPU:0"


def _relays(devices: Sequence[str], home: str) -> list[str]:
    """Return the CPUs of the other hosts that have several of the devices."""
    hosts = [cpu_of_host(device) for device in devices]
    here = cpu_of_host(home)
    return [
        host
        for host in dict.fromkeys(hosts)
        if host != here and hosts.count(host) > 1
    ]


class _Packed(NamedTuple):
    """Tensors on a device: the buffers of the small ones, and all of them."""

    buffers: list[tf.Tensor]
    tensors: list[tf.Tensor]
    device: str


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

    def pass_on(
        self, buffers: list[tf.Tensor], values: Any, cpu: str
    ) -> tuple[list[tf.Tensor], Any]:
        """Return buffers and tensors on a host's CPU, small ones left out."""
        with tf.device(cpu), _scope_of(cpu):
            arrived = [_kept(buffer) for buffer in buffers]
            tensors = [
                tensor if position in self.small else _kept(tensor)
                for position, tensor in enumerate(_tensors(values))
            ]
        return arrived, _like(values, tensors)

    def add(self, packed: Sequence[_Packed], device: str) -> _Packed:
        """Add up what several devices have, on one; small ones as packed."""
        columns = zip(*(one.tensors for one in packed), strict=True)
        with tf.device(device), _scope_of(device):
            buffers = [
                tf.add_n(column)
                for column in zip(*(one.buffers for one in packed), strict=True)
            ]
            tensors = [
                column[0] if position in self.small else tf.add_n(column)
                for position, column in enumerate(columns)
            ]
        return _Packed(buffers, tensors, device)

    def unpack(self, buffers: list[tf.Tensor], like: Any, target: str) -> Any:
        tensors = dict(enumerate(_tensors(like)))
        if self.small:
            with tf.device(target), _scope_of(target):
                unpacked = self._unpack(*buffers)
            tensors.update(zip(self.small, unpacked, strict=True))
        return _like(like, list(tensors.values()))


def _kept(tensor: tf.Tensor) -> tf.Tensor:
    """Return a tensor on this device, and from here to wherever it is used.

    TensorFlow leaves out a plain copy, and sends to each of its users.
    """
    if tf.executing_eagerly():
        return tf.identity(tensor)
    return tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=tensor.shape)


def _scope_of(device: str) -> Any:
    """Return a name scope that shows the device in a profile."""
    spec = tf.DeviceSpec.from_string(device)
    name = f"on_{spec.device_type}_{spec.device_index}"
    if spec.job in (None, "localhost"):
        return tf.name_scope(name)
    return tf.name_scope(f"{name}_of_{spec.job}_{spec.task}")


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
