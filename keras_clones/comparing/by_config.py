"""Making a model once more by its config, with what it was compiled with."""

import copy
import tempfile
import types
from collections.abc import Callable
from typing import Any

import keras

from keras_clones import _keras
from keras_clones.plan import exactness

INSTEAD = (
    "Pass a function that makes the compiled model in its place: "
    "`compare(make_model, ...)`."
)
FLOATING = ("float16", "bfloat16", "float32", "float64")


class CannotCopyError(ValueError):
    """A model that cannot be made once more."""


def copier(model: keras.Model) -> Callable[[str | None], keras.Model]:
    """Return what makes a model by the config of another."""
    known = _own_objects(model)
    try:
        config = keras.saving.serialize_keras_object(model)
    except Exception as error:
        raise _cannot(model, error) from error
    config.pop("compile_config", None)

    def make(dtype: str | None) -> keras.Model:
        try:
            with keras.saving.custom_object_scope(known):
                made = keras.saving.deserialize_keras_object(
                    recast(config, dtype), safe_mode=False
                )
                if not isinstance(made, type(model)):
                    raise TypeError(f"its config makes {made!r}")
                _compile_alike(model, made, dtype)
                _copy_assets(model, made)
        except Exception as error:
            raise _cannot(model, error) from error
        if not made.compiled:
            raise CannotCopyError(
                "Expected a model whose copy is compiled as it is. Received: "
                f"model={model!r}, whose class overrides `compile` and not "
                f"`compile_from_config`. {INSTEAD}"
            )
        return made

    return make


def _cannot(model: keras.Model, error: Exception) -> CannotCopyError:
    # Keras puts what went wrong behind the whole config.
    text = str(error)
    for before in ("Exception encountered: ", "during deserialization: "):
        text = text.rpartition(before)[2].strip()
    reason = (text.splitlines() or [""])[0]
    return CannotCopyError(
        "Expected a model that can be copied by its config. Received: "
        f"model={model!r}, which cannot ({type(error).__name__}: {reason}). "
        f"{INSTEAD}"
    )


def recast(config: Any, dtype: str | None) -> Any:
    """Return a config whose layers compute in another type of numbers.

    Policies of mixed precision become that type, too. Types of whole numbers
    and of strings stay, and so do policies of quantized layers.
    """
    if dtype is None:
        # Keras takes apart what it makes a model of.
        return copy.deepcopy(config)
    if isinstance(config, dict):
        name = (config.get("config") or {}) if "class_name" in config else {}
        if config.get("class_name") == "DTypePolicy" and isinstance(name, dict):
            return {**config, "config": {**name, "name": dtype}}
        return {
            key: dtype
            if key == "dtype" and value in FLOATING
            else recast(value, dtype)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(recast(entry, dtype) for entry in config)
    return config


def _own_objects(model: keras.Model) -> dict[str, Any]:
    """Return the classes and functions that a model's parts are made of.

    Their names alone do not find them where they are local to a function.
    """
    found: dict[str, Any] = {}
    for layer in _keras.layers(model):
        for part in [layer, *vars(layer).values()]:
            kind = part if isinstance(part, types.FunctionType) else type(part)
            own = not kind.__module__.startswith(("keras.", "builtins"))
            if own and (kind is part or hasattr(part, "get_config")):
                found[kind.__name__] = kind
    return found


def _compile_alike(
    model: keras.Model, made: keras.Model, dtype: str | None
) -> None:
    """Compile a copy with what the model was compiled with."""
    kind = type(model)
    if any(
        exactness.overrides(model, name)
        for name in ("compile", "get_compile_config", "compile_from_config")
    ):
        if kind.compile_from_config is not keras.Model.compile_from_config:
            config = recast(model.get_compile_config(), dtype)
            made.compile_from_config(config)
        return
    arguments = _keras.compile_arguments(model) or {}
    made.compile(
        **{
            name: keras.tree.map_structure(lambda x: _again(x, dtype), value)
            for name, value in arguments.items()
        }
    )


def _again(part: Any, dtype: str | None) -> Any:
    """Return an optimizer, metric or loss made once more, else the same."""
    state = (keras.optimizers.Optimizer, keras.metrics.Metric)
    if isinstance(part, state):
        return type(part).from_config(recast(part.get_config(), dtype))
    if isinstance(part, keras.losses.Loss) and dtype is not None:
        return type(part).from_config(recast(part.get_config(), dtype))
    return part


def _copy_assets(model: keras.Model, made: keras.Model) -> None:
    """Give a copy what its layers hold besides variables: vocabularies."""
    pairs = zip(_keras.layers(model), _keras.layers(made), strict=False)
    for layer, other in pairs:
        save = getattr(type(layer), "save_assets", None)
        if save is not getattr(keras.Layer, "save_assets", None):
            with tempfile.TemporaryDirectory() as folder:
                layer.save_assets(folder)
                other.load_assets(folder)
