"""Updates by functions that XLA compiles, in one pass and in place.

Where no kernel has Keras's algebra, XLA makes one of it. That takes some
tenths of a second for each shape, so it is for large variables only.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.update.one import Update

# Numbers in a variable from which a compiled update pays within an epoch.
LARGE = 2**20


def is_large(variable: tf.Variable) -> bool:
    """Say whether compiling the update of a variable pays."""
    size = variable.shape.num_elements()
    return size is not None and size >= LARGE


def run(
    function: Callable[..., None],
    variables: list[tf.Variable],
    tensors: list[tf.Tensor],
) -> None:
    """Run a function of variables and tensors, compiled by XLA.

    It is traced outside of the graph of the step: no device is written into
    it, and other steps find it and what it was compiled to.

    Args:
        function: Function of both lists, which assigns to the variables.
        variables: List of `tf.Variable`s.
        tensors: List of tensors of known shapes.
    """
    specs = [tf.TensorSpec(one.shape, one.dtype) for one in tensors]
    with tf.init_scope():
        concrete = _compiled(function).get_concrete_function(variables, specs)
    concrete(variables, tensors)


@functools.cache
def _compiled(function: Callable[..., None]) -> Any:
    return tf.function(function, jit_compile=True, autograph=False)


def way(
    optimizer: keras.optimizers.Optimizer,
) -> Callable[[Update], None] | None:
    """Return the function that updates by XLA, `None` if none does."""
    return _WAYS.get(type(optimizer))


def decay(variable: tf.Variable, factor: Any, learning_rate: Any) -> None:
    """Let the weight decay of a step take its part off a variable."""
    dtype = variable.dtype
    # By way of float32, as Keras casts a number.
    numbers = [tf.cast(factor, dtype), tf.cast(learning_rate, dtype)]
    run(_decay, [variable], numbers)


def _decay(variables: Any, tensors: Any) -> None:
    (variable,) = variables
    factor, rate = tensors
    variable.assign_sub(variable * factor * rate)


def _rmsprop(update: Update) -> None:
    velocity, _, average = update.slots
    numbers = (update.rate, update.number("rho"), update.rest("rho"))
    tensors = [update.gradient, *numbers, update.number("epsilon")]
    if average is None:
        run(_rmsprop_pass, [update.variable, velocity], tensors)
    else:
        variables = [update.variable, velocity, average]
        run(_centered_pass, variables, tensors)


def _rmsprop_pass(variables: Any, tensors: Any) -> None:
    variable, velocity = variables
    gradient, rate, rho, rest, epsilon = tensors
    velocity.assign(rho * velocity + rest * tf.square(gradient))
    variable.assign_sub(rate * gradient / tf.sqrt(velocity + epsilon))


def _centered_pass(variables: Any, tensors: Any) -> None:
    variable, velocity, average = variables
    gradient, rate, rho, rest, epsilon = tensors
    velocity.assign(rho * velocity + rest * tf.square(gradient))
    average.assign(rho * average + rest * gradient)
    variance = velocity - tf.square(average) + epsilon
    variable.assign_sub(rate * gradient / tf.sqrt(variance))


def _adagrad(update: Update) -> None:
    tensors = [update.gradient, update.rate, update.number("epsilon")]
    run(_adagrad_pass, [update.variable, *update.slots], tensors)


def _adagrad_pass(variables: Any, tensors: Any) -> None:
    variable, accumulator = variables
    gradient, rate, epsilon = tensors
    accumulator.assign_add(tf.square(gradient))
    variable.assign_sub(rate * gradient / tf.sqrt(accumulator + epsilon))


def lion(update: Update) -> None:
    """Update by Lion."""
    (momentum,) = update.slots
    first, second = (update.cast(name) for name in ("beta_1", "beta_2"))
    # Two functions: one would keep a copy of the momentum for the variable.
    run(
        _lion_variable,
        [update.variable, momentum],
        [update.gradient, update.rate, first],
    )
    run(_lion_momentum, [momentum], [update.gradient, second])


def _lion_variable(variables: Any, tensors: Any) -> None:
    variable, momentum = variables
    gradient, rate, beta = tensors
    signs = tf.sign(momentum * beta + gradient * (1.0 - beta))
    variable.assign_sub(rate * signs)


def _lion_momentum(variables: Any, tensors: Any) -> None:
    (momentum,) = variables
    gradient, beta = tensors
    momentum.assign(momentum * beta + gradient * (1.0 - beta))


def _nadam(update: Update) -> None:
    now, then = _nadam_rate(update, 1), _nadam_rate(update, 2)
    product = _keras.momentum_product(update.optimizer)
    product = update.once("product", lambda: product)
    tensors = [
        update.gradient,
        update.rate,
        update.cast("beta_1"),
        update.cast("beta_2"),
        update.number("epsilon"),
        update.once("of_momentum", lambda: then / (1 - product * then)),
        update.once("of_gradient", lambda: (1 - now) / (1 - product)),
        update.once("of_square", lambda: 1 - update.power("beta_2")),
    ]
    run(_nadam_pass, [update.variable, *update.slots], tensors)


def _nadam_rate(update: Update, later: int) -> tf.Tensor:
    step = update.numbers.iteration(later, update.dtype)
    decay = keras.ops.cast(0.96, update.dtype.name)
    return update.once(
        ("nadam", later),
        lambda: update.cast("beta_1") * (1.0 - 0.5 * tf.pow(decay, step)),
    )


def _nadam_pass(variables: Any, tensors: Any) -> None:
    variable, first, second = variables
    (
        gradient,
        rate,
        beta_1,
        beta_2,
        epsilon,
        of_momentum,
        of_gradient,
        of_square,
    ) = tensors
    first.assign_add((gradient - first) * (1 - beta_1))
    second.assign_add((tf.square(gradient) - second) * (1 - beta_2))
    ahead = of_momentum * first + of_gradient * gradient
    variable.assign_sub(ahead * rate / (tf.sqrt(second / of_square) + epsilon))


_WAYS = {
    keras.optimizers.RMSprop: _rmsprop,
    keras.optimizers.Adagrad: _adagrad,
    keras.optimizers.Lion: lion,
    keras.optimizers.Nadam: _nadam,
}
