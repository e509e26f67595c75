"""A callback that shows in TensorBoard what the clones of a model do."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_clones.door.attach import deployment
from keras_clones.door.steps_on import watch_training
from keras_clones.plan import exactness
from keras_clones.plan.watch import Watch


class CloneSummaries(keras.callbacks.Callback):
    """Write losses of the clones, and gradients, for TensorBoard.

    It writes through the `keras.callbacks.TensorBoard` that stands before it
    in the callbacks, into that one's log of the training, for the same steps:
    `TensorBoard(update_freq=100)` takes every 100th. These are written:

    - `clone_0/loss` and so on: the loss of each clone's shard. Weighted by
        their rows they add up to the loss of the global batch, if that is a
        mean over the rows.
    - `gradient_norm`: the norm of the gradient of the global batch, before
        the optimizer clips it, over all variables.
    - with `summarize_gradients`, `PATH/gradient_norm` and the histogram
        `PATH/gradient` of each trainable variable, by its path. That of an
        embedding has the rows that were looked up.

    Other steps run as they do without it, but for a condition. With
    `steps_per_execution`, the last step of each execution counts. The model's
    steps are traced anew when the training begins and after it ends.

    Args:
        summarize_gradients: Boolean, whether to also write the norm and a
            histogram of each variable's gradient. That needs memory for one
            more copy of the gradients, where the variables are. Defaults to
            `False`.

    Raises:
        TypeError: If `summarize_gradients` is not a boolean.
        ValueError: When training begins, if the model has no clones or a
            train step of its own, or no `TensorBoard` that writes within
            epochs stands before it.
        ImportError: When training begins, if there is no tensorboard.

    Example:

    >>> import tempfile
    >>> import keras
    >>> from keras_clones import CloneSummaries, clone_model
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model = clone_model(model, num_clones=2, clone_on_cpu=True)
    >>> model.compile("sgd", "mse")
    >>> x, y = keras.ops.ones((40, 3)), keras.ops.ones((40, 1))
    >>> logs = keras.callbacks.TensorBoard(tempfile.mkdtemp(), update_freq=2)
    >>> history = model.fit(
    ...     x, y, batch_size=10, callbacks=[logs, CloneSummaries()], verbose=0
    ... )
    """

    def __init__(self, summarize_gradients: bool = False) -> None:
        super().__init__()
        if not isinstance(summarize_gradients, bool):
            raise TypeError(
                "Argument `summarize_gradients` must be a boolean. "
                f"Received: summarize_gradients={summarize_gradients!r}"
            )
        self.summarize_gradients = summarize_gradients
        self._watch: Watch | None = None
        self._wanted = False
        self._step = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Let the steps leave what they come to."""
        self._check()
        made: Any = deployment(self.model)
        self._clones = made.clones
        self._wanted = False
        self._step = 0
        self._watch = Watch(
            len(made.clones), made.options.home, self.summarize_gradients
        )
        watch_training(self.model, self, self._watch)
        self.model.make_train_function()

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Say whether this step is to be written."""
        # Counted as `TensorBoard` does: in Keras 3.12 it does not tell.
        self._step += 1
        wanted = bool(tf.summary.should_record_summaries())
        if wanted != self._wanted and self._watch is not None:
            self._watch.wanted.assign(wanted)
        self._wanted = wanted

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Write what the step left."""
        if self._wanted and self._watch is not None:
            self._write(self._watch)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Let the steps be what they were."""
        self._watch = None
        if deployment(self.model) is not None:
            watch_training(self.model, self, None)

    def _check(self) -> None:
        if not hasattr(tf.summary, "scalar"):
            raise ImportError("Summaries need `pip install tensorboard`.")
        if deployment(self.model) is None:
            raise ValueError(
                "`CloneSummaries` shows the clones of a model, and this one "
                "has none: call `clone_model(model)` first. "
                f"Received: model={self.model!r}"
            )
        if exactness.overrides(self.model, "train_step"):
            raise ValueError(
                "`CloneSummaries` shows the train step of Keras, and this "
                "model has its own. Return what is to be shown among the logs "
                "of that step: `TensorBoard` writes them. "
                f"Received: model={self.model!r}"
            )
        if not tf.summary.should_record_summaries():
            raise ValueError(
                "`CloneSummaries` writes through a `TensorBoard` that stands "
                "before it in the callbacks, and whose `update_freq` is "
                "'batch' or a number of steps (it is 'epoch' by default). "
                "Received: no such callback. Pass `callbacks=["
                "keras.callbacks.TensorBoard('logs', update_freq=100), "
                "CloneSummaries()]`."
            )

    def _write(self, watch: Watch) -> None:
        step, losses = self._step, watch.losses.numpy()
        # Fewer losses than clones: the rows were too few for all of them.
        for clone, loss in zip(self._clones, losses, strict=False):
            name = f"{clone.scope or 'clone_0'}/loss"
            tf.summary.scalar(name, loss, step)
        if watch.norms is None:
            return
        norms = watch.norms.numpy()
        tf.summary.scalar("gradient_norm", np.linalg.norm(norms), step)
        if not self.summarize_gradients:
            return
        for variable, norm, gradient in zip(
            watch.variables, norms, watch.kept, strict=True
        ):
            tf.summary.scalar(f"{variable.path}/gradient_norm", norm, step)
            tf.summary.histogram(f"{variable.path}/gradient", gradient, step)
