"""One call of a layer on the global batch, run as one call a clone."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.calls import (
    call_tower,
    forward,
    held,
    looks,
    pullback,
    sharing,
)
from keras_clones.calls.arguments import Arguments, LayerCall
from keras_clones.calls.body import Body
from keras_clones.calls.undone import left_as_it_is
from keras_clones.clone import layer_losses, state
from keras_clones.clone.given_rows import NotForeseenError
from keras_clones.clone.inputs import input_types
from keras_clones.clone.tables import large_tables, looked_up_at_home
from keras_clones.devices import balance
from keras_clones.exchange import (
    arrivals,
    bringing_home,
    foreseen,
    in_turns,
    laying_out,
    tracing,
)
from keras_clones.exchange.batch_norm import synchronized_layers
from keras_clones.plan import in_pieces, inexact
from keras_clones.plan.build import build_by_call
from keras_clones.tensors import sharding
from keras_clones.update.update import writes_rows


def call(
    calls: sharing.Calls,
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
        build_by_call(layer, method, args, kwargs, calls.options.homes)
    if calls.options.looks is not None:
        calls.options.looks.batches.see_built()
    if not calls.has_all_whole:
        calls.settle_whole()
    if not calls.whole.is_apart(layer):
        with calls.while_busy(), layer_losses.adding(layer):
            given = Arguments.of(args, kwargs).with_held(layer, calls.left)
            one = LayerCall(layer, method, given)
            with _look_first(calls, one):
                return _call(calls, one)
    if not calls.whole.is_whole(layer):
        return method(*args, **kwargs)
    with tf.device(calls.options.clones[0].device):
        return method(*args, **kwargs)


def _look_first(
    calls: sharing.Calls, one: LayerCall
) -> contextlib.AbstractContextManager[Any]:
    """Return what to make a call in, so that it comes after a look at it."""
    if not calls.looks():
        return contextlib.nullcontext()
    seen = one._replace(method=one.layer, leaves=True)
    return looks.look_at(seen, calls.options, calls.training)


def _call(calls: sharing.Calls, one: LayerCall, foresees: bool = True) -> Any:
    sharded = _shard(calls, one, foresees)
    watched = _is_watched([*sharded.values, *one.given.components()])
    try:
        joined = pullback.run(sharded, watched)
    except NotForeseenError:
        return _call(calls, one, foresees=False)
    except held.UsesLeftError as error:
        calls.use_left(error.tensors)
        given = one.given.with_held(one.layer, calls.left)
        return _call(calls, one._replace(given=given), foresees)
    _assign_changes(calls, one.layer, joined)
    _observe(calls, joined)
    result = joined.runs[0].notes.finish(joined.values)
    calls.leave(one)
    return result


def _shard(
    calls: sharing.Calls, one: LayerCall, foresees: bool
) -> forward.Sharded:
    """Divide a call's rows, and read and send what it takes on the clones."""
    options, layer = calls.options, one.layer
    rows = one.given.count_rows()
    clones = options.clones[: sharding.enough(rows, len(options.clones))]
    many = 1 < len(clones) == len(options.clones)
    shards = sharding.divide(
        rows, len(clones), options.shares if many else None
    )
    pieces, turns = options.divide(shards, clones)
    variables = state.model_variables(layer)
    tables, found = calls.tables(layer), None
    if calls.jit_compile and foresees:
        found = _foresee(calls, Body(one, variables, options), shards)
        tables = [] if found is None else list(found.tables.values())
    read = sharing.read(calls, layer, variables, tables, clones)
    # Read once: a call that a tape runs again draws the same again.
    seeds = laying_out.read_seeds(variables)
    group = options.group(turns, calls.training, turns=pieces.turns)
    others = read.values[len(variables.trainable) :]
    watched_others = [
        i for i, value in enumerate(others) if _is_watched([value])
    ]
    divided = pieces.shards
    body = Body(
        one, variables, options, divided.may_be_idle, tuple(watched_others)
    )
    return forward.Sharded(
        body=body,
        shards=divided,
        values=read.values,
        mirrors=pieces.spread(read.mirrors),
        lay_out=functools.partial(laying_out.lay_out, divided, group, seeds),
        trace=_tracing(calls, body, found),
        busy=_busy(calls),
        is_synchronized=bool(_synchronized(calls, layer, turns)),
        foreseen={} if found is None else found.tables,
        look_up=functools.partial(_look_up, calls, found),
    )


