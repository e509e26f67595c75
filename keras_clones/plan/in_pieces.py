"""Which steps clones cannot work through in pieces, and why not."""

import keras

from keras_clones.exchange.batch_norm import synchronized_layers
from keras_clones.plan import whole
from keras_clones.plan.options import StepOptions

_EXPECTED = (
    "Expected a model that runs on some rows of a batch at a time, as `pieces` "
    "needs."
)


def check(model: keras.Model, options: StepOptions, training: bool) -> None:
    """Check that a step can be made in pieces, if it is to be.

    Args:
        model: A `keras.Model`, built or not.
        options: `StepOptions` of the deployment.
        training: Boolean, whether it is a training step.

    Raises:
        ValueError: If something in it needs all rows at once.
    """
    if options.pieces == 1:
        return
    if training:
        refuse_synchronized(
            synchronized_layers(model, options.batch_norm), options
        )
    reason = whole.find(model, options.whole, options.num_turns).reason
    if reason:
        raise ValueError(
            f"{_EXPECTED} Received: pieces={options.pieces}, and {reason}, "
            "which needs all rows of the batch at once. Pass `pieces=1`, and "
            "smaller batches or more clones where memory does not suffice."
        )


def refuse_synchronized(
    layers: list[keras.layers.BatchNormalization], options: StepOptions
) -> None:
    """Refuse layers that take moments over rows that are not there at once.

    Raises:
        ValueError: If there are any.
    """
    if not layers:
        return
    names = [layer.name for layer in layers]
    raise ValueError(
        f"{_EXPECTED} Received: pieces={options.pieces}, and layers {names} "
        "normalize over the global batch, so that each needs all rows of it "
        "at once. Pass `batch_norm='mean'` (or make the layers with "
        "`synchronized=False`), by which each piece normalizes by itself; use "
        "another normalization, such as `LayerNormalization`; or pass "
        "`pieces=1` and make more clones."
    )
