"""The variables of a training: weights, optimizers, seeds and metrics."""

import re
from typing import Any

import keras
import numpy as np

from keras_clones import _keras


def values(model: keras.Model) -> tuple[list[list[Any]], list[np.ndarray]]:
    """Return what tells the variables apart, and their values.

    Returns:
        A list of path, shape and dtype of each, and the list of values.
    """
    found = _variables(model)
    arrays = [np.asarray(variable.value) for variable in found]
    return [_look(variable) for variable in found], [_raw(a) for a in arrays]


def restore(
    model: keras.Model,
    looks: list[list[Any]],
    arrays: list[np.ndarray],
    spec: Any,
) -> None:
    """Give the variables the values they had.

    Args:
        model: Model, whose variables are made if they are not there yet.
        looks: List of path, shape and dtype of each, as `values` has them.
        arrays: List of their values.
        spec: Structure of `tf.TensorSpec`, of a batch of the data.

    Raises:
        ValueError: If the variables are others; nothing has changed then,
            but that all of them are there.
    """
    _make(model, looks, spec)
    found = _variables(model)
    _check(looks, [_look(variable) for variable in found])
    for variable, value in zip(found, arrays, strict=True):
        dtype = np.asarray(variable.value).dtype
        variable.assign(value.view(dtype) if value.dtype != dtype else value)


def _variables(model: keras.Model) -> list[keras.Variable]:
    """Return everything that a step can change, each once."""
    found = [
        *model.variables,
        *(v for o in _keras.optimizers(model) for v in o.variables),
        *(v for metric in model.metrics for v in metric.variables),
        *_keras.seed_states(model),
    ]
    return list({id(variable): variable for variable in found}.values())


def _make(model: keras.Model, looks: list[list[Any]], spec: Any) -> None:
    """Make the variables that a first step would make, if some lack."""
    if len(_variables(model)) == len(looks):
        return
    optimizer = getattr(model, "optimizer", None)
    if model.built and optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    if len(_variables(model)) != len(looks) and spec is not None:
        # Steps of the model's own need not build what `compile` was given.
        _keras.build_all(model, spec)


def _look(variable: keras.Variable) -> list[Any]:
    return [variable.path, list(variable.shape), variable.dtype]


def _raw(value: np.ndarray) -> np.ndarray:
    """Return a value in a dtype that a file of NumPy's can have.

    Those of bfloat16 and its kin are NumPy's to nobody but their maker.
    """
    if value.dtype.kind != "V" and value.dtype.isbuiltin == 1:
        return value
    return value.view(np.dtype(f"u{value.dtype.itemsize}"))


def _plain(path: str) -> str:
    """Return a path without the numbers that Keras makes up as it goes."""
    return re.sub(r"_\d+(?=[/_]|$)", "", path)


def _check(saved: list[list[Any]], found: list[list[Any]]) -> None:
    nothing: list[Any] = ["no variable", [], ""]
    for i in range(max(len(saved), len(found))):
        was = saved[i] if i < len(saved) else nothing
        now = found[i] if i < len(found) else nothing
        if [_plain(was[0]), *was[1:]] != [_plain(now[0]), *now[1:]]:
            raise ValueError(
                "Expected the model that the backup was made of. Received: "
                f"model with {_told(now)}, where the backup has {_told(was)}. "
                "Make and compile the model as before (with an optimizer of "
                "its own steps built), or use another folder to begin anew."
            )


def _told(look: list[Any]) -> str:
    path, shape, dtype = look
    return f"{path!r} of shape {tuple(shape)} and {dtype}" if dtype else path