def _foresee(
    calls: sharing.Calls, body: Body, shards: sharding.Shards
) -> foreseen.Foreseen | None:
    """Foresee look-ups in large tables, for clones that XLA compiles.

    Pieces would all have their rows at once.
    """
    tables = large_tables(body.layer)
    if not tables or tf.executing_eagerly() or calls.options.pieces > 1:
        return None
    with _tf.stop_recording():
        types = input_types(body.variables, body.given.split(shards))
    key = ("foreseen", body.key(), tuple(tf.nest.flatten(types)))
    if key not in calls.towers:

        def look(inputs: Any) -> None:
            with left_as_it_is(body.layer):
                body.look(inputs)

        with _tf.stop_recording():
            found = foreseen.foresee(
                look, body.variables.weights, tables, types
            )
        calls.towers[key] = calls.options.towers[key] = found
    return calls.towers[key]


def _look_up(
    calls: sharing.Calls,
    found: foreseen.Foreseen | None,
    layout: laying_out.Layout,
) -> laying_out.Layout:
    """Return a layout with the rows of tables that clones are given."""
    if found is None:
        return layout
    with _tf.stop_recording():
        return found.filled(layout, writes_rows(calls.model))


def _busy(
    calls: sharing.Calls,
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return what a tape runs a call in that it makes again.

    The call has ended by then: layers inside of it are told of `training` by
    nothing else.
    """
    called_in = _keras.call_again()

    @contextlib.contextmanager
    def busy() -> Iterator[None]:
        with calls.while_busy(), called_in():
            yield

    return busy


def _tracing(
    calls: sharing.Calls, body: Body, found: foreseen.Foreseen | None
) -> Callable[[laying_out.Layout, bool, bool], call_tower.CallTower]:
    """Return what traces the tower of a call, for a layout of any rows."""

    def trace(
        layout: laying_out.Layout, watched: bool, in_graph: bool
    ) -> call_tower.CallTower:
        typed = layout if found is None else found.typed(layout)
        return _trace(calls, body, typed, watched, in_graph)

    return trace


def _trace(
    calls: sharing.Calls,
    body: Body,
    layout: laying_out.Layout,
    watched: bool,
    in_graph: bool,
) -> call_tower.CallTower:
    """Return the tower of a call, traced once for all calls that are alike."""
    synchronized = _synchronized(calls, body.layer, layout.clones)
    key = (
        body.key(),
        tracing.types_of(layout),
        len(layout.clones),
        watched,
        in_graph,
        len(synchronized),
    )
    known = not tf.executing_eagerly() or in_graph
    if known and key in calls.towers:
        return calls.towers[key]
    devices = [clone.device for clone in layout.clones]
    inline = not layout.takes_turns and tracing.inlines(
        devices, len(body.variables.trainable)
    )
    tables = calls.tables(body.layer)
    how = call_tower.Tracing(
        watched, calls.jit_compile, inline, synchronized, in_graph
    )
    with looked_up_at_home(tables, writes_rows(calls.model)):
        made = call_tower.trace_with_outside(body, layout, how, calls.left)
    if made.outside():
        return made  # Another call may find others in the same places.
    calls.towers[key] = made
    if known and made.is_closed:
        # TensorFlow traces a step twice that makes variables.
        calls.options.towers[key] = made
    return made


def _synchronized(
    calls: sharing.Calls, layer: keras.Layer, clones: Sequence[Any]
) -> list[keras.layers.BatchNormalization]:
    training = dict(_keras.call_context()).get("training")
    if len(clones) == 1 or not training:
        return []
    layers = synchronized_layers(layer, calls.options.batch_norm)
    if not calls.options.may_meet:
        in_pieces.refuse_synchronized(layers, calls.options)
    return layers


def _is_watched(tensors: Sequence[tf.Tensor | None]) -> bool:
    """Say whether a tape may want gradients of what a call gets."""
    return _tf.num_watching([t for t in tensors if t is not None]) > 0


def _assign_changes(
    calls: sharing.Calls, layer: keras.Layer, joined: forward.Joined
) -> None:
    """Give variables that the clones assigned their merged values."""
    notes, layout = joined.runs[0].notes, joined.layout
    if calls.training and len(layout.clones) > 1:
        inexact.tell_of_inexact_state(
            layer, notes.assigned, calls.options, notes.unknown
        )
    changes = [run.output.changes for run in joined.runs]
    with _tf.stop_recording(), tf.device(calls.options.home):
        changes = in_turns.merge_changes(layout, changes)
        layout = in_turns.by_clone(layout)
        total = bringing_home.add_up(
            layout, [(c.averaged, c.added) for c in changes]
        )
        merged = bringing_home.merge_changes(layout, changes, *total)
        bringing_home.assign(notes.assigned, merged, list(total[1]))


def _observe(calls: sharing.Calls, joined: forward.Joined) -> None:
    """Measure what each clone took until its outputs were there."""
    values = [run.output.values for run in joined.runs]
    seconds = arrivals.seconds_until_there(joined.layout, values)
    if seconds is not None and calls.options.balance is not None:
        balance.observe(calls.options.balance, seconds)
