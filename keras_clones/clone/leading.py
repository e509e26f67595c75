"""Where the size of an axis comes from: the rows of a batch, or something else.

Shapes do not tell: an axis of no known size may be the batch's, or time. The
graph does, since a size is read off a tensor's shape, whose axes came from
those of other tensors, back to what the graph was given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_clones.clone.axes import (
    MIXED,
    OTHER,
    ROWS,
    RULES,
    SAME,
    UNKNOWN,
    constant,
    one_of,
    start_of_slice,
)
from keras_clones.tensors import traced

# Of what these give back, nothing tells.
_HIDING = (
    *("PartitionedCall", "StatefulPartitionedCall", "TensorListStack"),
    *("Where", "Unique", "UniqueV2", "DynamicPartition"),
)
# A question is a function and its arguments; asking comes to an answer, or to
# another question. Deep models would be too deep for calls within calls.
_Question = tuple[Callable[..., Any], tuple[Any, ...]]


class Sizes:
    """Answers where sizes come from, in the graph of a clone.

    Args:
        dense: Sequence of the tensors whose first axis is the batch.
        flat: Sequence of tensors with the values of ragged rows, one after
            the other.
        shapes: Sequence of vectors that are shapes of sparse tensors.
    """

    def __init__(
        self,
        dense: Sequence[tf.Tensor],
        flat: Sequence[tf.Tensor] = (),
        shapes: Sequence[tf.Tensor] = (),
    ) -> None:
        self._kinds: dict[int, str] = {id(t): ROWS for t in dense}
        self._kinds.update((id(t), MIXED) for t in flat)
        self._shapes = {id(t) for t in shapes}
        self._graph = (*dense, *flat, *shapes)[0].graph
        self._found = traced.dependence([*dense, *flat, *shapes])
        self._known: dict[Any, str] = {}

    def of_entry(self, vector: tf.Tensor, index: int) -> str:
        """Say where an entry of a vector of sizes comes from."""
        return self._answer((self.entry, (vector, index)))

    def of_axis(self, tensor: tf.Tensor, axis: int) -> str:
        """Say where the size of an axis of a tensor comes from."""
        return self._answer((self.axis, (tensor, axis)))

    def _depends(self, tensor: tf.Tensor) -> bool:
        """Say whether a tensor may depend on the rows.

        What a function or a loop is called with, is not known within it.
        """
        inside = tensor.graph is not self._graph
        return tensor.op.type != "Const" and (inside or self._found(tensor))

    def _answer(self, question: "_Question | str") -> str:
        passed = []
        while not isinstance(question, str):
            function, arguments = question
            key = (function.__name__, id(arguments[0]), *arguments[1:])
            passed.append(key)
            known = self._known.get(key)
            question = known or function(*map(_outer, arguments))
        for key in passed:
            self._known[key] = question
        return question

    def _product(self, questions: Sequence[_Question]) -> str:
        """Say of a product of sizes, whose first factor is the outermost."""
        found = [self._answer(question) for question in questions]
        if ROWS in found and set(found) - {ROWS} <= {OTHER}:
            both = found.count(ROWS) > 1
            return MIXED if both or found[0] != ROWS else ROWS
        return one_of(found)

    def entry(self, vector: tf.Tensor, index: int) -> "_Question | str":
        """Say of an entry of a vector."""
        op = vector.op
        if id(vector) in self._shapes:
            return ROWS if index == 0 else OTHER
        if not self._depends(vector):
            return OTHER
        if op.type in SAME:
            return self.entry, (op.inputs[0], index)
        if op.type in ("Shape", "ShapeN"):
            return self.axis, (op.inputs[vector.value_index], index)
        if op.type == "Pack":
            return self.scalar, (op.inputs[index],)
        if op.type == "ConcatV2":
            for part in list(op.inputs)[:-1]:
                length = part.shape.num_elements()
                if length is None:
                    break
                if index < length:
                    return self.entry, (part, index)
                index -= length
        start = start_of_slice(op)
        if start is not None:
            return self.entry, (op.inputs[0], start + index)
        if op.type == "GatherV2":
            where = constant(op.inputs[1])
            if where is not None and where.ndim == 1:
                return self.entry, (op.inputs[0], int(where[index]))
        if op.type in ("BroadcastArgs", "Maximum"):
            return one_of([self.of_entry(t, index) for t in op.inputs])
        return UNKNOWN

    def scalar(self, tensor: tf.Tensor) -> "_Question | str":
        """Say of a single size."""
        op = tensor.op
        if not self._depends(tensor):
            return OTHER
        if op.type in (*SAME, "Reshape", "Squeeze", "ExpandDims"):
            source = op.inputs[0]
            if source.shape.rank == 0:
                return self.scalar, (source,)
            return self.entry, (source, 0)
        start = start_of_slice(op)
        if start is not None:
            return self.entry, (op.inputs[0], start)
        if op.type == "Mul":
            found = [self._answer((self.scalar, (t,))) for t in op.inputs]
            # Which factor is the outer one, their order does not tell.
            found.sort(key=lambda kind: kind != ROWS)
            if found[0] == ROWS:
                return ROWS if found[1] == OTHER else MIXED
            return one_of(found)
        if op.type == "Prod" and op.inputs[0].shape.rank == 1:
            length = op.inputs[0].shape[0]
            if length is not None:
                source = op.inputs[0]
                return self._product(
                    [(self.entry, (source, i)) for i in range(length)]
                )
        return UNKNOWN

    def axis(self, tensor: tf.Tensor, axis: int) -> "_Question | str":
        """Say of an axis of a tensor."""
        if tensor.shape.rank is None:
            return UNKNOWN
        if tensor.shape[axis] is not None:
            return OTHER
        if id(tensor) in self._kinds:
            return self._kinds[id(tensor)] if axis == 0 else OTHER
        if not self._depends(tensor):
            return OTHER
        if tensor.op.type in _HIDING:
            return UNKNOWN
        rule = RULES.get(tensor.op.type)
        if rule is not None:
            return rule(self, tensor, axis)
        return self._like_inputs(tensor, axis)

    def _like_inputs(self, tensor: tf.Tensor, axis: int) -> "_Question | str":
        """Say of what has the axes of its inputs, as most operations do."""
        for source in tensor.op.inputs:
            shape = source.shape
            if shape.rank == tensor.shape.rank and shape[axis] is None:
                return self.axis, (source, axis)
        return UNKNOWN


def _outer(value: Any) -> Any:
    """Return what a function captured, in place of its name for it."""
    while isinstance(value, tf.Tensor) and value.op.type == "Placeholder":
        captures = getattr(value.graph, "captures", ())
        outer = [out for out, inner in captures if inner is value]
        if not outer or not hasattr(outer[0], "op"):
            break
        value = outer[0]
    return value
