"""What a clone gets: its rows, its mirrors, and what it goes by."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones.clone import draws
from keras_clones.clone.given_rows import NOTHING_GIVEN, Given, LookUps
from keras_clones.clone.state import Variables
from keras_clones.devices.divided import source_of
from keras_clones.tensors import sharding
from keras_clones.tensors.traced import dependence


class TowerInput(NamedTuple):
    """What a clone gets.

    `mirrors` holds the values of `Variables.trainable`, then of
    `Variables.others`, and `None` for a table that stays home. `data` is a
    nest with the clone's rows: a batch `(x, y, sample_weight)`, or what a
    layer is called with. `numbers` holds three float64 numbers: the rows of
    the shard over those of the whole, the optimizer's loss scale, and the
    index of the clone. Where layers draw what one device draws, `total` is of
    shape (rows of the global batch, 0), and a fourth of the `numbers` says
    which of these rows is the first of the clone.
    `counts` has a float64 number for each loss that does not divide by the
    number of entries, what it divides by on the global batch, and `None` for
    the others; it is `None` where all do.
    `look_ups` has the rows of the tables that stay home, by their positions
    among the mirrors, and is `None` where the clone looks them up itself.
    """

    mirrors: list[tf.Tensor | None]
    seeds: list[tf.Tensor]
    data: Any
    numbers: tf.Tensor
    total: tf.Tensor | None = None
    counts: list[tf.Tensor | None] | None = None
    look_ups: LookUps | None = None


class Weights:
    """What a clone's values are multiplied by.

    Args:
        inputs: `TowerInput` of the clone.
        may_be_idle: Boolean, whether the clone may have got no row of its
            own. It then runs on another's, and nothing of that counts.
    """

    def __init__(self, inputs: TowerInput, may_be_idle: bool) -> None:
        self._share = inputs.numbers[0]
        self._idle = may_be_idle
        self.share = functools.cache(lambda t: tf.cast(self._share, t))

    def weigh(self, value: tf.Tensor) -> tf.Tensor:
        """Multiply a value by the clone's share of the rows."""
        return value * self.share(value.dtype)

    def if_live(self, value: tf.Tensor) -> tf.Tensor:
        """Return zeros in place of a value of a clone without rows."""
        if not self._idle:
            return value
        return value * tf.cast(self._share > 0, value.dtype)

    def own_rows(self, value: Any) -> Any:
        """Return a tensor without the rows of a clone that has none."""
        if not self._idle or not sharding.has_rows(value):
            return value
        if isinstance(value, tf.SparseTensor):
            shape = tf.where(
                tf.one_hot(0, value.shape.rank, True, False),
                tf.cast(self._share > 0, tf.int64) * value.dense_shape,
                value.dense_shape,
            )
            return tf.sparse.slice(value, tf.zeros_like(shape), shape)
        rows = tf.cast(
            value.nrows()
            if isinstance(value, tf.RaggedTensor)
            else tf.shape(value)[0],
            tf.int32,
        )
        return value[: rows * tf.cast(self._share > 0, tf.int32)]


def drawing(
    inputs: TowerInput, leaves: Sequence[Any], exact: bool
) -> contextlib.AbstractContextManager[None]:
    """Let a clone draw what it is to draw.

    Args:
        inputs: `TowerInput` of the clone.
        leaves: Sequence of the tensors in its data that have its rows.
        exact: Boolean, whether to refuse draws that cannot be those of the
            global batch.
    """
    if inputs.total is None or not leaves:
        return contextlib.nullcontext()
    return draws.of_global_batch(leaves, inputs.total, inputs.numbers[3], exact)


def mapping(
    variables: Variables, inputs: TowerInput
) -> list[tuple[keras.Variable, tf.Tensor]]:
    """Return which value stands for which variable in a clone."""
    mirrored = zip(variables.weights, inputs.mirrors, strict=True)
    seeds = zip(variables.seeds, inputs.seeds, strict=True)
    return [*((v, m) for v, m in mirrored if m is not None), *seeds]


def sources(variables: Variables, inputs: TowerInput) -> list[Any]:
    """Return what a clone's gradients are with respect to.

    These are the mirrors of the trainable variables. Of a table that stays
    home it is the variable itself, or a list of the rows that the clone is
    given of it, look-up by look-up.
    """
    given = inputs.look_ups or {}

    def source(i: int, variable: keras.Variable) -> Any:
        if i in given:
            return [one.rows for one in given[i]]
        mirror = inputs.mirrors[i]
        return source_of(variable) if mirror is None else mirror

    return [source(i, v) for i, v in enumerate(variables.trainable)]


def alike_in_all(
    inputs: TowerInput, shards: Any = None, given: Given = NOTHING_GIVEN
) -> Callable[[tf.Tensor], bool]:
    """Return what says whether a tensor is alike in all clones.

    It is if it depends neither on the rows nor on random numbers.

    Args:
        inputs: `TowerInput` of a clone.
        shards: Nest of what in its data differs by clone. Defaults to `None`:
            all of it.
        given: `Given` to it of tables. Defaults to nothing.
    """
    if tf.executing_eagerly():
        return lambda tensor: False
    differs = inputs.data if shards is None else shards
    leaves = tf.nest.flatten(differs, expand_composites=True)
    rows = [
        leaf for leaf in leaves if leaf is not None and leaf.shape.rank != 0
    ]
    # With draws of the global batch, what is drawn for no rows is alike.
    drawn = inputs.seeds if inputs.total is None else [inputs.numbers]
    depends = dependence([*rows, *drawn])
    looked_up = given.rows_of(depends)
    if looked_up:
        depends = dependence([*rows, *drawn, *looked_up])
    return lambda tensor: not depends(tensor)


def common_types(nests: Sequence[Any]) -> Any:
    """Return the types that the tensors of some nests have in common."""

    def type_of(value: Any) -> Any:
        # What will be looked up for a clone is of a known type by now.
        known = isinstance(value, tf.TypeSpec)
        return value if known else tf.type_spec_from_value(value)

    types = [tf.nest.map_structure(type_of, nest) for nest in nests]
    return tf.nest.map_structure(
        lambda one, *more: one.most_specific_common_supertype(more), *types
    )


def input_types(variables: Variables, data: Sequence[Any]) -> TowerInput:
    """Return the types of what clones get, with a mirror of every variable.

    Args:
        variables: `Variables` of what they run.
        data: Sequence with one nest a clone: its rows.
    """

    def types(found: Sequence[keras.Variable]) -> list[tf.TensorSpec]:
        return [tf.TensorSpec(v.shape, v.dtype) for v in found]

    return TowerInput(
        mirrors=types(variables.weights),
        seeds=types(variables.seeds),
        data=common_types(data),
        numbers=tf.TensorSpec([3], tf.float64),
    )


def first_writes(inputs: TowerInput) -> contextlib.AbstractContextManager[Any]:
    """Let the first clone alone write summaries, if anything writes any."""
    # Without TensorBoard installed there is nothing to write with.
    if not hasattr(tf.summary, "should_record_summaries"):
        return contextlib.nullcontext()
    wanted = tf.summary.should_record_summaries()
    if tf.get_static_value(wanted) is not None and not tf.get_static_value(
        wanted
    ):
        return contextlib.nullcontext()
    is_first = tf.equal(inputs.numbers[2], 0)
    return tf.summary.record_if(tf.logical_and(is_first, wanted))
