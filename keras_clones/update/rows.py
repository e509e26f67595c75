"""Updates of large tables by the rows that a gradient has.

Keras's optimizers mean by a gradient by rows what they mean by a dense one:
slots decay in all rows, and where a row is there more than once, they sum
what they square. Slots and table are gone over in place by functions that XLA
compiles, and the rows are added to the slots by themselves. What is compiled
gets nothing of the batch's size, for which it would be compiled anew. Slots
and table have a function each, since one of both would copy a slot that it
reads again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones.update import compiled, kernels
from keras_clones.update.one import Update


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
    # Keras's own writes the rows and has no slots: there is nothing to gain.
    if kind is keras.optimizers.SGD and writes_rows(optimizer):
        return None
    return _WAYS.get(kind)


def writes_rows(optimizer: keras.optimizers.Optimizer) -> bool:
    """Say whether single rows of a table are written, and not all of it.

    Keras's own updates and those of this file do alike.
    """
    momentum = getattr(optimizer, "momentum", 0.0)
    return type(optimizer) in _ROW_WRITERS and not momentum


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
    rests = [update.rest("beta_1"), update.rest("beta_2")]
    compiled.run(_shrink, [first, second], rests)
    _add(first, rows.ids, rows.sums * rests[0])
    _add(second, rows.ids, rows.squares * rests[1])
    variables = [update.variable, first, second]
    tensors = [update.adam_rate, update.number("epsilon")]
    if largest is None:
        compiled.run(_adam_pass, variables, tensors)
    else:
        compiled.run(_amsgrad_pass, [*variables, largest], tensors)


def _shrink(variables: Any, tensors: Any) -> None:
    for variable, rest in zip(variables, tensors, strict=True):
        variable.assign_sub(variable * rest)


def _adam_pass(variables: Any, tensors: Any) -> None:
    variable, first, second = variables
    alpha, epsilon = tensors
    variable.assign_sub(first * alpha / (tf.sqrt(second) + epsilon))


def _amsgrad_pass(variables: Any, tensors: Any) -> None:
    variable, first, second, largest = variables
    alpha, epsilon = tensors
    largest.assign(tf.maximum(largest, second))
    variable.assign_sub(first * alpha / (tf.sqrt(largest) + epsilon))


def _adamax(update: Update) -> None:
    first, norm = update.slots
    rows, rest = _rows(update.gradient), update.rest("beta_1")
    compiled.run(_shrink, [first], [rest])
    _add(first, rows.ids, rows.sums * rest)
    compiled.run(_decay, [norm], [update.number("beta_2")])
    magnitudes = rows.add_up(tf.abs(update.gradient.values))
    norm.scatter_max(tf.IndexedSlices(magnitudes, rows.ids))
    tensors = [
        update.rate,
        update.once("of_norm", lambda: 1 - update.power("beta_1")),
        update.number("epsilon"),
    ]
    compiled.run(_adamax_pass, [update.variable, first, norm], tensors)


def _adamax_pass(variables: Any, tensors: Any) -> None:
    variable, first, norm = variables
    rate, of_norm, epsilon = tensors
    variable.assign_sub(rate * first / (of_norm * (norm + epsilon)))


def _sgd(update: Update) -> None:
    if update.optimizer.nesterov:
        kernels.sgd(_with_all_rows(update))
        return
    (momentum,) = update.slots
    rows = _rows(update.gradient)
    compiled.run(_decay, [momentum], [update.cast("momentum")])
    _add(momentum, rows.ids, -rows.sums * update.rate)
    compiled.run(_sum, [update.variable, momentum], [])


def _decay(variables: Any, tensors: Any) -> None:
    (factor,) = tensors
    for variable in variables:
        variable.assign(factor * variable)


def _sum(variables: Any, _: Any) -> None:
    variable, other = variables
    variable.assign_add(other)


def _difference(variables: Any, _: Any) -> None:
    variable, other = variables
    variable.assign_sub(other)


def _lion(update: Update) -> None:
    compiled.lion(_with_all_rows(update))


def _with_all_rows(update: Update) -> Update:
    """Return the same update by a dense gradient, where nothing is squared."""
    ids, values = update.gradient.indices, update.gradient.values
    number = update.variable.shape[0]
    dense = tf.math.unsorted_segment_sum(values, ids, number)
    return update._replace(
        gradient=tf.ensure_shape(dense, update.variable.shape)
    )


def _rmsprop(update: Update) -> None:
    velocity, momentum, average = update.slots
    rows, rest = _rows(update.gradient), update.rest("rho")
    slots = [slot for slot in (velocity, average) if slot is not None]
    compiled.run(_decay, slots, [update.number("rho")])
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
    compiled.run(_decay, [momentum], [update.number("momentum")])
    _add(momentum, rows.ids, change)
    compiled.run(_difference, [update.variable, momentum], [])


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
    compiled.run(_decay, update.slots, [update.number("rho")])
    _add(gradients, rows.ids, rest * rows.squares)
    now = tf.gather(gradients, rows.ids)
    factor = tf.sqrt(before + epsilon) / tf.sqrt(now + epsilon)
    _add(deltas, rows.ids, rest * tf.square(factor) * rows.squares)
    _add(update.variable, rows.ids, -update.rate * factor * rows.sums)


_WAYS = {
    keras.optimizers.Adam: _adam,
    keras.optimizers.AdamW: _adam,
    keras.optimizers.Adamax: _adamax,
    keras.optimizers.RMSprop: _rmsprop,
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adagrad: _adagrad,
    keras.optimizers.Adadelta: _adadelta,
    keras.optimizers.Lion: _lion,
}
# What they do with momentum goes over the whole table.
_ROW_WRITERS = {
    keras.optimizers.Adadelta,
    keras.optimizers.Adafactor,
    keras.optimizers.Adagrad,
    keras.optimizers.RMSprop,
    keras.optimizers.SGD,
}
