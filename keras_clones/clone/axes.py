"""How the axes of what an operation gives back come from those of its inputs.

A rule takes `Sizes`, a tensor and an axis of no known size. It returns where
the size comes from, or the question of another axis that tells.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# What an axis can be: as long as the batch or a multiple of it, with the
# entries of each row side by side; something else; of rows, but in another
# order; and of no kind that the graph tells.
ROWS, OTHER, MIXED, UNKNOWN = "rows", "other", "mixed", "unknown"

SAME = ("Identity", "Cast", "StopGradient", "PlaceholderWithDefault")
_REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Prod", "All", "Any")


def one_of(found: Sequence[str]) -> str:
    """Return which of several answers holds for what is like any of them."""
    for kind in (MIXED, UNKNOWN, ROWS):
        if kind in found:
            return kind
    return OTHER


def constant(tensor: tf.Tensor) -> Any:
    """Return the value of a tensor that is a constant, else `None`."""
    return tf.get_static_value(tensor)


def start_of_slice(op: Any) -> int | None:
    """Return where a slice of a vector starts, one entry after the other."""
    if op.type not in ("Slice", "StridedSlice") or op.inputs[0].shape.rank != 1:
        return None
    begin, length = constant(op.inputs[1]), op.inputs[0].shape[0]
    if op.type == "StridedSlice":
        masks = op.get_attr("new_axis_mask") or op.get_attr("ellipsis_mask")
        if masks or list(constant(op.inputs[3])) != [1]:
            return None
        if op.get_attr("begin_mask"):
            return 0
    if begin is None or (begin[0] < 0 and length is None):
        return None
    return int(begin[0] if begin[0] >= 0 else begin[0] + length)


def _transpose(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    order = constant(tensor.op.inputs[1])
    if order is None:
        return UNKNOWN
    return sizes.axis, (tensor.op.inputs[0], int(order[axis]))


def _reshape(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    source, shape = tensor.op.inputs
    parts = _sizes_in(shape)
    if parts is None or parts[axis] != -1:
        return sizes.entry, (shape, axis)
    if axis > 0 or source.shape.rank is None:
        return UNKNOWN
    found = [sizes.of_axis(source, i) for i in range(source.shape.rank)]
    if ROWS not in found[1:]:
        # All of a row's entries are side by side.
        return found[0]
    return MIXED


def _sizes_in(shape: tf.Tensor) -> "list[int | None] | None":
    """Return the entries of a shape that are constants, and `None` else."""
    known = constant(shape)
    if known is not None:
        return [int(size) for size in known]
    if shape.op.type in SAME:
        return _sizes_in(shape.op.inputs[0])
    if shape.op.type != "Pack":
        return None
    found = [constant(size) for size in shape.op.inputs]
    return [None if size is None else int(size) for size in found]


def _new_axis(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    op = tensor.op
    new = op.get_attr("axis") if op.type == "Pack" else constant(op.inputs[1])
    if new is None:
        return UNKNOWN
    return sizes.axis, (op.inputs[0], axis - (axis > new % tensor.shape.rank))


def _squeeze(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    source = tensor.op.inputs[0]
    gone = tensor.op.get_attr("squeeze_dims")
    if source.shape.rank is None or not gone:
        return UNKNOWN
    gone = {one % source.shape.rank for one in gone}
    kept = [i for i in range(source.shape.rank) if i not in gone]
    return sizes.axis, (source, kept[axis])


def _reduction(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    source, over = tensor.op.inputs
    if tensor.op.get_attr("keep_dims"):
        return sizes.axis, (source, axis)
    gone = constant(over)
    if gone is None or source.shape.rank is None:
        return UNKNOWN
    gone = {int(one) % source.shape.rank for one in gone.reshape(-1)}
    kept = [i for i in range(source.shape.rank) if i not in gone]
    return sizes.axis, (source, kept[axis])


def _concat(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    parts = list(tensor.op.inputs)[:-1]
    along = constant(tensor.op.inputs[-1])
    if along is None:
        return UNKNOWN
    if int(along) % tensor.shape.rank != axis:
        return sizes._like_inputs(tensor, axis)
    # The rows of one part come after all those of another.
    found = [sizes.of_axis(part, axis) for part in parts]
    return MIXED if ROWS in found else one_of(found)


def _tile(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    source, multiples = tensor.op.inputs
    parts = _sizes_in(multiples)
    if parts is not None and parts[axis] == 1:
        return sizes.axis, (source, axis)
    if source.shape[axis] == 1:
        return sizes.entry, (multiples, axis)
    found = sizes.of_axis(source, axis)
    times = sizes.of_entry(multiples, axis)
    return MIXED if ROWS in (found, times) else one_of([found, times])


def _gather(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    op = tensor.op
    table, ids = op.inputs[:2]
    along, shared = 0, 0
    if op.type == "GatherV2":
        along, shared = constant(op.inputs[2]), op.get_attr("batch_dims")
        if along is None or ids.shape.rank is None or along < 0:
            return UNKNOWN
    if axis < along:
        return sizes.axis, (table, axis)
    if axis < along + ids.shape.rank - shared:
        return sizes.axis, (ids, axis - int(along) + shared)
    return UNKNOWN


def _slice(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    source, _, size = tensor.op.inputs
    parts = _sizes_in(size)
    if parts is not None and parts[axis] == -1:
        return sizes.axis, (source, axis)
    return sizes.entry, (size, axis)


def _strided_slice(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    op = tensor.op
    new, ellipsis = op.get_attr("new_axis_mask"), op.get_attr("ellipsis_mask")
    shrunk = op.get_attr("shrink_axis_mask")
    if ellipsis & 1 and axis == 0 and not new:
        return sizes.axis, (op.inputs[0], 0)
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
                (sizes.axis, (op.inputs[0], source))
                if whole or past
                else UNKNOWN
            )
        else:
            axis, source = axis - 1, source + 1
        entry += 1


def _einsum(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    equation = tensor.op.get_attr("equation").decode()
    given, _, result = equation.replace(" ", "").partition("->")
    if "." in equation or axis >= len(result):
        return UNKNOWN
    for source, letters in zip(tensor.op.inputs, given.split(","), strict=True):
        at = letters.find(result[axis])
        if at >= 0 and source.shape[at] is None:
            return sizes.axis, (source, at)
    return UNKNOWN


def _same_place(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    """Return the rule of a loop, whose variables keep their shapes."""
    return sizes.axis, (tensor.op.inputs[tensor.value_index], axis)


def _by_shape(where: int) -> Callable[[Any, tf.Tensor, int], Any]:
    """Return the rule of operations that are told their shape."""
    return lambda sizes, tensor, axis: (
        sizes.entry,
        (tensor.op.inputs[where], axis),
    )


def _sparse(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    """Return the rule of a sparse matrix times a dense one."""
    if axis > 0 or tensor.op.get_attr("adjoint_a"):
        return UNKNOWN
    return sizes.entry, (tensor.op.inputs[2], 0)


def _matmul(sizes: Any, tensor: tf.Tensor, axis: int) -> Any:
    source, name = tensor.op.inputs[axis], "transpose_" + "ab"[axis]
    swapped = tensor.op.get_attr(name)
    return sizes.axis, (source, 1 - axis if swapped else axis)


RULES: dict[str, Callable[[Any, tf.Tensor, int], Any]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "ExpandDims": _new_axis,
    "Squeeze": _squeeze,
    "Pack": _new_axis,
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
    "While": _same_place,
    "StatelessWhile": _same_place,
    "MatMul": _matmul,
}
