"""Trace tower functions once, for all clones to call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import warn
from keras_clones.clone.inputs import TowerInput, common_types
from keras_clones.exchange import errors, outside
from keras_clones.exchange.laying_out import Layout
from keras_clones.tensors import traced

# Clones times variables up to which the towers are inlined. It costs well
# under a second at the first step.
INLINE_VARIABLES = 300


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
    its notes. `tower` is what is called where it is not traced. `layer` is
    what it calls, and `exact` says whether to refuse what could differ.
    """

    function: Any
    returned: list[Any]
    tower: Callable[[TowerInput], tuple[Any, Any]]
    layer: keras.Layer
    exact: bool


class TowerOptions(NamedTuple):
    """How a tower function runs.

    Attributes:
        inline: Boolean, whether it becomes part of the step's graph, which it
            cannot where XLA compiles it.
        jit_compile: Boolean, whether XLA compiles the function.
        exact: Boolean, whether to refuse what could differ from one device.
    """

    inline: bool
    jit_compile: bool
    exact: bool


def callable_tower(
    layer: keras.Layer,
    tower: Callable[[TowerInput], tuple[Any, Any]],
    options: TowerOptions,
    returns: Callable[[Any], Any] = lambda output: output,
    by_python: Callable[[TowerInput], tuple[Any, Any]] | None = None,
) -> CallableTower:
    """Make a tower function callable from any place of a graph.

    Args:
        layer: The `keras.Layer` that it calls.
        tower: Function from `TowerInput` to an output and notes.
        options: `TowerOptions`.
        returns: Function of the output that keeps what is needed of it.
        by_python: Function that is called in place of the tower where that
            is not traced. Defaults to `None`: the tower itself.
    """
    returned: list[Any] = []

    def run_tower(inputs: TowerInput) -> Any:
        returned[:] = tower(inputs)
        return returns(returned[0])

    inline, jit_compile, exact = options
    function = tf.function(
        run_tower, autograph=False, **function_options(inline, jit_compile)
    )
    return CallableTower(function, returned, by_python or tower, layer, exact)


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
    _, returned, python, layer, exact = tower
    by_python = python
    if len(layout.clones) > 1:
        by_python = outside.telling(layer, python, exact)
    if synchronized:
        return TracedTower(
            with_open_rows(by_python, layout), None, None, synchronized
        )
    if tf.executing_eagerly() and not in_graph:
        return TracedTower(by_python)
    try:
        concrete = concrete_tower(tower, layout)
    except Exception as error:
        if len(layout.clones) > 1:
            errors.add_note_of_trace(error, layout.shards, layout.called)
        raise
    output, notes = returned
    if len(layout.clones) > 1:
        found = traced.outside_variables(concrete)
        outside.tell(layer, found, exact)
    if traced.calls_python(concrete):
        return TracedTower(with_open_rows(python, layout), output, notes)
    call: Callable[[TowerInput], Any] = concrete
    if not in_graph and traced.has_state_of_no_variable(concrete):
        call = apart(concrete)
    return TracedTower(call, output, notes, (), concrete)


def concrete_tower(tower: CallableTower, layout: Layout) -> Any:
    """Return the function that all clones call, for shards of any size.

    What a layer assigns can look alike in all clones only because all shards
    have as many rows, as a count of them does, and what it returns can have
    as many rows by chance. So it is looked at once more with that number
    unknown.
    """
    found = _open_tower(tower, layout)
    if found is not None:
        return found
    concrete = tower.function.get_concrete_function(_common_types(layout))
    notes = tower.returned[1]
    fixed = all(isinstance(size, int) for size in layout.shards.sizes)
    if (notes.seen or notes.doubt) and fixed and len(layout.clones) > 1:
        return _look_again(tower, layout, concrete)
    return concrete


def _look_again(tower: CallableTower, layout: Layout, concrete: Any) -> Any:
    """Return the function for any number of rows, if that tells otherwise."""
    kept = list(tower.returned)
    notes = kept[1]
    unknown = len(notes.unknown)
    try:
        found = tower.function.get_concrete_function(
            _common_types(layout, any_rows=True)
        )
    except Exception:
        if notes.doubt == "rows":
            raise
        tower.returned[:] = kept
        return concrete
    if notes.doubt or len(tower.returned[1].unknown) > unknown:
        return found
    tower.returned[:] = kept
    return concrete


def _draws_globally(layout: Layout) -> bool:
    """Say whether clones draw what one device draws for their rows."""
    return layout.inputs[0].total is not None


def _open_tower(tower: CallableTower, layout: Layout) -> Any:
    """Return the function for any number of rows, where clones draw globally.

    Only where that number is not known, shapes tell what is drawn for the rows
    from what has as many entries in any batch. There is none of a model that
    has to know it.
    """
    if not _draws_globally(layout):
        return None
    types = _common_types(layout, any_rows=True)
    try:
        return tower.function.get_concrete_function(types)
    except warn.RefusedError:
        raise
    except Exception:
        return None


def _common_types(layout: Layout, any_rows: bool = False) -> TowerInput:
    common = common_types(layout.inputs)
    if not any_rows:
        return common
    sizes = {s for s in layout.shards.sizes if isinstance(s, int)}

    def relax(spec: Any) -> Any:
        if not isinstance(spec, (tf.TensorSpec, tf.SparseTensorSpec)):
            return spec
        # What has other entries first is not of the batch.
        if not spec.shape.rank or not {spec.shape[0]} <= {None, *sizes}:
            return spec
        return type(spec)([None, *spec.shape[1:]], spec.dtype)

    return common._replace(data=tf.nest.map_structure(relax, common.data))


def with_open_rows(
    tower: Callable[[TowerInput], Any], layout: Layout
) -> Callable[[TowerInput], Any]:
    """Let a Python function not know the number of rows, as traces do not."""
    return lambda inputs: tower(open_rows(inputs, layout))


def open_rows(inputs: TowerInput, layout: Layout) -> TowerInput:
    """Return a clone's input whose rows are of no number known in a graph."""
    if not _draws_globally(layout) or tf.executing_eagerly():
        return inputs
    types = _common_types(layout, any_rows=True)

    def relax(value: Any, spec: Any) -> Any:
        if not isinstance(spec, tf.TensorSpec) or value.shape == spec.shape:
            return value
        return tf.raw_ops.PlaceholderWithDefault(input=value, shape=spec.shape)

    return inputs._replace(
        data=tf.nest.map_structure(relax, inputs.data, types.data)
    )


def types_of(layout: Layout) -> tuple[Any, ...]:
    """Return the types of what clones get, to tell layouts apart by."""
    return tuple(tf.nest.flatten(_common_types(layout)))


def apart(concrete: Any) -> Callable[[TowerInput], Any]:
    """Return a function whose calls do not wait for each other.

    Each gets a resource of its own, which nothing is ever kept in. A function
    around the traced one takes it: tracing what layers do takes the time.
    """
    (types,), _ = concrete.structured_input_signature
    # In line, what it waits for would not be waited for by the one inside.
    inline = "_noinline" not in concrete.function_def.attr
    around = tf.function(
        lambda place, inputs: concrete(inputs),
        autograph=False,
        **function_options(inline, jit_compile=False),
    ).get_concrete_function(tf.TensorSpec([], tf.resource), types)

    def call(inputs: TowerInput) -> Any:
        place = tf.raw_ops.VarHandleOp(
            dtype=tf.float32,
            shape=[],
            shared_name=f"keras_clones/{tf.get_current_name_scope()}",
        )
        return around(place, inputs)

    return call
