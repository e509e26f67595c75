"""What a training step does with its gradients: told, then applied."""

import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_clones.exchange.beside_data import beside_data
from keras_clones.plan.options import StepOptions
from keras_clones.plan.watch import Watch
from keras_clones.step.begin import Step
from keras_clones.tensors.parted import Parted
from keras_clones.update.by_parts import by_parts
from keras_clones.update.update import faster


def record(step: Step, losses: Callable[[Watch], Any], gradients: Any) -> None:
    """Let the watch of a training step know what it came to, if there is one.

    Args:
        step: `Step`.
        losses: Function of the watch that returns a float64 tensor, one loss
            a clone.
        gradients: List with the gradient of each trainable variable.
    """
    watch = step.options.watch
    if watch is None:
        return
    watch.record(
        losses(watch),
        [g.join() if isinstance(g, Parted) else g for g in gradients],
        step.variables.trainable,
        step.model.optimizer.scale_loss(1.0),
    )


def apply(
    model: keras.Model,
    gradients: Any,
    variables: list[keras.Variable],
    options: StepOptions,
) -> None:
    """Update the variables, or warn that there are none, as Keras does."""
    if variables:
        optimizer = model.optimizer
        with (
            faster([optimizer], options.update),
            beside_data(optimizer, options.homes),
            by_parts([optimizer]),
        ):
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
    else:
        warnings.warn(
            "The model does not have any trainable weights.", stacklevel=1
        )
