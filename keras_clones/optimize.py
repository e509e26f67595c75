"""Loss and gradients of clones: TF-Slim's `optimize_clones`."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, gradients, sharding
from keras_clones.clones import Clone, find_shares, name_scope
from keras_clones.config import CPU


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
    home = getattr(clones, "home", CPU)
    parts = weighted_losses(clones, weights)
    variables = _variables(clones, optimizer, var_list)
    extra = regularization(variables, regularization_losses, home)
    total = total_loss(parts, extra, home)
    if not optimizer.built:
        name = keras.name_scope(optimizer.name, caller=optimizer)
        with tf.init_scope(), tf.device(home), name:
            optimizer.build(variables)
    sources = [variable.value for variable in variables]
    columns = []
    for clone, part in zip(clones, parts, strict=True):
        with name_scope(clone.scope), tf.device(clone.device):
            scaled = optimizer.scale_loss(part)
            columns.append(tf.gradients(scaled, sources))
    with tf.device(home):
        if extra is not None:
            scaled = optimizer.scale_loss(extra)
            columns.append(tf.gradients(scaled, sources))
        merged = [
            gradients.largest(column)
            if _keras.overwrites_with_gradient(variable)
            else gradients.merge(column)
            for variable, column in zip(
                variables, zip(*columns, strict=True), strict=True
            )
        ]
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
    return total, pairs


def weighted_losses(
    clones: Sequence[Clone], weights: Sequence[Any] | None = None
) -> list[tf.Tensor]:
    """Return each clone's part of the total loss, on the clone's device."""
    if isinstance(clones, Clone) or not all(
        isinstance(clone, Clone) for clone in clones
    ):
        raise TypeError(
            "Argument `clones` must be a list of `Clone(outputs, scope, "
            f"device)`, as `create_clones` returns. Received: clones={clones}"
        )
    if not clones:
        raise ValueError("Expected at least one clone. Received: clones=[]")
    losses = [check_loss(clone.outputs) for clone in clones]
    if weights is None:
        weights = getattr(clones, "rows", None)
    parts = []
    for clone, loss, share in zip(
        clones, losses, find_shares(weights, clones), strict=True
    ):
        with name_scope(clone.scope), tf.device(clone.device):
            parts.append(loss * tf.cast(share, loss.dtype))
    return parts


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
    parts: Sequence[tf.Tensor], extra: tf.Tensor | None, home: str
) -> tf.Tensor:
    """Add up the losses of the clones and of regularizers."""
    with tf.device(home), tf.name_scope("total_loss"):
        total = tf.add_n(list(parts))
        return total if extra is None else total + tf.cast(extra, total.dtype)


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
        read = getattr(clones, "variables", [])
        chosen = [variable for variable in read if variable.trainable]
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
