"""One call of a layer on the global batch, run as one call a clone."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import (
    _keras,
    _tf,
    balance,
    bringing_home,
    call_tower,
    exactness,
    exchange,
    inexact,
    layer_losses,
    laying_out,
    looks,
    placement,
    pullback,
    sharding,
    state,
    whole,
)
from keras_clones.arguments import Arguments
from keras_clones.build import build_by_call, resolve_jit_compile
from keras_clones.options import StepOptions
from keras_clones.synchronize import synchronized_layers
from keras_clones.tables import large_tables, looked_up_at_home


class _Mirrors(NamedTuple):
    """Variables that were read, and their mirrors: one list a clone."""

    graph: Any
    values: list[tf.Tensor | None]
    mirrors: list[list[tf.Tensor | None]]
    writes: list[int]


class Calls:
    """What the layer calls of one step share.

    Attributes:
        busy: Boolean, whether a call runs on the clones just now. What it
            calls in turn is an ordinary call.
        whole: `Whole`, the layers that are not called on shards.
        has_all_whole: Boolean, whether all that `whole` names are made.
    """

    def __init__(
        self, model: keras.Model, options: StepOptions, training: bool
    ) -> None:
        self.model = model
        self.options = options
        self.training = training
        self.busy = False
        self.towers: dict[Any, Any] = dict(options.towers)
        self.mirrors: dict[Any, _Mirrors] = {}
        self.jit_compile = resolve_jit_compile(model, options)
        self._graph = _graph()
        self.settle_whole()
        if len(options.clones) > 1:
            exactness.check_layers(model, self.whole.is_apart)

    def settle_whole(self) -> None:
        """Look for whole layers, some of which may not be made yet."""
        named = self.options.whole
        self.whole = whole.find(self.model, named, len(self.options.clones))
        self.has_all_whole = not whole.missing(self.model, named)

    def looks(self) -> bool:
        """Say whether it is looked at whether rows stay apart in calls.

        A call in a loop of the step's graph may see something else each time.
        """
        return self.training and self._graph is _graph()

    def check_whole(self) -> None:
        """Check that what `whole` names is there, once all layers are."""
        if all(one.built for one in _keras.layers(self.model)):
            whole.check(self.model, self.options.whole)

    @contextlib.contextmanager
    def while_busy(self) -> Iterator[None]:
        """Let calls that happen now be ordinary calls."""
        held, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = held


def _graph() -> Any:
    """Return the graph that is made just now, `None` outside of one."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()


def device_of_step(options: StepOptions) -> str:
    """Return where a step's own mathematics runs.

    That is the first clone's device where it is a GPU, else where the
    variables are.
    """
    first = options.clones[0].device
    return first if "GPU" in first else options.home


