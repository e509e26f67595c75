"""Large embedding tables: they stay home, and only their rows travel."""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.devices.divided import Divided, parts_of
from keras_clones.devices.moving import device_of

# A smaller table is sent whole, packed or not: its rows would save little.
LARGE_BYTES = 1 << 20


def large_tables(model: keras.Model) -> list[keras.Variable]:
    """Return the tables of a model that are large and only looked up.

    A table that is regularized, quantized or adapted by LoRA is read whole.
    One that is divided is no mirror's, however large it is.
    """
    tables = [
        _keras.embedding_table(layer)
        for layer in _keras.layers(model)
        if isinstance(layer, keras.layers.Embedding) and _is_plain(layer)
    ]
    return [
        table
        for table in tables
        if parts_of(table) is not None
        or (table.regularizer is None and is_large(table))
    ]


def _is_plain(layer: keras.layers.Embedding) -> bool:
    return (
        layer.built
        and not layer.lora_enabled
        and layer.quantization_mode is None
    )


def is_large(table: keras.Variable) -> bool:
    """Say whether a table is too large to be sent for a few of its rows."""
    size = tf.as_dtype(table.dtype).size
    return table.shape.num_elements() * size >= LARGE_BYTES


def looked_up_at_home(
    tables: Sequence[keras.Variable], by_rows: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Look rows up where the table is, for the time of a trace.

    `tf.gather` asks its first argument for `sparse_read`, which TensorFlow's
    variables have and Keras's lack. Theirs runs ResourceGather, which makes
    every later assignment copy the table first. A gather from a plain read,
    which is what Keras does, leaves it in place.

    A look-up of sparse ids takes the table as a tensor, and looks rows up
    where that says it is: TensorFlow asks for each id once, and adds up the
    rows of a bag by itself.

    Args:
        tables: Sequence of the variables that are looked up.
        by_rows: Boolean, whether updates write single rows: then it is the
            plain read that copies the table. Defaults to `False`.
    """
    return _keras.all_replaced(
        (table, name, read)
        for table in tables
        for name, read in _reads(table, by_rows).items()
    )


def look_up(table: keras.Variable, ids: tf.Tensor, by_rows: bool) -> tf.Tensor:
    """Return rows of a table, looked up where it is.

    Args:
        table: Variable that is looked up.
        ids: Tensor of integers, of any shape.
        by_rows: Boolean, whether updates write single rows.
    """
    return _reads(table, by_rows)["sparse_read"](ids)


def _reads(table: keras.Variable, by_rows: bool) -> dict[str, Any]:
    """Return what reads a table where it is, by the name of the method."""

    def sparse_read(indices: tf.Tensor, name: str | None = None) -> tf.Tensor:
        value = _keras.tf_variable(table)
        if isinstance(value, Divided):
            return value.sparse_read(indices, name, by_rows)
        with tf.device(device_of(table)):
            if by_rows:
                return value.sparse_read(indices, name)
            return tf.gather(tf.convert_to_tensor(table.value), indices)

    def whole(dtype: Any = None, name: str | None = None) -> tf.Tensor:
        with tf.device(device_of(table)):
            value = table.value
            if by_rows and isinstance(value, tf.Variable):
                value = value.read_value_no_copy()
            # A read has no device of its own, which look-ups go by.
            return tf.identity(tf.convert_to_tensor(value, dtype), name)

    return {"sparse_read": sparse_read, "__tf_tensor__": whole}
