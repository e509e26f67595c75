"""Timing copies of a model: fairly, in turns, in its own type of numbers."""

import functools
import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones.callbacks.profiler import CloneProfiler
from keras_clones.comparing import copies, kept_batches, training
from keras_clones.comparing.copies import Source
from keras_clones.comparing.kept_batches import Batches
from keras_clones.comparing.records import Run, joined
from keras_clones.devices import placement
from keras_clones.door.attach import clone_model, deployment
from keras_clones.look import footprint, report, resident

# Steps between the first, which traces, and the first that is timed.
_WARM_UP = 3
# A turn of one copy takes about so long, so that its median settles.
_SECONDS_A_TURN, _TURNS = 0.3, 4
_MOST_STEPS, _LEAST_STEPS = 60, 3
# A profile of slower steps would take longer than it is worth.
_MOST_SECONDS_A_STEP = 2.0


class Timing(NamedTuple):
    """How long steps take, in seconds; what they hold, in bytes, and move."""

    seconds: float
    first_seconds: float
    memory: dict[str, int] | None
    received: tuple[str, ...] = ()
    sent: tuple[str, ...] = ()
    bound_by: str | None = None
    verdict: str | None = None


class Stopwatch(keras.callbacks.Callback):
    """A callback that notes when each step ends, once its logs are read."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


class QuietProfiler(CloneProfiler):
    """A `CloneProfiler` that makes its report, and writes and prints nothing.

    Args:
        steps: Pair of integers, as for `CloneProfiler`.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        super().__init__(steps, os.path.join(tempfile.gettempdir(), "none"))

    def _check_can_draw(self) -> None:
        pass

    def _write(self) -> None:
        self._read()

    def stop(self) -> None:
        """End a profile that a training which failed has left running."""
        self._stop()


class Candidate:
    """One copy that is timed, whose first step has been.

    Args:
        make: Function that makes the copy.
        batches: `Batches` that it trains on.
    """

    def __init__(
        self, make: Callable[[], keras.Model], batches: Batches
    ) -> None:
        held = _Held()
        self.model = make()
        data = kept_batches.serve(batches)
        self._data = data.cache().repeat().prefetch(2)
        self._at_once = self.model.steps_per_execution
        begin = time.perf_counter()
        ends = self._fit(1 + _WARM_UP)
        self.first_seconds = ends[0] - begin
        self._medians = [float(np.median(np.diff(ends)))]
        self.memory = held.more()

    @property
    def seconds(self) -> float:
        """The median step of the best turn."""
        return min(self._medians) / self._at_once

    def take_turn(self) -> None:
        """Train for a while, and note the median step."""
        wanted = round(_SECONDS_A_TURN / min(self._medians))
        steps = min(_MOST_STEPS, max(_LEAST_STEPS, wanted))
        ends = self._fit(1 + steps)
        self._medians.append(float(np.median(np.diff(ends))))

    def timing(self, rows: int) -> Timing:
        """Return all that was found, for batches of so many rows."""
        received, sent = _crossing(self.model, rows)
        found = _what_bounds(self._fit, self.model, self.seconds)
        return Timing(
            self.seconds,
            self.first_seconds,
            self.memory,
            received,
            sent,
            found.bound_by if found else None,
            found.verdict if found else None,
        )

    def _fit(self, calls: int, *callbacks: Any) -> list[float]:
        stopwatch = Stopwatch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.fit(
                self._data,
                steps_per_epoch=calls * self._at_once,
                verbose=0,
                callbacks=[*callbacks, stopwatch],
            )
        return stopwatch.ends


def take_turns(candidates: Sequence[Candidate]) -> None:
    """Time copies in turns, so that what else runs meets all alike."""
    for turn in range(_TURNS):
        # Each goes first once, in case a turn is a burden to the next.
        at = turn % len(candidates) if candidates else 0
        for candidate in [*candidates[at:], *candidates[:at]]:
            candidate.take_turn()


def time_runs(
    source: Source,
    batches: Batches,
    runs: Sequence[Run],
    options: dict[str, Any],
) -> list[Run]:
    """Time plain Keras and the clones that trained, in turns."""

    def make(run: Run) -> keras.Model:
        model = copies.copy_of(source)
        if not run.num_clones:
            return model
        asked = joined(options, run.options)
        return clone_model(model, num_clones=run.num_clones, **asked)

    found = list(runs)
    candidates: dict[int, Candidate] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, run in enumerate(runs):
            if run.failed:
                continue
            try:
                candidates[i] = Candidate(functools.partial(make, run), batches)
            except (tf.errors.ResourceExhaustedError, MemoryError) as error:
                found[i] = run._replace(failed=training.why_failed(error))
        take_turns(list(candidates.values()))
        for i, candidate in candidates.items():
            timing = candidate.timing(batches.rows)
            found[i] = found[i]._replace(**timing._asdict())
    return found


class _Held:
    """What is held of each GPU's memory, or by the process without a GPU.

    What copies before have given back to the process, and it not to the
    system, is not seen again.
    """

    def __init__(self) -> None:
        gpus = placement.logical_devices("GPU")
        self._gpus = {gpu: _memory(gpu, reset=True)["current"] for gpu in gpus}
        gc.collect()
        self._process = resident.peak() if resident.reset_peak() else None

    def more(self) -> dict[str, int] | None:
        """Return the bytes at the peak since, by device, if they are known."""
        if self._gpus:
            return {
                gpu: _memory(gpu)["peak"] - held
                for gpu, held in self._gpus.items()
            }
        grown = resident.grown(self._process)
        return None if grown is None else {"process": grown}


def _memory(gpu: str, reset: bool = False) -> dict[str, int]:
    name = gpu.removeprefix("/device:")
    if reset:
        tf.config.experimental.reset_memory_stats(name)
    return tf.config.experimental.get_memory_info(name)


def _crossing(
    model: keras.Model, rows: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return in words what a step sends to and gets from each clone."""
    made = deployment(model)
    if made is None:
        return (), ()
    size = footprint.measure(model, made.step_options())
    received, sent = [], []
    for i, (clone, n) in enumerate(
        zip(made.clones, made.shard_sizes(rows), strict=True)
    ):
        at_home = (clone.device,) == made.options.homes.devices
        flows = size.received, report.sent_by(i, size)
        words = [
            report.readable(0) if at_home else report.flow_text(flow, n)
            for flow in flows
        ]
        received.append(words[0])
        sent.append(words[1])
    return tuple(received), tuple(sent)


def _what_bounds(
    fit: Callable[..., Any], model: keras.Model, seconds: float
) -> Any:
    """Return the report of a short profile, `None` if there is none."""
    if model.run_eagerly or seconds > _MOST_SECONDS_A_STEP:
        return None
    at_once = model.steps_per_execution
    profiler = QuietProfiler((2 * at_once, 5 * at_once))
    try:
        fit(6, profiler)
    except tf.errors.OpError:
        return None
    finally:
        profiler.stop()
    return profiler.report
