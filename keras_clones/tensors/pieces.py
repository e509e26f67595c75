"""Dividing the shards of clones into pieces, which take turns."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_clones.tensors import sharding


class Pieces(NamedTuple):
    """How the shards of clones are divided into pieces.

    Attributes:
        shards: `Shards` of the rows over all pieces, clone by clone.
        parts: List of `Shards`, how the rows of each clone are divided.
        turns: List of ranges, which of all pieces each clone works through.
    """

    shards: sharding.Shards
    parts: list[sharding.Shards]
    turns: list[range]

    def split(
        self, data: Sequence[Any], devices: Sequence[str]
    ) -> list[list[Any]] | list[Any]:
        """Split the rows of each clone, on its device, into its pieces.

        Args:
            data: Sequence with one nest a clone: its rows.
            devices: Sequence of device strings, one a clone.
        """
        found: list[Any] = []
        for nest, device, part in zip(data, devices, self.parts, strict=True):
            with tf.device(device):
                found += sharding.split_rows(nest, part)
        return found

    def spread(self, values: Sequence[Any]) -> list[Any]:
        """Return one value a piece of those that there are by clone."""
        return [
            value
            for value, own in zip(values, self.turns, strict=True)
            for _ in own
        ]


def divide(shards: sharding.Shards, most: int) -> Pieces:
    """Divide each clone's rows into pieces, as far as they go.

    Args:
        shards: `Shards`, how the rows are divided over the clones.
        most: Integer, how many pieces to make of a shard.
    """
    sizes: list[Any] = []
    starts: list[Any] = []
    parts, turns = [], []
    for size, start in zip(shards.sizes, shards.starts, strict=True):
        part = sharding.divide(size, sharding.enough(size, most))
        turns.append(range(len(sizes), len(sizes) + len(part.sizes)))
        parts.append(part)
        sizes += part.sizes
        starts += [start + one for one in part.starts] if most > 1 else [start]
    rows = shards.rows
    if most > 1 and not all(isinstance(size, int) for size in sizes):
        # There may be fewer rows than pieces, as far as is known.
        rows = tf.convert_to_tensor(rows)
    return Pieces(
        shards._replace(rows=rows, sizes=sizes, starts=starts), parts, turns
    )
