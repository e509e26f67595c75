"""The datasets of several hosts, as one, and what becomes of a lost host's."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_clones import _tf
from keras_clones.cluster import watch
from keras_clones.cluster.host_iterators import HostsIterator
from keras_clones.devices.hosts import host_of
from keras_clones.tensors import by_host, sharding


class HostsDataset(tf.data.Dataset):
    """The datasets of all hosts, whose elements are `HostBatch`es.

    Args:
        element: As for `OfHosts`.
        devices: As for `OfHosts`.
        datasets: Sequence of the `tf.data.Dataset` of each host.
        make: Function of the index of a host and of a device, which makes the
            host's dataset anew, to be read on that device.
    """

    def __init__(
        self,
        element: Any,
        devices: Any,
        datasets: Sequence[tf.data.Dataset],
        make: Callable[[int, str], tf.data.Dataset],
    ) -> None:
        self._element = element
        self._devices = list(devices)
        self._datasets = list(datasets)
        self._make = make
        super().__init__(_tf.dataset_handle(tf.data.Dataset.range(0)))

    def _inputs(self) -> list[tf.data.Dataset]:
        return []

    @property
    def _variant_tensor(self) -> tf.Tensor:
        raise TypeError(
            "Expected the dataset of `worker_dataset` to be passed to `fit`, "
            "`evaluate` or `predict` of a cloned model as it is. Transform "
            "the dataset of each host inside of `fn`. `class_weight` is such "
            "a transformation, too: let `fn` return sample weights."
        )

    @property
    def element_spec(self) -> Any:
        """The type of the rows of all hosts, joined."""
        return self._element

    def cardinality(self, name: str | None = None) -> tf.Tensor:
        """Return that of the longest, where that is known."""
        found = self._on_each(lambda dataset: int(dataset.cardinality()))
        if tf.data.INFINITE_CARDINALITY in found:
            return tf.constant(tf.data.INFINITE_CARDINALITY, tf.int64)
        if tf.data.UNKNOWN_CARDINALITY in found:
            return tf.constant(tf.data.UNKNOWN_CARDINALITY, tf.int64)
        return tf.constant(max(found), tf.int64)

    def __iter__(self) -> HostsIterator:
        iterators = tuple(self._on_each(iter))
        # A step is not behind what its hosts are still to do.
        _tf.wait_for_all()
        return OneByOne(self, self._element, self._devices, iterators)

    def _on_each(self, function: Callable[[tf.data.Dataset], Any]) -> list[Any]:
        self.leave_lost_hosts()
        found = []
        for device, dataset in zip(self._devices, self._datasets, strict=True):
            with tf.device(device):
                found.append(function(dataset))
        return found

    def leave_lost_hosts(self) -> None:
        """Let others read what hosts that are lost were to read."""
        lost = {one for one in self._devices if watch.is_lost(host_of(one))}
        left = [one for one in self._devices if one not in lost]
        for i, device in enumerate(self._devices):
            if device in lost and left:
                spec = tf.DeviceSpec.from_string(device)
                _tf.forget_task(spec.job, spec.task)
                device = min(left, key=self._devices.count)
                self._datasets[i] = self._make(i, device)
                self._devices[i] = device

    def part(self, i: int, skipped: int) -> tuple[str, Any]:
        """Return where a host's dataset is read, and a new iterator of it."""
        with tf.device(self._devices[i]):
            return self._devices[i], iter(self._datasets[i].skip(skipped))


class OneByOne(HostsIterator):
    """The iterators of all hosts, which can also be read host by host.

    Attributes:
        behind: List of integers, how many batches of each host are to be read
            before it is as far as the others.

    Args:
        dataset: `HostsDataset` that it is of.
        element: As for `OfHosts`.
        devices: As for `OfHosts`.
        parts: Tuple of the `tf.data.Iterator` of each host.
    """

    def __init__(
        self, dataset: HostsDataset, element: Any, devices: Any, parts: Any
    ) -> None:
        super().__init__(element, tuple(devices), parts)
        self._dataset = dataset
        self.behind = [0] * len(parts)
        # Batches that have been read, and those of them that are done with.
        self._read = [0] * len(parts)
        self._done = [0] * len(parts)
        self._ended: set[int] = set()

    def next_of(self, i: int) -> Any:
        """Return the next rows of a host, `None` if it has run out.

        Raises:
            tf.errors.OpError: If the host is lost, or its dataset fails.
        """
        if i in self._ended:
            return None
        with tf.device(self.devices[i]):
            optional = self.parts[i].get_next_as_optional()
            if not bool(optional.has_value()):
                self._ended.add(i)
                return None
            rows = by_host.flat(self.element, optional.get_value())
            nest = by_host.packed(self.element, rows)
            # Where this comes back, the rows are there.
            int(sharding.count_rows(nest))
        self._read[i] += 1
        return nest

    def settle(self) -> None:
        """Take note that all that has been read is done with."""
        self._done = list(self._read)

    def read_again(self, prefix: str) -> None:
        """Let another host read what a lost one read and was to read.

        It begins with what was not done with, and is behind by as much.

        Args:
            prefix: String, what the devices of the lost host begin with.
        """
        self._dataset.leave_lost_hosts()
        devices, parts = list(self.devices), list(self.parts)
        for i, device in enumerate(self.devices):
            if host_of(device) == prefix:
                devices[i], parts[i] = self._dataset.part(i, self._done[i])
                self.behind[i] += self._read[i] - self._done[i]
                self._read[i] = self._done[i]
                self._ended.discard(i)
        self.devices, self.parts = tuple(devices), tuple(parts)
