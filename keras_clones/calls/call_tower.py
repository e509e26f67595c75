"""The tower function of a layer call: what each clone runs of it."""

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.calls import held
from keras_clones.calls.body import Backward, Body
from keras_clones.calls.traced_backward import floating, trace_backward, wanted
from keras_clones.calls.undone import remember
from keras_clones.clone.inputs import TowerInput
from keras_clones.exchange import laying_out, tracing
from keras_clones.tensors import traced


class CallTower(NamedTuple):
    """A traced call: `backward` is `None` where a tape runs it backward.

    `extra` has the variables of nobody that it uses, and the tensors of the
    step that reach it by no argument, which have gradients too.
    """

    tower: tracing.TracedTower
    backward: Backward | None
    extra: Sequence[Any]

    def outside(self) -> list[tf.Tensor]:
        """Return the tensors that it uses of the graph around it.

        A layer may be called with a function of the step's own, or have one.
        """
        concrete = self.tower.concrete
        captures = () if concrete is None else concrete.graph.captures
        return [
            outer
            for outer, _ in captures
            if tf.is_symbolic_tensor(outer) and outer.dtype != tf.resource
        ]

    @property
    def is_closed(self) -> bool:
        """Say whether it uses nothing of the graph that it was traced in."""
        concrete = self.tower.concrete
        return concrete is not None and not any(
            hasattr(outer, "graph") and not hasattr(outer, "numpy")
            for outer, _ in concrete.graph.captures
        )


class Tracing(NamedTuple):
    """How a call is traced.

    Attributes:
        watched: Boolean, whether gradients may be wanted.
        jit_compile: Boolean, whether XLA compiles it.
        inline: Boolean, whether it becomes part of the step's graph.
        synchronized: Sequence of layers that share sums over the clones.
        in_graph: Boolean, whether it is traced also outside of a graph.
            Else, there the Python function itself runs.
        outer: Sequence of tensors that are no arguments, and have gradients.
    """

    watched: bool
    jit_compile: bool
    inline: bool
    synchronized: Sequence[Any] = ()
    in_graph: bool = False
    outer: Sequence[tf.Tensor] = ()


def trace(body: Body, layout: laying_out.Layout, how: Tracing) -> CallTower:
    """Trace a call once for all clones, and how to run it backward.

    Args:
        body: `Body` of the call.
        layout: `Layout` of its rows.
        how: `Tracing`.
    """
    made = tracing.callable_tower(
        body.layer,
        _keeping(body, how),
        tracing.TowerOptions(how.inline, how.jit_compile, body.exact),
        by_python=body,
    )
    tower = tracing.trace(made, layout, how.synchronized, how.in_graph)
    if tower.concrete is None:
        return CallTower(tower, None, [])
    if how.jit_compile and how.watched and traced.has_loops(tower.concrete):
        # What a loop keeps to run backward cannot leave what XLA compiles.
        how = Tracing(how.watched, False, how.inline)
        return trace(body, layout, how)
    return CallTower(tower, tower.notes.backward, tower.notes.extra)


def trace_with_outside(
    body: Body,
    layout: laying_out.Layout,
    how: Tracing,
    left: Container[int],
) -> CallTower:
    """Trace a call, and once more if it uses tensors that are no arguments.

    Args:
        body: `Body` of the call.
        layout: `Layout` of its rows.
        how: `Tracing`.
        left: Container of the ids of what earlier calls have left on layers.

    Raises:
        held.UsesLeftError: If it uses any of these.
    """
    if tf.executing_eagerly():
        return trace(body, layout, how)
    undo = remember(_keras.layers(body.layer), variables=False)
    made = trace(body, layout, how)
    outside = made.outside()
    if any(id(tensor) in left for tensor in outside):
        undo()
        raise held.UsesLeftError([t for t in outside if id(t) in left])
    watched = [
        t for t in outside if traced.is_continuous(t) and _tf.num_watching([t])
    ]
    if not (watched and how.watched):
        return made
    undo()
    return trace(body, layout, how._replace(outer=watched))


def _keeping(body: Body, how: Tracing) -> Callable[[TowerInput], Any]:
    """Return a body that also gives back what it takes to run backward."""
    options = tracing.function_options(how.inline, how.jit_compile)

    def run_and_keep(inputs: TowerInput) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            if how.watched:
                tape.watch([*floating(inputs.data), *wanted(body, inputs)])
                tape.watch(list(how.outer))
            output, notes = body(inputs)
        residuals: list[tf.Tensor] = []
        if how.watched and floating(output.values):
            # In the notes, it stays with the trace that it belongs to.
            backward, extra, residuals = trace_backward(
                body, inputs, (output, notes), tape, (how.outer, options)
            )
            notes = notes._replace(backward=backward, extra=extra)
        return (output, residuals), notes

    def with_residuals(inputs: TowerInput) -> tuple[Any, Any]:
        # What runs back may call layers again, and they draw the same again.
        with body.drawing(inputs):
            return run_and_keep(inputs)

    return with_residuals
