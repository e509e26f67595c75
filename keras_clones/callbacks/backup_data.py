"""Where in its data a training is, and how it gets there again."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_clones import _keras
from keras_clones.warn import warn


class Position(NamedTuple):
    """Where in its data a training is.

    Attributes:
        batch: Integer, the batches of this epoch that were seen.
        epochs: Integer, the epochs before it that this training has run.
        iterators: Integer, the iterators made before that of this epoch.
        consumed: Integer, the batches that came from that one.
        batches: Integer, how many there are, or `None` if it is not known.
    """

    batch: int
    epochs: int
    iterators: int
    consumed: int
    batches: int | None


class Data:
    """The batches of a `fit`, in an order that can be had again.

    Keras makes an iterator an epoch, and some that it does not use. Which
    batches come from one is a function of the seed, for arrays that `fit`
    shuffles, and of how many were made before. So to be where a training was,
    as many are made, and the batches that it has seen are read and left out.

    Args:
        epochs: The batches of a `fit`, as `_keras.fit_of` has them.
        seed: Integer, the seed of the order of what `fit` shuffles.
    """

    def __init__(self, epochs: Any, seed: int) -> None:
        self._epochs = epochs
        self._seed = seed
        self._made = self._consumed = self._done = 0
        self._target: Position | None = None
        self._dataset = self._in_order(_keras.dataset_of(epochs))
        _keras.replace_batches(epochs, self, self._steps)

    def __iter__(self) -> Any:
        """Make an iterator of all batches, in the order of its number."""
        # Read when the iterator is first used, before another is made.
        if self._number is not None:
            self._number.assign(self._made)
        self._made += 1
        self._consumed = 0
        return iter(self._dataset)

    @property
    def spec(self) -> Any:
        """The structure of a batch, of `tf.TensorSpec`."""
        return self._dataset.element_spec

    @property
    def steps_per_execution(self) -> int:
        """The batches between two calls of callbacks."""
        return self._epochs.steps_per_execution

    def is_last(self, batch: int) -> bool:
        """Say whether an epoch is known to have no more batches."""
        number = self._epochs.num_batches
        return number is not None and batch >= number

    def position(self, batch: int) -> Position:
        """Return where the training is, that many batches into an epoch.

        Args:
            batch: Integer. 0 after an epoch, and before the next.
        """
        goes_on = batch or _keras.open_iterator(self._epochs) is not None
        return Position(
            batch,
            self._done - (1 if batch else 0),
            self._made - (1 if goes_on else 0),
            self._consumed if goes_on else 0,
            _keras.known_batches(self._epochs),
        )

    def go_to(self, position: Position) -> None:
        """Let the next epoch begin where a training was."""
        size = self.steps_per_execution
        if position.batch % size:
            raise ValueError(
                "Expected `steps_per_execution` to divide the batches that "
                "the backup was made after. Received: "
                f"steps_per_execution={size}, and a backup after "
                f"{position.batch} batches of an epoch. Compile the model as "
                "before, or use another folder to begin anew."
            )
        self._target = position

    def _in_order(self, dataset: Any) -> Any:
        """Return the dataset, in an order that the seed decides."""
        self._number: tf.Variable | None = None
        if _keras.is_of_arrays(self._epochs):
            with tf.device("/device:CPU:0"):
                self._number = tf.Variable(0, dtype=tf.int32)
            return _keras.shuffle_arrays(self._epochs, self._shuffle)
        drawn_by = _keras.shuffles_py_dataset(self._epochs)
        if drawn_by == "Keras":
            _keras.order_py_dataset(self._epochs, self._order)
        elif drawn_by == "workers":
            warn(
                "`Backup` cannot have the order again in which the workers of "
                "a `PyDataset` shuffle its batches: a training that goes on "
                "sees others than one without a break. Pass `shuffle=False` "
                "to `fit`, and shuffle in the `on_epoch_end` of the dataset."
            )
        return dataset

    def _shuffle(self, rows: tf.Tensor) -> tf.Tensor:
        """Return row numbers shuffled by the seed and the iterator."""
        # With `shuffle="batch"` these are the rows of a batch.
        seed = tf.stack([tf.constant(self._seed, tf.int32), self._number])
        seed = tf.random.experimental.stateless_fold_in(
            seed, tf.cast(rows[0], tf.int32)
        )
        return tf.random.experimental.stateless_shuffle(rows, seed)

    def _order(self, number: int) -> np.ndarray:
        """Return the order of the batches of the last iterator made."""
        made = [self._seed, max(self._made - 1, 0)]
        return np.random.default_rng(made).permutation(number)

    def _steps(
        self, steps: Callable[[], Iterator[tuple[int, int, Any]]]
    ) -> Iterator[tuple[int, int, Any]]:
        """Give the steps of an epoch, without those that were seen."""
        target, self._target = self._target, None
        seen = 0
        if target is not None:
            self._rewind(target)
            seen = target.batch
        self._done += 1
        for begin, end, iterator in steps():
            if target is not None:
                self._skip(iterator, target.consumed)
                target = None
            if begin >= seen:
                self._consumed += self.steps_per_execution
                yield begin, end, iterator

    def _rewind(self, target: Position) -> None:
        """Make as many iterators and run as many epochs as there were."""
        _keras.set_known_batches(self._epochs, target.batches)
        # Of arrays and their like, an iterator's number says its order.
        for _ in range(target.iterators if self._number is None else 0):
            iter(self._dataset)
        self._made, self._done = target.iterators, target.epochs
        data = _keras.py_dataset_of(self._epochs)
        if data is not None:
            for _ in range(target.epochs):
                data.on_epoch_begin()
                data.on_epoch_end()
        if self._epochs.steps_per_epoch and target.consumed:
            before = target.consumed - target.batch
            _keras.set_open_iterator(self._epochs, iter(self), before)

    def _skip(self, iterator: Any, number: int) -> None:
        """Read the batches of an iterator that were seen."""
        for i in range(number):
            # The last execution of an iterator may have had fewer.
            if next(iterator, None) is None:
                if number - i >= self.steps_per_execution:
                    raise ValueError(
                        "Expected the data that the backup was made with. "
                        f"Received: data with {i} batches, of which the "
                        f"backup has seen {number}. Pass `fit` the data as "
                        "before, or use another folder to begin anew."
                    )
                break
        self._consumed = number
