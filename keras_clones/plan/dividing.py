"""Which tables are divided over homes, and what is wrong with that."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_clones import _keras


def tables_of(
    model: keras.Model, named: Sequence[Any], homes: Sequence[str]
) -> list[keras.Variable]:
    """Return the tables of the embeddings that are named.

    Args:
        model: A `keras.Model`.
        named: Sequence of names and layers, as `clone_model` got them.
        homes: Sequence of device strings, which rows are divided over.

    Raises:
        ValueError: If one cannot be divided.
    """
    received = f"Received: divided={list(named)!r}"
    found = {
        id(one): one
        for name in named
        for one in _fitting(model, name, received)
    }
    for layer in found.values():
        if why := _why_not(layer, len(homes)):
            raise ValueError(
                "Argument `divided` must have `Embedding` layers whose table "
                "is built and only looked up, with a row or more for each "
                f"home. Layer {layer.name!r} {why} {received}"
            )
    if found and len(homes) < 2:
        raise ValueError(
            "Argument `divided` needs at least two homes to divide rows "
            "over: the CPUs of replicas, parameter servers where weights are "
            "on these, or, on one machine, the logical CPU devices of its "
            f"clones. These are {list(homes)}. Leave `divided` out, or add "
            f"replicas or parameter servers. {received}"
        )
    tables = [_keras.embedding_table(layer) for layer in found.values()]
    return list({id(table): table for table in tables}.values())


def _fitting(model: keras.Model, name: Any, received: str) -> list[keras.Layer]:
    known = _keras.layers(model)
    found = [one for one in known if one is name or one.name == name]
    if found:
        return found
    names = [
        one.name for one in known if isinstance(one, keras.layers.Embedding)
    ]
    raise ValueError(
        "Argument `divided` must have layers of the model, by name or as "
        f"objects. It has no layer {getattr(name, 'name', name)!r}. Its "
        f"`Embedding` layers are {names}. {received}"
    )


def _why_not(layer: keras.Layer, number: int) -> str | None:
    if not isinstance(layer, keras.layers.Embedding):
        return f"is a `{type(layer).__name__}`."
    if not layer.built:
        return "is not built: call the model on some data first."
    if layer.quantization_mode is not None:
        return "is quantized: divide it before, or leave it whole."
    if layer.lora_enabled:
        return "is adapted by LoRA, which reads all of its table."
    table = _keras.embedding_table(layer)
    if table.regularizer is not None:
        return "has a regularizer, which reads all of its table."
    if table.constraint is not None:
        return "has a constraint, which reads all of its table."
    if table.shape[0] < number:
        return f"has {table.shape[0]} rows, and there are {number} homes."
    return None


def check_optimizers(model: keras.Model) -> None:
    """Check that a model's optimizers can update a table part by part.

    Raises:
        ValueError: If one may look at a variable as a whole.
    """
    for one in _keras.optimizers(model):
        optimizer = getattr(one, "inner_optimizer", None) or one
        if not _keras.updates_as_made(optimizer):
            known = sorted(kind.__name__ for kind in _keras.KNOWN_OPTIMIZERS)
            raise ValueError(
                "A divided table needs an optimizer that updates each number "
                f"by itself, one of Keras's {', '.join(known)}, as it is. "
                "Others may go by the whole table, which no home has. "
                f"Received: optimizer {type(optimizer).__name__!r}. Compile "
                "with one of these, or leave `divided` out."
            )
