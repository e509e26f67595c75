"""Sending nests of tensors between devices, their small tensors packed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_clones.devices.hosts import host_of
from keras_clones.tensors.merging import merge
from keras_clones.tensors.packing import pack, pack_spec, unpack


def send_to_all(values: Any, source: str, targets: Sequence[str]) -> list[Any]:
    """Send a nest of tensors from one device to several.

    What several devices of another host get crosses the network once: to that
    host's CPU, and from there to them. What GPUs get of a CPU is copied on it
    first, once for all, since then they can take it from there by themselves.

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
    ready = {
        cpu: transfer.pin(*arrived.get(cpu, (buffers, values)), cpu)
        for cpu in dict.fromkeys(map(cpu_of_host, filter(_is_gpu, targets)))
        if cpu in (source, *arrived)
    }
    sent = []
    for target in targets:
        cpu = cpu_of_host(target)
        here, nest = arrived.get(cpu, (buffers, values))
        if _is_gpu(target):
            here, nest = ready.get(cpu, (here, nest))
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
        return self._each(_kept, buffers, values, cpu)

    def pin(
        self, buffers: list[tf.Tensor], values: Any, cpu: str
    ) -> tuple[list[tf.Tensor], Any]:
        """Return them in memory of a CPU that its GPUs copy from directly.

        TensorFlow gives an operation such memory for what goes to a GPU next.
        A variable's own value is in other memory, of which a GPU's driver
        makes a copy first, and the step waits: on an H200 a transformer of 98
        M weights on two clones took 203 ms a step, and 95 with this copy.
        """
        return self._each(_copied, buffers, values, cpu)

    def _each(
        self,
        function: Callable[[tf.Tensor], tf.Tensor],
        buffers: list[tf.Tensor],
        values: Any,
        device: str,
    ) -> tuple[list[tf.Tensor], Any]:
        with tf.device(device), _scope_of(device):
            there = [function(buffer) for buffer in buffers]
            tensors = [
                tensor if position in self.small else function(tensor)
                for position, tensor in enumerate(_tensors(values))
            ]
        return there, _like(values, tensors)

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


def _is_gpu(device: str) -> bool:
    return tf.DeviceSpec.from_string(device).device_type == "GPU"


def _copied(tensor: tf.Tensor) -> tf.Tensor:
    return tf.raw_ops.Snapshot(input=tensor)


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
