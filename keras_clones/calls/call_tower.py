"""The tower function of a layer call: what each clone runs of it."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls.arguments import TENSOR, Arguments
from keras_clones.calls.joining import Joining
from keras_clones.clone import layer_losses
from keras_clones.clone.changes import by_rows, find_changes
from keras_clones.clone.inputs import (
    TowerInput,
    Weights,
    alike_in_all,
    drawing,
    first_writes,
    mapping,
    sources,
)
from keras_clones.clone.leftovers import kept_tensors
from keras_clones.clone.scopes import CloneScope
from keras_clones.clone.state import Changes, Variables
from keras_clones.exchange import laying_out, outside, tracing
from keras_clones.plan.options import StepOptions
from keras_clones.tensors import traced


class CallOutput(NamedTuple):
    """What a clone gives back of a call.

    `values` are tensors in the order of `CallNotes.kinds`.
    """

    values: list[Any]
    changes: Changes


class CallNotes(NamedTuple):
    """What is found out about a call while it is traced.

    `kinds` says how each value joins: `"rows"`, `"sum"` of the clones' parts,
    or `"first"` of values that are alike. `finish` makes what the layer
    returns of the joined values, and leaves on layers what it leaves.
    `backward` says how to run the traced call backward, and `extra` has the
    variables of nobody that it uses. `ends` says where the values of outputs
    end, and where those of losses begin.
    """

    assigned: list[keras.Variable]
    unknown: list[keras.Variable]
    seen: list[keras.Variable]
    kinds: list[str]
    finish: Callable[[list[Any]], Any]
    backward: "Backward | None" = None
    extra: Sequence[tf.Variable] = ()
    ends: tuple[int, int] = (0, 0)


class Body:
    """A layer's call as a function of `TowerInput`."""

    def __init__(
        self,
        layer: keras.Layer,
        method: Callable[..., Any],
        given: Arguments,
        variables: Variables,
        options: StepOptions,
        may_be_idle: bool,
        watched_others: tuple[int, ...],
    ) -> None:
        self.layer = layer
        self.variables = variables
        self.watched_others = watched_others
        self.exact = options.exact
        self._method = method
        self._given = given
        self._options = options
        self._may_be_idle = may_be_idle

    def key(self) -> Any:
        """Return what two calls must have in common to share a tower."""
        others = tuple(
            None if x is TENSOR else _hashable(x) for x in self._given.others
        )
        structure = repr(
            keras.tree.map_structure(lambda _: 0, self._given.structure)
        )
        return (
            id(self.layer),
            getattr(self._method, "__name__", ""),
            structure,
            others,
            tuple(self._given.masked),
            _keras.call_context(),
            self.watched_others,
            self._may_be_idle,
            tuple(id(v) for v in self.variables.trainable),
            _fingerprint(self.layer),
        )

    def alike_in_all(self, inputs: TowerInput) -> Callable[[tf.Tensor], bool]:
        """Return what says whether a tensor is alike in all clones."""
        return alike_in_all(inputs, self._given.differing(inputs.data))

    def __call__(self, inputs: TowerInput) -> tuple[CallOutput, CallNotes]:
        """Call the layer as a clone does."""
        with self.drawing(inputs):
            return self._call(inputs)

    def drawing(
        self, inputs: TowerInput
    ) -> contextlib.AbstractContextManager[None]:
        """Let a clone draw what it is to draw."""
        rows = self._given.differing(inputs.data)
        return drawing(inputs, rows, self._options.exact)

    def _call(self, inputs: TowerInput) -> tuple[CallOutput, CallNotes]:
        layer, options = self.layer, self._options
        weights = Weights(inputs, self._may_be_idle)
        before = kept_tensors(layer)
        args, kwargs = self._given.pack(inputs.data)
        scope = CloneScope(mapping(self.variables, inputs))
        with scope, first_writes(inputs):
            with layer_losses.marking(layer) as marks:
                outputs = self._method(*args, **kwargs)
            losses = layer_losses.own(
                layer, marks, options.scalar_losses, options.exact
            )
            _keras.clear_losses(layer)
        is_alike = self.alike_in_all(inputs)
        changes, notes = find_changes(
            layer,
            self.variables,
            inputs,
            scope,
            options.policies,
            weights,
            is_alike,
        )
        many = len(options.clones) > 1
        joining = Joining(layer, inputs, weights, many, is_alike)
        finish_outputs = joining.add_outputs(outputs)
        num_outputs = len(joining.values)
        finish_kept = joining.add_kept(before)
        ends = (num_outputs, len(joining.values))
        finish_losses = joining.add_losses(losses)

        def finish(values: list[Any]) -> Any:
            rest = iter(values)
            result = finish_outputs(rest)
            finish_kept(rest)
            finish_losses(rest)
            return result

        return CallOutput(joining.values, changes), CallNotes(
            *notes[:3], joining.kinds, finish, ends=ends
        )


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)


