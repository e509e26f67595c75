"""What the losses of regularizers add to those of the clones, once."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras


def regularization(
    variables: Sequence[keras.Variable],
    losses: Iterable[Any] | None,
    home: str,
) -> tf.Tensor | None:
    """Return the sum of regularization losses, `None` if there are none."""
    if losses is None:
        names = [v.path for v in variables if v.regularizer is not None]
        if names:
            warnings.warn(
                f"Variables {names} have regularizers, and nothing says "
                "whether the losses have them. Pass `regularization_losses="
                "model.losses` to add them once, or `[]` if `model_fn` adds "
                "them to its loss.",
                stacklevel=3,
            )
        return None
    losses = [_keras.as_loss(loss) for loss in losses]
    if not losses:
        return None
    if any(loss.shape.rank not in (0, None) for loss in losses):
        raise ValueError(
            "Argument `regularization_losses` must be a list of scalars. "
            f"Received: regularization_losses={losses}"
        )
    with tf.device(home), tf.name_scope("regularization_loss"):
        return tf.add_n(losses)


def total_loss(
    loss: tf.Tensor, extra: tf.Tensor | None, home: str
) -> tf.Tensor:
    """Add the losses of regularizers to that of the clones."""
    with tf.device(home), tf.name_scope("total_loss"):
        return loss if extra is None else loss + tf.cast(extra, loss.dtype)
