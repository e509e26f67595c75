"""Lay a batch out over the clones, run their towers, bring results home."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import gradients, sharding, state
from keras_clones.balance import seconds_now
from keras_clones.placement import Clone
from keras_clones.rendezvous import run_side_by_side
from keras_clones.state import Variables
from keras_clones.synchronize import over_clones
from keras_clones.tower import Tower, TowerInput, TowerOutput
from keras_clones.unique_rows import looked_up_once

# Clones times variables up to which the towers are inlined. It costs well
# under a second at the first step.
INLINE_VARIABLES = 300


class Layout(NamedTuple):
    """A global batch laid out over clones, one input a clone.

    `stay` has the resources of the variables that are not sent, by position.
    `started` is when the batch was laid out, in seconds, if that is measured.
    """

    home: str
    clones: Sequence[Clone]
    inputs: list[TowerInput]
    stay: dict[int, tf.Tensor]
    started: tf.Tensor | None


class TracedTower(NamedTuple):
    """A tower function ready to be called on any device.

    `returns` is what it returns, or the types of that in a graph, as far as
    that is known before it runs.
    `unique_rows` has the positions of the trainable variables whose gradients
    have each row once. `synchronized` has the layers that share sums over
    the clones, which then run side by side as parts of the step's own graph.
    """

    call: Callable[[TowerInput], TowerOutput]
    returns: TowerOutput | None
    unique_rows: frozenset[int]
    synchronized: Sequence[keras.layers.BatchNormalization] = ()


def lay_out(
    batch: Any,
    rows: sharding.Rows,
    variables: Variables,
    tables: Sequence[keras.Variable],
    loss_scale: tf.Tensor,
    clones: Sequence[Clone],
    home: str,
    fractions: Any = None,
    clock: tf.Variable | None = None,
) -> Layout:
    """Split a batch over clones, and send each one mirror of the variables.

    Args:
        batch: Tuple `(x, y, sample_weight)` of nests of tensors.
        rows: Integer or scalar int32 tensor, the rows of the batch, at least
            as many as there are clones.
        variables: `Variables` of the model, each read once.
        tables: Sequence of the variables that are not sent, but looked up.
        loss_scale: Scalar tensor, what the optimizer multiplies the loss by.
        clones: Sequence of `Clone`s.
        home: Device string, where the batch and the variables are.
        fractions: Sequence of floats or tensor, the clones' fractions of the
            rows. Defaults to `None`: even ones.
        clock: Variable that keeps when the batch was laid out. Defaults to
            `None`: that is not measured.
    """
    sizes = sharding.shard_sizes(rows, len(clones), fractions)
    with tf.name_scope("split_batch"):
        shards = sharding.split(batch, sizes)
    shares = tf.cast(tf.stack(sizes), tf.float64) / tf.cast(rows, tf.float64)
    scale = tf.fill([len(clones)], tf.cast(loss_scale, tf.float64))
    both = tf.unstack(_opaque(tf.stack([shares, scale], axis=1)))
    seeds = [v.value.read_value() for v in variables.seeds]
    sent = variables.trainable + variables.others
    stay = {
        i: variable.value.handle
        for i, variable in enumerate(sent)
        if any(variable is table for table in tables)
    }
    with tf.name_scope("send_mirrors"):
        mirrors = gradients.send_to_all(
            [
                None if i in stay else variable.value.read_value()
                for i, variable in enumerate(sent)
            ],
            home,
            [clone.device for clone in clones],
        )
    inputs = [
        TowerInput(
            mirrors=mirrors[i],
            seeds=state.offset_seeds(seeds, i),
            x=shards[i][0],
            y=shards[i][1],
            sample_weight=shards[i][2],
            share=both[i],
        )
        for i in range(len(clones))
    ]
    started = None if clock is None else seconds_now(clock, shards)
    return Layout(home, clones, inputs, stay, started)


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
    returned when it was last traced, also what the function leaves out.
    """

    function: Any
    returned: list[TowerOutput]


def callable_tower(
    tower: Tower,
    inline: bool,
    jit_compile: bool,
    with_outputs: bool,
) -> CallableTower:
    """Make a tower function callable from any place of a graph.

    Args:
        tower: Tower function.
        inline: Boolean, whether it becomes part of the step's graph, which it
            cannot where XLA compiles it.
        jit_compile: Boolean, whether XLA compiles the function.
        with_outputs: Boolean, whether the model's outputs are needed.
    """
    returned: list[TowerOutput] = []

    def run_tower(inputs: TowerInput) -> TowerOutput:
        returned[:] = [tower(inputs)]
        if with_outputs:
            return returned[0]
        return returned[0]._replace(outputs=None, masks=[])

    function = tf.function(
        run_tower,
        autograph=False,
        jit_compile=jit_compile or None,
        experimental_attributes=(
            None if inline and not jit_compile else {"_noinline": True}
        ),
    )
    return CallableTower(function, returned)


