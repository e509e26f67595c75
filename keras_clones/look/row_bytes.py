"""The bytes of a row of the batch: of inputs, targets, outputs and lookups."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.plan import exactness

# What Keras makes of whole numbers from NumPy: int64.
_CLASS = 8


# What `Embedding` makes of its ids: int32.
ID_BYTES = 4


def total_of(*sizes: int | None) -> int | None:
    """Return the sum of some bytes, if all of them are known."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def of_outputs(model: keras.Model) -> tuple[int | None, int | None]:
    """Return the bytes of outputs that leave a clone, and of their gradients.

    A softmax or sigmoid has its logits beside it, from which Keras computes
    cross-entropies; what is masked has its mask. Both are for a row.
    """
    outputs = getattr(model, "outputs", None)
    if outputs is None:
        return None, None
    losses = _losses_of_outputs(model, outputs)
    leave: list[int | None] = []
    back: list[int | None] = []
    for output, loss in zip(outputs, losses, strict=True):
        size = of_tensors([output])
        by_logits = _has_logits(output) and "crossentropy" in _name(loss)
        apart = by_logits and exactness.needs_outputs(model)
        mask = _keras.get_mask(output)
        leave += [size, size if apart else 0]
        leave.append(0 if mask is None else of_tensors([mask]))
        back.append(0 if loss is None else size)
    return total_of(*leave), total_of(*back)


def _has_logits(output: Any) -> bool:
    """Say whether Keras hangs logits on an output."""
    layer, _, index = output._keras_history
    if isinstance(layer, keras.Model):
        return _has_logits(layer.outputs[index])
    squash = (keras.activations.softmax, keras.activations.sigmoid)
    return isinstance(layer, keras.layers.Softmax) or (
        getattr(layer, "activation", None) in squash
    )


def looked_up(
    model: keras.Model, tables: dict[int, keras.Variable]
) -> tuple[int | None, int | None]:
    """Return the bytes of the rows that large tables send to a clone.

    The second number is that of the ids that they are looked up by.
    Both are for a row of the batch.
    """
    rows, total = 0, 0
    for layer in _keras.layers(model) if tables else []:
        if not isinstance(layer, keras.layers.Embedding):
            continue
        table = tables.get(id(_keras.embedding_table(layer)))
        if table is not None:
            ids = num_ids(layer)
            if ids is None:
                return None, None
            rows += ids * of_table(table)
            total += ids * ID_BYTES
    return rows, total


def num_ids(layer: keras.layers.Embedding) -> int | None:
    """Return how many rows of its table a layer looks up, a row of a batch.

    That is of its first call, where a model calls a layer several times.
    """
    try:
        return _elements(layer.input)
    except (AttributeError, ValueError):
        return None


def of_table(table: keras.Variable) -> int:
    """Return the bytes of a row of an embedding table."""
    return table.shape[-1] * tf.as_dtype(table.dtype).size


def of_targets(model: keras.Model) -> int | None:
    """Return the bytes of a row of the targets, going by the losses."""
    outputs = getattr(model, "outputs", None)
    if outputs is None or not model.compiled:
        return None if outputs is None else 0
    losses = _losses_of_outputs(model, outputs)
    total = 0
    for output, loss in zip(outputs, losses, strict=True):
        elements = _elements(output)
        if elements is None:
            return None
        if loss is None:
            continue
        if "sparse" in _name(loss) and len(output.shape) > 1:
            total += elements // output.shape[-1] * _CLASS
        else:
            total += elements * tf.as_dtype(output.dtype).size
    return total


def _losses_of_outputs(model: keras.Model, outputs: Sequence[Any]) -> list[Any]:
    """Return what `compile` got for a loss of each output."""
    losses = keras.tree.flatten(model.loss) if model.compiled else []
    if len(losses) == len(outputs):
        return losses
    return [losses[0] if losses else None] * len(outputs)


def _name(loss: Any) -> str:
    """Return what a loss is called, in small letters and one word."""
    name = f"{type(loss).__name__} {getattr(loss, '__name__', loss)}"
    return name.lower().replace("_", "")


def of_tensors(tensors: Sequence[Any] | None) -> int | None:
    """Return the bytes of a row of symbolic tensors, if they are fixed."""
    if tensors is None:
        return None
    sizes = [(_elements(t), tf.as_dtype(t.dtype).size) for t in tensors]
    return total_of(*(n and n * size for n, size in sizes))


def _elements(tensor: Any) -> int | None:
    """Return the elements of a row of a symbolic tensor, if they are fixed."""
    shape = tensor.shape[1:]
    unknown = tensor.dtype == "string" or getattr(tensor, "sparse", False)
    return None if unknown or None in shape else math.prod(shape)
