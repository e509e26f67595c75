"""Tensors that layers keep on themselves: what a call leaves behind."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras

# What Keras itself keeps on a layer.
_NOT_KEPT = ("_losses", "_losses_override")


def kept_tensors(layer: keras.Layer) -> dict[tuple[int, str], Any]:
    """Return the tensors that layers keep on themselves, by their place.

    The values of the dict are lists of the ids of tensors.
    """
    return {
        (id(owner), name): [id(tensor) for tensor in tensors]
        for owner, name, tensors in kept_by_layers(layer)
    }


def kept_by_layers(
    layer: keras.Layer,
) -> list[tuple[keras.Layer, str, list[Any]]]:
    """Return which layers keep tensors, under which names, and these."""
    return [
        (one, name, tensors)
        for one in _keras.layers(layer)
        for name, value in list(vars(one).items())
        if name not in _NOT_KEPT and (tensors := tensors_in(value))
    ]


def tensors_in(value: Any, around: tuple[int, ...] = ()) -> list[Any]:
    """Return the tensors in a value, without variables.

    They are looked for in lists, tuples, dicts and records: objects of a
    user's own class, which are no parts of a model.

    Args:
        value: Anything that a layer returns or keeps.
        around: Tuple of the ids of what the value is in.
    """
    if isinstance(value, _VARIABLES) or id(value) in around:
        return []
    if tf.is_tensor(value):
        return [value]
    inside = (*around, id(value))
    entries = _entries(value, around)
    return [t for one in entries for t in tensors_in(one, inside)]


def _entries(value: Any, around: tuple[int, ...]) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    is_near = len(around) < _DEPTH and _is_record(value)
    return list(vars(value).values()) if is_near else []


def with_tensors(
    value: Any,
    function: Callable[[Any], Any],
    around: tuple[int, ...] = (),
) -> Any:
    """Return a value with others in the place of its tensors.

    What has tensors in it is made anew.

    Args:
        value: Anything that a layer returns or keeps.
        function: Function of a tensor, called in the order of `tensors_in`.
        around: Tuple of the ids of what the value is in.
    """
    if not tensors_in(value, around):
        return value
    if tf.is_tensor(value):
        return function(value)
    inside = (*around, id(value))
    entries = _entries(value, around)
    made = [with_tensors(one, function, inside) for one in entries]
    if isinstance(value, dict):
        return dict(zip(value, made, strict=True))
    if isinstance(value, (list, tuple)):
        if hasattr(value, "_fields"):
            return type(value)(*made)
        return tuple(made) if isinstance(value, tuple) else made
    record = copy.copy(value)
    vars(record).update(zip(vars(value), made, strict=True))
    return record


# How deep a record may be in other values: some lead to all of a program.
_DEPTH = 3
_VARIABLES = (keras.Variable, tf.Variable)
# Objects that a user's class may be one of, and that hold no data of a batch.
_NO_RECORDS = (
    *(keras.Layer, keras.Metric, keras.Loss, keras.Optimizer),
    *(keras.Initializer, keras.regularizers.Regularizer, keras.DTypePolicy),
    *(keras.random.SeedGenerator, tf.Module, type, ModuleType),
)


def _is_record(value: Any) -> bool:
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not callable(value)
        and not isinstance(value, _NO_RECORDS)
        and _keras.is_of_user(value)
    )