def _fingerprint(layer: keras.Layer) -> Any:
    """Return the plain settings of layers, which a call may go by."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (name, value)
        for one in _keras.layers(layer)
        for name, value in list(vars(one).items())
        if isinstance(value, plain) and name not in _keras.CHANGING
    )


class Backward(NamedTuple):
    """How to run a traced call backward.

    `function` takes the gradients of the floating values; `captured` says
    where each tensor that it captures is: an input of the call, a tensor
    outside of it, or one of the residuals that the call gives back.
    `reach` has, for each of these values, the positions of the sources that
    it can have a gradient with respect to.
    """

    function: Any
    captured: list[tuple[str, Any]]
    reach: list[set[int]]


class CallTower(NamedTuple):
    """A traced call: `backward` is `None` where a tape runs it backward.

    `extra` has the variables of nobody that it uses, which have gradients
    too.
    """

    tower: tracing.TracedTower
    backward: Backward | None
    extra: Sequence[tf.Variable]

    @property
    def is_closed(self) -> bool:
        """Say whether it uses nothing of the graph that it was traced in."""
        concrete = self.tower.concrete
        return concrete is not None and not any(
            hasattr(outer, "graph") and not hasattr(outer, "numpy")
            for outer, _ in concrete.graph.captures
        )


def floating(nest: Any) -> list[tf.Tensor]:
    """Return the floating tensors that a nest is made of."""
    leaves = tf.nest.flatten(nest, expand_composites=True)
    return [t for t in leaves if t is not None and t.dtype.is_floating]


def wanted(body: Body, inputs: TowerInput) -> list[Any]:
    """Return what of a clone's mirrors gradients are wanted for."""
    mirrors = inputs.mirrors[len(body.variables.trainable) :]
    return [
        *sources(body.variables, inputs),
        *(mirrors[i] for i in body.watched_others),
    ]


def trace(
    body: Body,
    layout: laying_out.Layout,
    watched: bool,
    jit_compile: bool,
    inline: bool,
    synchronized: Sequence[Any] = (),
    in_graph: bool = False,
) -> CallTower:
    """Trace a call once for all clones, and how to run it backward.

    Args:
        body: `Body` of the call.
        layout: `Layout` of its rows.
        watched: Boolean, whether gradients may be wanted.
        jit_compile: Boolean, whether XLA compiles it.
        inline: Boolean, whether it becomes part of the step's graph.
        synchronized: Sequence of layers that share sums over the clones.
        in_graph: Boolean, whether it is traced also outside of a graph.
            Defaults to `False`: there the Python function itself runs.
    """
    options = tracing.function_options(inline, jit_compile)

    def with_residuals(inputs: TowerInput) -> tuple[Any, Any]:
        # What runs back may call layers again, and they draw the same again.
        with body.drawing(inputs):
            return run_and_keep(inputs)

    def run_and_keep(inputs: TowerInput) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            if watched:
                tape.watch([*floating(inputs.data), *wanted(body, inputs)])
            output, notes = body(inputs)
        residuals: list[tf.Tensor] = []
        if watched and floating(output.values):
            # In the notes, it stays with the trace that it belongs to.
            backward, extra, residuals = _trace_backward(
                body, inputs, output, tape, options
            )
            notes = notes._replace(backward=backward, extra=extra)
        return (output, residuals), notes

    made = tracing.callable_tower(
        body.layer,
        with_residuals,
        inline,
        jit_compile,
        exact=body.exact,
    )
    tower = tracing.trace(made, layout, synchronized, in_graph)
    if tower.concrete is None:
        opened = tracing.with_open_rows(body, layout)
        if len(layout.clones) > 1:
            opened = outside.telling(body.layer, opened, body.exact)
        return CallTower(tower._replace(call=opened), None, [])
    if jit_compile and watched and traced.has_loops(tower.concrete):
        # What a loop keeps to run backward cannot leave what XLA compiles.
        return trace(body, layout, watched, False, inline)
    return CallTower(tower, tower.notes.backward, tower.notes.extra)


