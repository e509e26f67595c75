"""Training copies step by step, and judging how far they come apart."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras
from keras_clones.comparing import copies, kept_batches
from keras_clones.comparing.copies import Source
from keras_clones.comparing.history import History, Recorder, as_numbers
from keras_clones.comparing.kept_batches import Batches
from keras_clones.comparing.records import NOISE, OUT_OF_MEMORY, Difference

# What is taken for rounding, by the type of numbers, as the package's own
# tests do.
_FLOORS = {"float64": 1e-10, "float32": 1e-5}
# In float32 TensorFlow's kernel of Adam takes `1 - beta_2` for another number,
# 1.3e-5 of it off, and so is the second moment. The weights are not.
_SECOND_MOMENT = 2e-5
# And so many times what plain Keras itself comes apart by when its weights
# change in the last place. An operation rounds once; a step has many, and
# those of clones add up in another order.
SPREAD = 100
_SEEDS = (1, 2)


class Plain(NamedTuple):
    """What plain Keras came to, and what rounding does to it.

    `limits` has a row a step and a column a variable, then a log: the
    difference that rounding explains. `drew` has the places, among the
    variables, of seed generators that were advanced, and `drew_unseeded` says
    whether the one behind `keras.random` was. `by_order` says whether the
    order of the rows matters. `dtype` is the type of numbers that it trained
    in, `None` for the model's own.
    """

    history: History
    names: list[str]
    kinds: list[str]
    limits: np.ndarray
    drew: list[int]
    drew_unseeded: bool
    by_order: bool
    dtype: str | None

    @property
    def repeats(self) -> bool:
        """Whether plain Keras comes to the same when it trains again."""
        return float(np.median(self.limits[-1])) < NOISE

    @property
    def draws(self) -> bool:
        """Whether anything drew at random."""
        return bool(self.drew) or self.drew_unseeded


def train(
    model: keras.Model, batches: Batches, callback: Any, dtype: str | None
) -> list[str]:
    """Train one epoch on the batches; return what was warned of."""
    model.steps_per_execution = 1
    with _keras.made_in(dtype), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(
            kept_batches.serve(kept_batches.cast(batches, dtype)),
            epochs=1,
            verbose=0,
            shuffle=False,
            callbacks=[callback],
        )
    return texts(caught)


def texts(caught: Sequence[Any]) -> list[str]:
    """Return the texts of warnings, each once."""
    found = [str(one.message) for one in caught if one.category is UserWarning]
    return list(dict.fromkeys(found))


def train_plain(source: Source, batches: Batches, dtype: str | None) -> Plain:
    """Train plain Keras, and again from weights that differ by rounding.

    Its own spread is what it comes apart by when each weight changes by one
    unit in the last place. Where a model draws nothing, also when the rows of
    each batch change places, since that only changes the order in which they
    add up. With draws each row would get another's, so that tells nothing; and
    where that alone changes far more than the last place does, the model goes
    by the order of its rows, and that is no rounding.
    """
    model = copies.copy_of(source, dtype)
    history = History()
    train(model, batches, Recorder(history.add), dtype)
    copies.check_complete(model, source)
    found = copies.variables(model)
    names, kinds = _labels(source, found, history)
    drew = _what_drew(source, found, history)
    seed = _keras.global_seed_state().numpy()
    unseeded = bool((seed != source.global_seed).any())
    floor = _floor(model, dtype)
    epsilon = _epsilon(model)

    def spread(change: Callable[[keras.Model], None], data: Batches) -> Any:
        again = model
        if len(source.state) != len(found):
            # What it made in its first step cannot be reset.
            again = copies.copy_of(source, dtype)
        copies.restore(again, source)
        change(again)
        return train_against(again, data, history, dtype)[0]

    parts = [
        spread(functools.partial(_nudge, epsilon=epsilon, seed=seed), batches)
        for seed in _SEEDS
    ]
    own = np.maximum.reduce(parts)
    by_order = False
    shuffled = kept_batches.permuted(batches, seed=0)
    if shuffled is not None and not drew and not unseeded:
        moved = spread(lambda m: None, shuffled)
        by_order = bool((moved > _limits(own, floor)).any())
        own = own if by_order else np.maximum(own, moved)
    limits = _limits(own, floor)
    if floor > _FLOORS["float64"] and _has_adam(model):
        moments = [name.endswith("_velocity") for name in names]
        limits[:, moments] = np.maximum(limits[:, moments], _SECOND_MOMENT)
    return Plain(history, names, kinds, limits, drew, unseeded, by_order, dtype)


def _has_adam(model: keras.Model) -> bool:
    kinds = keras.optimizers.Adam, keras.optimizers.AdamW
    return any(type(one) in kinds for one in _keras.optimizers(model))


def train_against(
    model: keras.Model,
    batches: Batches,
    history: History,
    dtype: str | None,
) -> tuple[np.ndarray, list[str]]:
    """Train a copy; return how far it is from a history, and the warnings.

    The differences have a row a step and a column a variable, then a log.
    """
    rows: list[list[float]] = []

    def compare(values: list[np.ndarray], logs: dict[str, float]) -> None:
        step = len(rows)
        expected = [*history.values(step), *history.logs[step].values()]
        received = [*values, *(logs.get(k) for k in history.logs[step])]
        rows.append(
            [_relative(a, b) for a, b in zip(expected, received, strict=True)]
        )

    found = train(model, batches, Recorder(compare), dtype)
    return np.array(rows), found


def judge(plain: Plain, found: np.ndarray) -> tuple[Difference, ...]:
    """Return each variable's and log's difference, and its first step."""
    differences = []
    for i, (name, kind) in enumerate(
        zip(plain.names, plain.kinds, strict=True)
    ):
        # The step at which it is the furthest from what rounding explains.
        beyond = found[:, i] > plain.limits[:, i]
        worst = int(found[:, i].argmax())
        first = int(beyond.argmax()) + 1 if beyond.any() else None
        differences.append(
            Difference(
                name,
                kind,
                float(found[worst, i]),
                float(plain.limits[worst, i]),
                first,
            )
        )
    return tuple(differences)


def _relative(expected: Any, received: Any) -> float:
    """Return the largest difference over the largest magnitude."""
    if received is None or np.shape(expected) != np.shape(received):
        return float("inf")
    one = np.asarray(expected, "float64")
    other = np.asarray(received, "float64")
    if not one.size:
        return 0.0
    equal = (one == other) | (np.isnan(one) & np.isnan(other))
    if equal.all():
        return 0.0
    known = np.isfinite(one) & np.isfinite(other)
    if not (known | equal).all():
        return float("inf")
    scale = max(np.abs(one[known]).max(), np.finfo("float64").tiny)
    return float(np.abs(one - other)[known].max() / scale)


def _limits(spread: np.ndarray, floor: float) -> np.ndarray:
    """Return what rounding explains, which only grows as training goes on."""
    return np.maximum(floor, SPREAD * np.maximum.accumulate(spread, axis=0))


def _nudge(model: keras.Model, epsilon: float, seed: int) -> None:
    """Change every weight by one unit in the last place, up or down."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            value = as_numbers(variable.numpy())
            signs = rng.choice([-1.0, 1.0], value.shape)
            changed = tf.cast(value * (1 + epsilon * signs), variable.dtype)
            variable.assign(changed)


