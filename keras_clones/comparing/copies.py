"""Copies of a compiled model, in its own type of numbers or another."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras
from keras_clones.comparing import by_config
from keras_clones.comparing.by_config import FLOATING, INSTEAD, CannotCopyError
from keras_clones.devices.homes import Homes
from keras_clones.devices.placement import main_home
from keras_clones.look import footprint
from keras_clones.plan import build, exactness


class Source(NamedTuple):
    """What makes copies of a model.

    `make` gets the name of a type of numbers, or `None` for the model's own,
    and returns a compiled model. `state` holds the arrays that a copy starts
    from, in the order of `variables`, and `names` and `kinds` what they are.
    `global_seed` is the state behind draws without a seed. `batch` is a batch
    to build a copy by.
    """

    make: Callable[[str | None], keras.Model]
    state: list[np.ndarray]
    names: list[str]
    kinds: list[str]
    global_seed: np.ndarray
    batch: Any


@contextlib.contextmanager
def keeping_global_state() -> Iterator[None]:
    """Restore the streams of random numbers and what Keras keeps."""
    stream, numpy_stream = random.getstate(), np.random.get_state()
    try:
        with _keras.global_state_kept():
            yield
    finally:
        random.setstate(stream)
        np.random.set_state(numpy_stream)


def find_source(model: Any, batch: Any) -> Source:
    """Return what makes copies of a model, and the state they start from.

    Args:
        model: A compiled `keras.Model`, or a function that makes one.
        batch: Nest of arrays, to build what the model lacks.

    Raises:
        TypeError: If it is neither.
        ValueError: If the model is not compiled, or cannot be copied.
    """
    if isinstance(model, keras.Model):
        check_compiled(model)
        make = by_config.copier(model)
    elif callable(model):
        make = _maker(model)
    else:
        raise TypeError(
            "Argument `model` must be a compiled `keras.Model`, or a function "
            f"that makes one. Received: model={model!r} (of type "
            f"{type(model).__name__})"
        )
    first = make(None)
    was_built = footprint.is_built(first)
    complete(first, batch)
    original = first
    if isinstance(model, keras.Model) and footprint.is_built(model):
        _check_same(model, first)
        _assign(first, [v.numpy() for v in _weights(model)])
        _copy_optimizer_state(model, first)
        original = model
    elif was_built and isinstance(model, keras.Model):
        raise CannotCopyError(
            "Expected a model whose copy has the same variables. Received: "
            f"model={model!r}, which is not built, while its copy is. "
            f"{INSTEAD}"
        )
    found = variables(first)
    names = [v.path for v in _weights(original)]
    names += [v.path for v in found[len(names) :]]
    kinds = ["variable"] * len(_weights(first))
    kinds += ["optimizer variable"] * (len(found) - len(kinds))
    global_seed = _keras.global_seed_state().numpy()
    state = [v.numpy() for v in found]
    return Source(make, state, names, kinds, global_seed, batch)


def copy_of(source: Source, dtype: str | None = None) -> keras.Model:
    """Return a compiled copy that is built and starts from the same state.

    Args:
        source: `Source` of the model.
        dtype: String, the type of all its numbers, or `None` for its own.

    Raises:
        ValueError: If the copy does not have the type that is asked for, or
            not the variables of the first.
    """
    with _keras.made_in(dtype):
        model = source.make(dtype)
        complete(model, source.batch)
    if dtype is not None:
        _check_dtype(model, dtype)
    restore(model, source)
    return model


def restore(model: keras.Model, source: Source) -> None:
    """Let a copy start from the state of all others."""
    _assign(model, source.state)
    _keras.global_seed_state().assign(source.global_seed)


def check_complete(model: keras.Model, source: Source) -> None:
    """Check that a copy that was trained has made no weights of its own.

    They would start from another value in each copy.

    Raises:
        ValueError: If it has.
    """
    made = _weights(model)[source.kinds.count("variable") :]
    if made:
        raise CannotCopyError(
            "Expected a model that is built before it trains, for all copies "
            "to start from the same weights. Received: a model whose first "
            f"step makes {[v.path for v in made]}. Call it on a batch first."
        )


def variables(model: keras.Model) -> list[keras.Variable]:
    """Return a model's variables in its order, then its optimizers'."""
    found = _weights(model)
    for optimizer in _keras.optimizers(model):
        found += optimizer.variables
    return list({id(v): v for v in found}.values())


def complete(model: keras.Model, batch: Any) -> None:
    """Build what a model lacks, as its first step would."""
    data = keras.tree.map_structure(
        lambda x: x if x is None else tf.convert_to_tensor(x),
        batch,
    )
    parts = keras.utils.unpack_x_y_sample_weight(data)
    if not exactness.overrides(model, "train_step"):
        build.build(model, parts, Homes(main_home()), True)
    elif not footprint.is_built(model):
        # A step of the user's own may call the model in any way, so it has
        # to build itself in its first step where this does not.
        with contextlib.suppress(Exception):
            _keras.call(model, parts[0], training=False)


def _weights(model: keras.Model) -> list[keras.Variable]:
    metrics = [v for m in _keras.layer_metrics(model) for v in m.variables]
    found = [*model.variables, *metrics]
    return list({id(v): v for v in found}.values())


def check_compiled(model: keras.Model) -> None:
    """Check that a model is compiled."""
    if not model.compiled:
        raise ValueError(
            "Argument `model` must be compiled: its copies train as it would. "
            f"Received: model={model!r}. Call `model.compile(...)` first."
        )


def _maker(function: Callable[[], Any]) -> Callable[[str | None], keras.Model]:
    """Return what makes a model by a function of the user's."""

    def make(dtype: str | None) -> keras.Model:
        model = function()
        if not isinstance(model, keras.Model):
            raise TypeError(
                "Argument `model` must be a compiled `keras.Model`, or a "
                "function that makes one. Received: a function that returned "
                f"{model!r} (of type {type(model).__name__})"
            )
        check_compiled(model)
        return model

    return make


