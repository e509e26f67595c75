"""What is wrong with what `clone_model` is asked for, if anything is."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_clones import _keras
from keras_clones.checks import check_choice
from keras_clones.clone.state import POLICIES
from keras_clones.devices import balance, placement
from keras_clones.devices.config import DeploymentConfig
from keras_clones.devices.homes import STRATEGIES
from keras_clones.look import footprint
from keras_clones.plan import exactness
from keras_clones.plan import whole as whole_layers
from keras_clones.plan.options import StepOptions
from keras_clones.update.update import CHOICES

_LOSSES = ("auto", "clones", "gather")
_LAYER_LOSSES = ("mean", "sum")


def check_options(
    model: keras.Model, asked: StepOptions, variables: Any
) -> StepOptions:
    """Return the options of a model's steps, or say what is wrong with them.

    Args:
        model: The `keras.Model` to clone.
        asked: `StepOptions` with the arguments of `clone_model` as they were
            passed. The clones and their shares are not looked at.
        variables: What was passed of the variables' homes.
    """
    check_choice("loss", asked.loss, _LOSSES)
    batch_norm, random = resolve_exact(asked)
    check_layer_losses(model, asked.layer_losses)
    check_state(asked.state)
    whole = check_whole(model, asked.whole)
    check_choice("jit_compile", asked.jit_compile, (True, False, "auto"))
    check_choice("variables", variables, (None, *STRATEGIES))
    check_choice("update", asked.update, CHOICES)
    layer_losses = asked.layer_losses
    if isinstance(layer_losses, Mapping):
        layer_losses = dict(layer_losses)
    return asked._replace(
        batch_norm=batch_norm,
        random=random,
        layer_losses=layer_losses,
        state=tuple(dict(asked.state or {}).items()),
        whole=whole,
        pieces=check_pieces(asked.pieces),
        divided=check_divided(asked),
    )


def check_shares(
    model: keras.Model, shares: Any, num_clones: int
) -> tuple[float, ...] | str | None:
    """Return the clones' shares of the rows, or say what is wrong with them."""
    checked = balance.check_shares(shares, num_clones)
    if checked == "auto" and exactness.overrides(model, "train_step"):
        raise ValueError(
            "Argument `shares='auto'` measures the train step of Keras, and "
            "this model has its own. Pass a list with a number a clone. "
            f"Received: model={model!r}"
        )
    return checked


def resolve_exact(asked: StepOptions) -> tuple[str, str]:
    """Return the policies of normalization and of random draws.

    Raises:
        ValueError: If a value is not one of a few, or `exact=True` is
            contradicted.
    """
    check_choice("exact", asked.exact, (True, False))
    check_choice("check_rows", asked.check_rows, (True, False))
    batch_norms = (None, "mean", "first", "sync")
    check_choice("batch_norm", asked.batch_norm, batch_norms)
    check_choice("random", asked.random, (None, "clones", "global"))
    if not asked.exact:
        return asked.batch_norm or "mean", asked.random or "clones"
    for name, needed in (
        ("batch_norm", (None, "sync")),
        ("random", (None, "global")),
        ("loss", ("auto", "gather")),
        ("check_rows", (True,)),
    ):
        value = getattr(asked, name)
        if value not in needed:
            raise ValueError(
                f"Argument `exact=True` needs `{name}={needed[-1]!r}`, which "
                f"it includes: leave `{name}` out, or pass `exact=False`. "
                f"Received: exact=True, {name}={value!r}"
            )
    return "sync", "global"


def check_pieces(value: Any) -> Any:
    """Return in how many pieces to work, or say what is wrong with that.

    Raises:
        TypeError: If it is no integer, and not `"auto"`.
        ValueError: If it is less than 1.
    """
    if isinstance(value, str) and value == "auto":
        return value
    known = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if known and value >= 1:
        return int(value)
    message = (
        "Argument `pieces` must be an integer of at least 1, or 'auto'. "
        f"Received: pieces={value!r}"
    )
    if known or isinstance(value, str):
        raise ValueError(message)
    raise TypeError(f"{message} (of type {type(value).__name__})")


