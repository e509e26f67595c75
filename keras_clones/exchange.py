"""Lay rows out over the clones, run their towers, bring results home."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras, errors, gradients, sharding, state, traced
from keras_clones.balance import seconds_now
from keras_clones.placement import Clone
from keras_clones.rendezvous import run_side_by_side
from keras_clones.state import Variables
from keras_clones.synchronize import over_clones
from keras_clones.tower import TowerInput

# Clones times variables up to which the towers are inlined. It costs well
# under a second at the first step.
INLINE_VARIABLES = 300


class Layout(NamedTuple):
    """Rows laid out over the clones, one input a clone.

    `stay` has the positions of the variables that are not sent. `started` is
    when the rows were laid out, in seconds, if that is measured.
    """

    home: str
    clones: Sequence[Clone]
    shards: sharding.Shards
    inputs: list[TowerInput]
    stay: Sequence[int]
    started: tf.Tensor | None = None


class TracedTower(NamedTuple):
    """A tower function ready to be called on any device.

    `notes` is what tracing it found out, and `returns` what it returns, as
    far as that is known before it runs. `synchronized` has the layers that
    share sums over the clones, which then run side by side as parts of the
    step's own graph.
    """

    call: Callable[[TowerInput], Any]
    returns: Any = None
    notes: Any = None
    synchronized: Sequence[keras.layers.BatchNormalization] = ()
    concrete: Any = None


def read_variables(
    variables: Variables, tables: Sequence[keras.Variable]
) -> list[tf.Tensor | None]:
    """Read each variable once, `None` for the tables that stay home."""
    return [
        None
        if any(variable is table for table in tables)
        else _keras.tf_variable(variable).read_value()
        for variable in [*variables.trainable, *variables.others]
    ]


def send_mirrors(
    values: list[tf.Tensor | None], home: str, clones: Sequence[Clone]
) -> list[list[tf.Tensor | None]]:
    """Send each clone one mirror of every variable."""
    with tf.name_scope("send_mirrors"):
        devices = [clone.device for clone in clones]
        return gradients.send_to_all(values, home, devices)


def lay_out(
    shards: sharding.Shards,
    data: list[Any],
    mirrors: list[list[tf.Tensor | None]],
    variables: Variables,
    loss_scale: tf.Tensor,
    clones: Sequence[Clone],
    home: str,
    clock: tf.Variable | None = None,
) -> Layout:
    """Make one input a clone of its rows, its mirrors and its numbers.

    Args:
        shards: `Shards`, how the rows are divided.
        data: List with one nest a clone: its rows.
        mirrors: List with one list a clone: its mirrors.
        variables: `Variables` of the model.
        loss_scale: Scalar tensor, what the optimizer multiplies the loss by.
        clones: Sequence of `Clone`s.
        home: Device string, where the variables are.
        clock: Variable that keeps when the rows were laid out. Defaults to
            `None`: that is not measured.
    """
    shares = sharding.shares(shards)
    scale = tf.fill([len(clones)], tf.cast(loss_scale, tf.float64))
    index = tf.cast(tf.range(len(clones)), tf.float64)
    numbers = tf.unstack(_opaque(tf.stack([shares, scale, index], axis=1)))
    seeds = [_keras.tf_variable(v).read_value() for v in variables.seeds]
    inputs = [
        TowerInput(
            mirrors=mirrors[i],
            seeds=state.offset_seeds(seeds, i),
            data=data[i],
            numbers=numbers[i],
        )
        for i in range(len(clones))
    ]
    stay = [i for i, mirror in enumerate(mirrors[0]) if mirror is None]
    started = None if clock is None else seconds_now(clock, data)
    return Layout(home, clones, shards, inputs, stay, started)


def _opaque(value: tf.Tensor) -> tf.Tensor:
    """Keep a value from being known while a graph is optimized.

    TensorFlow makes a copy of a function for each call with a constant of its
    own, or with results that nothing needs, and optimizes each copy.
    """
    return tf.raw_ops.PlaceholderWithDefault(input=value, shape=value.shape)


def inlines(devices: Sequence[str], num_variables: int) -> bool:
    """Say whether towers become part of the step's graph.

    Then a gradient leaves as soon as it is made, and a layer runs as soon as
    its mirrors have arrived: a function waits for all it gets, and gives back
    all at once. But the towers of all clones are optimized, each by itself,
    which takes seconds for a large model. So they are inlined where there is
    one, where the model is small, and on GPUs, whose copies take time.
    """
    return (
        len(devices) == 1
        or len(devices) * num_variables <= INLINE_VARIABLES
        or all("GPU" in device for device in devices)
    )


class CallableTower(NamedTuple):
    """A tower function that can be called from any place of a graph.

    `function` is a `tf.function`, and `returned` holds what the tower
    returned when it was last traced, also what the function leaves out, and
    its notes. `tower` is the Python function, which returns both. `layer` is
    what it calls.
    """

    function: Any
    returned: list[Any]
    tower: Callable[[TowerInput], tuple[Any, Any]]
    layer: keras.Layer


def callable_tower(
    layer: keras.Layer,
    tower: Callable[[TowerInput], tuple[Any, Any]],
    inline: bool,
    jit_compile: bool,
    returns: Callable[[Any], Any] = lambda output: output,
) -> CallableTower:
    """Make a tower function callable from any place of a graph.

    Args:
        layer: The `keras.Layer` that it calls.
        tower: Function from `TowerInput` to an output and notes.
        inline: Boolean, whether it becomes part of the step's graph, which it
            cannot where XLA compiles it.
        jit_compile: Boolean, whether XLA compiles the function.
        returns: Function of the output that keeps what is needed of it.
    """
    returned: list[Any] = []

    def run_tower(inputs: TowerInput) -> Any:
        returned[:] = tower(inputs)
        return returns(returned[0])

    function = tf.function(
        run_tower, autograph=False, **function_options(inline, jit_compile)
    )
    return CallableTower(function, returned, tower, layer)


def function_options(inline: bool, jit_compile: bool) -> dict[str, Any]:
    """Return the arguments of `tf.function` for what a clone runs."""
    whole = None if inline and not jit_compile else {"_noinline": True}
    return {
        "jit_compile": jit_compile or None,
        "experimental_attributes": whole,
    }


def trace(
    tower: CallableTower,
    layout: Layout,
    synchronized: Sequence[keras.layers.BatchNormalization] = (),
    in_graph: bool = False,
) -> TracedTower:
    """Trace a tower function once for the shards of all clones.

    Outside of a graph, each clone calls the Python function itself, so that
    it can be debugged. So does a function that calls Python code with a
    gradient: all its calls would share what that keeps.

    Args:
        tower: `CallableTower`.
        layout: `Layout` of the rows.
        synchronized: Sequence of layers that share sums over the clones.
        in_graph: Boolean, whether to trace outside of a graph, too. Defaults
            to `False`.
    """
    function, returned, python, layer = tower
    if synchronized:
        return TracedTower(python, synchronized=synchronized)
    if tf.executing_eagerly() and not in_graph:
        return TracedTower(python)
    try:
        concrete = concrete_tower(tower, layout)
    except Exception as error:
        if len(layout.clones) > 1:
            errors.add_note_of_trace(error, layout.shards)
        raise
    output, notes = returned
    warn_of_outside_variables(layer, concrete)
    if traced.calls_python(concrete):
        return TracedTower(python, output, notes)
    call: Callable[[TowerInput], Any] = concrete
    if not in_graph and traced.has_state_of_no_variable(concrete):
        types = _common_types(layout)
        place = tf.TensorSpec([], tf.resource)
        concrete = function.get_concrete_function(types._replace(place=place))
        output, notes = returned
        call = apart(concrete)
    return TracedTower(call, output, notes, (), concrete)


def concrete_tower(tower: CallableTower, layout: Layout) -> Any:
    """Return the function that all clones call, for shards of any size.

    What a layer assigns can look alike in all clones only because all shards
    have as many rows, as a count of them does. So it is looked at once more
    with that number unknown.
    """
    types = _common_types(layout)
    concrete = tower.function.get_concrete_function(types)
    assigned = tower.returned[1].assigned
    fixed = all(isinstance(size, int) for size in layout.shards.sizes)
    if assigned and fixed and len(layout.clones) > 1:
        relaxed = _common_types(layout, any_rows=True)
        kept = list(tower.returned)
        unknown = list(kept[1].unknown)
        try:
            found = tower.function.get_concrete_function(relaxed)
        except Exception:
            tower.returned[:] = kept
        else:
            if len(tower.returned[1].unknown) > len(unknown):
                return found
            tower.returned[:] = kept
    return concrete


def _common_types(layout: Layout, any_rows: bool = False) -> TowerInput:
    types = [
        tf.nest.map_structure(tf.type_spec_from_value, inputs)
        for inputs in layout.inputs
    ]
    common = tf.nest.map_structure(
        lambda one, *more: one.most_specific_common_supertype(more), *types
    )
    if not any_rows:
        return common

    def relax(spec: Any) -> Any:
        if not isinstance(spec, tf.TensorSpec) or not spec.shape.rank:
            return spec
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)

    return common._replace(data=tf.nest.map_structure(relax, common.data))


def types_of(layout: Layout) -> tuple[Any, ...]:
    """Return the types of what clones get, to tell layouts apart by."""
    return tuple(tf.nest.flatten(_common_types(layout)))


def warn_of_outside_variables(layer: keras.Layer, concrete: Any) -> None:
    """Warn of variables that each clone assigns by itself."""
    variables = traced.outside_variables(concrete)
    names = {
        id(value): f"{type(one).__name__}.{name}"
        for one in _keras.layers(layer)
        for name, value in list(vars(one).items())
        if isinstance(value, tf.Variable)
    }
    if variables:
        found = sorted({names.get(id(v), v.name) for v in variables})
        warnings.warn(
            f"A layer assigns {found}, made by `tf.Variable`, in `call`: every "
            "clone assigns it, once for its own shard. Make such variables "
            "with `self.add_weight(..., trainable=False, aggregation=...)`, "
            "which clones merge as `aggregation` says.",
            stacklevel=1,
        )


def apart(concrete: Any) -> Callable[[TowerInput], Any]:
    """Return a function whose calls do not wait for each other.

    Each gets a resource of its own, which nothing is ever kept in.
    """

    def call(inputs: TowerInput) -> Any:
        place = tf.raw_ops.VarHandleOp(
            dtype=tf.float32,
            shape=[],
            shared_name=f"keras_clones/{tf.get_current_name_scope()}",
        )
        return concrete(inputs._replace(place=place))

    return call


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
    results = []
    for i, clone in enumerate(layout.clones):
        scope = tf.name_scope(clone.scope or "clone")
        with tf.device(clone.device), scope, running(layout, i):
            results.append(function(i))
    return results


@contextlib.contextmanager
def running(layout: Layout, i: int) -> Iterator[None]:
    """Say in what is raised which clone ran, and on how many rows."""
    try:
        yield
    except Exception as error:
        if len(layout.clones) > 1:
            errors.add_note(error, i, layout.shards)
        raise


def bring_home(layout: Layout, values: list[Any]) -> list[Any]:
    """Send one nest of results a clone to the variables device."""
    sources = [clone.device for clone in layout.clones][: len(values)]
    with tf.name_scope("bring_home"):
        return gradients.collect(values, sources, layout.home)


def add_up(layout: Layout, values: list[Any]) -> Any:
    """Send one nest of dense results a clone home, where they are added up."""
    sources = [clone.device for clone in layout.clones]
    with tf.name_scope("bring_home"):
        return gradients.add_up(values, sources, layout.home)


def merge_changes(
    layout: Layout, changes: list[state.Changes], averaged: Any, added: Any
) -> dict[int, Any]:
    """Return the new values of assigned variables, at home, by position.

    Args:
        layout: `Layout` of the rows.
        changes: List of the `Changes` of the clones.
        averaged: Dict of the averages, at home.
        added: Dict of what is to be added to the old values, at home.
    """
    firsts = bring_home(layout, [changes[0].first])[0]
    merged = {**firsts, **averaged}
    for reduce, kind in (
        (tf.reduce_max, "largest"),
        (tf.reduce_min, "smallest"),
    ):
        columns = bring_home(layout, [getattr(c, kind) for c in changes])
        for i in columns[0]:
            merged[i] = reduce(tf.stack([c[i] for c in columns]), axis=0)
    return {**merged, **added}


def assign(
    variables: Sequence[keras.Variable],
    merged: dict[int, Any],
    added: Sequence[int],
) -> None:
    """Give the variables that the clones assigned their merged values."""
    for i, value in merged.items():
        if i in added:
            variables[i].assign_add(value)
        else:
            variables[i].assign(value)


class Merged(NamedTuple):
    """What clones come to at home: one gradient a variable, and the rest."""

    gradients: list[Any]
    parts: Any


def merge_gradients(
    layout: Layout,
    results: list[list[Any]],
    variables: Sequence[keras.Variable],
    parts: list[Any] | None = None,
) -> Merged:
    """Add up the clones' gradients at home, as one device would have them.

    Args:
        layout: `Layout` of the rows.
        results: List with one list of gradients a clone.
        variables: Sequence of the variables they are of.
        parts: List with one nest of dense tensors a clone, which add up, too.
            Defaults to `None`: there are none.
    """
    apart = [
        i
        for i, column in enumerate(zip(*results, strict=True))
        if any(isinstance(g, traced.RowGradient) for g in column)
        or _keras.overwrites_with_gradient(variables[i])
    ]
    dense = [
        {i: g for i, g in enumerate(result) if i not in apart and g is not None}
        for result in results
    ]
    rest, merged = add_up(
        layout, list(zip(parts or [()] * len(dense), dense, strict=True))
    )
    kept = bring_home(layout, [[r[i] for i in apart] for r in results])
    with tf.name_scope("merge_gradients"):
        for i, column in zip(apart, zip(*kept, strict=True), strict=True):
            overwrites = _keras.overwrites_with_gradient(variables[i])
            merge = gradients.largest if overwrites else gradients.merge
            merged[i] = merge(column)
    return Merged([merged.get(i) for i in range(len(variables))], rest)
