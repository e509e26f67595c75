"""What a tensor is made of, by its graph: data, constants, variables."""

from collections.abc import Sequence

import tensorflow as tf

# What a function is given, or another one gives back.
_GIVEN = (
    *("Placeholder", "IteratorGetNext", "OptionalGetValue"),
    *("PartitionedCall", "StatefulPartitionedCall"),
)

_SAME = ("Identity", "Cast")


def comes_from_variables(tensor: tf.Tensor) -> bool:
    """Say whether a tensor is made of variables, and of no data or numbers.

    In a graph, that is what reads variables, but nothing that a function is
    given and nothing that is drawn.
    """
    reads, stack, seen = False, [tensor], set()
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if one.op.type == "ReadVariableOp":
            reads = True
        elif "Random" in one.op.type or one.op.type in _GIVEN:
            return False
        else:
            stack += one.op.inputs
    return reads


def made_of(
    tensor: tf.Tensor, given: Sequence[tf.Tensor], but: Sequence[str] = ()
) -> bool:
    """Say whether a tensor is made of some others and constants alone.

    It is not if it is drawn, or if it takes a state, a function, a branch or
    a loop to make it.

    Args:
        tensor: Tensor in the graph that is made just now.
        given: Sequence of tensors in that graph.
        but: Sequence of types of operations that are not to be among those
            that make it. Defaults to none.
    """
    graph = given[0].graph
    constants = [i for o, i in graph.captures if hasattr(o, "numpy")]
    known = {t.op.name for t in [*given, *constants]}
    stack, seen = [tensor.op], set()
    while stack:
        op = stack.pop()
        if op.name in known or op.name in seen:
            continue
        seen.add(op.name)
        if op.graph is not graph or not _is_plain(op) or op.type in but:
            return False
        stack += [*(t.op for t in op.inputs), *op.control_inputs]
    return True


def _is_plain(op: tf.Operation) -> bool:
    """Say whether what an operation makes is made of its inputs alone."""
    kinds = {one.type for one in op.op_def.attr}
    return not (
        op.op_def.is_stateful
        or op.type == "Placeholder"
        or "Random" in op.type
        or kinds & {"func", "list(func)"}
    )


def is_used(tensor: tf.Tensor) -> bool:
    """Say whether anything is made of a tensor, but of its shape."""
    return any(
        op.type not in _SAME or any(map(is_used, op.outputs))
        for op in tensor.consumers()
    )