def check_layer_losses(model: keras.Model, value: Any) -> None:
    """Check what scalars that layers pass to `add_loss` are said to be."""
    if value is None or (isinstance(value, str) and value in _LAYER_LOSSES):
        return
    expected = (
        "Argument `layer_losses` must be one of 'mean', 'sum', a dict of "
        f"layer names to these, or `None`. Received: layer_losses={value!r}"
    )
    if isinstance(value, str):
        raise ValueError(expected)
    if not _maps_strings(value):
        raise TypeError(expected)
    if any(kind not in _LAYER_LOSSES for kind in value.values()):
        raise ValueError(expected)
    names = {layer.name for layer in _keras.layers(model)}
    unknown = sorted(set(value) - names)
    if unknown and footprint.is_built(model):
        raise ValueError(
            f"Argument `layer_losses` names layers {unknown}, which the model "
            f"does not have. Its layers are {sorted(names)}. "
            f"Received: layer_losses={dict(value)!r}"
        )


def check_whole(model: keras.Model, value: Any) -> tuple[Any, ...]:
    """Check which layers are said to see the global batch, and return them.

    Layers that are not made yet are looked for in the first step.
    """
    expected = (
        "Argument `whole` must be a list of layers, by name, as objects or by "
        f"class, such as ['scores']. Received: whole={value!r}"
    )
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"{expected} (of type {type(value).__name__})")
    for one in value:
        is_class = isinstance(one, type) and issubclass(one, keras.Layer)
        if not is_class and not isinstance(one, (str, keras.Layer)):
            raise TypeError(f"{expected}, with {one!r}")
    named = tuple(value)
    if footprint.is_built(model):
        whole_layers.check(model, named)
    return named


def check_divided(asked: StepOptions) -> tuple[Any, ...]:
    """Return which embeddings are to be divided, as they were passed.

    Raises:
        TypeError: If it is no list of names and layers.
        ValueError: If another option contradicts it.
    """
    value = asked.divided
    kinds = (str, keras.Layer)
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(one, kinds) for one in value
    ):
        raise TypeError(
            "Argument `divided` must be a list of `Embedding` layers, by name "
            f"or as objects, such as ['items']. Received: divided={value!r} "
            f"(of type {type(value).__name__})"
        )
    if value and asked.jit_compile is True:
        raise ValueError(
            "Argument `divided` looks rows up on other devices, which XLA "
            "cannot: leave `jit_compile` out. "
            f"Received: jit_compile=True, divided={value!r}"
        )
    return tuple(value)


def check_state(value: Any) -> None:
    """Check what is said of variables that the forward pass assigns."""
    if value is None:
        return
    expected = (
        "Argument `state` must be a dict of patterns of variables' paths to "
        f"one of {POLICIES}, such as {{'*/norm/count': 'sum'}}. "
        f"Received: state={value!r}"
    )
    if not _maps_strings(value):
        raise TypeError(expected)
    if any(policy not in POLICIES for policy in value.values()):
        raise ValueError(expected)


def _maps_strings(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(part, str) for pair in value.items() for part in pair
    )


def choose_config(
    config: Any,
    num_clones: int | None,
    devices: Sequence[str] | None,
    clone_on_cpu: bool,
) -> DeploymentConfig:
    """Return the config that is given, or one of the arguments beside it."""
    if config is None:
        return placement.choose_config(num_clones, devices, clone_on_cpu)
    if not isinstance(config, DeploymentConfig):
        raise TypeError(
            "Argument `config` must be a `DeploymentConfig`. "
            f"Received: config={config!r}"
        )
    if num_clones is not None or devices is not None or clone_on_cpu:
        raise ValueError(
            "Argument `config` takes the place of `num_clones`, `devices` and "
            "`clone_on_cpu`: pass either it or them. "
            f"Received: num_clones={num_clones}, devices={devices}, "
            f"clone_on_cpu={clone_on_cpu}, config={config}"
        )
    return config