def _trace_backward(
    body: Body,
    inputs: TowerInput,
    output: CallOutput,
    tape: tf.GradientTape,
    options: dict[str, Any],
) -> tuple[Backward, list[tf.Variable], list[tf.Tensor]]:
    """Trace how to run a call backward, inside of its own trace.

    Returns:
        `Backward`, the variables of nobody, and the residuals that the call
        has to give back.
    """
    targets = floating(output.values)
    known = wanted(body, inputs)
    extra = [
        v for v in tape.watched_variables() if not any(v is k for k in known)
    ]
    found = [*known, *floating(inputs.data), *extra]
    is_alike = body.alike_in_all(inputs)

    def backward(gradients: list[tf.Tensor]) -> list[Any]:
        return by_rows(
            tape.gradient(targets, found, output_gradients=gradients), is_alike
        )

    types = [tf.TensorSpec(t.shape, t.dtype) for t in targets]
    function = tf.function(backward, autograph=False, **options)
    concrete = function.get_concrete_function(types)
    graph = tf.compat.v1.get_default_graph()
    given = tf.nest.flatten(inputs, expand_composites=True)
    at = {id(t): i for i, t in enumerate(given)}
    outer = {id(inner): out for out, inner in graph.captures}
    captured: list[tuple[str, Any]] = []
    residuals: list[tf.Tensor] = []
    for tensor in concrete.captured_inputs:
        if id(tensor) in at:
            captured.append(("input", at[id(tensor)]))
        elif id(tensor) in outer:
            captured.append(("outside", outer[id(tensor)]))
        else:
            captured.append(("residual", len(residuals)))
            residuals.append(tensor)
    inner = {id(out): id(i) for out, i in graph.captures}
    ids = [
        inner.get(id(s.handle)) if isinstance(s, tf.Variable) else id(s)
        for s in found
    ]
    reach = []
    for target in targets:
        reached = traced.reaching([target]) if len(targets) > 1 else set(ids)
        reach.append({i for i, one in enumerate(ids) if one in reached})
    return Backward(concrete, captured, reach), extra, residuals


def run_backward(
    backward: Backward,
    inputs: TowerInput,
    residuals: Sequence[tf.Tensor],
    values: Sequence[tf.Tensor],
    gradients: Sequence[Any],
) -> list[Any]:
    """Return the gradients of a clone's call with respect to its sources.

    Args:
        backward: `Backward` of the call.
        inputs: `TowerInput` of the clone.
        residuals: Sequence of the tensors that the call gave back for this.
        values: Sequence of the floating values that it gave back.
        gradients: Sequence of their gradients, `None` where there is none.
    """
    given = tf.nest.flatten(inputs, expand_composites=True)
    found = {"input": given, "residual": residuals}
    backward.function.set_external_captures(
        [
            what if where == "outside" else found[where][what]
            for where, what in backward.captured
        ]
    )
    known = [i for i, g in enumerate(gradients) if g is not None]
    pulled = backward.function(
        [
            tf.zeros_like(value) if g is None else tf.cast(g, value.dtype)
            for value, g in zip(values, gradients, strict=True)
        ]
    )
    reached: set[int] = set().union(*(backward.reach[i] for i in known))
    return [g if i in reached else None for i, g in enumerate(pulled)]
