"""Loss and gradients of clones: TF-Slim's `optimize_clones`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.devices.config import CPU
from keras_clones.exchange import bringing_home
from keras_clones.model_deploy import clone_gradients
from keras_clones.model_deploy.clones import (
    Clone,
    find_shares,
    layout_of,
    name_scope,
    rows_of,
    scopes_of,
)
from keras_clones.model_deploy.regularizers import regularization, total_loss
from keras_clones.tensors import sharding


@tf.autograph.experimental.do_not_convert
def optimize_clones(
    clones: Sequence[Clone],
    optimizer: keras.optimizers.Optimizer,
    regularization_losses: Iterable[Any] | None = None,
    *,
    weights: Sequence[Any] | None = None,
    var_list: Sequence[keras.Variable] | None = None,
) -> tuple[tf.Tensor, list[tuple[Any, keras.Variable]]]:
    """Return the total loss of clones, and its gradients, inside a step.

    Call it inside a `tf.function`, and give the gradients to
    `optimizer.apply_gradients`.

    Args:
        clones: List of `Clone`s, as `create_clones` returns it. Their outputs
            are or hold scalar losses.
        optimizer: The `keras.optimizers.Optimizer` that will apply the
            gradients. They are scaled if it scales losses.
        regularization_losses: List of scalar tensors that count once, such as
            `model.losses` outside of the clones. Pass `[]` if the losses of
            the clones have them. Defaults to `None`: none, with a warning if
            variables have regularizers.
        weights: List of one number a clone, how much its loss counts: such
            as the rows of its shard, if the loss is a mean. Only their
            proportions matter. Defaults to `None`: the rows of the shards of
            `split_batch` where there are any, else the clones count alike.
        var_list: List of the `keras.Variable`s to differentiate by. Defaults
            to `None`: those of the optimizer if it is built, else the
            trainable ones that the clones read.

    Returns:
        The scalar total loss, and a list of `(gradient, variable)` for the
        variables that the loss depends on. Both are merged on `CPU:0`.

    Raises:
        RuntimeError: If it is called outside of a `tf.function`.
        TypeError: If an argument has the wrong type.
        ValueError: If a clone has no loss, the weights are no proportions, or
            no variable has a gradient.

    Example:

    ```python
    @tf.function
    def train_step(images, labels):
        shards = split_batch((images, labels), config.num_clones)
        clones = create_clones(config, model_fn, [shards])
        total_loss, grads_and_vars = optimize_clones(clones, optimizer)
        with tf.device(config.optimizer_device()):
            optimizer.apply_gradients(grads_and_vars)
        return total_loss
    ```

    Reference:

    - TF-Slim, `deployment/model_deploy.py`.
    """
    if tf.executing_eagerly():
        raise RuntimeError(
            "`optimize_clones` differentiates a graph: call it, together with "
            "`create_clones`, inside a function decorated with `@tf.function` "
            "(and without `tf.config.run_functions_eagerly`), or use `deploy`, "
            "which makes that function."
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "Argument `optimizer` must be a `keras.optimizers.Optimizer`. "
            f"Received: optimizer={optimizer!r}"
        )
    losses = find_losses(clones)
    home = home_of(clones)
    variables = _variables(clones, optimizer, var_list)
    extra = regularization(variables, regularization_losses, home)
    _build(optimizer, variables, home)
    with tf.device(home):
        scale = optimizer.scale_loss(1.0)
        parts, seeds = _weigh(clones, losses, weights, scale)
    columns = clone_gradients.differentiate(clones, losses, seeds, variables)
    with tf.device(home):
        merged, part = clone_gradients.merge(
            layout_of(home, clones), columns, variables, parts
        )
        total = total_loss(part, extra, home)
        if extra is not None:
            merged = clone_gradients.add(
                merged, extra, scale, variables, scopes_of(clones)
            )
    return total, _pairs(merged, variables)


def _build(
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    home: str,
) -> None:
    """Have an optimizer make its variables at home, before it is needed."""
    if not optimizer.built:
        name = keras.name_scope(optimizer.name, caller=optimizer)
        with tf.init_scope(), tf.device(home), name:
            optimizer.build(variables)


def _pairs(
    merged: Sequence[Any], variables: Sequence[keras.Variable]
) -> list[tuple[Any, keras.Variable]]:
    """Return the gradients that there are, each with its variable."""
    pairs = [
        (gradient, variable)
        for gradient, variable in zip(merged, variables, strict=True)
        if gradient is not None
    ]
    if not pairs:
        raise ValueError(
            "Expected losses that depend on trainable variables, through "
            "operations that have gradients. Received: losses without a "
            f"gradient for any of {[v.path for v in variables]}"
        )
    return pairs


def find_losses(clones: Sequence[Clone]) -> list[tf.Tensor]:
    """Return the loss of each clone, or say what is wrong with the clones."""
    if isinstance(clones, Clone) or not all(
        isinstance(clone, Clone) for clone in clones
    ):
        raise TypeError(
            "Argument `clones` must be a list of `Clone(outputs, scope, "
            f"device)`, as `create_clones` returns. Received: clones={clones}"
        )
    if not clones:
        raise ValueError("Expected at least one clone. Received: clones=[]")
    return [check_loss(clone.outputs) for clone in clones]


def home_of(clones: Sequence[Clone]) -> str:
    """Return where the variables of clones live."""
    homes = [scope.mirrors.home for scope in scopes_of(clones)]
    return homes[0] if homes else CPU


def weighted_loss(clones: Sequence[Clone]) -> tf.Tensor:
    """Return the loss of all clones together, at home."""
    losses, home = find_losses(clones), home_of(clones)
    with tf.device(home):
        parts, _ = _weigh(clones, losses, None, 1.0)
        return bringing_home.add_up(layout_of(home, clones), parts)


def _weigh(
    clones: Sequence[Clone],
    losses: Sequence[tf.Tensor],
    weights: Sequence[Any] | None,
    scale: Any,
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Return each clone's part of the total loss, and of the scaled gradient.

    Both are on the clone's device. What is known before a step runs is not
    sent there.

    Args:
        clones: Sequence of `Clone`s.
        losses: Sequence of their losses.
        weights: Sequence of numbers, how much each loss counts, or `None`.
        scale: Number or scalar tensor, what the optimizer scales losses by.
    """
    shares = find_shares(
        rows_of(clones) if weights is None else weights, clones
    )
    known = tf.get_static_value(scale) if tf.is_tensor(scale) else scale
    scale = tf.cast(scale, tf.float64) if known is None else float(known)
    parts, seeds = [], []
    for clone, loss, share in zip(clones, losses, shares, strict=True):
        numbers: Any = (share, share * scale)
        if any(tf.is_tensor(number) for number in numbers):
            numbers = tf.stack([tf.cast(n, tf.float64) for n in numbers])
        with name_scope(clone.scope), tf.device(clone.device):
            share, seed = (tf.cast(numbers[i], loss.dtype) for i in range(2))
            parts.append(loss * share)
            seeds.append(seed)
    return parts, seeds


