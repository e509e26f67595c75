"""What a layer is called with, taken apart and split by rows."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls.held import Held, find, holding
from keras_clones.tensors import origins, sharding

# Stands where an argument is a tensor.
TENSOR = object()


class Arguments(NamedTuple):
    """What a layer is called with, taken apart.

    `leaves` are the tensors among it, then the masks that hang on them, of
    the tensors at `masked`, then those that layers hold at the places `held`.
    `others` are the leaves of `structure` that are no tensors, with `TENSOR`
    for each that is. `first` is the place of the tensor whose rows are those
    of the call, `None` if no tensor has rows.
    """

    structure: Any
    leaves: list[Any]
    others: list[Any]
    masked: list[int]
    held: Sequence[Held] = ()
    first: int | None = None

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
        return cls((args, kwargs), leaves, others, masked)._settled()

    def pack(self, leaves: Sequence[Any]) -> tuple[Any, Any]:
        """Return positional and named arguments with other tensors."""
        num = self._num_passed()
        masks = leaves[num : num + len(self.masked)]
        for i, mask in zip(self.masked, masks, strict=True):
            _keras.set_mask(leaves[i], mask)
        rest = iter(leaves)
        flat = [next(rest) if x is TENSOR else x for x in self.others]
        return keras.tree.pack_sequence_as(self.structure, flat)

    def _num_passed(self) -> int:
        return sum(x is TENSOR for x in self.others)

    def with_held(
        self, layer: keras.Layer, but: Collection[int] = ()
    ) -> "Arguments":
        """Return what a call of a layer also gets: tensors of the step on it.

        Args:
            layer: Layer that is called.
            but: Collection of the ids of tensors that it does not need.
        """
        places, tensors = find(layer, but)
        start = self._num_passed() + len(self.masked)
        leaves = [*self.leaves[:start], *tensors]
        made = self._replace(held=places, leaves=leaves)
        return made if made.first is not None else made._settled()

    def holding(self, leaves: Sequence[Any]) -> AbstractContextManager[None]:
        """Let layers hold what of other tensors is at their places."""
        start = self._num_passed() + len(self.masked)
        return holding(self.held, leaves[start:])

    def components(self) -> list[tf.Tensor]:
        """Return the dense tensors that the tensors are made of."""
        return tf.nest.flatten(self.leaves, expand_composites=True)

    def differing(self, leaves: Sequence[Any]) -> list[Any]:
        """Return those of a clone's leaves that are not given whole."""
        if self.first is None:
            return []
        rows = self.leaves[self.first].shape[:1]
        return [
            mine
            for leaf, mine in zip(self.leaves, leaves, strict=True)
            if sharding.has_rows(leaf)
            and (rows.rank is None or leaf.shape[:1].is_compatible_with(rows))
            and not (rows == [None] and leaf.shape[:1] != rows)
        ]

    def mode(self) -> tuple[Any, ...]:
        """Return which of the things it does a call asks a layer for.

        Numbers do not say so: a time of diffusion has many.
        """
        kinds = (str, bool, type(None))
        settings = [x if isinstance(x, kinds) else type(x) for x in self.others]
        names = keras.tree.map_structure(lambda _: 0, self.structure)
        return repr(names), *settings

    def count_rows(self) -> sharding.Rows:
        """Return the rows of the call: those of its first tensor that has any.

        A first axis of one entry is taken for one that all rows share, and so
        is one of a known number where that of others is not.
        """
        if self.first is None:
            return 0
        first = self.leaves[self.first]
        rows = None if first.shape.rank is None else first.shape[0]
        return sharding.leaf_rows(first) if rows is None else rows

    def of_rows(self, rows: int) -> "Arguments":
        """Return the same for a call whose number of rows is known."""
        for i, leaf in enumerate(self.leaves):
            if sharding.has_rows(leaf) and leaf.shape[0] == rows:
                return self._replace(first=i)
        return self

    def _settled(self) -> "Arguments":
        """Return the same, knowing which tensor has the rows of the call."""
        shapes = [
            leaf.shape if sharding.has_rows(leaf) else tf.TensorShape([])
            for leaf in self.leaves
        ]
        found = [i for i, shape in enumerate(shapes) if shape.rank != 0]
        wide = [i for i in found if not shapes[i].rank or shapes[i][0] != 1]
        # Queries that a model has learned may come before its rows.
        is_open = [
            i for i in wide if not shapes[i].rank or shapes[i][0] is None
        ]
        if len(wide) > 1 and not is_open:
            is_open = [i for i in wide if not _is_a_bank(self.leaves[i])]
        best = is_open or wide or found
        return self._replace(first=best[0] if best else None)

    def split(self, shards: sharding.Shards) -> list[list[Any]]:
        """Return the leaves that each clone gets."""
        first = None if self.first is None else self.leaves[self.first]
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
    """A call of a layer: the method that is called, and with what.

    `leaves` says whether a step sees the tensors that it leaves on layers.
    """

    layer: keras.Layer
    method: Callable[..., Any]
    given: Arguments
    leaves: bool = False


def _is_a_bank(leaf: Any) -> bool:
    """Say whether a tensor only happens to have as many rows as the call.

    One that is made of variables alone is not of the batch.
    """
    if sharding.is_composite(leaf) or not tf.is_symbolic_tensor(leaf):
        return False
    return origins.comes_from_variables(leaf)
