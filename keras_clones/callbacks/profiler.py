"""A callback that shows what training steps spend their time on."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import checks
from keras_clones.callbacks import away, trace
from keras_clones.callbacks.lanes import find_places
from keras_clones.callbacks.profiler_checks import (
    NAME,
    check_can_draw,
    checked_path,
    checked_steps,
)
from keras_clones.callbacks.verdict import Report, find_machine, make_report
from keras_clones.devices import hosts
from keras_clones.door.attach import deployment
from keras_clones.door.steps_on import time_clones
from keras_clones.look import timeline
from keras_clones.look.timeline import Event, Window
from keras_clones.warn import warn


class CloneProfiler(keras.callbacks.Callback):
    """Show what the training steps of a model spend their time on.

    It traces some steps of `fit` with TensorFlow's profiler. When training
    ends, it writes a timeline of one typical step: a lane for each clone, one
    for the variables device and two for the input, with the phases mirror
    (variables and rows sent to the clones), forward, backward, gradient
    transfer, update, metrics and input. It prints what bounds the step, what
    one clone more would give, and what to change. Steps outside of the range
    run as they do without it, and the training stays the same.

    What bounds the step: each moment of it counts once, for the first of
    compute (forward and backward), update, transfer (mirror and gradient
    transfer), metrics and waiting for input that is going on in any lane, and
    for overhead (Python and TensorFlow between operations) if none is. The
    largest sum bounds the step. With one clone more, the compute divides by
    one more, as far as there is a device for it or, on the CPU, a core that
    neither has a clone nor was kept busy; the rest is taken to stay.

    In a cluster only the controller's process is traced. The lane of a clone
    on another host shows how long it is away, from the rows being laid out
    until its gradients are there. The verdict names the replica that all
    others wait for. For that each clone sends one number a step, and the step
    is traced anew when the training begins. Updates of weights that are at
    home on other hosts count as overhead.

    It also works on a plain model: one lane, where what has no name scope
    counts for the metrics. A clone that XLA compiles on the CPU has its
    forward and backward pass in one phase. The profiler makes short
    operations look longer than they are, by about a microsecond each.

    Args:
        steps: Pair of integers, the first training step to trace and the
            first one not to, counted from 0 over all epochs of a `fit`. With
            `steps_per_execution`, the range grows to whole calls of that many
            steps. The first steps are slow, so begin after a few.
            Defaults to `(10, 20)`.
        path: String or path, where to write `path` + `".png"`, which needs
            matplotlib, and `path` + `".json"`, a trace that chrome://tracing
            and Perfetto load. A path that ends in one of the two means the
            same. In a folder, such as `"logs/"`, the files are called
            `clone_profile`. Defaults to `"clone_profile"`.

    Attributes:
        report: `None` until a profile is done, then a named tuple with
            `seconds` (of a step), `phases` (seconds a step by lane and
            phase), `bounds` (seconds of a step by what they went to),
            `bound_by`, `with_another_clone` (seconds), `advice`, `verdict`
            and `hosts` (seconds until each replica has its gradients).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `steps` is no increasing pair, or the folder of `path`
            cannot be written to. When training begins, also if it ends
            before the range does, or runs eagerly.
        ImportError: When training begins, if there is no matplotlib.

    Example:

    >>> import os, tempfile
    >>> import keras
    >>> from keras_clones import CloneProfiler, clone_model
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model = clone_model(model, num_clones=2, clone_on_cpu=True)
    >>> model.compile("sgd", "mse")
    >>> x, y = keras.ops.ones((60, 3)), keras.ops.ones((60, 1))
    >>> folder = tempfile.mkdtemp()
    >>> profiler = CloneProfiler((4, 6), os.path.join(folder, "step"))
    >>> history = model.fit(
    ...     x, y, batch_size=10, callbacks=[profiler], verbose=0
    ... )  # doctest: +ELLIPSIS
    Training steps 4 to 5...
    >>> profiler.report.seconds > 0
    True
    >>> sorted(os.listdir(folder))
    ['step.json', 'step.png']
    """

    def __init__(
        self,
        steps: Sequence[int] = (10, 20),
        path: str | os.PathLike[str] = NAME,
    ) -> None:
        super().__init__()
        self.steps = checked_steps(steps)
        self.path = checked_path(path)
        self.report: Report | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._running = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check that the fit can be profiled."""
        self._check_fit()
        # A fit that failed in the range has left the profiler running.
        self._stop()
        self.report = None
        self._folder = None
        self._seen = 0
        self._epoch = 0
        self._done = self._gave_up = False
        self._calls: dict[int, tuple[int, int]] = {}
        self._busy = self._wall = 0.0
        self._time_clones(True)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Note the epoch: time between epochs is no part of a step."""
        self._epoch = epoch

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Mark where a step begins, if it is in the range."""
        self._first = batch
        if self._seen >= self.steps[0] and not self._done:
            if self._folder is None:
                self._start()
            if self._running:
                self._mark = tf.profiler.experimental.Trace(
                    trace.STEP, step_num=self._seen
                )
                self._clock = time.process_time(), time.perf_counter()
                self._mark.__enter__()

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Mark where a step ends, and end the profile with the range."""
        # With `steps_per_execution`, Keras names a last step past the end.
        last = min(batch, (self.params.get("steps") or batch + 1) - 1)
        steps = last - self._first + 1
        if self._running:
            self._mark.__exit__(None, None, None)
            self._busy += time.process_time() - self._clock[0]
            self._wall += time.perf_counter() - self._clock[1]
            self._calls[self._seen] = self._epoch, steps
        self._seen += steps
        if self._running and self._seen >= self.steps[1]:
            self._stop()
            self._done = True

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Write the timeline, and print the verdict."""
        self._stop()
        self._time_clones(False)
        if self._gave_up:
            return
        if not self._done:
            warn(
                f"Training ended after {self._seen} steps, before the range "
                f"steps={self.steps} of `CloneProfiler` was done: nothing was "
                "written. Give it a range that ends earlier."
            )
            return
        try:
            self._write()
        except OSError as error:
            warn(f"`CloneProfiler` could not write its files: {error}")

    def _check_fit(self) -> None:
        """Refuse a fit that cannot be profiled, before it begins."""
        checks.check_backend()
        if self.model.run_eagerly or tf.config.functions_run_eagerly():
            raise ValueError(
                "`CloneProfiler` knows the phases of a step by the names in "
                "its graph, and there is none. Received: a model that runs "
                "eagerly. Compile it with `run_eagerly=False`."
            )
        made = deployment(self.model)
        if made is not None and not made.config.sync:
            raise ValueError(
                "`CloneProfiler` shows steps that all clones take together. "
                "Received: a model whose replicas step by themselves "
                "(sync=False in its `DeploymentConfig`). Profile it with "
                "`sync=True`."
            )
        check_can_draw()
        per_epoch, epochs = self.params.get("steps"), self.params.get("epochs")
        if per_epoch and epochs and self.steps[1] > per_epoch * epochs:
            raise ValueError(
                "Argument `steps` of `CloneProfiler` must end within the "
                f"training, which has {per_epoch * epochs} steps ({epochs} "
                f"epochs of {per_epoch}). Received: steps={self.steps}"
            )

    def _time_clones(self, wanted: bool) -> None:
        """Let steps tell when clones on other hosts are done, or no more."""
        if hosts.cluster() is not None and deployment(self.model) is not None:
            time_clones(self.model, self, wanted)
            if wanted:
                self.model.make_train_function()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        try:
            tf.profiler.experimental.start(self._folder.name)
        except tf.errors.AlreadyExistsError:
            self._give_up(
                "Another profiler runs already, such as that of the "
                "`TensorBoard` callback (`profile_batch=0` turns it off) or "
                "of a training that failed "
                "(`tf.profiler.experimental.stop()` ends it)"
            )
        else:
            self._running = True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            # The threads of the last step return a little after it ends, and
            # what has not returned is not in the profile.
            time.sleep(0.05)
            try:
                tf.profiler.experimental.stop()
            except tf.errors.UnavailableError:
                self._give_up("The profiler was stopped by something else")

    def _give_up(self, reason: str) -> None:
        self._done = self._gave_up = True
        warn(f"{reason}: `CloneProfiler` writes nothing. The training goes on.")

    def _read(
        self,
    ) -> tuple[list[Event], list[str], list[Window]] | None:
        """Read the profile and make the report, if it has the steps."""
        with self._folder as folder:  # type: ignore[union-attr]
            spans = trace.read_spans(folder)
        places = find_places(self.model)
        windows = trace.find_windows(spans, self._calls)
        if not windows:
            self._give_up("TensorFlow's profile has none of the steps")
            return None
        events = trace.place(spans, places)
        replicas = places.hosts
        if replicas.away:
            seconds = away.seconds_by_host(events, windows, replicas)
            replicas = replicas._replace(seconds=seconds)
        events = away.show(events, replicas)
        lanes = places.lanes()
        lanes += sorted({event.lane for event in events} - set(lanes))
        busy = self._busy / self._wall
        self.report = make_report(
            events, lanes, windows, find_machine(self.model, busy), replicas
        )
        return events, lanes, windows

    def _write(self) -> None:
        """Write and print what the profile came to."""
        found = self._read()
        if found is None or self.report is None:
            return
        events, lanes, windows = found
        window = timeline.typical(windows)
        with open(f"{self.path}.json", "w", encoding="utf-8") as file:
            json.dump(timeline.chrome_trace(events, lanes, window), file)
        title = f"Training step {window.first}\n{self.report.verdict}"
        picture = timeline.draw(events, lanes, window, title)
        picture.savefig(f"{self.path}.png")
        last = max(self._calls) + self._calls[max(self._calls)][1] - 1
        print(
            f"Training steps {min(self._calls)} to {last}, "
            f"timeline in {self.path}.png and {self.path}.json.\n"
            f"{self.report.verdict}"
        )