def _floats(model: keras.Model) -> set[str]:
    types = {layer.compute_dtype for layer in _keras.layers(model)}
    types |= {v.dtype for v in model.weights}
    return {t for t in types if keras.backend.is_float_dtype(t)}


def _epsilon(model: keras.Model) -> float:
    """Return one unit in the last place of the coarsest numbers in use."""
    types = [tf.as_dtype(t).as_numpy_dtype for t in _floats(model)]
    return (
        max(
            (float(np.finfo(t).eps) if np.dtype(t).kind == "f" else 2.0**-7)
            for t in types
        )
        if types
        else 0.0
    )


def _floor(model: keras.Model, dtype: str | None) -> float:
    if dtype in _FLOORS:
        return _FLOORS[dtype]
    return max(_FLOORS["float32"], 4 * _epsilon(model))


def _labels(
    source: Source, found: Sequence[keras.Variable], history: History
) -> tuple[list[str], list[str]]:
    """Return the name and kind of every variable, then of every log."""
    made_later = found[len(source.names) :]
    logs = list(history.logs[0])
    names = [*source.names, *(v.path for v in made_later), *logs]
    kinds = [*source.kinds, *(["optimizer variable"] * len(made_later))]
    return names, [*kinds, *(["log"] * len(logs))]


def _what_drew(
    source: Source, found: Sequence[keras.Variable], history: History
) -> list[int]:
    """Return the places of the states of seed generators that advanced."""
    last = history.values(len(history) - 1)
    triples = zip(found, source.state, last, strict=False)
    return [
        i
        for i, (variable, old, new) in enumerate(triples)
        if _keras.is_seed_state(variable) and (old != new).any()
    ]


def why_failed(error: Exception) -> str:
    """Say in one line why copies do not train."""
    if isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError)):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or what it is called."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
