"""Adding up and merging the gradients that clones come to."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from keras_clones.tensors.traced import RowGradient

Gradient: TypeAlias = "tf.Tensor | tf.IndexedSlices | None"


def merge(gradients: Sequence[Any]) -> Gradient:
    """Add up the gradients of one variable over the clones.

    The clones' shares of the global batch are in the gradients already, so
    the sum is the gradient of the global batch. Gradients by rows are listed
    as one device would list them: one after the other, since Keras's
    optimizers square row by row; position by position where the ids do not
    depend on the batch; by row where one device would add up by row.

    Args:
        gradients: Sequence with one gradient a clone: tensors of one shape,
            `IndexedSlices`, `RowGradient`s, or `None` where the loss does not
            depend on the variable.

    Returns:
        The merged gradient, or `None` if all are `None`.
    """
    present = [g for g in gradients if g is not None]
    if not present:
        return None
    if all(isinstance(g, RowGradient) for g in present):
        return _merge_rows(present)
    present = [
        _merge_rows([g]) if isinstance(g, RowGradient) else g for g in present
    ]
    if len(present) == 1:
        return present[0]
    if all(isinstance(g, tf.IndexedSlices) for g in present):
        return _list_rows(present)
    return tf.add_n([tf.convert_to_tensor(g) for g in present])


def of_pieces(pieces: Sequence[Any]) -> Any:
    """Make one gradient of those of a clone's pieces, by rows as they are.

    Args:
        pieces: Sequence with one gradient a piece: `RowGradient`s, or values
            that overwrite the variable.
    """
    if all(isinstance(g, RowGradient) for g in pieces):
        return _by_part(pieces)
    if all(isinstance(g, tf.IndexedSlices) for g in pieces):
        return _list_rows(pieces)
    return largest(pieces)


def _merge_rows(clones: Sequence[RowGradient]) -> tf.IndexedSlices:
    rows = _by_part(clones)
    return _list_rows([*rows.repeated, *rows.constant, *rows.unique])


def _by_part(clones: Sequence[RowGradient]) -> RowGradient:
    """Make one of gradients by rows, look-up by look-up."""
    constant, unique = [], []
    for column in _columns(clones, "constant"):
        values = tf.add_n([part.values for part in column])
        first = column[0]
        constant.append(
            tf.IndexedSlices(values, first.indices, first.dense_shape)
        )
    for column in _columns(clones, "unique"):
        rows = _list_rows(column)
        unique.append(add_up_rows(rows) if len(column) > 1 else rows)
    repeated = [_list_rows(column) for column in _columns(clones, "repeated")]
    return RowGradient(repeated, constant, unique)


def _columns(
    clones: Sequence[RowGradient], kind: str
) -> list[tuple[tf.IndexedSlices, ...]]:
    return list(zip(*(getattr(clone, kind) for clone in clones), strict=True))


def _list_rows(parts: Sequence[tf.IndexedSlices]) -> tf.IndexedSlices:
    """List rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    return tf.IndexedSlices(
        tf.concat([part.values for part in parts], axis=0),
        tf.concat([part.indices for part in parts], axis=0),
        parts[0].dense_shape,
    )


def add_up_rows(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """Add up what a gradient has more than once of a row."""
    indices, rows = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(
        gradient.values, rows, tf.size(indices)
    )
    return tf.IndexedSlices(values, indices, gradient.dense_shape)


def scale(gradient: Gradient, factor: tf.Tensor) -> Gradient:
    """Multiply a gradient by a scalar."""
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * tf.cast(factor, gradient.values.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(factor, gradient.dtype)


def largest(values: Sequence[Gradient]) -> Gradient:
    """Merge by the largest value what overwrites a variable.

    That is what a variable with `overwrite_with_gradient` holds: largest
    magnitudes seen, and scales that follow from them.
    """
    present = [v for v in values if v is not None]
    return tf.reduce_max(tf.stack(present), axis=0) if present else None
