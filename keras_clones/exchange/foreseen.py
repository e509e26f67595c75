"""Which rows of large tables a clone will look up, foreseen from its data.

What XLA compiles looks up no rows in a table of another device. Where the ids
come of a clone's data alone, and of nothing that the clone computes, they are
computed before it runs, and it gets the rows with its data.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone.given_rows import LookUp, LookUps
from keras_clones.clone.inputs import TowerInput
from keras_clones.clone.tables import look_up
from keras_clones.exchange.laying_out import Layout
from keras_clones.exchange.tracing import TracedTower
from keras_clones.tensors.origins import is_used, made_of

# XLA does not know how large these are that go by values.
_OF_ANY_SIZE = (
    *("Where", "Unique", "UniqueV2", "UniqueWithCounts", "UniqueWithCountsV2"),
    *("DynamicPartition", "ListDiff"),
)


class Foreseen(NamedTuple):
    """How to look rows up for a clone before it runs.

    Attributes:
        tables: Dict of the tables by their positions among the mirrors.
        types: Dict of lists of `LookUp`s of `tf.TensorSpec`s.
        ids: Function of the dense tensors of a clone's data that returns the
            ids of all look-ups, table by table.
    """

    tables: dict[int, keras.Variable]
    types: LookUps
    ids: Callable[..., Sequence[tf.Tensor]]

    def typed(self, layout: Layout) -> Layout:
        """Return a layout whose inputs have the types of the look-ups."""
        return layout._replace(
            inputs=[one._replace(look_ups=self.types) for one in layout.inputs]
        )

    def filled(self, layout: Layout, by_rows: bool) -> Layout:
        """Return a layout whose inputs have the rows.

        Args:
            layout: `Layout` of the rows of the batch.
            by_rows: Boolean, whether updates write single rows of tables.
        """
        inputs = []
        for clone, one in zip(layout.clones, layout.inputs, strict=True):
            with tf.device(clone.device):
                rows = self.look_up(one.data, by_rows)
            inputs.append(one._replace(look_ups=rows))
        return layout._replace(inputs=inputs)

    def giving(self, tower: TracedTower, by_rows: bool) -> TracedTower:
        """Return a tower that gets its rows when it is called.

        Args:
            tower: `TracedTower` for a layout that is `typed`.
            by_rows: Boolean, whether updates write single rows of tables.
        """

        def call(inputs: TowerInput) -> Any:
            found = self.look_up(inputs.data, by_rows)
            return tower.call(inputs._replace(look_ups=found))

        return tower._replace(call=call)

    def look_up(self, data: Any, by_rows: bool) -> LookUps:
        """Look rows up for a clone, on whose device this is called.

        Args:
            data: Nest with the clone's rows.
            by_rows: Boolean, whether updates write single rows of tables.
        """
        leaves = _dense(data)
        # Else the data would go to the clone and their ids come back.
        with tf.device(leaves[0].device), tf.name_scope("ids"):
            ids = iter(self.ids(*leaves))
        with tf.name_scope("look_up"):
            return {
                i: [
                    _look_up(self.tables[i], next(ids), one.rows.dtype, by_rows)
                    for one in types
                ]
                for i, types in self.types.items()
            }


def _dense(data: Any) -> list[Any]:
    """Return the dense tensors, or their types, that a nest is made of."""
    leaves = tf.nest.flatten(data, expand_composites=True)
    return [leaf for leaf in leaves if leaf is not None]


def _look_up(
    table: keras.Variable, ids: tf.Tensor, dtype: tf.DType, by_rows: bool
) -> LookUp:
    rows = look_up(table, ids, by_rows)
    with tf.device(rows.device):
        return LookUp(ids, tf.cast(rows, dtype))


class _Seen(NamedTuple):
    """What look-ups in a table ask for, and in which type they read it.

    `wholes` has the tensor that stood for all of the table.
    """

    ids: list[tf.Tensor]
    dtypes: list[tf.DType]
    wholes: list[tf.Tensor]


def foresee(
    look: Callable[[TowerInput], Any],
    weights: Sequence[keras.Variable],
    tables: Sequence[keras.Variable],
    types: TowerInput,
) -> Foreseen | None:
    """Foresee the look-ups in some tables, if the data tell all of them.

    Args:
        look: Function that runs forward what a clone runs.
        weights: Sequence of the variables that have mirrors.
        tables: Sequence of those that are only to be looked up in.
        types: `TowerInput` of the types of what clones get, mirrors of all
            `weights` among them.

    Returns:
        `Foreseen`, of the tables where nothing but data tells the ids, and
        that are not read as a whole. `None` if there are none.
    """
    wanted = {id(table) for table in tables}
    places = {i: v for i, v in enumerate(weights) if id(v) in wanted}
    data = _dense(types.data)
    if not data:
        return None
    seen = {i: _Seen([], [], []) for i in places}
    try:
        traced = _trace(look, places, types, seen)
    except Exception:
        # The trace of what clones run says what is wrong.
        return None
    given = traced.inputs[: len(data)]
    kept = {
        i: one
        for i, one in seen.items()
        if not any(map(is_used, one.wholes))
        and all(made_of(ids, given, _OF_ANY_SIZE) for ids in one.ids)
    }
    if not kept:
        return None
    asked = [ids for one in kept.values() for ids in one.ids]
    return Foreseen(
        {i: places[i] for i in kept},
        {i: _types(places[i], one) for i, one in kept.items()},
        traced.prune(given, asked) if asked else lambda *_: [],
    )


def _trace(
    look: Callable[[TowerInput], Any],
    tables: dict[int, keras.Variable],
    types: TowerInput,
    seen: dict[int, _Seen],
) -> Any:
    """Trace what a clone runs forward, its data first, and see look-ups."""

    def run(*tensors: tf.Tensor) -> list[tf.Tensor]:
        inputs = _pack(types, tensors)
        for i, one in seen.items():
            one.wholes.append(inputs.mirrors[i])
        with _watching(tables, seen):
            look(inputs)
        return [ids for one in seen.values() for ids in one.ids]

    data, rest = _dense(types.data), _dense(types._replace(data=None))
    return tf.compat.v1.wrap_function(run, [*data, *rest])


def _pack(types: TowerInput, tensors: Sequence[tf.Tensor]) -> TowerInput:
    """Return the input of a clone of tensors, those of its data first."""
    left = iter(tensors)

    def fill(nest: Any) -> Any:
        leaves = tf.nest.flatten(nest, expand_composites=True)
        found = [None if leaf is None else next(left) for leaf in leaves]
        return tf.nest.pack_sequence_as(nest, found, expand_composites=True)

    data = fill(types.data)
    return fill(types._replace(data=None))._replace(data=data)


def _types(table: keras.Variable, seen: _Seen) -> list[LookUp]:
    # By the number of rows here, a graph would know that of the batch.
    return [
        LookUp(
            tf.TensorSpec([None], ids.dtype),
            tf.TensorSpec([None, *table.shape[1:]], dtype),
        )
        for ids, dtype in zip(seen.ids, seen.dtypes, strict=True)
    ]


def _watching(
    tables: dict[int, keras.Variable], seen: dict[int, _Seen]
) -> contextlib.AbstractContextManager[None]:
    """Let look-ups tell what they ask for, and return rows of no values."""
    return _keras.all_replaced(
        (table, "sparse_read", _telling(table, seen[i]))
        for i, table in tables.items()
    )


def _telling(table: keras.Variable, seen: _Seen) -> Callable[..., tf.Tensor]:
    def sparse_read(indices: Any, name: str | None = None) -> tf.Tensor:
        ids = tf.convert_to_tensor(indices)
        whole = tf.convert_to_tensor(table.value)
        seen.ids.append(tf.reshape(ids, [-1]))
        seen.dtypes.append(whole.dtype)
        shape = ids.shape.concatenate(table.shape[1:])
        # What depends on the values of rows is nothing that data tell.
        return tf.compat.v1.placeholder(whole.dtype, shape, name)

    return sparse_read
