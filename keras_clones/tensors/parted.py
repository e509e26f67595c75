"""Gradients of a divided table, part by part."""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_clones.devices import divided
from keras_clones.tensors.traced import RowGradient


class Parted(NamedTuple):
    """The gradient of a divided table.

    Attributes:
        parts: List with one gradient a part, each at the part's home, of
            which rows are numbered as in the part.
        shape: `tf.TensorShape` of the whole.
    """

    parts: list[Any]
    shape: tf.TensorShape

    def join(self) -> tf.IndexedSlices:
        """Return the gradient of the whole, of gradients by rows."""
        number = len(self.parts)
        return tf.IndexedSlices(
            tf.concat([part.values for part in self.parts], axis=0),
            tf.concat(
                [
                    part.indices * number + j
                    for j, part in enumerate(self.parts)
                ],
                axis=0,
            ),
            tf.constant(self.shape.as_list(), tf.int64),
        )


def split(gradient: Any, number: int, shape: tf.TensorShape) -> list[Any]:
    """Return what of a gradient is of each part of a divided table.

    Which these are `devices.divided` says. Rows of a part stay in their order.

    Args:
        gradient: Tensor, `tf.IndexedSlices`, `RowGradient`, `Parted` or
            `None`.
        number: Integer, how many parts there are.
        shape: `tf.TensorShape` of the whole.
    """
    if gradient is None:
        return [None] * number
    if isinstance(gradient, Parted):
        return gradient.parts
    if isinstance(gradient, RowGradient):
        columns = [
            [split(rows, number, shape) for rows in kind] for kind in gradient
        ]
        return [
            RowGradient(*([rows[j] for rows in kind] for kind in columns))
            for j in range(number)
        ]
    if isinstance(gradient, tf.IndexedSlices):
        return _split_rows(gradient, number, shape)
    return divided.split(gradient, number)


def _split_rows(
    gradient: tf.IndexedSlices, number: int, shape: tf.TensorShape
) -> list[tf.IndexedSlices]:
    owners, local = divided.locate(gradient.indices, number)
    values = tf.dynamic_partition(gradient.values, owners, number)
    indices = tf.dynamic_partition(local, owners, number)
    total, *row = shape.as_list()
    return [
        tf.IndexedSlices(
            values[j],
            indices[j],
            tf.constant([len(range(j, total, number)), *row], tf.int64),
        )
        for j in range(number)
    ]
