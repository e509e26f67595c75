"""How a traced call runs backward: traced along with it, and run."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_clones.calls.body import Backward, Body, CallNotes, CallOutput
from keras_clones.clone.inputs import TowerInput, sources
from keras_clones.tensors import traced


def floating(nest: Any) -> list[tf.Tensor]:
    """Return the tensors that a nest is made of and gradients go through."""
    leaves = tf.nest.flatten(nest, expand_composites=True)
    return [t for t in leaves if t is not None and traced.is_continuous(t)]


def wanted(body: Body, inputs: TowerInput) -> list[Any]:
    """Return what of a clone's mirrors gradients are wanted for."""
    mirrors = inputs.mirrors[len(body.variables.trainable) :]
    return [
        *sources(body.variables, inputs),
        *(mirrors[i] for i in body.watched_others),
    ]


def trace_backward(
    body: Body,
    inputs: TowerInput,
    ran: tuple[CallOutput, CallNotes],
    tape: tf.GradientTape,
    how: tuple[Sequence[tf.Tensor], dict[str, Any]],
) -> tuple[Backward, list[Any], list[tf.Tensor]]:
    """Trace how to run a call backward, inside of its own trace.

    Args:
        body: `Body` of the call.
        inputs: `TowerInput` of the clone.
        ran: What the call gave back: `CallOutput` and `CallNotes`.
        tape: The tape that has seen it.
        how: Tuple of the tensors of the step that reach it by no argument,
            and of the arguments of `tf.function`.

    Returns:
        `Backward`, the variables of nobody and tensors of the step, and the
        residuals that the call has to give back.
    """
    output, notes = ran
    outer, options = how
    targets = floating(output.values)
    known = wanted(body, inputs)
    extra: list[Any] = [
        v
        for v in tape.watched_variables()
        if isinstance(v, tf.Variable) and not any(v is k for k in known)
    ]
    extra += outer
    found = [*known, *floating(inputs.data), *extra]

    def backward(gradients: list[tf.Tensor]) -> list[Any]:
        pulled = tape.gradient(targets, found, output_gradients=gradients)
        return body.by_rows(pulled, inputs, notes)

    types = [tf.TensorSpec(t.shape, t.dtype) for t in targets]
    function = tf.function(backward, autograph=False, **options)
    concrete = function.get_concrete_function(types)
    captured, residuals = _capture(concrete, inputs)
    reach = _reach(targets, found)
    return Backward(concrete, captured, reach), extra, residuals


def _capture(
    concrete: Any, inputs: TowerInput
) -> tuple[list[tuple[str, Any]], list[tf.Tensor]]:
    """Return where each tensor is that a function captures, and residuals."""
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
    return captured, residuals


def _reach(targets: list[tf.Tensor], found: list[Any]) -> list[set[int]]:
    """Return which sources each target can have a gradient with respect to."""
    graph = tf.compat.v1.get_default_graph()
    inner = {id(out): id(i) for out, i in graph.captures}
    # Of a table there may be several look-ups.
    ids = [
        {inner.get(id(s.handle)) if isinstance(s, tf.Variable) else id(s)}
        if not isinstance(s, list)
        else {id(rows) for rows in s}
        for s in found
    ]
    if len(targets) == 1:
        return [set(range(len(ids)))]
    return [
        {i for i, one in enumerate(ids) if one & traced_from}
        for traced_from in (traced.reaching([target]) for target in targets)
    ]


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