def _check_same(model: keras.Model, made: keras.Model) -> None:
    """Check that a copy has the variables of the model, in its order."""
    one, other = _shapes(_weights(model)), _shapes(_weights(made))
    if one != other:
        raise CannotCopyError(
            "Expected a model whose copy has the same variables. Received: "
            f"model={model!r} with {len(one)} variables, whose copy has "
            f"{len(other)}, or of other shapes. {INSTEAD}"
        )


def _shapes(found: Sequence[keras.Variable]) -> list[tuple[int, ...]]:
    return [tuple(v.shape) for v in found]


def _copy_optimizer_state(model: keras.Model, made: keras.Model) -> None:
    """Let the optimizers of a copy go on where those of the model are."""
    pairs = zip(_keras.optimizers(model), _keras.optimizers(made), strict=False)
    for one, other in pairs:
        if not one.built:
            continue
        if not other.built:
            other.build(_matching(model, made, one))
        if _shapes(one.variables) != _shapes(other.variables):
            raise CannotCopyError(
                "Expected an optimizer whose copy has the same variables. "
                f"Received: optimizer={one!r}, whose copy has others. "
                f"{INSTEAD}"
            )
        for variable, copy in zip(one.variables, other.variables, strict=True):
            copy.assign(variable.numpy())


def _matching(
    model: keras.Model, made: keras.Model, optimizer: Any
) -> list[keras.Variable]:
    """Return the copy's variables that stand for what an optimizer updates."""
    places = {id(v): i for i, v in enumerate(_weights(model))}
    own = _weights(made)
    return [own[places[id(v)]] for v in _keras.optimized_variables(optimizer)]


def _assign(model: keras.Model, state: Sequence[np.ndarray]) -> None:
    """Assign the first of a model's variables, as many as there are arrays."""
    found = variables(model)
    if [tuple(x.shape) for x in state] != _shapes(found)[: len(state)]:
        raise CannotCopyError(
            "Expected copies with the same variables each time. Received: "
            f"{len(found)} variables for {len(state)} arrays, or of other "
            f"shapes. {INSTEAD}"
        )
    for variable, value in zip(found, state, strict=False):
        variable.assign(tf.cast(value, variable.dtype))


def _check_dtype(model: keras.Model, dtype: str) -> None:
    """Check that all numbers of a model are of a type."""
    others = {
        v.path: v.dtype
        for v in model.variables
        if keras.backend.is_float_dtype(v.dtype) and v.dtype != dtype
    }
    policies = {
        layer.name: layer.compute_dtype
        for layer in _keras.layers(model)
        if layer.compute_dtype in FLOATING and layer.compute_dtype != dtype
    }
    if others or policies:
        raise ValueError(
            f"Expected a model that can be made in {dtype}. Received: one "
            f"with variables {others} and layers {policies} of other types. "
            "Pass `dtype='float32'` to judge it in its own."
        )
