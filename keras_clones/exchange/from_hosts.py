"""Rows that each host has read, divided over the clones of that host."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_clones.cluster import watch
from keras_clones.cluster.host_datasets import OneByOne
from keras_clones.devices import hosts
from keras_clones.devices.placement import PlacedClone
from keras_clones.tensors import by_host, sharding
from keras_clones.tensors.by_host import HostBatch


def clones_of_hosts(
    batch: HostBatch, clones: Sequence[PlacedClone]
) -> list[list[int]] | None:
    """Return the indices of the clones of each host that has rows.

    Returns:
        `None` if the clones are not those of the hosts, in their order: rows
        then have to go elsewhere.
    """
    indices = range(len(clones))
    grouped = [
        (prefix, list(group))
        for prefix, group in itertools.groupby(
            indices, lambda i: hosts.host_of(clones[i].device)
        )
    ]
    with_rows = [hosts.host_of(device) for device in batch.devices]
    if [prefix for prefix, _ in grouped] != with_rows:
        return None
    return [group for _, group in grouped]


def divide(
    batch: HostBatch, groups: Sequence[Sequence[int]], fractions: Any = None
) -> tuple[sharding.Shards, list[Any]]:
    """Divide the rows of each host over its clones, where they are.

    A clone without rows gets a copy of another's, as `Shards` has it, from
    another host if its own has none.

    Args:
        batch: `HostBatch` with at least one row.
        groups: Sequence with the indices of the clones of each host.
        fractions: Sequence of floats or float64 tensor, the share of each
            clone; those of a host count among each other. Defaults to `None`:
            even shares.

    Returns:
        Tuple `(shards, data)`: `Shards` of the global batch, and one nest a
        clone with its rows.
    """
    sizes, starts, data = [], [], []
    before: Any = 0
    filled = _with_a_row_each(batch)
    for device, count, nest, group in zip(
        batch.devices, batch.counts, filled, groups, strict=True
    ):
        among = None
        if fractions is not None:
            own = [fractions[i] for i in group]
            among = [one / sum(own) for one in own]
        with tf.device(device):
            shards = sharding.divide(count, len(group), among)
            data += sharding.split_rows(nest, shards)
        sizes += shards.sizes
        starts += [before + start for start in shards.starts]
        before = before + count
    last = tf.maximum(batch.rows - 1, 0)
    starts = [0, *(tf.minimum(start, last) for start in starts[1:])]
    return sharding.Shards(batch.rows, sizes, starts), data


class LostRowsError(Exception):
    """A host is lost, and what it has read with it.

    Its arguments are what the names of its devices begin with, and the
    `ConnectionError` that tells of it.
    """


def read_apart(
    iterator: Iterator[Any], batches: int = 1
) -> Iterator[tuple[str | None, Any]]:
    """Yield some batches of each host, with its devices' prefix.

    One that is behind gives as many more. Data that no hosts have read are of
    none: `None`.

    Raises:
        LostRowsError: If a host is lost. `read_again` lets another read.
    """
    if not isinstance(iterator, OneByOne):
        for data in itertools.islice(iterator, batches):
            yield None, data
        return
    for i in range(len(iterator.parts)):
        iterator.behind[i] += batches
    for i in range(len(iterator.parts)):
        while iterator.behind[i] > 0:
            prefix = hosts.host_of(iterator.devices[i])
            data = _next_of(iterator, i, prefix)
            iterator.behind[i] -= 1
            if data is None:
                iterator.behind[i] = 0
            else:
                yield prefix, data


def settle(iterator: Any) -> None:
    """Take note that steps on all batches that were read are done."""
    if isinstance(iterator, OneByOne):
        iterator.settle()


def _next_of(iterator: OneByOne, i: int, prefix: str) -> Any:
    try:
        return iterator.next_of(i)
    except tf.errors.OpError as error:
        lost = watch.explain(error)
        if lost is None or not watch.is_lost(prefix):
            raise
        raise LostRowsError(prefix, lost) from error


def _with_a_row_each(batch: HostBatch) -> list[Any]:
    """Return one nest a host: its rows, or one of another's if it has none."""
    if len(batch.devices) == 1:
        return batch.of_each_host()
    found = [
        _filled(batch, column) for column in zip(*batch.parts[1], strict=True)
    ]
    return [
        by_host.packed(batch.element, leaves)
        for leaves in zip(*found, strict=True)
    ]


def _filled(batch: HostBatch, column: Sequence[Any]) -> list[Any]:
    if not sharding.has_rows(column[0]):
        leaf = batch.joined_leaf(column)
        return [leaf] * len(column)
    with tf.name_scope("spare_row"):
        row = _spare_row(batch, column)
        spare = [
            sharding.slice_rows(row, 0, tf.cast(tf.equal(count, 0), tf.int32))
            for count in batch.counts
        ]
    found = []
    for i, device in enumerate(batch.devices):
        with tf.device(device):
            found.append(sharding.join_leaf((column[i], spare[i])))
    return found


def _spare_row(batch: HostBatch, column: Sequence[Any]) -> Any:
    """Return a row of the first host that has any, if another has none.

    Else it is of no rows, so that no rows travel.
    """
    have = tf.stack(batch.counts) > 0
    needed = tf.reduce_any(tf.logical_not(have))
    first = tf.argmax(have, output_type=tf.int32)
    rows = []
    for i, leaf in enumerate(column):
        gives = tf.logical_and(needed, tf.equal(first, i))
        size = tf.cast(gives, tf.int32)
        with tf.device(batch.devices[i]):
            rows.append(sharding.slice_rows(leaf, 0, size))
    return sharding.join_leaf(tuple(rows))
