"""Why clones of a model differ from plain Keras, as far as it is known."""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_clones import _keras
from keras_clones.comparing import copies
from keras_clones.comparing.records import Cause, Run, joined
from keras_clones.comparing.training import Plain

# The names in a warning of this package, such as "Layers ['a', 'b'] ...".
_NAMES = re.compile(r"\[[^\]]*\]")
_WHOLE = re.compile(r"whole=(\[[^\]]*\])")


def find(
    model: keras.Model, run: Run, plain: Plain, options: Mapping[str, Any]
) -> list[Cause]:
    """Return what is known to let clones differ, the likeliest first.

    That is first what the first wrong variable's own layer does, then what
    the layers before it do, then those after it, whose gradients it gets, and
    last the layers that may know the rows of each other.

    Args:
        model: A copy of the model, trained.
        run: `Run` of the clones that differ.
        plain: `Plain`, what plain Keras came to.
        options: Dict of what `clone_model` got.
    """
    if run.num_clones == 1:
        # One clone has all rows, so none of this lets it differ.
        return []
    known = [
        *_normalizing(model, options),
        *_drawing(model, options, plain),
        *(c for text in run.warnings if (c := _from_warning(text, options))),
    ]
    order = [layer.name for layer in _keras.layers(model)]
    at = _place(model, run, plain)

    def rank(cause: Cause) -> tuple[int, int]:
        places = [order.index(n) for n in cause.layers if n in order]
        if not places or at is None:
            return 2, 0
        first = min(places)
        return (0 if at in places else 1 if first < at else 2), abs(first - at)

    suspects = _knowing_rows(model, known, plain.by_order)
    return [*sorted(known, key=rank), *suspects]


def attempt(
    causes: Sequence[Cause], train: Callable[[dict[str, Any]], Run]
) -> list[Cause]:
    """Try the options that mend, one more at a time, until all is the same.

    Args:
        causes: Sequence of `Cause`s.
        train: Function that trains the clones with more options.

    Returns:
        The causes, with what came of trying. Where it took several options,
        all of them count as having mended it, if it takes them.
    """
    mends: dict[str, Any] = {}
    tried: list[Cause] = []
    for cause in causes:
        if not cause.mends:
            tried.append(cause)
            continue
        mends = joined(mends, cause.mends)
        same = train(mends).same
        tried.append(cause._replace(tried=same))
        if same:
            break
    else:
        return tried
    *before, last = tried
    if any(c.mends for c in before) and not train(last.mends).same:
        before = [c._replace(tried=True) if c.mends else c for c in before]
    rest = [c for c in causes[len(tried) :] if not c.suspected]
    return [*before, last, *rest]


def mending(causes: Sequence[Cause]) -> dict[str, Any]:
    """Return the options that were tried and mend what differs."""
    found: dict[str, Any] = {}
    for cause in causes:
        if cause.tried:
            found = joined(found, cause.mends)
    return found


def _place(model: keras.Model, run: Run, plain: Plain) -> int | None:
    """Return the place of the layer that has the first wrong variable."""
    index = plain.names.index(run.wrong[0].name)
    found = copies.variables(model)
    if index >= len(found):
        return None
    for place, layer in enumerate(_keras.layers(model)):
        below = {id(v) for sub in _below(layer) for v in sub.variables}
        own = {id(v) for v in layer.variables} - below
        if id(found[index]) in own:
            return place
    return None


def _below(layer: keras.Layer) -> list[keras.Layer]:
    return [one for one in _keras.layers(layer) if one is not layer]


def _normalizing(model: keras.Model, options: Mapping[str, Any]) -> list[Cause]:
    if options.get("batch_norm") == "sync" or options.get("exact"):
        return []
    names = [
        layer.name
        for layer in _keras.layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
        and not layer.synchronized
    ]
    why = "each clone normalizes its own shard, not the global batch"
    return [Cause(tuple(names), why, {"batch_norm": "sync"})] if names else []


def _drawing(
    model: keras.Model, options: Mapping[str, Any], plain: Plain
) -> list[Cause]:
    known = options.get("random") == "global" or options.get("exact")
    if known or not plain.draws:
        return []
    variables = copies.variables(model)
    states = {id(variables[i]) for i in plain.drew}
    names = [
        layer.name
        for layer in _keras.layers(model)
        if states & {id(v) for v in _keras.own_seed_states(layer)}
    ]
    if plain.drew_unseeded:
        names.append("calls of keras.random without a seed")
    why = "each clone draws random numbers of its own for its rows"
    return [Cause(tuple(names), why, {"random": "global"})]


def _from_warning(text: str, options: Mapping[str, Any]) -> Cause | None:
    """Return what a warning of this package tells, if it tells a cause."""
    found = _NAMES.search(text)
    names = _read_names(found[0] if found else "")
    if "normalize each clone's shard" in text:
        return None
    if "pass scalars to `add_loss`" in text:
        why = (
            "scalars from `add_loss` are taken for means over the rows; if "
            "they are sums, say so"
        )
        given = options.get("layer_losses") or {}
        return Cause(
            names,
            why,
            {"layer_losses": {**given, **dict.fromkeys(names, "sum")}},
        )
    if "are assigned in the forward pass" in text:
        why = "each clone assigns these variables from its own shard"
        return Cause(names, why, {"state": dict.fromkeys(names, "sum")})
    if "do not average to the loss" in text:
        return Cause((), text, {"loss": "auto"})
    if whole := _WHOLE.search(text):
        mends = {"whole": list(_read_names(whole[1]))}
        return Cause(tuple(mends["whole"]), text, mends)
    telling = ("made by `tf.Variable`", "are updated in a layer")
    known = any(words in text for words in telling)
    return Cause(names, text, {}) if known else None


def _read_names(text: str) -> tuple[str, ...]:
    try:
        return tuple(map(str, ast.literal_eval(text)))
    except (SyntaxError, ValueError):
        return ()


def _knowing_rows(
    model: keras.Model, known: Sequence[Cause], by_order: bool
) -> list[Cause]:
    """Return the layers not Keras's own, which may know rows of each other."""
    named = {name for c in known if "whole" in c.mends for name in c.layers}
    names = [
        layer.name
        for layer in _keras.layers(model)[1:]
        if not type(layer).__module__.startswith("keras.")
        and layer.name not in named
    ]
    why = "a layer of one's own whose rows may know each other"
    if by_order:
        why += ": plain Keras itself goes by the order of a batch's rows"
    mends = {"whole": names}
    return [Cause(tuple(names), why, mends, suspected=True)] if names else []
