"""Packing small tensors into flat buffers that travel as one."""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

# A tensor of up to this many bytes travels packed with others. A copy of this
# size costs less than the fixed cost of a transfer of its own.
PACK_BYTES = 1 << 16


class PackSpec(NamedTuple):
    """How tensors are packed: groups of positions, and the tensors' shapes."""

    groups: list[list[int]]
    shapes: list[tf.TensorShape]


def pack_spec(*tensors: Sequence[tf.Tensor]) -> PackSpec:
    """Choose what travels packed: small tensors of known shape, by dtype.

    Args:
        *tensors: Sequences of as many tensors, one for each time that the
            spec is to be used.
    """
    by_dtype: dict[tf.DType, list[int]] = {}
    columns = list(zip(*tensors, strict=True))
    for position, column in enumerate(columns):
        first = column[0]
        size = first.shape.num_elements()
        fixed = all(tensor.shape == first.shape for tensor in column)
        if fixed and size is not None and size * first.dtype.size <= PACK_BYTES:
            by_dtype.setdefault(first.dtype, []).append(position)
    return PackSpec(
        groups=[group for group in by_dtype.values() if len(group) > 1],
        shapes=[column[0].shape for column in columns],
    )


def pack(tensors: Sequence[tf.Tensor], spec: PackSpec) -> list[tf.Tensor]:
    """Join the tensors of each group into one flat buffer.

    Args:
        tensors: Sequence of the tensors of all groups, in their order.
        spec: `PackSpec`.
    """
    rest, buffers = iter(tensors), []
    for group in spec.groups:
        shapes = [spec.shapes[p] for p in group]
        flat = [_flat(next(rest), shape) for shape in shapes]
        # Shapes are not known to be fixed in every function's graph.
        size = sum(shape.num_elements() for shape in shapes)
        buffers.append(tf.ensure_shape(tf.concat(flat, axis=0), [size]))
    return buffers


def unpack(buffers: Sequence[tf.Tensor], spec: PackSpec) -> list[tf.Tensor]:
    """Return the tensors that `pack` was given, in their order."""
    tensors: list[tf.Tensor] = []
    for buffer, group in zip(buffers, spec.groups, strict=True):
        shapes = [spec.shapes[p] for p in group]
        parts = tf.split(buffer, [shape.num_elements() for shape in shapes])
        tensors += [
            part if shape.rank == 1 else tf.reshape(part, shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]
    return tensors


def _flat(tensor: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """Return a tensor as one of rank 1, with no node for what is one."""
    return tensor if shape.rank == 1 else tf.reshape(tensor, [-1])