def trace(
    tower: CallableTower,
    layout: Layout,
    synchronized: Sequence[keras.layers.BatchNormalization] = (),
    runs_back: bool = False,
) -> TracedTower:
    """Trace a tower function once for the shards of all clones.

    Outside of a graph, each clone calls the Python function itself, so that
    it can be debugged.

    Args:
        tower: `CallableTower`.
        layout: `Layout` of the global batch.
        synchronized: Sequence of layers that share sums over the clones.
        runs_back: Boolean, whether the function is to run backward later.
            What a loop keeps for that cannot leave a function that XLA
            compiles, so such a function is not compiled. Defaults to
            `False`.
    """
    function, returned = tower
    inline = tf.executing_eagerly() or synchronized
    if inline and not _has_sparse(layout.inputs[0].x):
        call = function.python_function
        if synchronized:
            return TracedTower(call, None, frozenset(), synchronized)
        with tf.device(layout.clones[0].device):
            call(layout.inputs[0])
        return TracedTower(call, returned[0], frozenset())
    types = [
        tf.nest.map_structure(tf.type_spec_from_value, inputs)
        for inputs in layout.inputs
    ]
    common = tf.nest.map_structure(
        lambda one, *more: one.most_specific_common_supertype(more), *types
    )
    concrete = function.get_concrete_function(common)
    if runs_back and _is_compiled(concrete) and _loops(concrete):
        function = tf.function(
            function.python_function,
            autograph=False,
            experimental_attributes={"_noinline": True},
        )
        concrete = function.get_concrete_function(common)
    call = concrete
    if not inline and _has_state_of_no_variable(concrete):
        place = tf.TensorSpec([], tf.resource)
        concrete = function.get_concrete_function(common._replace(place=place))
        call = _apart(concrete)
    return TracedTower(
        function.python_function if inline else call,
        returned[0],
        looked_up_once(concrete, layout.inputs[0].mirrors, layout.stay),
        synchronized,
    )


def _is_compiled(concrete: Any) -> bool:
    attributes = concrete.function_def.attr
    # Reading a key that is not there would add it.
    return "_XlaMustCompile" in attributes and attributes["_XlaMustCompile"].b


def _loops(concrete: Any) -> bool:
    return any("While" in op.type for op in concrete.graph.get_operations())


def _has_state_of_no_variable(concrete: Any) -> bool:
    """Say whether a function draws from `tf.random`, prints or calls Python.

    Within a `tf.function`, TensorFlow runs calls of such functions one after
    the other, unless each works on resources of its own. XLA takes none that
    nothing is kept in.
    """
    if _is_compiled(concrete):
        return False
    return not any(t.dtype == tf.resource for t in concrete.inputs) and any(
        op.op_def.is_stateful and op.type != "Placeholder"
        for op in concrete.graph.get_operations()
    )


def _apart(concrete: Any) -> Callable[[TowerInput], TowerOutput]:
    """Return a function whose calls do not wait for each other.

    Each gets a resource of its own, which nothing is ever kept in.
    """

    def call(inputs: TowerInput) -> TowerOutput:
        place = tf.raw_ops.VarHandleOp(
            dtype=tf.float32,
            shape=[],
            shared_name=f"keras_clones/{tf.get_current_name_scope()}",
        )
        return concrete(inputs._replace(place=place))

    return call


def _has_sparse(x: Any) -> bool:
    """Say whether gradients have unique rows, which only a graph tells of."""
    return any(isinstance(leaf, tf.SparseTensor) for leaf in tf.nest.flatten(x))


def call(tower: TracedTower, layout: Layout) -> list[TowerOutput]:
    """Run a tower on every clone, each on its device."""
    return _each(tower, layout, lambda i: tower.call(layout.inputs[i]))


def _each(
    tower: TracedTower, layout: Layout, function: Callable[[int], Any]
) -> list[Any]:
    """Call a function once a clone, in its scope and on its device."""
    if tower.synchronized:
        with over_clones(tower.synchronized):
            return run_side_by_side(layout.clones, function)
    results = []
    for i, clone in enumerate(layout.clones):
        with tf.device(clone.device), tf.name_scope(clone.scope or "clone"):
            results.append(function(i))
    return results


def call_with_pullback(
    tower: TracedTower, layout: Layout, watched: Sequence[Sequence[Any]]
) -> tuple[list[TowerOutput], Callable[[list[list[Any]]], list[list[Any]]]]:
    """Run a tower on every clone, ready to run backward later.

    Args:
        tower: `TracedTower` without a loss of its own.
        layout: `Layout` of the global batch.
        watched: Sequence of what gradients are wanted for, one a clone.

    Returns:
        The results, and a function that takes the gradients of the loss with
        respect to each clone's `targets` and returns those with respect to
        what is watched.
    """

    def forward(i: int) -> tuple[TowerOutput, tf.GradientTape]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(watched[i])
            return tower.call(layout.inputs[i]), tape

    results, tapes = zip(*_each(tower, layout, forward), strict=True)

    def pullback(cotangents: list[list[Any]]) -> list[list[Any]]:
        def backward(i: int) -> list[Any]:
            pairs = zip(targets(results[i]), cotangents[i], strict=True)
            known = [(t, c) for t, c in pairs if c is not None]
            if not known:
                return [None] * len(watched[i])
            wanted, upstream = zip(*known, strict=True)
            return tapes[i].gradient(
                wanted, list(watched[i]), output_gradients=upstream
            )

        return _each(tower, layout, backward)

    return list(results), pullback


def targets(result: TowerOutput) -> list[tf.Tensor]:
    """Return what a loss over the global batch can depend on in a clone."""
    leaves = tf.nest.flatten(
        (result.outputs, result.layer_losses), expand_composites=True
    )
    return [leaf for leaf in leaves if leaf.dtype.is_floating]


def bring_home(layout: Layout, values: list[Any]) -> list[Any]:
    """Send one nest of results a clone to the variables device."""
    sources = [clone.device for clone in layout.clones]
    with tf.name_scope("bring_home"):
        return gradients.collect(values, sources, layout.home)


def add_up(layout: Layout, values: list[Any]) -> Any:
    """Send one nest of dense results a clone home, where they are added up."""
    sources = [clone.device for clone in layout.clones]
    with tf.name_scope("bring_home"):
        return gradients.add_up(values, sources, layout.home)


def first_home(layout: Layout, value: Any) -> Any:
    """Send a nest of results of the first clone to the variables device."""
    sources = [layout.clones[0].device]
    with tf.name_scope("bring_home"):
        return gradients.collect([value], sources, layout.home)[0]
