"""Where the size of an axis comes from: the rows of a batch, or something else.

Shapes do not tell: an axis of no known size may be the batch's, or time. The
graph does, since a size is read off a tensor's shape, whose axes came from
those of other tensors, back to what the graph was given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_clones import traced

# What an axis can be: as long as the batch or a multiple of it, with the
# entries of each row side by side; something else; of rows, but in another
# order; and of no kind that the graph tells.
ROWS, OTHER, MIXED, UNKNOWN = "rows", "other", "mixed", "unknown"

_SAME = ("Identity", "Cast", "StopGradient", "PlaceholderWithDefault")
_REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Prod", "All", "Any")
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
        return self._answer((self._entry, (vector, index)))

    def of_axis(self, tensor: tf.Tensor, axis: int) -> str:
        """Say where the size of an axis of a tensor comes from."""
        return self._answer((self._axis, (tensor, axis)))

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
        return _one_of(found)

    def _entry(self, vector: tf.Tensor, index: int) -> "_Question | str":
        """Say of an entry of a vector."""
        op = vector.op
        if id(vector) in self._shapes:
            return ROWS if index == 0 else OTHER
        if not self._depends(vector):
            return OTHER
        if op.type in _SAME:
            return self._entry, (op.inputs[0], index)
        if op.type in ("Shape", "ShapeN"):
            return self._axis, (op.inputs[vector.value_index], index)
        if op.type == "Pack":
            return self._scalar, (op.inputs[index],)
        if op.type == "ConcatV2":
            for part in list(op.inputs)[:-1]:
                length = part.shape.num_elements()
                if length is None:
                    break
                if index < length:
                    return self._entry, (part, index)
                index -= length
        start = _start_of_slice(op)
        if start is not None:
            return self._entry, (op.inputs[0], start + index)
        if op.type == "GatherV2":
            where = _constant(op.inputs[1])
            if where is not None and where.ndim == 1:
                return self._entry, (op.inputs[0], int(where[index]))
        if op.type in ("BroadcastArgs", "Maximum"):
            return _one_of([self.of_entry(t, index) for t in op.inputs])
        return UNKNOWN

    def _scalar(self, tensor: tf.Tensor) -> "_Question | str":
        """Say of a single size."""
        op = tensor.op
        if not self._depends(tensor):
            return OTHER
        if op.type in (*_SAME, "Reshape", "Squeeze", "ExpandDims"):
            source = op.inputs[0]
            if source.shape.rank == 0:
                return self._scalar, (source,)
            return self._entry, (source, 0)
        start = _start_of_slice(op)
        if start is not None:
            return self._entry, (op.inputs[0], start)
        if op.type == "Mul":
            found = [self._answer((self._scalar, (t,))) for t in op.inputs]
            # Which factor is the outer one, their order does not tell.
            found.sort(key=lambda kind: kind != ROWS)
            if found[0] == ROWS:
                return ROWS if found[1] == OTHER else MIXED
            return _one_of(found)
        if op.type == "Prod" and op.inputs[0].shape.rank == 1:
            length = op.inputs[0].shape[0]
            if length is not None:
                source = op.inputs[0]
                return self._product(
                    [(self._entry, (source, i)) for i in range(length)]
                )
        return UNKNOWN

    def _axis(self, tensor: tf.Tensor, axis: int) -> "_Question | str":
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
        rule = _RULES.get(tensor.op.type)
        if rule is not None:
            return rule(self, tensor, axis)
        return self._like_inputs(tensor, axis)

    def _like_inputs(self, tensor: tf.Tensor, axis: int) -> "_Question | str":
        """Say of what has the axes of its inputs, as most operations do."""
        for source in tensor.op.inputs:
            shape = source.shape
            if shape.rank == tensor.shape.rank and shape[axis] is None:
                return self._axis, (source, axis)
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


def _one_of(found: Sequence[str]) -> str:
    """Return which of several answers holds for what is like any of them."""
    for kind in (MIXED, UNKNOWN, ROWS):
        if kind in found:
            return kind
    return OTHER


def _constant(tensor: tf.Tensor) -> Any:
    return tf.get_static_value(tensor)


def _start_of_slice(op: Any) -> int | None:
    """Return where a slice of a vector starts, one entry after the other."""
    if op.type not in ("Slice", "StridedSlice") or op.inputs[0].shape.rank != 1:
        return None
    begin, length = _constant(op.inputs[1]), op.inputs[0].shape[0]
    if op.type == "StridedSlice":
        masks = op.get_attr("new_axis_mask") or op.get_attr("ellipsis_mask")
        if masks or list(_constant(op.inputs[3])) != [1]:
            return None
        if op.get_attr("begin_mask"):
            return 0
    if begin is None or (begin[0] < 0 and length is None):
        return None
    return int(begin[0] if begin[0] >= 0 else begin[0] + length)


def _transpose(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    order = _constant(tensor.op.inputs[1])
    if order is None:
        return UNKNOWN
    return sizes._axis, (tensor.op.inputs[0], int(order[axis]))


def _reshape(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    source, shape = tensor.op.inputs
    parts = _sizes_in(shape)
    if parts is None or parts[axis] != -1:
        return sizes._entry, (shape, axis)
    if axis > 0 or source.shape.rank is None:
        return UNKNOWN
    found = [sizes.of_axis(source, i) for i in range(source.shape.rank)]
    if ROWS not in found[1:]:
        # All of a row's entries are side by side.
        return found[0]
    return MIXED


def _sizes_in(shape: tf.Tensor) -> "list[int | None] | None":
    """Return the entries of a shape that are constants, and `None` else."""
    known = _constant(shape)
    if known is not None:
        return [int(size) for size in known]
    if shape.op.type in _SAME:
        return _sizes_in(shape.op.inputs[0])
    if shape.op.type != "Pack":
        return None
    found = [_constant(size) for size in shape.op.inputs]
    return [None if size is None else int(size) for size in found]


def _expand_dims(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    new = _constant(tensor.op.inputs[1])
    if new is None:
        return UNKNOWN
    new = int(new) % tensor.shape.rank
    return sizes._axis, (tensor.op.inputs[0], axis - (axis > new))


def _squeeze(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    source = tensor.op.inputs[0]
    gone = tensor.op.get_attr("squeeze_dims")
    if source.shape.rank is None or not gone:
        return UNKNOWN
    gone = {one % source.shape.rank for one in gone}
    kept = [i for i in range(source.shape.rank) if i not in gone]
    return sizes._axis, (source, kept[axis])


def _reduction(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    source, over = tensor.op.inputs
    if tensor.op.get_attr("keep_dims"):
        return sizes._axis, (source, axis)
    gone = _constant(over)
    if gone is None or source.shape.rank is None:
        return UNKNOWN
    gone = {int(one) % source.shape.rank for one in gone.reshape(-1)}
    kept = [i for i in range(source.shape.rank) if i not in gone]
    return sizes._axis, (source, kept[axis])


def _pack(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    new = tensor.op.get_attr("axis") % tensor.shape.rank
    return sizes._axis, (tensor.op.inputs[0], axis - (axis > new))


def _concat(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    parts = list(tensor.op.inputs)[:-1]
    along = _constant(tensor.op.inputs[-1])
    if along is None:
        return UNKNOWN
    if int(along) % tensor.shape.rank != axis:
        return sizes._like_inputs(tensor, axis)
    # The rows of one part come after all those of another.
    found = [sizes.of_axis(part, axis) for part in parts]
    return MIXED if ROWS in found else _one_of(found)


def _tile(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    source, multiples = tensor.op.inputs
    parts = _sizes_in(multiples)
    if parts is not None and parts[axis] == 1:
        return sizes._axis, (source, axis)
    if source.shape[axis] == 1:
        return sizes._entry, (multiples, axis)
    found = sizes.of_axis(source, axis)
    times = sizes.of_entry(multiples, axis)
    return MIXED if ROWS in (found, times) else _one_of([found, times])


def _gather(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    op = tensor.op
    table, ids = op.inputs[:2]
    along, shared = 0, 0
    if op.type == "GatherV2":
        along, shared = _constant(op.inputs[2]), op.get_attr("batch_dims")
        if along is None or ids.shape.rank is None or along < 0:
            return UNKNOWN
    if axis < along:
        return sizes._axis, (table, axis)
    if axis < along + ids.shape.rank - shared:
        return sizes._axis, (ids, axis - int(along) + shared)
    return UNKNOWN


def _slice(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    source, _, size = tensor.op.inputs
    parts = _sizes_in(size)
    if parts is not None and parts[axis] == -1:
        return sizes._axis, (source, axis)
    return sizes._entry, (size, axis)


def _strided_slice(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    op = tensor.op
    new, ellipsis = op.get_attr("new_axis_mask"), op.get_attr("ellipsis_mask")
    shrunk = op.get_attr("shrink_axis_mask")
    if ellipsis & 1 and axis == 0 and not new:
        return sizes._axis, (op.inputs[0], 0)
    if ellipsis:
        return UNKNOWN
    source, entry = 0, 0
    while True:
        bit = 1 << entry
        if new & bit:
            if axis == 0:
                return OTHER
            axis -= 1
        elif shrunk & bit:
            source += 1
        elif axis == 0:
            whole = bit & op.get_attr("begin_mask") & op.get_attr("end_mask")
            past = entry >= (op.inputs[1].shape[0] or 0)
            return (
                (sizes._axis, (op.inputs[0], source))
                if whole or past
                else UNKNOWN
            )
        else:
            axis, source = axis - 1, source + 1
        entry += 1


def _einsum(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    equation = tensor.op.get_attr("equation").decode()
    given, _, result = equation.replace(" ", "").partition("->")
    if "." in equation or axis >= len(result):
        return UNKNOWN
    for source, letters in zip(tensor.op.inputs, given.split(","), strict=True):
        at = letters.find(result[axis])
        if at >= 0 and source.shape[at] is None:
            return sizes._axis, (source, at)
    return UNKNOWN


def _by_shape(where: int) -> Callable[[Sizes, tf.Tensor, int], Any]:
    """Return the rule of operations that are told their shape."""
    return lambda sizes, tensor, axis: (
        sizes._entry,
        (tensor.op.inputs[where], axis),
    )


def _sparse(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    """Return the rule of a sparse matrix times a dense one."""
    if axis > 0 or tensor.op.get_attr("adjoint_a"):
        return UNKNOWN
    return sizes._entry, (tensor.op.inputs[2], 0)


def _loop(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    """Return the rule of a loop, whose variables keep their shapes."""
    return sizes._axis, (tensor.op.inputs[tensor.value_index], axis)


def _matmul(sizes: Sizes, tensor: tf.Tensor, axis: int) -> Any:
    source, name = tensor.op.inputs[axis], "transpose_" + "ab"[axis]
    swapped = tensor.op.get_attr(name)
    return sizes._axis, (source, 1 - axis if swapped else axis)


_RULES: dict[str, Callable[[Sizes, tf.Tensor, int], Any]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "ExpandDims": _expand_dims,
    "Squeeze": _squeeze,
    "Pack": _pack,
    "ConcatV2": _concat,
    "Tile": _tile,
    "GatherV2": _gather,
    "ResourceGather": _gather,
    "Slice": _slice,
    "StridedSlice": _strided_slice,
    "Einsum": _einsum,
    "Fill": _by_shape(0),
    "BroadcastTo": _by_shape(1),
    "SparseToDense": _by_shape(1),
    "SparseTensorDenseMatMul": _sparse,
    "While": _loop,
    "StatelessWhile": _loop,
    "MatMul": _matmul,
}
