"""What a layer is called with, taken apart and split by rows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras
from keras_clones.tensors import origins, sharding

# Stands where an argument is a tensor.
TENSOR = object()


class Arguments(NamedTuple):
    """What a layer is called with, taken apart.

    `leaves` are the tensors among it, then the masks that hang on them, of
    the tensors at `masked`. `others` are the leaves of `structure` that are
    no tensors, with `TENSOR` for each that is.
    """

    structure: Any
    leaves: list[Any]
    others: list[Any]
    masked: list[int]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Arguments":
        """Take the arguments of a call apart."""
        kinds = (keras.Variable, tf.Variable, np.ndarray)
        flat = [
            tf.convert_to_tensor(leaf) if isinstance(leaf, kinds) else leaf
            for leaf in keras.tree.flatten((args, kwargs))
        ]
        leaves = [leaf for leaf in flat if tf.is_tensor(leaf)]
        masks = [_keras.get_mask(leaf) for leaf in leaves]
        masked = [i for i, mask in enumerate(masks) if mask is not None]
        others = [TENSOR if tf.is_tensor(x) else x for x in flat]
        leaves += [masks[i] for i in masked]
        return cls((args, kwargs), leaves, others, masked)

    def pack(self, leaves: Sequence[Any]) -> tuple[Any, Any]:
        """Return positional and named arguments with other tensors."""
        num_masks = len(self.masked)
        for i, mask in zip(
            self.masked, leaves[len(leaves) - num_masks :], strict=True
        ):
            _keras.set_mask(leaves[i], mask)
        rest = iter(leaves)
        flat = [next(rest) if x is TENSOR else x for x in self.others]
        return keras.tree.pack_sequence_as(self.structure, flat)

    def components(self) -> list[tf.Tensor]:
        """Return the dense tensors that the tensors are made of."""
        return tf.nest.flatten(self.leaves, expand_composites=True)

    def differing(self, leaves: Sequence[Any]) -> list[Any]:
        """Return those of a clone's leaves that are not given whole."""
        found = [leaf for leaf in self.leaves if sharding.has_rows(leaf)]
        if not found:
            return []
        rows = self._leading(found).shape[:1]
        return [
            mine
            for leaf, mine in zip(self.leaves, leaves, strict=True)
            if sharding.has_rows(leaf)
            and (rows.rank is None or leaf.shape[:1].is_compatible_with(rows))
            and not (rows == [None] and leaf.shape[:1] != rows)
        ]

    def count_rows(self) -> sharding.Rows:
        """Return the rows of the call: those of its first tensor that has any.

        A first axis of one entry is taken for one that all rows share.
        """
        found = [leaf for leaf in self.leaves if sharding.has_rows(leaf)]
        if not found:
            return 0
        first = self._leading(found)
        rows = None if first.shape.rank is None else first.shape[0]
        return sharding.leaf_rows(first) if rows is None else rows

    @staticmethod
    def _leading(found: list[Any]) -> Any:
        wide = [t for t in found if t.shape.rank is None or t.shape[0] != 1]
        return (wide or found)[0]

    def split(self, shards: sharding.Shards) -> list[list[Any]]:
        """Return the leaves that each clone gets."""
        found = [leaf for leaf in self.leaves if sharding.has_rows(leaf)]
        first = self._leading(found) if found else None
        columns = [self._split(leaf, first, shards) for leaf in self.leaves]
        return [list(shard) for shard in zip(*columns, strict=True)] or [
            [] for _ in shards.sizes
        ]

    def _split(
        self, leaf: Any, first: Any, shards: sharding.Shards
    ) -> list[Any]:
        many = len(shards.sizes)
        if many == 1 or not sharding.has_rows(leaf):
            return [leaf] * many
        known = leaf.shape.rank is not None and leaf.shape[0] is not None
        if leaf is first:
            return sharding.split_leaf(leaf, shards)
        if isinstance(shards.rows, int) and known:
            if leaf.shape[0] != shards.rows or _is_a_bank(leaf):
                return [leaf] * many
            return sharding.split_leaf(leaf, shards)
        if known:
            # So many rows whatever the batch has are not the batch's.
            return [leaf] * many
        return self._split_if_same(leaf, shards)

    def _split_if_same(self, leaf: Any, shards: sharding.Shards) -> list[Any]:
        """Split a tensor if it has the rows of the call when the step runs."""
        own = sharding.leaf_rows(leaf)
        same = tf.equal(own, shards.rows)
        parts = [
            (
                tf.where(same, start, 0),
                tf.where(same, tf.maximum(size, 1), own),
            )
            for start, size in zip(shards.starts, shards.sizes, strict=True)
        ]
        return [sharding.slice_rows(leaf, *part) for part in parts]


class LayerCall(NamedTuple):
    """A call of a layer: the method that is called, and with what."""

    layer: keras.Layer
    method: Callable[..., Any]
    given: Arguments


def _is_a_bank(leaf: Any) -> bool:
    """Say whether a tensor only happens to have as many rows as the call.

    One that is made of variables alone is not of the batch.
    """
    if tf.executing_eagerly() or sharding.is_composite(leaf):
        return False
    return origins.comes_from_variables(leaf)
