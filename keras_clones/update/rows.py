"""Updates of large tables by the rows that a gradient has.

Keras's optimizers mean by a gradient by rows what they mean by a dense one:
slots decay in all rows, and where a row is there more than once, they sum
what they square. The rows are added to the slots by themselves, and one
function that XLA compiles goes over the table as if there were no gradient.
It gets nothing whose size is that of the batch, which it would be compiled
for anew.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones.update import compiled
from keras_clones.update.one import Update

# What decays more than that leaves too little to divide by.
_LEAST = 0.01


class _Rows(NamedTuple):
    """A gradient's rows, each once.

    `sums` adds up what the gradient has of a row, `squares` the squares of
    that, as `add_up` does with any values that the gradient's rows have.
    """

    ids: tf.Tensor
    sums: tf.Tensor
    squares: tf.Tensor
    add_up: Callable[[tf.Tensor], tf.Tensor]


def way(
    optimizer: keras.optimizers.Optimizer,
) -> Callable[[Update], None] | None:
    """Return the function that updates by rows, `None` if none does."""
    kind = type(optimizer)
    if kind in (keras.optimizers.Adam, keras.optimizers.AdamW):
        least = min(optimizer.beta_1, optimizer.beta_2)
        return _adam if least >= _LEAST else None
    if kind is keras.optimizers.Adamax:
        least = min(optimizer.beta_1, optimizer.beta_2)
        return _adamax if least >= _LEAST else None
    if kind is keras.optimizers.SGD:
        plain = optimizer.momentum >= _LEAST and not optimizer.nesterov
        return _momentum if plain else None
    if kind is keras.optimizers.RMSprop:
        bare = not optimizer.momentum > 0
        return _rmsprop if bare or optimizer.momentum >= _LEAST else None
    return _WAYS.get(kind)


def _rows(gradient: tf.IndexedSlices) -> _Rows:
    """Return the rows of a gradient, added up in their order."""
    ids, places = tf.unique(gradient.indices)

    def add_up(values: tf.Tensor) -> tf.Tensor:
        return tf.math.unsorted_segment_sum(values, places, tf.size(ids))

    values = gradient.values
    return _Rows(ids, add_up(values), add_up(tf.square(values)), add_up)


def _add(variable: tf.Variable, ids: tf.Tensor, values: tf.Tensor) -> None:
    variable.scatter_add(tf.IndexedSlices(values, ids))


def _adam(update: Update) -> None:
    first, second, largest = update.slots
    rows = _rows(update.gradient)
    betas = [update.number("beta_1"), update.number("beta_2")]
    rests = [update.rest("beta_1"), update.rest("beta_2")]
    # What is added before the decay must come out of it as it should be.
    _add(first, rows.ids, rows.sums * (rests[0] / betas[0]))
    _add(second, rows.ids, rows.squares * (rests[1] / betas[1]))
    tensors = [update.adam_rate, *rests, update.number("epsilon")]
    variables = [update.variable, first, second]
    if largest is None:
        compiled.run(_adam_pass, variables, tensors)
    else:
        compiled.run(_amsgrad_pass, [*variables, largest], tensors)


def _adam_pass(variables: Any, tensors: Any) -> None:
    variable, first, second = variables
    alpha, rest_1, rest_2, epsilon = tensors
    first.assign_sub(first * rest_1)
    second.assign_sub(second * rest_2)
    variable.assign_sub(first * alpha / (tf.sqrt(second) + epsilon))


def _amsgrad_pass(variables: Any, tensors: Any) -> None:
    variable, first, second, largest = variables
    alpha, rest_1, rest_2, epsilon = tensors
    first.assign_sub(first * rest_1)
    second.assign_sub(second * rest_2)
    largest.assign(tf.maximum(largest, second))
    variable.assign_sub(first * alpha / (tf.sqrt(largest) + epsilon))


def _adamax(update: Update) -> None:
    first, norm = update.slots
    rows = _rows(update.gradient)
    beta_1, beta_2 = update.number("beta_1"), update.number("beta_2")
    _add(first, rows.ids, rows.sums * (update.rest("beta_1") / beta_1))
    magnitudes = rows.add_up(tf.abs(update.gradient.values))
    norm.scatter_max(tf.IndexedSlices(magnitudes / beta_2, rows.ids))
    tensors = [
        update.rate,
        update.rest("beta_1"),
        beta_2,
        update.once("of_norm", lambda: 1 - update.power("beta_1")),
        update.number("epsilon"),
    ]
    compiled.run(_adamax_pass, [update.variable, first, norm], tensors)


def _adamax_pass(variables: Any, tensors: Any) -> None:
    variable, first, norm = variables
    rate, rest_1, beta_2, of_norm, epsilon = tensors
    first.assign_sub(first * rest_1)
    norm.assign(beta_2 * norm)
    variable.assign_sub(rate * first / (of_norm * (norm + epsilon)))


def _momentum(update: Update) -> None:
    (momentum,) = update.slots
    rows = _rows(update.gradient)
    decay = update.cast("momentum")
    _add(momentum, rows.ids, -rows.sums * update.rate / decay)
    compiled.run(_momentum_pass, [update.variable, momentum], [decay])


def _momentum_pass(variables: Any, tensors: Any) -> None:
    variable, momentum = variables
    (decay,) = tensors
    momentum.assign(momentum * decay)
    variable.assign_add(momentum)


def _rmsprop(update: Update) -> None:
    velocity, momentum, average = update.slots
    rows, rest = _rows(update.gradient), update.rest("rho")
    decaying = [slot for slot in (velocity, average) if slot is not None]
    compiled.run(_decays[len(decaying)], decaying, [update.number("rho")])
    _add(velocity, rows.ids, rest * rows.squares)
    variance = tf.gather(velocity, rows.ids)
    if average is not None:
        _add(average, rows.ids, rest * rows.sums)
        variance -= tf.square(tf.gather(average, rows.ids))
    change = update.rate * rows.sums
    change /= tf.sqrt(variance + update.number("epsilon"))
    if momentum is None:
        _add(update.variable, rows.ids, -change)
        return
    decay = update.number("momentum")
    _add(momentum, rows.ids, change / decay)
    compiled.run(_rmsprop_pass, [update.variable, momentum], [decay])


def _rmsprop_pass(variables: Any, tensors: Any) -> None:
    variable, momentum = variables
    (decay,) = tensors
    momentum.assign(momentum * decay)
    variable.assign_sub(momentum)


def _decay_one(variables: Any, tensors: Any) -> None:
    (one,) = variables
    (rho,) = tensors
    one.assign(rho * one)


def _decay_two(variables: Any, tensors: Any) -> None:
    one, other = variables
    (rho,) = tensors
    one.assign(rho * one)
    other.assign(rho * other)


_decays: dict[int, Callable[..., None]] = {1: _decay_one, 2: _decay_two}


def _adagrad(update: Update) -> None:
    (accumulator,) = update.slots
    rows = _rows(update.gradient)
    _add(accumulator, rows.ids, rows.squares)
    root = tf.sqrt(tf.gather(accumulator, rows.ids) + update.number("epsilon"))
    _add(update.variable, rows.ids, -update.rate * rows.sums / root)


def _adadelta(update: Update) -> None:
    gradients, deltas = update.slots
    rows, rest = _rows(update.gradient), update.rest("rho")
    epsilon = update.number("epsilon")
    before = tf.gather(deltas, rows.ids)
    compiled.run(_decay_two, update.slots, [update.number("rho")])
    _add(gradients, rows.ids, rest * rows.squares)
    now = tf.gather(gradients, rows.ids)
    factor = tf.sqrt(before + epsilon) / tf.sqrt(now + epsilon)
    _add(deltas, rows.ids, rest * tf.square(factor) * rows.squares)
    _add(update.variable, rows.ids, -update.rate * factor * rows.sums)


_WAYS = {
    keras.optimizers.Adagrad: _adagrad,
    keras.optimizers.Adadelta: _adadelta,
}