def check_loss(outputs: Any) -> tf.Tensor:
    """Return the loss in what a model function returned, or raise."""
    loss = find_loss(outputs)
    if loss is None:
        raise ValueError(
            "Expected `model_fn` to return a loss to train with: a scalar, "
            "floating point tensor, or a dict with it at 'loss', a named "
            "tuple with it at `loss`, or a list or tuple with it at first. "
            f"Received: {outputs}"
        )
    return loss


def find_loss(outputs: Any) -> tf.Tensor | None:
    """Return the loss in what a model function returned, or `None`."""
    loss: Any
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    elif hasattr(outputs, "_fields") and hasattr(outputs, "loss"):
        loss = outputs.loss
    elif isinstance(outputs, (list, tuple)):
        loss = outputs[0] if outputs else None
    else:
        loss = outputs
    if isinstance(loss, keras.Variable):
        loss = loss.value
    if not tf.is_tensor(loss) or sharding.is_composite(loss):
        return None
    is_scalar = loss.shape.rank in (0, None)
    return loss if is_scalar and loss.dtype.is_floating else None


def variables_of(clones: Sequence[Clone]) -> list[keras.Variable]:
    """Return the variables that clones read, each once."""
    read = [v for s in scopes_of(clones) for v in s.mirrors.variables]
    return list({id(v): v for v in read}.values())


def _variables(
    clones: Sequence[Clone],
    optimizer: keras.optimizers.Optimizer,
    var_list: Sequence[keras.Variable] | None,
) -> list[keras.Variable]:
    if var_list is not None:
        chosen = list(var_list)
    elif optimizer.built:
        chosen = _keras.optimized_variables(optimizer)
    else:
        chosen = [v for v in variables_of(clones) if v.trainable]
    if not all(isinstance(v, keras.Variable) for v in chosen):
        raise TypeError(
            "Argument `var_list` must be a list of `keras.Variable`s. "
            f"Received: var_list={var_list}"
        )
    if not chosen:
        raise ValueError(
            "Expected trainable variables. Received: clones that read none, "
            "and an optimizer that is not built. Pass `var_list=`, such as "
            "`model.trainable_variables`."
        )
    return chosen
