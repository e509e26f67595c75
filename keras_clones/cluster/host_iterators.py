"""Iterators that live on several hosts, read as one."""

from typing import Any

import tensorflow as tf

from keras_clones.tensors import by_host, sharding
from keras_clones.tensors.by_host import ByHostSpec, HostBatch, OfHosts


class HostsOptional(OfHosts, tf.experimental.Optional):
    """What the iterators of all hosts have next, if any of them has.

    Its `parts` are a scalar boolean tensor, whether any has, and the parts of
    a `HostBatch`. In the loop of several steps an execution they go by the
    controller, as tensors: a `tf.experimental.Optional` of each host would
    take ten times as long.
    """

    @property
    def _type_spec(self) -> ByHostSpec:
        specs = (tf.TensorSpec([], tf.bool), self.get_value().part_specs())
        return _OptionalSpec(self.element, self.devices, specs)

    @property
    def element_spec(self) -> Any:
        """The type of the rows of all hosts, joined."""
        return self.element

    def has_value(self, name: str | None = None) -> tf.Tensor:
        """Say whether a host has rows left."""
        return self.parts[0]

    def get_value(self, name: str | None = None) -> HostBatch:
        """Return the next rows of each host, none of one that has run out."""
        return HostBatch(self.element, self.devices, self.parts[1])


class _OptionalSpec(ByHostSpec):
    @property
    def value_type(self) -> type:
        return HostsOptional


class HostsIterator(OfHosts, tf.data.Iterator):
    """The iterators of all hosts, which ends when all of them have.

    Its `parts` are the `tf.data.Iterator` of each host.
    """

    @property
    def _type_spec(self) -> ByHostSpec:
        specs = tuple(tf.type_spec_from_value(part) for part in self.parts)
        return _IteratorSpec(self.element, self.devices, specs)

    @property
    def element_spec(self) -> Any:
        """The type of the rows of all hosts, joined."""
        return self.element

    def get_next_as_optional(self) -> HostsOptional:
        """Return the next rows, if there are any."""
        have, counts, leaves = [], [], []
        with tf.name_scope("read_rows"):
            for device, part in zip(self.devices, self.parts, strict=True):
                # Errors of a dataset that fails have it, and so the task.
                with tf.device(device), tf.name_scope(_task(device)):
                    optional = part.get_next_as_optional()
                    have.append(optional.has_value())
                    rows = _rows(self.element, optional)
                    nest = by_host.packed(self.element, rows)
                    count = sharding.count_rows(nest)
                    counts.append(tf.convert_to_tensor(count))
                leaves.append(tuple(rows))
        parts = (tuple(counts), tuple(leaves))
        batch = by_host.fitted(HostBatch(self.element, self.devices, parts))
        found = (tf.reduce_any(tf.stack(have)), batch.parts)
        return HostsOptional(self.element, self.devices, found)

    def get_next(self) -> HostBatch:
        """Return the next rows.

        Raises:
            tf.errors.OutOfRangeError: If all hosts have run out.
        """
        optional = self.get_next_as_optional()
        with tf.device(self.devices[0]):
            go_on = self._end_unless(optional.has_value())
        batch = optional.get_value()
        if tf.executing_eagerly():
            return batch
        return _after(go_on, batch)

    def _end_unless(self, any_rows: tf.Tensor) -> tf.Tensor:
        """Raise what an iterator raises at its end, unless there are rows."""

        def end() -> tf.Tensor:
            # It has run out, and says so whenever it is asked.
            with tf.control_dependencies(_tensors(self.parts[0].get_next())):
                return tf.constant(False)

        return tf.cond(any_rows, lambda: tf.constant(True), end)

    def __iter__(self) -> "HostsIterator":
        return self

    def __next__(self) -> HostBatch:
        try:
            return self.get_next()
        except tf.errors.OutOfRangeError:
            raise StopIteration from None


class _IteratorSpec(ByHostSpec):
    @property
    def value_type(self) -> type:
        return HostsIterator


def _rows(element: Any, optional: tf.experimental.Optional) -> list[Any]:
    """Return the leaves of one host, without rows if it has run out."""
    specs = list(filter(by_host.is_leaf, tf.nest.flatten(element)))
    return tf.cond(
        optional.has_value(),
        lambda: by_host.flat(element, optional.get_value()),
        lambda: [by_host.empty_leaf(spec) for spec in specs],
    )


def _task(device: str) -> str:
    spec = tf.DeviceSpec.from_string(device)
    return f"{spec.job}_{spec.task}"


def _tensors(nest: Any) -> list[tf.Tensor]:
    return tf.nest.flatten(nest, expand_composites=True)


def _after(first: tf.Tensor, batch: HostBatch) -> HostBatch:
    """Return a batch that is there after something else, where it is."""
    counts, leaves = batch.parts
    kept = []
    for device, count, rows in zip(batch.devices, counts, leaves, strict=True):
        with tf.device(device), tf.control_dependencies([first]):
            kept.append(
                tf.nest.map_structure(
                    tf.identity, (count, rows), expand_composites=True
                )
            )
    parts = tuple(zip(*kept, strict=True))
    return HostBatch(batch.element, batch.devices, parts)
