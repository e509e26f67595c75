"""A callback that lets a training go on where it was interrupted."""

import os
import random
from typing import Any

import keras

from keras_clones import _keras, checks
from keras_clones.callbacks import backup_callbacks as callbacks_of
from keras_clones.callbacks import backup_file as file
from keras_clones.callbacks import backup_variables as variables
from keras_clones.callbacks.backup_checks import (
    checked_folder,
    checked_save_freq,
    checked_seed,
)
from keras_clones.callbacks.backup_data import Data, Position


class Backup(keras.callbacks.Callback):
    """Let a training that was interrupted go on, at the batch it was at.

    It writes what a training has come to into a folder. A script that is
    started again, with the same model, data and arguments of `fit`, goes on
    from there, and ends with the weights, logs and history of one that was
    never interrupted. `fit` that ends removes the backup.

    `keras.callbacks.BackupAndRestore` goes back to the first batch of an
    epoch, with weights that have seen some of it, and writes over its only
    file. Here a process may be killed at any time, also while it writes: the
    one file appears when it is whole, and the one before stays until then.

    What is restored: every variable of the model, its optimizers (also their
    moving averages, accumulated gradients and iterations) and metrics; the
    states of all `keras.random.SeedGenerator`s in layers, and of draws
    without a seed; numbers, strings, arrays and lists and dicts of these that
    other callbacks have changed since the training began, as `EarlyStopping`,
    `ReduceLROnPlateau`, `ModelCheckpoint` and `History` have. Callbacks are
    told by class and order, and `Backup` is called after all of them.
    `CloneProfiler`, `CloneSummaries` and what runs in threads begin anew.

    The order of the data, by what `fit` is given:

    - Arrays: with `shuffle=True` (or `"batch"`) the rows are shuffled by the
        seed and the number of the epoch. Neither the seeds of TensorFlow, NumPy
        and Python matter, nor does the order equal that without `Backup`.
    - `tf.data.Dataset`: the batches that were seen are read and left out, and
        a `shuffle(..., seed=...)` that reshuffles goes on with the order of
        that epoch. Its order must be a function of seeds: no shuffling without
        one, no draws in a `map` that runs in parallel, and no shuffling within
        `repeat` or `interleave` unless `steps_per_epoch` is given, where one
        pass goes on through all epochs (and is read again from its begin).
    - `PyDataset`: with `shuffle=True`, batches are shuffled by the seed and
        the epoch, but not with workers, of which it warns. `on_epoch_begin`
        and `on_epoch_end` are called again for each epoch that was done, so
        one that shuffles with a generator of its own, made with a seed, has
        the same order; one that draws from NumPy's global state has not.
    - Generators, torch's `DataLoader` and others: batches that were seen are
        read and left out. They must give the same ones again from the start.

    What is not restored: draws of `tf.random`, `numpy.random` and `random`
    in layers and data, variables that are no Keras variables, files of other
    callbacks, and what `shares="auto"` has measured.

    Args:
        folder: String or path, a folder for this training alone. It is made
            if need be.
        save_freq: `"epoch"`, or integer, the batches between two backups,
            counted over all epochs. With `steps_per_execution`, a backup
            follows the execution; one due at the end of an epoch is written
            after its validation. Defaults to `"epoch"`.
        delete_checkpoint: Boolean, whether to remove the backup when `fit`
            ends. If not, the same `fit` again does nothing, and one with
            more epochs goes on. Defaults to `True`.
        seed: Integer, the seed of the order of data that `fit` shuffles.
            Defaults to `None`: drawn from Python's `random` at the first
            start, and kept in the backup.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `folder` is a file or cannot be written to, or
            `save_freq` is less than 1. When training begins, if the backup is
            of another model, seed or `steps_per_execution`, or no backup there
            can be read, or the data end before the batch it was made at.

    Example:

    >>> import os, tempfile
    >>> import keras
    >>> from keras_clones import Backup
    >>> def train(*callbacks):
    ...     model = keras.Sequential([keras.layers.Dense(1)])
    ...     model.compile("sgd", "mse")
    ...     x, y = keras.ops.ones((60, 3)), keras.ops.ones((60, 1))
    ...     backup = Backup(folder, save_freq=2)
    ...     return model.fit(
    ...         x, y, 10, epochs=3, verbose=0, callbacks=[backup, *callbacks]
    ...     )
    >>> class Fails(keras.callbacks.Callback):
    ...     def on_epoch_begin(self, epoch, logs=None):
    ...         if epoch == 2:
    ...             raise KeyboardInterrupt
    >>> folder = os.path.join(tempfile.mkdtemp(), "backup")
    >>> try:
    ...     history = train(Fails())
    ... except KeyboardInterrupt:
    ...     print(os.path.exists(folder))
    True
    >>> history = train()
    >>> history.epoch
    [0, 1, 2]
    >>> os.path.exists(folder)
    False
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        save_freq: str | int = "epoch",
        delete_checkpoint: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.folder = checked_folder(folder)
        self.save_freq = checked_save_freq(save_freq)
        if not isinstance(delete_checkpoint, bool):
            raise TypeError(
                "Argument `delete_checkpoint` must be a boolean. "
                f"Received: delete_checkpoint={delete_checkpoint!r}"
            )
        self.delete_checkpoint = delete_checkpoint
        self.seed = checked_seed(seed)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Let the training go on from the backup, if there is one."""
        checks.check_backend()
        fit = _keras.fit_of(self)
        if fit is None:
            raise ValueError(
                "Expected `Backup` among the callbacks of `fit`. Received: a "
                "loop of another kind. Pass `callbacks=[Backup(folder)]` to "
                "`model.fit`."
            )
        callbacks, epochs = fit
        self._put_last(callbacks)
        found = file.read(self.folder)
        # A fit that failed early has left its own.
        _keras.set_initial_epoch(self.model, None)
        self._used_seed = self._find_seed(found)
        self._data = Data(epochs, self._used_seed)
        self._epoch = self._batch = self._unsaved = 0
        self._first: callbacks_of.States | None = None
        self._found = found
        if found is not None:
            self._data.go_to(Position(*found.data["position"]))
            self._restore_variables(found)
            self._begin_at(found)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Restore all once more: the others have begun an epoch anew."""
        found, self._found = self._found, None
        self._epoch, self._batch = epoch, 0
        if found is not None and found.data["position"][0]:
            self._batch = found.data["position"][0]
            self._restore_variables(found)
            self._restore_callbacks(found)
            _keras.begin_with_logs(self.model, found.data["logs"])

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Write a backup, if it is due."""
        self._unsaved += batch + 1 - self._batch
        self._batch = batch + 1
        # The epoch's end is still to come, with all that others do then.
        if self._is_due() and not self._data.is_last(self._batch):
            self._write(logs)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Write a backup, if it is due."""
        self._epoch, self._batch = epoch + 1, 0
        if self.save_freq is None or self._is_due():
            self._write(logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Remove the backup: there is nothing left to go on with."""
        if self.delete_checkpoint:
            file.remove(self.folder)

    def _is_due(self) -> bool:
        return self.save_freq is not None and self._unsaved >= self.save_freq

    def _put_last(self, callbacks: keras.callbacks.CallbackList) -> None:
        """Be called after the others, and before their epochs begin."""
        self._others = [
            one
            for one in callbacks.callbacks
            if one is not self and not isinstance(one, _BeforeOthers)
        ]
        before = _BeforeOthers(self)
        # A new list: Keras is just going through the one there is.
        callbacks.callbacks = [before, *self._others, self]

    def _before_others(self) -> None:
        """Restore what others have counted, before they count on."""
        if self._first is not None:
            return
        self._first = callbacks_of.states(self._others)
        _keras.set_initial_epoch(self.model, None)
        found = self._found
        if found is not None and not found.data["position"][0]:
            self._restore_callbacks(found)

    def _find_seed(self, found: file.Content | None) -> int:
        if found is None:
            return random.randrange(2**31) if self.seed is None else self.seed
        seed = found.data["seed"]
        if self.seed not in (None, seed):
            raise ValueError(
                "Argument `seed` must be that of the backup, or `None`. "
                f"Received: seed={self.seed}, where the backup has {seed}. "
                "Use another folder to begin anew."
            )
        return seed

    def _begin_at(self, found: file.Content) -> None:
        epoch = found.data["epoch"]
        if found.data["stopped"]:
            epoch = max(epoch, self.params["epochs"])
        _keras.set_initial_epoch(self.model, epoch)

    def _restore_variables(self, found: file.Content) -> None:
        looks = found.data["variables"]
        arrays = found.arrays[: len(looks)]
        variables.restore(self.model, looks, arrays, self._data.spec)

    def _restore_callbacks(self, found: file.Content) -> None:
        arrays = found.arrays[len(found.data["variables"]) :]
        callbacks_of.restore(self._others, found.data["callbacks"], arrays)

    def _write(self, logs: dict[str, Any] | None) -> None:
        looks, arrays = variables.values(self.model)
        kept: list[Any] = []
        data = {
            "epoch": self._epoch,
            "position": self._data.position(self._batch),
            "stopped": bool(self.model.stop_training and not self._batch),
            "seed": self._used_seed,
            "logs": _numbers(logs),
            "variables": looks,
            "callbacks": callbacks_of.changed(
                self._others, self._first or [], kept
            ),
        }
        file.write(self.folder, file.Content(data, [*arrays, *kept]))
        self._unsaved = 0


class _BeforeOthers(keras.callbacks.Callback):
    """Stands before all other callbacks, for a `Backup` that is the last."""

    def __init__(self, backup: Backup) -> None:
        super().__init__()
        self._backup = backup

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Restore the others, before they begin an epoch."""
        self._backup._before_others()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the others, where there was no epoch left."""
        self._backup._before_others()


def _numbers(logs: dict[str, Any] | None) -> dict[str, float]:
    """Return the logs that are numbers."""
    return {
        name: value
        for name, value in (logs or {}).items()
        if isinstance(value, (int, float))
    }
