"""Lay rows out over the clones, and call something once a clone."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone import state
from keras_clones.clone.inputs import TowerInput
from keras_clones.clone.state import Variables
from keras_clones.devices.clocks import Clocks, seconds_now
from keras_clones.devices.divided import source_of
from keras_clones.devices.moving import device_of
from keras_clones.devices.placement import PlacedClone
from keras_clones.exchange import errors
from keras_clones.exchange.batch_norm import over_clones
from keras_clones.exchange.meeting import run_side_by_side
from keras_clones.tensors import sharding, transfer

# Name scope of what measures when clones start and when they are done.
ARRIVALS = "clone_arrivals"


class Layout(NamedTuple):
    """Rows laid out over the clones, one input a clone.

    `stay` has the positions of the variables that are not sent. `started` is
    when the rows were laid out, in seconds, if `clocks` measure that. Where
    clones work through their shards in pieces, `clones`, `shards` and `inputs`
    are those of all pieces, and `turns` says which of them each clone works
    on, one after the other.
    """

    home: str
    clones: Sequence[PlacedClone]
    shards: sharding.Shards
    inputs: list[TowerInput]
    stay: Sequence[int]
    clocks: Clocks | None = None
    started: tf.Tensor | None = None
    turns: Sequence[range] = ()

    @property
    def takes_turns(self) -> bool:
        """Say whether any clone works through several pieces."""
        return any(len(own) > 1 for own in self.turns)

    @property
    def called(self) -> str:
        """What gets one of the shards, in words."""
        return "piece" if self.takes_turns else "clone"


def read_variables(
    variables: Variables, tables: Sequence[keras.Variable]
) -> list[tf.Tensor | None]:
    """Read each variable once, `None` for the tables that stay home."""

    def read(variable: keras.Variable) -> tf.Tensor:
        with tf.device(device_of(variable)):
            # Of a divided table this is nothing but what a tape knows it by.
            return source_of(variable).read_value()

    return [
        None if any(variable is table for table in tables) else read(variable)
        for variable in variables.weights
    ]


def homes_of(variables: Variables) -> list[str]:
    """Return where each variable that has a mirror is at home."""
    return [device_of(variable) for variable in variables.weights]


def read_seeds(variables: Variables) -> list[tf.Tensor]:
    """Read the state of each seed generator."""
    return [_keras.tf_variable(v).read_value() for v in variables.seeds]


def send_mirrors(
    values: Sequence[tf.Tensor | None],
    homes: Sequence[str],
    clones: Sequence[PlacedClone],
) -> list[list[tf.Tensor | None]]:
    """Send each clone one mirror of every variable.

    Args:
        values: Sequence of the variables' values, `None` for what is not sent.
        homes: Sequence of device strings, where each of them is.
        clones: Sequence of `PlacedClone`s.
    """
    devices = [clone.device for clone in clones]
    mirrors: list[dict[int, Any]] = [{} for _ in clones]
    with tf.name_scope("send_mirrors"):
        for home in dict.fromkeys(homes):
            there = {i: v for i, v in enumerate(values) if homes[i] == home}
            sent = transfer.send_to_all(there, home, devices)
            for found, one in zip(mirrors, sent, strict=True):
                found.update(one)
    return [[found[i] for i in range(len(values))] for found in mirrors]


class Group(NamedTuple):
    """The clones that rows are laid out over, and what all of them go by.

    Attributes:
        clones: Sequence of `PlacedClone`s.
        home: Device string, where the variables are.
        random: String, `"global"` lets clones draw what one device draws for
            their rows, `"clones"` lets each draw numbers of its own.
        clocks: `Clocks` that measure what the clones take, or `None`.
        loss_scale: Scalar tensor, what the optimizer multiplies the loss by.
        turns: Sequence of ranges, which of the `clones` are pieces that one
            works through. Empty: each has one.
    """

    clones: Sequence[PlacedClone]
    home: str
    random: str = "clones"
    clocks: Clocks | None = None
    loss_scale: Any = 1.0
    turns: Sequence[range] = ()


def lay_out(
    shards: sharding.Shards,
    group: Group,
    seeds: Sequence[tf.Tensor],
    data: list[Any],
    mirrors: list[list[tf.Tensor | None]],
) -> Layout:
    """Make one input a clone of its rows, its mirrors and its numbers.

    Args:
        shards: `Shards`, how the rows are divided.
        group: `Group` of the clones.
        seeds: Sequence of the values of the seed states.
        data: List with one nest a clone: its rows.
        mirrors: List with one list a clone: its mirrors.
    """
    clones = group.clones
    shares = sharding.shares(shards)
    scale = tf.fill([len(clones)], tf.cast(group.loss_scale, tf.float64))
    index = tf.cast(tf.range(len(clones)), tf.float64)
    columns, total = [shares, scale, index], None
    if group.random == "global" and len(clones) > 1:
        columns.append(tf.cast(tf.stack(shards.starts), tf.float64))
        # Its shape is known where that of the batch is, as XLA needs it.
        total = tf.zeros([shards.rows, 0])
    numbers = tf.unstack(_opaque(tf.stack(columns, axis=1)))
    inputs = [
        TowerInput(
            mirrors=mirrors[i],
            seeds=state.offset_seeds(seeds, i if total is None else 0),
            data=data[i],
            numbers=numbers[i],
            total=total,
        )
        for i in range(len(clones))
    ]
    stay = [i for i, mirror in enumerate(mirrors[0]) if mirror is None]
    started = start_clock(group.clocks, data)
    turns = group.turns or [range(i, i + 1) for i in range(len(clones))]
    return Layout(
        group.home,
        clones,
        shards,
        inputs,
        stay,
        group.clocks,
        started,
        turns,
    )


def start_clock(
    clocks: Clocks | None, after: Any, way: str = "forth"
) -> tf.Tensor | None:
    """Return when clones can start, in seconds, if that is measured.

    Args:
        clocks: `Clocks` of the clones, or `None`.
        after: Nest of tensors that they start with.
        way: String, `"back"` if they run backward by themselves.
    """
    if clocks is None:
        return None
    with tf.name_scope(f"{ARRIVALS}/{way}/start/"):
        return seconds_now(clocks.start, after)


def _opaque(value: tf.Tensor) -> tf.Tensor:
    """Keep a value from being known while a graph is optimized.

    TensorFlow makes a copy of a function for each call with a constant of its
    own, or with results that nothing needs, and optimizes each copy.
    """
    return tf.raw_ops.PlaceholderWithDefault(input=value, shape=value.shape)


def each(
    layout: Layout,
    function: Callable[[int], Any],
    synchronized: Sequence[keras.layers.BatchNormalization] = (),
) -> list[Any]:
    """Call a function once a clone, in its scope and on its device.

    Args:
        layout: `Layout` of the rows.
        function: Function of the index of the clone.
        synchronized: Sequence of layers that share sums over the clones.
            Defaults to none: the calls do not know of each other.
    """
    if synchronized:
        live = None
        if layout.shards.may_be_idle:
            live = [inputs.numbers[0] for inputs in layout.inputs]
        with over_clones(synchronized, live):
            return run_side_by_side(layout.clones, function)
    results: list[Any] = []
    firsts = {own[0] for own in layout.turns}
    for i in range(len(layout.clones)):
        with on_clone(layout, i, None if i in firsts else results[-1]):
            results.append(function(i))
    return results


@contextlib.contextmanager
def on_clone(layout: Layout, i: int, after: Any) -> Iterator[None]:
    """Run what a clone runs: in its scope, on its device.

    Args:
        layout: `Layout` of the rows.
        i: Integer, the index of the clone, or of the piece.
        after: Nest with what has to be there before anything runs, or `None`.
    """
    clone = layout.clones[i]
    leaves = tf.nest.flatten(after, expand_composites=True)
    before = [leaf for leaf in leaves if isinstance(leaf, tf.Tensor)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(tf.device(clone.device))
        stack.enter_context(tf.name_scope(clone.scope or "clone"))
        if before:
            stack.enter_context(tf.control_dependencies(before))
        stack.enter_context(running(layout, i))
        yield


@contextlib.contextmanager
def running(layout: Layout, i: int) -> Iterator[None]:
    """Say in what is raised which clone ran, and on how many rows."""
    try:
        yield
    except Exception as error:
        if len(layout.clones) > 1:
            errors.add_note(error, i, layout.shards, layout.called)
        raise
