"""The value of a variable whose rows are divided over several homes.

Home `j` of `k` has rows `j`, `j + k`, `j + 2 k` and so on, its part: those of
a vocabulary that is sorted by frequency are looked up alike at each home.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras, _tf

_numbers = itertools.count()


def split(value: Any, number: int) -> list[Any]:
    """Return the rows of each of some parts."""
    return [value[j::number] for j in range(number)]


def locate(ids: tf.Tensor, number: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return of rows which of some parts has each, and where it is there."""
    owners = tf.cast(tf.math.floormod(ids, number), tf.int32)
    return owners, tf.math.floordiv(ids, number)


class Divided:
    """What a Keras variable holds in place of a `tf.Variable`.

    It is read and assigned as a whole by whatever knows nothing of parts:
    files, `get_weights`, checkpoints. A look-up sends each home the ids of its
    rows and gets these rows alone.

    Attributes:
        parts: List of `keras.Variable`s, one a home, of shape `(rows of the
            part, ...)`.
        homes: Tuple of device strings.
        shape: `tf.TensorShape` of the whole.
        dtype: `tf.DType`.
        device: Device string, where it is put together.
        source: `tf.Variable` of shape `(0, ...)`, which gradients are with
            respect to: a tape takes it for the whole.

    Args:
        value: Tensor, the whole.
        homes: Sequence of device strings.
        device: As above.
        name: String, the name of the variable.
    """

    def __init__(
        self, value: tf.Tensor, homes: Sequence[str], device: str, name: str
    ) -> None:
        self.homes = tuple(homes)
        self.shape, self.dtype, self.device = value.shape, value.dtype, device
        self.name = name
        self._unique_id = f"divided_{next(_numbers)}"
        with tf.device(device):
            empty = tf.zeros([0, *self.shape[1:]], self.dtype)
            self.source = tf.Variable(empty, name=f"{name}_source")
        self.parts = []
        for rows, home in zip(
            split(value, len(self.homes)), self.homes, strict=True
        ):
            with tf.device(home):
                # A tape must not see them: `source` stands for all of them.
                part = tf.Variable(rows, trainable=False, name=name)
            self.parts.append(
                keras.Variable(part, dtype=self.dtype.name, name="part")
            )

    @property
    def handle(self) -> tf.Tensor:
        """What tapes know the variable by."""
        return self.source.handle

    def values(self) -> list[tf.Variable]:
        """Return the `tf.Variable` of each part."""
        return [_keras.tf_variable(part) for part in self.parts]

    def read_value(self) -> tf.Tensor:
        """Return the whole, put together of its parts."""

        @tf.custom_gradient
        def read(source: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
            with _tf.stop_recording(), tf.device(self.device):
                rows = [part.read_value() for part in self.values()]
                places = [
                    tf.range(j, self.shape[0], len(rows))
                    for j in range(len(rows))
                ]
                whole = tf.dynamic_stitch(places, rows)
                whole = tf.ensure_shape(whole, self.shape)
            return whole, lambda gradient: gradient

        return read(self.source.read_value())

    def sparse_read(
        self, indices: Any, name: str | None = None, by_rows: bool = False
    ) -> tf.Tensor:
        """Return some of the rows, as `tf.gather` asks variables to.

        Args:
            indices: Tensor of integers, of any shape.
            name: String, not used.
            by_rows: Boolean, whether updates write single rows, which a
                plain read would make copy a part. Defaults to `False`.
        """
        ids = tf.convert_to_tensor(indices)
        row = self.shape[1:]

        @tf.custom_gradient
        def look_up(source: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
            with _tf.stop_recording():
                rows = self._look_up(tf.reshape(ids, [-1]), by_rows)
                shape = tf.concat([tf.shape(ids), row], axis=0)
                rows = tf.reshape(rows, shape)
                rows.set_shape([*ids.shape, *row])

            def backward(gradient: tf.Tensor) -> tf.IndexedSlices:
                values = tf.reshape(gradient, [-1, *row])
                flat = tf.reshape(ids, [-1])
                whole = tf.constant(self.shape.as_list(), tf.int64)
                return tf.IndexedSlices(values, flat, whole)

            return rows, backward

        return look_up(self.source.read_value())

    def _look_up(self, ids: tf.Tensor, by_rows: bool) -> tf.Tensor:
        """Return rows by their ids, of each home those that it has."""
        number = len(self.homes)
        owners, local = locate(ids, number)
        every = tf.range(tf.size(ids))
        places = tf.dynamic_partition(every, owners, number)
        wanted = tf.dynamic_partition(local, owners, number)
        rows = []
        for home, part, one in zip(
            self.homes, self.values(), wanted, strict=True
        ):
            with tf.device(home):
                # As `clone.tables` has it of one table.
                read = part if by_rows else part.read_value()
                rows.append(tf.gather(read, one))
        # Where a row is in no part, its look-up has failed by now.
        return tf.dynamic_stitch(places, rows)

    def assign(self, value: Any, *_: Any, **__: Any) -> "Divided":
        """Give each part its rows of a value."""
        if isinstance(value, keras.Variable):
            value = _keras.tf_variable(value)
        if isinstance(value, Divided) and value.homes == self.homes:
            rows = value.values()
        else:
            with tf.device(self.device):
                whole = tf.convert_to_tensor(value, self.dtype)
                rows = split(whole, len(self.homes))
        for part, new in zip(self.values(), rows, strict=True):
            part.assign(new)
        return self

    def assign_add(self, value: Any, *_: Any, **__: Any) -> "Divided":
        """Add a value."""
        return self.assign(self.read_value() + value)

    def assign_sub(self, value: Any, *_: Any, **__: Any) -> "Divided":
        """Subtract a value."""
        return self.assign(self.read_value() - value)

    def scatter_add(self, rows: Any, *_: Any, **__: Any) -> "Divided":
        """Add rows, as an update outside of the steps of clones does."""
        return self.assign_add(tf.convert_to_tensor(rows))

    def scatter_sub(self, rows: Any, *_: Any, **__: Any) -> "Divided":
        """Subtract rows."""
        return self.assign_sub(tf.convert_to_tensor(rows))

    def numpy(self) -> np.ndarray:
        """Return the whole as an array."""
        return np.asarray(self.read_value().numpy())

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.numpy().astype(dtype) if dtype else self.numpy()

    def __tf_tensor__(self, dtype: Any = None, name: Any = None) -> tf.Tensor:
        value = self.read_value()
        return value if dtype is None else tf.cast(value, dtype)

    # Checkpoints of TensorFlow's have it as they have a `tf.Variable`.
    @property
    def _shared_name(self) -> str:
        return self.name

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return {"VARIABLE_VALUE": self.read_value()}

    def _restore_from_tensors(self, tensors: dict[str, tf.Tensor]) -> Any:
        return self.assign(tensors["VARIABLE_VALUE"])

    def _export_to_saved_model_graph(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            "A model with a divided table cannot be exported as it is, since "
            "a SavedModel is one machine's. Call "
            "`keras_clones.unclone_model(model)` first, which joins the "
            f"table. Received: variable {self.name!r}"
        )


def parts_of(variable: keras.Variable) -> list[keras.Variable] | None:
    """Return the parts of a divided variable, `None` of any other."""
    value = _keras.tf_variable(variable)
    return value.parts if isinstance(value, Divided) else None


def source_of(variable: keras.Variable) -> tf.Variable:
    """Return what tapes know a variable by."""
    value = _keras.tf_variable(variable)
    return value.source if isinstance(value, Divided) else value
