"""Run deployed clones, and keep what the last run came to."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras
from keras_clones.devices import moving, placement
from keras_clones.devices.config import DeploymentConfig
from keras_clones.model_deploy import clone_losses, regularizers
from keras_clones.model_deploy.call import (
    Call,
    PerClone,
    check_arguments,
    check_one_replica,
)
from keras_clones.model_deploy.clones import Clone, assign_merged, call_clones
from keras_clones.model_deploy.reads import rehearse
from keras_clones.plan import at_home
from keras_clones.update.update import faster
from keras_clones.warn import warn


class Run(NamedTuple):
    """What one run of the clones came to.

    `losses` are those of the clones as they returned them, and `gradients`
    have an entry for each variable that is trained, in their order.
    """

    outputs: list[Any]
    losses: list[tf.Tensor]
    regularization: tf.Tensor | None
    total: tf.Tensor | None
    gradients: list[tf.Tensor | None]


class Training(NamedTuple):
    """What clones are trained by; `deploy` says what each of them is."""

    optimizer: Any
    summarize_gradients: bool
    regularization_losses: Any
    update: str


class Runner:
    """Steps of a custom training loop on clones.

    Args:
        config: A `DeploymentConfig`.
        call: `Call` of what each clone runs, with the arguments that it gets
            where a step is called without any.
        training: `Training`.

    Attributes:
        clones: List of `Clone`s, with the outputs of the last run.
    """

    def __init__(
        self, config: DeploymentConfig, call: Call, training: Training
    ) -> None:
        self._config = config
        self._model_fn = call.model_fn
        self._defaults = (call.args or (), call.kwargs or {})
        self._training = training
        self._home = placement.main_home()
        self._trained: list[keras.Variable] = []
        self._read: list[keras.Variable] = []
        self._prepared = False
        self._warned = config.num_clones == 1
        self._last: Run | None = None
        self._placed = placement.place_clones(config)
        check_one_replica(config)
        self._homes = placement.find_homes(config, None)
        self.clones = [
            Clone(None, scope and f"{scope}/", device)
            for scope, device in self._placed
        ]
        self._train = tf.function(self._train_step, autograph=False)
        self._evaluate = tf.function(self._evaluate_step, autograph=False)
        if call.args or call.kwargs:
            self._warn_of_a_whole_batch(*self._defaults)
            self._prepare(self._call(*self._defaults))

    def train(self, *args: Any, **kwargs: Any) -> tf.Tensor:
        """Run one training step, and return the total loss."""
        return self._run(self._train, args, kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> tf.Tensor | None:
        """Run the clones, change no variable, and return the total loss."""
        return self._run(self._evaluate, args, kwargs)

    def summarize(self, writer: Any, step: int | None = None) -> None:
        """Write the scalars of the last run, and its gradients if wanted.

        Args:
            writer: A `tf.summary.SummaryWriter`.
            step: Integer, the step to write them for. Defaults to `None`: the
                iterations of the optimizer.
        """
        if not hasattr(tf.summary, "scalar"):
            raise ImportError("Summaries need `pip install tensorboard`.")
        if not hasattr(writer, "as_default"):
            raise TypeError(
                "Argument `writer` must be a summary writer, such as "
                "`tf.summary.create_file_writer('logs')`. "
                f"Received: writer={writer!r}"
            )
        if self._last is None:
            raise RuntimeError(
                "There is nothing to write before the first run: call "
                "`train_fn` or `total_loss` first."
            )
        if step is None:
            if self._training.optimizer is None:
                raise ValueError(
                    "Argument `step` must be an integer where there is no "
                    "optimizer to count the steps. Received: step=None"
                )
            step = int(self._training.optimizer.iterations)
        with writer.as_default(step):
            self._write(self._last)

    def _write(self, run: Run) -> None:
        for clone, loss in zip(self.clones, run.losses, strict=False):
            tf.summary.scalar(f"{clone.scope or 'clone_0/'}loss", loss)
        if run.regularization is not None:
            tf.summary.scalar("regularization_loss", run.regularization)
        if run.total is not None:
            tf.summary.scalar("total_loss", run.total)
        for variable, gradient in zip(
            self._trained, run.gradients, strict=False
        ):
            if gradient is not None:
                name = f"{variable.path}/gradient"
                tf.summary.scalar(f"{name}_norm", tf.norm(gradient))
                tf.summary.histogram(name, gradient)

    def _run(self, function: Callable[..., Run], args: Any, kwargs: Any) -> Any:
        if not args and not kwargs:
            args, kwargs = self._defaults
        call = self._call(args, kwargs)
        check_arguments(self._config, call)
        self._warn_of_a_whole_batch(args, kwargs)
        if not self._prepared:
            self._prepare(call)
        run = function(list(args), dict(kwargs))
        self._last = run
        for i, outputs in enumerate(run.outputs):
            self.clones[i] = self.clones[i]._replace(outputs=outputs)
        return run.total

    def _warn_of_a_whole_batch(self, args: Any, kwargs: Any) -> None:
        """Warn once where nothing tells the clones' arguments apart."""
        if self._warned or not _is_the_same_for_all([*args, *kwargs.values()]):
            return
        self._warned = True
        number = self._config.num_clones
        warn(
            f"Each of the {number} clones gets the whole batch, so all of them "
            "compute the same. `split_batch(batch, config.num_clones)` in its "
            "place gives each clone its rows, and `PerClone([...])` each one "
            "its own."
        )

    def _call(self, args: Any, kwargs: Any) -> Call:
        return Call(self._model_fn, args, kwargs)

    def _prepare(self, call: Call) -> None:
        """Check what the function returns, and move what it reads home."""
        outputs, read = rehearse(call.function(0), self._home, builds=True)
        self._read = read
        variables = list(read)
        optimizer = self._training.optimizer
        if optimizer is not None:
            clone_losses.check_loss(outputs)
            variables += optimizer.variables
            self._trained = (
                _keras.optimized_variables(optimizer)
                if optimizer.built
                else [variable for variable in read if variable.trainable]
            )
        weights = [v for v in read if not _keras.is_seed_state(v)]
        optimizers = [] if optimizer is None else [optimizer]
        moved = moving.move_variables(
            at_home.homes_of(weights, optimizers, variables, self._homes),
            self._homes.main,
        )
        if moved and optimizer is not None:
            _keras.reindex_optimizer(optimizer)
        self._prepared = True

    def _train_step(self, args: list[Any], kwargs: dict[str, Any]) -> Run:
        clones, training = self._call_clones(args, kwargs), self._training
        extra = self._extra_losses()
        total, pairs = clone_losses.optimize_clones(
            clones, training.optimizer, extra, var_list=self._trained
        )
        run = self._describe(clones, extra, total)
        with tf.device(self._home):
            if training.summarize_gradients:
                found = {id(variable): g for g, variable in pairs}
                scale = training.optimizer.scale_loss(tf.ones(()))
                run = run._replace(
                    gradients=[
                        _unscaled(found.get(id(variable)), scale)
                        for variable in self._trained
                    ]
                )
            assign_merged(clones)
            with faster([training.optimizer], training.update):
                training.optimizer.apply_gradients(pairs)
        return run

    def _evaluate_step(self, args: list[Any], kwargs: dict[str, Any]) -> Run:
        clones = self._call_clones(args, kwargs)
        if clone_losses.find_loss(clones[0].outputs) is None:
            return self._describe(clones, None, None)
        extra = self._extra_losses()
        regularization = regularizers.regularization(
            clone_losses.variables_of(clones), extra, self._home
        )
        total = regularizers.total_loss(
            clone_losses.weighted_loss(clones), regularization, self._home
        )
        return self._describe(clones, extra, total)

    def _call_clones(self, args: Any, kwargs: Any) -> list[Clone]:
        call = self._call(args, kwargs)
        return call_clones(self._home, self._placed, call, self._read)

    def _extra_losses(self) -> Any:
        losses = self._training.regularization_losses
        return list(losses()) if callable(losses) else losses

    def _describe(self, clones: list[Clone], extra: Any, total: Any) -> Run:
        losses = [clone_losses.find_loss(clone.outputs) for clone in clones]
        return Run(
            outputs=[clone.outputs for clone in clones],
            losses=[loss for loss in losses if loss is not None],
            regularization=regularizers.regularization(
                [], extra or [], self._home
            ),
            total=total,
            gradients=[],
        )


def _is_the_same_for_all(arguments: Sequence[Any]) -> bool:
    """Say whether there are arrays, and nothing that differs by clone.

    Scalars have no rows to split, variables are no batch, and an iterator
    gives each clone another batch.
    """
    if any(isinstance(argument, PerClone) for argument in arguments):
        return False
    leaves = keras.tree.flatten(list(arguments))
    if any(hasattr(leaf, "__next__") for leaf in leaves):
        return False
    return any(_has_rows(leaf) for leaf in leaves)


def _has_rows(leaf: Any) -> bool:
    is_array = tf.is_tensor(leaf) or isinstance(leaf, np.ndarray)
    is_variable = isinstance(leaf, (tf.Variable, keras.Variable))
    return is_array and not is_variable and len(leaf.shape) > 0


def _unscaled(gradient: Any, scale: tf.Tensor) -> tf.Tensor | None:
    """Return the values of a gradient, as they are without loss scaling."""
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        indices, rows = tf.unique(gradient.indices)
        gradient = tf.math.unsorted_segment_sum(
            gradient.values, rows, tf.size(indices)
        )
    return gradient / tf.cast(scale, gradient.dtype)
