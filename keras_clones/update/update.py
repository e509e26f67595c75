"""Letting optimizers update each variable in the fastest way there is."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.update import compiled, kernels, rows
from keras_clones.update.one import Numbers, Update

CHOICES = ("auto", "keras")


@contextlib.contextmanager
def faster(
    optimizers: Iterable[keras.optimizers.Optimizer | None], update: str
) -> Iterator[None]:
    """Let optimizers update in the fastest way, what else they do kept.

    Only Keras's own optimizers do so, as they are: not a subclass, nor one
    with an `update_step` of its own. Clipping, decay, accumulation, averages,
    loss scaling and constraints stay what they are, around the updates.

    Args:
        optimizers: Iterable of optimizers, also wrapped ones.
        update: String. `"keras"` leaves them as they are.
    """
    with contextlib.ExitStack() as stack:
        for one in _parts(optimizers) if update == "auto" else []:
            if _keras.updates_as_made(one) and _has_plain_numbers(one):
                stack.enter_context(_keras.unreduced(one))
                stack.enter_context(_swapped(one))
        yield


def writes_rows(model: keras.Model) -> bool:
    """Say whether an optimizer of a model updates single rows of a table.

    TensorFlow then copies the table whenever all of it is read.
    """
    return any(map(rows.writes_rows, _parts(_keras.optimizers(model))))


def _parts(
    optimizers: Iterable[keras.optimizers.Optimizer | None],
) -> list[keras.optimizers.Optimizer]:
    """Return the optimizers that update, each once, out of their wrappers."""
    found: dict[int, keras.optimizers.Optimizer] = {}
    for one in optimizers:
        inner = getattr(one, "inner_optimizer", None)
        inside = [*getattr(one, "optimizers", []), inner]
        if any(part is not None for part in inside):
            found.update({id(part): part for part in _parts(inside)})
        elif one is not None:
            found[id(one)] = one
    return list(found.values())


def _has_plain_numbers(optimizer: keras.optimizers.Optimizer) -> bool:
    """Say whether its hyperparameters are numbers, as they are from Keras."""
    names = ("beta_1", "beta_2", "rho", "momentum", "epsilon")
    return all(
        isinstance(getattr(optimizer, name, 0.0), (int, float))
        for name in names
    )


def _swapped(
    optimizer: keras.optimizers.Optimizer,
) -> contextlib.AbstractContextManager[None]:
    numbers, mine = Numbers(optimizer), threading.get_ident()

    def is_seen() -> bool:
        """Say whether what runs is the step that is being traced here."""
        return (
            threading.get_ident() == mine
            and not tf.executing_eagerly()
            and not _keras.in_scope_without_state()
        )

    def update_step(
        own: Callable[..., None], gradient: Any, variable: Any, rate: Any
    ) -> None:
        way = None
        if is_seen():
            way = way_of(optimizer, gradient, variable)
        if way is None:
            own(gradient, variable, rate)
            return
        slots = _keras.slots_of(optimizer, variable)
        gradient = tf.cast(gradient, variable.dtype)
        way(Update(optimizer, variable, slots, gradient, rate, numbers))

    def decay(own: Callable[..., None], variables: Any) -> None:
        # Each step comes by here, before it updates.
        numbers.forget()
        large = []
        if is_seen() and optimizer.weight_decay is not None:
            large = [v for v in variables if compiled.is_large(_value(v))]
        own([v for v in variables if all(v is not one for one in large)])
        for variable in map(_value, large):
            if _keras.decays(optimizer, variable):
                rate = optimizer.learning_rate
                compiled.decay(variable, optimizer.weight_decay, rate)

    return _keras.updating(optimizer, update_step, decay)


def _value(variable: Any) -> tf.Variable:
    if isinstance(variable, keras.Variable):
        return _keras.tf_variable(variable)
    return variable


def way_of(
    optimizer: keras.optimizers.Optimizer, gradient: Any, variable: Any
) -> Callable[[Update], None] | None:
    """Return how a variable is updated, `None` where Keras's own is best.

    Args:
        optimizer: One of Keras's own optimizers.
        gradient: Tensor or `tf.IndexedSlices`, the variable's gradient.
        variable: `tf.Variable`.
    """
    slots = _keras.slots_of(optimizer, variable)
    known = (tf.float32, tf.float64)
    if variable.dtype not in known or any(
        slot is not None and slot.dtype != variable.dtype for slot in slots
    ):
        return None
    large = compiled.is_large(variable)
    if isinstance(gradient, tf.IndexedSlices):
        return rows.way(optimizer) if large else None
    if not isinstance(gradient, tf.Tensor):
        return None
    kernel = kernels.way(optimizer, variable.dtype)
    if kernel is None and large:
        return compiled.way(optimizer)
    return kernel
