"""`deploy`: clones, an optimizer and what runs them, as TF-Slim has it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones.checks import check_choice
from keras_clones.devices.config import DeploymentConfig
from keras_clones.model_deploy.call import Call, check_arguments
from keras_clones.model_deploy.clones import Clone
from keras_clones.model_deploy.runner import Runner, Training
from keras_clones.update.update import CHOICES


class DeployedModel(NamedTuple):
    """What `deploy` returns.

    Attributes:
        train_fn: Function that runs one step and returns the total loss, or
            `None` without an optimizer.
        summary_fn: Function `summary_fn(writer, step=None)` that writes what
            the last run came to.
        total_loss: Function that runs the clones, changes no variable and
            returns the total loss, or `None` if `model_fn` returns none.
        clones: List of `Clone(outputs, scope, device)`. The outputs are those
            of the last run, `None` before the first.
    """

    train_fn: Callable[..., tf.Tensor] | None
    summary_fn: Callable[..., None]
    total_loss: Callable[..., tf.Tensor | None]
    clones: list[Clone]


def deploy(
    config: DeploymentConfig,
    model_fn: Callable[..., Any],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: keras.optimizers.Optimizer | None = None,
    summarize_gradients: bool = False,
    *,
    regularization_losses: Callable[[], Iterable[Any]]
    | Sequence[Any]
    | None = None,
    update: str = "auto",
) -> DeployedModel:
    """Make the functions of a custom training loop on clones.

    Where TF-Slim made operations to run in a session, this makes functions to
    call. Called without arguments, they take those given here, as in TF-Slim:
    an iterator, say, from which each clone draws. Called with arguments, they
    take these: `train_fn(split_batch(batch, config.num_clones))`. A batch that
    is not split goes to every clone whole, with a warning. Variables that are
    elsewhere move to `config.variables_device()`.

    Args:
        config: A `DeploymentConfig`.
        model_fn: Function that each clone calls, as in `create_clones`.
        args: List of arguments, as in `create_clones`. Defaults to `None`:
            none.
        kwargs: Dict of arguments by name. Defaults to `None`: none.
        optimizer: A `keras.optimizers.Optimizer` to train with. Defaults to
            `None`: there is no `train_fn`.
        summarize_gradients: Boolean, whether `summary_fn` also writes the
            norm and a histogram of each variable's gradient. Defaults to
            `False`.
        regularization_losses: Function without arguments that returns a list
            of scalar losses to count once, such as `lambda: model.losses`, or
            `[]` if the losses of the clones have them. Defaults to `None`:
            none, with a warning if variables have regularizers.
        update: String, `"auto"` or `"keras"`, how the optimizer updates, as
            for `clone_model`. Defaults to `"auto"`.

    Returns:
        A `DeployedModel(train_fn, summary_fn, total_loss, clones)`.

    Raises:
        RuntimeError: If it is called inside of a `tf.function`.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the devices are not there,
            or `model_fn` returns no loss where there is an optimizer. Without
            `args` and `kwargs`, the last is known at the first call.

    Example:

    >>> import keras, numpy as np
    >>> from keras_clones import DeploymentConfig, deploy, split_batch
    >>> config = DeploymentConfig(num_clones=2, clone_on_cpu=True)
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> def model_fn(batch):
    ...     x, y = batch
    ...     return keras.ops.mean((model(x) - y) ** 2)
    >>> batch = np.ones((5, 3), "float32"), np.ones((5, 1), "float32")
    >>> deployed = deploy(
    ...     config, model_fn, [split_batch(batch, 2)],
    ...     optimizer=keras.optimizers.SGD(0.05),
    ... )
    >>> before = deployed.train_fn()
    >>> bool(deployed.train_fn() < before)
    True

    Reference:

    - TF-Slim, `deployment/model_deploy.py`.
    """
    if not tf.executing_eagerly():
        raise RuntimeError(
            "`deploy` makes a `tf.function` of its own: call it outside of "
            "every `tf.function`, or call `create_clones` and "
            "`optimize_clones` there."
        )
    call = Call(model_fn, args, kwargs)
    check_arguments(config, call)
    _check_training(optimizer, regularization_losses)
    check_choice("update", update, CHOICES)
    runner = Runner(
        config,
        call,
        Training(optimizer, summarize_gradients, regularization_losses, update),
    )
    return DeployedModel(
        train_fn=None if optimizer is None else runner.train,
        summary_fn=runner.summarize,
        total_loss=runner.evaluate,
        clones=runner.clones,
    )


def _check_training(optimizer: Any, regularization_losses: Any) -> None:
    """Say what is wrong with what clones are to be trained by, if anything."""
    if optimizer is not None and not isinstance(
        optimizer, keras.optimizers.Optimizer
    ):
        raise TypeError(
            "Argument `optimizer` must be a `keras.optimizers.Optimizer`. "
            f"Received: optimizer={optimizer!r}"
        )
    none = regularization_losses is None or regularization_losses == []
    if not none and not callable(regularization_losses):
        raise TypeError(
            "Argument `regularization_losses` must be a function, so that "
            "each step computes them anew: `lambda: model.losses`, or `[]`. "
            f"Received: regularization_losses={regularization_losses}"
        )
