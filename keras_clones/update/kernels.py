"""Updates by TensorFlow's own kernels, where their algebra is Keras's.

Such a kernel goes over a variable and its slots once, on all threads, where
Keras runs an operation for each sign of the formula. It is ordered among the
reads of a variable as `assign` is, and copies what is being read.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_clones.update.one import Update

_ops = tf.raw_ops
# What a moving average may take in of a gradient more or less than in Keras.
_NEAR = 2e-5
_AVERAGES = ("beta_1", "beta_2", "rho")


def way(
    optimizer: keras.optimizers.Optimizer, dtype: tf.DType
) -> Callable[[Update], None] | None:
    """Return the function that updates by a kernel, `None` if none does.

    A kernel gets a decay in the type of the variable and takes it from 1,
    where Keras takes it from 1 first: float32 leaves 1.3e-5 less of 0.001,
    and nothing like it of much less.
    """
    decays = [getattr(optimizer, name, 0.0) for name in _AVERAGES]
    if not all(_is_near(1 - np.array(d, dtype.name), 1 - d) for d in decays):
        return None
    kind = type(optimizer)
    # The kernel keeps a momentum, also where it is zero.
    if kind is keras.optimizers.RMSprop and not optimizer.momentum > 0:
        return None
    return _WAYS.get(kind)


def _is_near(found: Any, expected: float) -> bool:
    return bool(abs(found - expected) <= _NEAR * abs(expected))


def _adam(update: Update) -> None:
    first, second, largest = update.slots
    rate, epsilon, zero = _adam_numbers(update)
    arguments = {
        "var": update.variable.handle,
        "m": first.handle,
        "v": second.handle,
        "beta1_power": zero,
        "beta2_power": zero,
        "lr": rate,
        "beta1": update.number("beta_1"),
        "beta2": update.number("beta_2"),
        "epsilon": epsilon,
        "grad": update.gradient,
    }
    if largest is None:
        _ops.ResourceApplyAdam(**arguments)
    else:
        _ops.ResourceApplyAdamWithAmsgrad(**arguments, vhat=largest.handle)


def _adam_numbers(update: Update) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the rate and the epsilon of a step, and powers that count not.

    What the kernel's second moment lacks for taking `beta_2` from 1 in
    float32 is the same for all weights, and known: it is taken off again.
    """
    exact = 1 - update.optimizer.beta_2
    taken = float(1 - np.array(update.optimizer.beta_2, update.dtype.name))

    def lacking() -> Any:
        if taken == exact:
            return 1.0
        steps = update.numbers.iteration(1, tf.float64)
        part, whole = np.log1p(-taken), np.log1p(-exact)
        return tf.sqrt(
            tf.math.expm1(steps * part) / tf.math.expm1(steps * whole)
        )

    def times(number: tf.Tensor) -> Any:
        factor = update.numbers.once("lacking", tf.float64, lacking)
        return tf.cast(number, tf.float64) * factor

    rate = update.once("kernel_rate", lambda: times(update.adam_rate))
    epsilon = update.number("epsilon")
    epsilon = update.once("kernel_epsilon", lambda: times(epsilon))
    return rate, epsilon, update.once("zero", lambda: 0.0)


def sgd(update: Update) -> None:
    """Update by SGD, with momentum or without."""
    (momentum,) = update.slots
    if momentum is None:
        _ops.ResourceApplyGradientDescent(
            var=update.variable.handle, alpha=update.rate, delta=update.gradient
        )
        return
    _ops.ResourceApplyKerasMomentum(
        var=update.variable.handle,
        accum=momentum.handle,
        lr=update.rate,
        grad=update.gradient,
        momentum=update.cast("momentum"),
        use_nesterov=bool(update.optimizer.nesterov),
    )


def _rmsprop(update: Update) -> None:
    velocity, momentum, average = update.slots
    arguments = {
        "var": update.variable.handle,
        "ms": velocity.handle,
        "mom": momentum.handle,
        "lr": update.rate,
        "rho": update.number("rho"),
        "momentum": update.number("momentum"),
        "epsilon": update.number("epsilon"),
        "grad": update.gradient,
    }
    if average is None:
        _ops.ResourceApplyRMSProp(**arguments)
    else:
        _ops.ResourceApplyCenteredRMSProp(**arguments, mg=average.handle)


def _adadelta(update: Update) -> None:
    gradients, deltas = update.slots
    _ops.ResourceApplyAdadelta(
        var=update.variable.handle,
        accum=gradients.handle,
        accum_update=deltas.handle,
        lr=update.rate,
        rho=update.number("rho"),
        epsilon=update.number("epsilon"),
        grad=update.gradient,
    )


def _adamax(update: Update) -> None:
    first, norm = update.slots
    _ops.ResourceApplyAdaMax(
        var=update.variable.handle,
        m=first.handle,
        v=norm.handle,
        beta1_power=update.power("beta_1"),
        lr=update.rate,
        beta1=update.number("beta_1"),
        beta2=update.number("beta_2"),
        epsilon=update.number("epsilon"),
        grad=update.gradient,
    )


def _ftrl(update: Update) -> None:
    accumulator, linear = update.slots
    strength = update.optimizer.l2_regularization_strength
    beta = update.optimizer.beta
    _ops.ResourceApplyFtrlV2(
        var=update.variable.handle,
        accum=accumulator.handle,
        linear=linear.handle,
        grad=update.gradient,
        lr=update.rate,
        l1=update.number("l1_regularization_strength"),
        l2=update.once("l2", lambda: strength + beta / (2.0 * update.rate)),
        l2_shrinkage=update.number("l2_shrinkage_regularization_strength"),
        lr_power=update.number("learning_rate_power"),
    )


_WAYS = {
    keras.optimizers.Adam: _adam,
    keras.optimizers.AdamW: _adam,
    keras.optimizers.SGD: sgd,
    keras.optimizers.RMSprop: _rmsprop,
    keras.optimizers.Adadelta: _adadelta,
    keras.optimizers.Adamax: _adamax,
    keras.optimizers.Ftrl: _ftrl,
}