def call(
    calls: Calls,
    layer: keras.Layer,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a layer on the clones, and return what it returns on one device.

    A whole layer is called as it is, on the global batch, and one that holds
    a whole layer too. The layers that these call are called on the clones.
    """
    with calls.while_busy():
        build_by_call(layer, method, args, kwargs, calls.options.home)
    if not calls.has_all_whole:
        calls.settle_whole()
    if not calls.whole.is_apart(layer):
        with calls.while_busy(), layer_losses.adding(layer):
            if not calls.looks():
                return _call(calls, layer, method, args, kwargs)
            with looks.look_at(calls.options, layer, layer, args, kwargs):
                return _call(calls, layer, method, args, kwargs)
    if not calls.whole.is_whole(layer):
        return method(*args, **kwargs)
    with tf.device(calls.options.clones[0].device):
        return method(*args, **kwargs)


def _call(
    calls: Calls,
    layer: keras.Layer,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    options = calls.options
    given = Arguments.of(args, kwargs)
    rows = given.count_rows()
    clones = options.clones[: sharding.enough(rows, len(options.clones))]
    many = 1 < len(clones) == len(options.clones)
    shards = sharding.divide(
        rows, len(clones), options.shares if many else None
    )
    variables = state.model_variables(layer)
    tables = [] if calls.jit_compile else large_tables(layer)
    read = _read(calls, layer, variables, tables, clones)
    # Read once: a call that a tape runs again draws the same again.
    seeds = laying_out.read_seeds(variables)
    others = read.values[len(variables.trainable) :]
    body = call_tower.Body(
        layer,
        method,
        given,
        variables,
        options,
        shards.may_be_idle,
        tuple(i for i, value in enumerate(others) if _is_watched([value])),
    )
    called_in = _keras.call_again()

    @contextlib.contextmanager
    def busy() -> Iterator[None]:
        # A tape runs a call again after it has ended: layers inside are then
        # told of `training` by nothing else.
        with calls.while_busy(), called_in():
            yield

    sharded = pullback.Sharded(
        body,
        given,
        shards,
        read.values,
        read.mirrors,
        functools.partial(_lay_out, calls, shards, variables, clones, seeds),
        functools.partial(_trace, calls, body, tables),
        busy,
        bool(_synchronized(calls, layer, clones)),
    )
    watched = _is_watched([*read.values, *given.components()])
    joined = pullback.run(sharded, watched)
    _assign_changes(calls, layer, joined)
    _observe(calls, joined)
    return joined.runs[0].notes.finish(joined.values)


def _lay_out(
    calls: Calls,
    shards: sharding.Shards,
    variables: state.Variables,
    clones: Sequence[placement.Clone],
    seeds: Sequence[tf.Tensor],
    data: list[Any],
    mirrors: list[list[Any]],
) -> laying_out.Layout:
    options = calls.options
    clock = None
    if options.balance and calls.training:
        clock = options.balance.clocks[0]
    return laying_out.lay_out(
        shards,
        data,
        mirrors,
        variables,
        1.0,
        clones,
        options.home,
        clock,
        options.random,
        seeds,
    )


def _trace(
    calls: Calls,
    body: call_tower.Body,
    tables: Sequence[keras.Variable],
    layout: laying_out.Layout,
    watched: bool,
    in_graph: bool,
) -> call_tower.CallTower:
    """Return the tower of a call, traced once for all calls that are alike."""
    synchronized = _synchronized(calls, body.layer, layout.clones)
    key = (
        body.key(),
        exchange.types_of(layout),
        len(layout.clones),
        watched,
        in_graph,
        len(synchronized),
    )
    known = not tf.executing_eagerly() or in_graph
    if known and key in calls.towers:
        return calls.towers[key]
    devices = [clone.device for clone in layout.clones]
    with looked_up_at_home(tables, calls.options.home):
        made = call_tower.trace(
            body,
            layout,
            watched,
            calls.jit_compile,
            exchange.inlines(devices, len(body.variables.trainable)),
            synchronized,
            in_graph,
        )
    calls.towers[key] = made
    if known and made.is_closed:
        # TensorFlow traces a step twice that makes variables.
        calls.options.towers[key] = made
    return made


def _synchronized(
    calls: Calls, layer: keras.Layer, clones: Sequence[Any]
) -> list[keras.layers.BatchNormalization]:
    training = dict(_keras.call_context()).get("training")
    if len(clones) == 1 or not training:
        return []
    return synchronized_layers(layer, calls.options.batch_norm)


def _is_watched(tensors: Sequence[tf.Tensor | None]) -> bool:
    """Say whether a tape may want gradients of what a call gets."""
    found = [t for t in tensors if t is not None]
    return bool(found) and _tf.num_watching(found) > 0


def _read(
    calls: Calls,
    layer: keras.Layer,
    variables: state.Variables,
    tables: Sequence[keras.Variable],
    clones: Sequence[placement.Clone],
) -> _Mirrors:
    """Read a layer's variables and send mirrors, or use those sent before.

    What was sent holds until a variable is assigned, in the same graph and
    for a tape that has seen it read.
    """
    home = calls.options.home
    graph = _graph()
    key = (id(graph), id(layer), len(clones), len(variables.trainable))
    found = calls.mirrors.get(key)
    if found is not None and _still_holds(found, variables):
        return found
    with tf.device(home):
        values = laying_out.read_variables(variables, ())
    kept = [
        None if any(v is table for table in tables) else value
        for v, value in zip(
            [*variables.trainable, *variables.others], values, strict=True
        )
    ]
    with _tf.stop_recording():
        mirrors = laying_out.send_mirrors(kept, home, clones)
    writes = [] if graph is None else [_tf.num_writes(v) for v in values]
    made = _Mirrors(graph, values, mirrors, writes)
    if graph is not None:
        calls.mirrors[key] = made
    return made


def _still_holds(found: _Mirrors, variables: state.Variables) -> bool:
    known = [_keras.tf_variable(v) for v in variables.trainable]
    for variable in known:
        _tf.variable_accessed(variable)
    wanted = _tf.num_watching([v.handle for v in known]) if known else 0
    have = _tf.num_watching(found.values[: len(known)]) if known else 0
    # Of several tapes, nothing tells which of them saw the variables read.
    if wanted and not wanted == have == 1:
        return False
    return found.writes == [_tf.num_writes(v) for v in found.values]


def _assign_changes(
    calls: Calls, layer: keras.Layer, joined: pullback.Joined
) -> None:
    """Give variables that the clones assigned their merged values."""
    notes, layout = joined.runs[0].notes, joined.layout
    if calls.training and len(layout.clones) > 1:
        inexact.tell_of_inexact_state(
            layer, notes.assigned, calls.options, notes.unknown
        )
    changes = [run.output.changes for run in joined.runs]
    with _tf.stop_recording(), tf.device(calls.options.home):
        total = bringing_home.add_up(
            layout, [(c.averaged, c.added) for c in changes]
        )
        merged = bringing_home.merge_changes(layout, changes, *total)
        bringing_home.assign(notes.assigned, merged, list(total[1]))


def _observe(calls: Calls, joined: pullback.Joined) -> None:
    """Measure what each clone took until its outputs were there."""
    measured, layout = calls.options.balance, joined.layout
    if layout.started is None or len(layout.clones) == 1 or measured is None:
        return
    seconds = []
    for clock, run in zip(measured.clocks[1:], joined.runs, strict=True):
        value = tf.nest.flatten(run.output.values, expand_composites=True)[0]
        arrived = tf.identity(tf.reshape(value, [-1])[:1])
        seconds.append(balance.seconds_now(clock, arrived) - layout.started)
    balance.observe(measured, seconds)
