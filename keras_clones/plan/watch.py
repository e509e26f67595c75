"""What training steps leave at home for summaries to read."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.tensors import merging


class Watch:
    """Variables in which a training step leaves what it came to.

    Attributes:
        wanted: Variable, whether the next step is to leave anything.
        losses: Variable with the losses of the clones that had rows.
        variables: List of the `keras.Variable`s that have gradients.
        norms: Variable with the norms of their gradients, `None` before the
            first step.
        kept: List of variables with these gradients, if they are kept.
    """

    def __init__(self, num_clones: int, home: str, keep: bool) -> None:
        self._home = home
        self._keep = keep
        self.variables: list[keras.Variable] = []
        self.norms: tf.Variable | None = None
        self.kept: list[tf.Variable] = []
        with tf.device(home):
            self.wanted = tf.Variable(False, trainable=False)
            # Fewer clones run where a batch has fewer rows than there are.
            self.losses = tf.Variable(
                tf.zeros([num_clones], tf.float64),
                shape=[None],
                trainable=False,
            )

    def record(
        self,
        losses: tf.Tensor,
        merged: Sequence[Any],
        variables: Sequence[keras.Variable],
        scale: Any,
    ) -> None:
        """Leave what a step came to, if it is wanted.

        Args:
            losses: Float64 tensor with the loss of each clone that has rows.
            merged: Sequence of the merged gradients of the scaled loss.
            variables: Sequence of the trainable variables.
            scale: Scalar, what the optimizer multiplies the loss by.
        """
        pairs = [
            (variable, gradient)
            for variable, gradient in zip(variables, merged, strict=True)
            if gradient is not None
            and not _keras.overwrites_with_gradient(variable)
        ]
        self._make(pairs)

        def leave() -> tf.Tensor:
            found = [_values(gradient, scale) for _, gradient in pairs]
            norms = [tf.norm(tf.cast(g, tf.float64)) for g in found]
            self.losses.assign(losses)
            if self.norms is not None:
                self.norms.assign(tf.stack(norms))
            for kept, gradient in zip(self.kept, found, strict=False):
                kept.assign(gradient)
            return tf.constant(True)

        with tf.name_scope("update_metrics"):
            tf.cond(self.wanted, leave, lambda: tf.constant(False))

    def _make(self, pairs: list[tuple[keras.Variable, Any]]) -> None:
        """Make, with the first graph, what the variables' gradients need."""
        if self.variables or not pairs:
            return
        self.variables = [variable for variable, _ in pairs]
        with tf.init_scope(), tf.device(self._home):
            self.norms = tf.Variable(
                tf.zeros([len(pairs)], tf.float64), trainable=False
            )
            if self._keep:
                # How many rows an embedding looks up differs by step.
                self.kept = [
                    tf.Variable(
                        tf.zeros([0], gradient.dtype),
                        shape=tf.TensorShape(None),
                        trainable=False,
                    )
                    for _, gradient in pairs
                ]


class Watches:
    """Several watches, which a training step tells as it tells one."""

    def __init__(self, watches: Iterable[Watch]) -> None:
        self._watches = tuple(watches)

    @property
    def wanted(self) -> tf.Tensor:
        """Scalar boolean, whether any of them wants the next step."""
        return tf.reduce_any([watch.wanted for watch in self._watches])

    def record(self, *args: Any) -> None:
        """Let each of them leave what a step came to, if it wants it."""
        for watch in self._watches:
            watch.record(*args)


def join(watches: Iterable[Watch]) -> Any:
    """Return what a step tells in place of several watches, if any."""
    watches = tuple(watches)
    return Watches(watches) if len(watches) > 1 else next(iter(watches), None)


def _values(gradient: Any, scale: Any) -> tf.Tensor:
    """Return the values of a gradient, as they are without the loss scale.

    Of a sparse one, these are the rows that it has, each once.
    """
    gradient = merging.scale(gradient, 1.0 / tf.cast(scale, gradient.dtype))
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    indices, rows = tf.unique(gradient.indices)
    return tf.math.unsorted_segment_sum(gradient.values, rows, tf.size(indices))
