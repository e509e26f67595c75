"""What losses divide by where masks or weights say which entries count.

The loss of a clone's shard is a mean over the entries that count there, and so
it counts for as much as these are of those of the global batch, not for as
much as the rows are. That number is known of the batch before clones run,
where masks come of the data.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.plan import exactness


def may_count(model: keras.Model) -> bool:
    """Say whether losses may divide by anything else than by the rows.

    Args:
        model: A compiled `keras.Model`.
    """
    return any(map(_counts, _keras.compiled_losses(model))) or any(
        map(_may_mask, _keras.layers(model))
    )


def _counts(loss: keras.losses.Loss) -> bool:
    by_weights = loss.reduction == "mean_with_sample_weight"
    return by_weights or _ignored_class(loss) is not None


def _ignored_class(loss: keras.losses.Loss) -> int | None:
    """Return the class whose entries a loss leaves out, if there is one."""
    known = _keras.loss_function(loss)
    return None if known is None else known[1].get("ignore_class")


def _may_mask(layer: keras.Layer) -> bool:
    """Say whether masks may begin at a layer."""
    if isinstance(layer, keras.layers.Embedding):
        return layer.mask_zero
    own = type(layer).compute_mask is not keras.Layer.compute_mask
    of_keras = type(layer).__module__.startswith("keras.")
    return isinstance(layer, keras.layers.Masking) or (own and not of_keras)


def find(
    model: keras.Model, batch: tuple[Any, Any, Any], training: bool
) -> list[tf.Tensor | None] | None:
    """Return what each loss divides by, on the global batch.

    Args:
        model: A compiled and built `keras.Model`.
        batch: Tuple `(x, y, sample_weight)` of nests of tensors.
        training: Boolean, what the model is called with.

    Returns:
        A list with one scalar float64 tensor a loss, `None` for one that
        divides by as many entries a row as there are. `None` if the data do
        not tell.
    """
    leaves = tf.nest.flatten(batch, expand_composites=True)
    tensors = [leaf for leaf in leaves if leaf is not None]
    is_known: list[bool] = []

    def count(*given: tf.Tensor) -> list[tf.Tensor]:
        rest = iter(given)
        again = [None if leaf is None else next(rest) for leaf in leaves]
        nest = tf.nest.pack_sequence_as(batch, again, expand_composites=True)
        found = _count_all(model, nest, training)
        is_known[:] = [one is not None for one in found]
        return [one for one in found if one is not None]

    try:
        whole = tf.compat.v1.wrap_function(
            count, [tf.TensorSpec(t.shape, t.dtype) for t in tensors]
        )
    except Exception:
        # The step itself says what is wrong.
        return None
    if not any(is_known):
        return [None for _ in is_known]
    # Of the model there is left what masks are made of.
    part = whole.prune(
        whole.inputs[: len(tensors)], list(whole.structured_outputs)
    )
    if any(weight.consumers() for weight in part.inputs[len(tensors) :]):
        return None
    counts = iter(part(*tensors))
    return [next(counts) if known else None for known in is_known]


def _count_all(
    model: keras.Model, batch: tuple[Any, Any, Any], training: bool
) -> list[tf.Tensor | None]:
    """Return what each loss divides by, and leave nothing behind."""
    x, y, sample_weight = batch
    found: dict[int, tf.Tensor | None] = {}

    def wrap(i: int, loss: keras.losses.Loss) -> Callable[..., tf.Tensor]:
        def counting(y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
            found[i] = divisor(loss, y, y_pred, sample_weight)
            return tf.zeros([], loss.dtype)

        return counting

    with keras.StatelessScope(), _keras.wrapping_losses(model, wrap):
        outputs = _keras.call(model, x, training)
        nothing = tf.zeros([], keras.config.floatx())
        with _keras.overriding_losses(model, [nothing]):
            _keras.compute_loss(model, x, y, outputs, sample_weight, training)
    return [found[i] for i in sorted(found)]


def divisor(
    loss: keras.losses.Loss, y: Any, y_pred: Any, sample_weight: Any
) -> tf.Tensor | None:
    """Return what a loss divides the sum over its entries by.

    Returns:
        A scalar float64 tensor, or `None`: by the number of entries.

    Reference:

    - Keras, `losses/loss.py`: `Loss.__call__` and `reduce_weighted_values`.
    """
    by_weights = loss.reduction == "mean_with_sample_weight"
    masks = [_keras.get_mask(y_pred)]
    ignored = _ignored_class(loss)
    if ignored is not None:
        if y.shape.rank == y_pred.shape.rank and y.shape[-1] == 1:
            y = tf.squeeze(y, -1)
        masks.append(tf.not_equal(y, tf.cast(ignored, y.dtype)))
    weights = [tf.cast(mask, tf.float64) for mask in masks if mask is not None]
    if by_weights and sample_weight is not None:
        weights.append(tf.cast(sample_weight, tf.float64))
    if not weights:
        return None
    added = 0.0 if by_weights else _keras.masked_epsilon()
    return tf.reduce_sum(_product(weights)) + added


def _product(weights: Sequence[tf.Tensor]) -> tf.Tensor:
    """Multiply weights, of which some may have a last axis of one entry."""
    product, *others = weights
    for other in others:
        ranks = product.shape.rank, other.shape.rank
        if ranks[0] == ranks[1] + 1 and product.shape[-1] == 1:
            product = tf.squeeze(product, -1)
        elif ranks[1] == ranks[0] + 1 and other.shape[-1] == 1:
            other = tf.squeeze(other, -1)
        elif ranks[0] == ranks[1] + 1:
            other = other[..., None]
        elif ranks[1] == ranks[0] + 1:
            product = product[..., None]
        product = product * other
    return product


class Counts:
    """Wraps the losses of a clone, so that they count as their entries do.

    Args:
        totals: Sequence with what each loss divides by on the global batch:
            scalar float64 tensors, or `None`s.
        share: Scalar float64 tensor, the clone's share of the rows.
    """

    def __init__(
        self, totals: Sequence[tf.Tensor | None], share: tf.Tensor
    ) -> None:
        self._totals = totals
        self._share = share

    def wrap(self, i: int, loss: keras.losses.Loss) -> Callable[..., tf.Tensor]:
        """Return what is called in place of a loss."""
        total = self._totals[i]

        def counted(y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
            value = loss(y, y_pred, sample_weight)
            own = divisor(loss, y, y_pred, sample_weight)
            if own is None:
                return value
            # What this loss counts for, over what the clone's rows do.
            factor = tf.math.divide_no_nan(own, total * self._share)
            return value * tf.cast(factor, value.dtype)

        return counted if total is not None else loss


def reason(model: keras.Model) -> str | None:
    """Say why losses do not average by rows, where counts are not known."""
    for loss in _keras.compiled_losses(model):
        if _ignored_class(loss) is not None:
            return f"loss {loss.name!r} has an `ignore_class`"
        if loss.reduction not in exactness.MEANS:
            return f"loss {loss.name!r} has reduction={loss.reduction!r}"
    return None
