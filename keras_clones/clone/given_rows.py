"""Rows of large tables that a clone is given, since XLA reaches no table.

What XLA compiles reads no variable of another device. So rows are looked up
before a clone runs, and in the clone each look-up returns those it was given.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.tensors.origins import is_used
from keras_clones.tensors.traced import RowGradient, row_gradient


class LookUp(NamedTuple):
    """The rows of one look-up in a table.

    `ids` are integers of shape `(n,)`, and `rows` is of shape `(n, ...)`, in
    the type in which the layer reads the table.
    """

    ids: tf.Tensor
    rows: tf.Tensor


# The look-ups in each table, in their order, by the position of the table.
LookUps = dict[int, list[LookUp]]


class NotForeseenError(Exception):
    """A table is read in a way that did not show when it was foreseen."""


class Given(NamedTuple):
    """What a clone is given of tables, and what it has asked for.

    Attributes:
        tables: Dict of the tables by their positions.
        look_ups: Dict of lists of `LookUp`s.
        asked: Dict of lists of the ids that each look-up asked for: integer
            tensors of any shape.
        wholes: Dict of tensors that stand for the tables, and tell nothing
            but their shapes.
    """

    tables: dict[int, keras.Variable]
    look_ups: LookUps
    asked: dict[int, list[tf.Tensor]]
    wholes: dict[int, tf.Tensor]

    @property
    def mapping(self) -> list[tuple[keras.Variable, tf.Tensor]]:
        """What stands for which table in a clone."""
        return [(table, self.wholes[i]) for i, table in self.tables.items()]

    def rows_of(self, is_meant: Callable[[tf.Tensor], bool]) -> list[tf.Tensor]:
        """Return the rows of the look-ups whose ids a function is true for."""
        return [
            one.rows
            for i, found in self.look_ups.items()
            for one, ids in zip(found, self.asked[i], strict=False)
            if is_meant(ids)
        ]

    @contextlib.contextmanager
    def looked_up(self) -> Iterator[None]:
        """Let look-ups return the rows that are given, in their order.

        Raises:
            NotForeseenError: If there are more look-ups, or if a table is
                read as a whole.
        """
        reads = [
            (t, "sparse_read", _giving(t, self.look_ups[i], self.asked[i]))
            for i, t in self.tables.items()
        ]
        with _keras.all_replaced(reads):
            yield
        for i, table in self.tables.items():
            if is_used(self.wholes[i]):
                raise NotForeseenError(table.path)


def give(weights: Sequence[keras.Variable], look_ups: LookUps | None) -> Given:
    """Return what a clone is given, before it has asked for anything.

    Args:
        weights: Sequence of the variables that have mirrors.
        look_ups: Dict of lists of `LookUp`s by the position of the table, or
            `None` if there are none.
    """
    tables = {i: weights[i] for i in look_ups or {}}
    return Given(
        tables,
        look_ups or {},
        {i: [] for i in tables},
        {i: tf.zeros(table.shape, table.dtype) for i, table in tables.items()},
    )


NOTHING_GIVEN = Given({}, {}, {}, {})


def _giving(
    table: keras.Variable, look_ups: list[LookUp], asked: list[tf.Tensor]
) -> Callable[..., tf.Tensor]:
    def sparse_read(indices: Any, name: str | None = None) -> tf.Tensor:
        if len(asked) == len(look_ups):
            raise NotForeseenError(table.path)
        ids = tf.convert_to_tensor(indices)
        rows = look_ups[len(asked)].rows
        asked.append(ids)
        # The ids tell which axes are those of the batch.
        shape = tf.concat([tf.shape(ids), table.shape[1:]], axis=0)
        found = tf.reshape(rows, shape, name)
        found.set_shape([*ids.shape, *table.shape[1:]])
        return found

    return sparse_read


def by_table(
    gradients: Sequence[Any], given: Given, is_alike: Callable[..., bool]
) -> list[Any]:
    """Make one gradient by rows of those of the look-ups of each table.

    Args:
        gradients: Sequence with one gradient a trainable variable, or a list
            of those with respect to the rows of its look-ups.
        given: `Given` to the clone.
        is_alike: Function that says whether a tensor is alike in all clones.
    """
    return [
        _of_table(gradient, given, i, is_alike)
        if i in given.tables
        else gradient
        for i, gradient in enumerate(gradients)
    ]


def _of_table(
    gradients: Sequence[tf.Tensor | None],
    given: Given,
    i: int,
    is_alike: Callable[..., bool],
) -> RowGradient | None:
    table, look_ups = given.tables[i], given.look_ups[i]
    types = {one.ids.dtype for one in look_ups}
    # TensorFlow lists rows by ids of several types as those of the widest.
    kind = tf.int64 if len(types) > 1 else None
    shape = tf.constant([*table.shape], tf.int64)
    found = RowGradient([], [], [])
    columns = zip(gradients, look_ups, given.asked[i], strict=False)
    for gradient, one, asked in columns:
        if gradient is not None:
            values = tf.cast(gradient, table.dtype)
            ids = tf.cast(one.ids, kind or one.ids.dtype)
            # The ids that the clone asked for tell of which kind a look-up
            # is, and those that it was looked up by which rows it had.
            told = tf.IndexedSlices(values, asked, shape)
            for all_, own in zip(
                found, row_gradient(told, is_alike), strict=True
            ):
                all_ += [tf.IndexedSlices(values, ids, shape) for _ in own]
    return found if any(found) else None
