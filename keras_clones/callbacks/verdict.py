"""From a timeline of training steps to figures, and a verdict in words."""

import math
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import keras

from keras_clones.callbacks import away
from keras_clones.devices import hosts
from keras_clones.devices.placement import logical_devices
from keras_clones.door.attach import deployment
from keras_clones.look.timeline import (
    PIPELINE,
    Event,
    Window,
    clip,
    intervals,
    join,
)

# What can bound a step. A moment counts for the first that is going on.
KINDS = {
    "compute": ("forward", "backward", "forward and backward"),
    "update": ("update",),
    "transfer": ("mirror", "gradient transfer"),
    "metrics": ("metrics",),
    "other hosts": (away.AWAY,),
    "input": ("input",),
}
OVERHEAD = "overhead"


class Machine(NamedTuple):
    """How many clones there are, and room for how many times as many.

    `room` is the number of devices over those that clones run on or, on the
    CPU, of cores over those that have a clone or were busy. A cluster can
    have one host more.
    """

    num_clones: int
    room: float


class Report(NamedTuple):
    """What the profile of a model's training steps came to.

    Attributes:
        seconds: Float, how long one training step takes.
        phases: Dict of dicts, the seconds a step that each lane spends in
            each phase. Lanes and phases go on side by side.
        bounds: Dict, the seconds of a step by what they went to: compute,
            update, transfer, metrics, other hosts, input or overhead. They
            add up to `seconds`.
        bound_by: String, the largest of `bounds`.
        with_another_clone: Float, the estimated seconds a step with one
            clone more.
        advice: Tuple of strings, what to change.
        verdict: String, all of this in words.
        hosts: Dict, in a cluster the seconds that the slowest clone of each
            replica takes, from the rows being laid out until its gradients
            are there, by names such as `"worker 1"`.
    """

    seconds: float
    phases: dict[str, dict[str, float]]
    bounds: dict[str, float]
    bound_by: str
    with_another_clone: float
    advice: tuple[str, ...]
    verdict: str
    hosts: dict[str, float] = {}  # noqa: RUF012


def find_machine(model: keras.Model, busy: float) -> Machine:
    """Return the number of clones, and the room for more.

    Args:
        model: A `keras.Model`.
        busy: Float, how many cores the process kept busy.
    """
    made = deployment(model)
    gpus = logical_devices("GPU")
    used = {clone.device for clone in made.clones} if made else set(gpus[:1])
    num_clones = len(made.clones) if made else 1
    if hosts.cluster() is not None:
        return Machine(num_clones, math.inf)
    if used and used <= set(gpus):
        return Machine(num_clones, len(gpus) / len(used))
    cores = _num_cores()
    return Machine(num_clones, cores / min(max(busy, num_clones), cores))


def _num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_report(
    events: Sequence[Event],
    lanes: Sequence[str],
    windows: Sequence[Window],
    machine: Machine,
    replicas: away.Hosts | None = None,
) -> Report:
    """Return the figures of the mean step, and the verdict on them.

    Args:
        events: Sequence of `Event`s, in any order.
        lanes: Sequence of the lanes' names.
        windows: Sequence of `Window`s, in which each step is one step more.
        machine: `Machine` that the steps ran on.
        replicas: `away.Hosts` of the clones. Defaults to `None`: no cluster.
    """
    events = join(events)
    phases, bounds = _sums(events, lanes, windows)
    total = sum(bounds.values())
    bound_by = max(bounds, key=lambda kind: bounds[kind])
    another = with_another_clone(bounds, machine)
    used = {phase for figures in phases.values() for phase in figures}
    advice = advise(
        bound_by,
        machine.num_clones,
        saved=1 - another / total,
        compiled="forward and backward" in used,
        several_steps=any(window.steps > 1 for window in windows),
    )
    by_host: dict[str, float] = {}
    words = ""
    if replicas is not None and replicas.away:
        by_host, words = dict(replicas.seconds), f"\n{away.describe(replicas)}"
        advice = (*away.advise(replicas), *advice)
    verdict = describe(total, bounds, bound_by, another, advice) + words
    return Report(
        total, phases, bounds, bound_by, another, advice, verdict, by_host
    )


def _sums(
    events: Sequence[Event], lanes: Sequence[str], windows: Sequence[Window]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return the `phases` and the `bounds` of a `Report`."""
    steps = sum(window.steps for window in windows)
    phases: dict[str, dict[str, float]] = {lane: {} for lane in lanes}
    bounds = dict.fromkeys((*KINDS, OVERHEAD), 0.0)
    for window in windows:
        inside = clip(events, window)
        for lane, phase in sorted({(e.lane, e.phase) for e in inside}):
            busy = intervals(inside, lane, phase)
            seconds = sum(end - start for start, end in busy) / steps
            figures = phases[lane]
            figures[phase] = figures.get(phase, 0.0) + seconds
        for kind, seconds in attribute(inside, window).items():
            bounds[kind] += seconds / steps
    return phases, bounds


def attribute(events: Iterable[Event], window: Window) -> dict[str, float]:
    """Give each moment of a window to one kind of work.

    Several lanes work at once, so a moment counts for the first of compute,
    update, transfer, metrics, other hosts and input that is going on, and for
    overhead if none is: what hides behind a clone's compute does not bound
    the step.
    """
    kinds = {phase: kind for kind, own in KINDS.items() for phase in own}
    edges = [(window.start, "", 0), (window.end, "", 0)]
    for event in events:
        kind = kinds.get(event.phase)
        if kind is not None and event.lane != PIPELINE:
            edges += [(event.start, kind, 1), (event.end, kind, -1)]
    going = dict.fromkeys(("", *KINDS), 0)
    seconds = dict.fromkeys((*KINDS, OVERHEAD), 0.0)
    before = window.start
    for time, kind, change in sorted(edges):
        current = next((k for k in KINDS if going[k]), OVERHEAD)
        seconds[current] += time - before
        going[kind] += change
        before = time
    return seconds


def with_another_clone(bounds: dict[str, float], machine: Machine) -> float:
    """Estimate the seconds of a step with one clone more.

    The compute divides by the clones, as far as there is room for more. All
    else stays what it is.
    """
    n = machine.num_clones
    left = max(n / (n + 1), 1 / max(machine.room, 1.0))
    return sum(bounds.values()) - bounds["compute"] * (1 - left)


def advise(
    bound_by: str,
    num_clones: int,
    *,
    saved: float,
    compiled: bool,
    several_steps: bool,
) -> tuple[str, ...]:
    """Return what to change, by what bounds the step.

    Args:
        bound_by: String, a key of `Report.bounds`.
        num_clones: Integer, how many clones there are.
        saved: Float, the part of the step that one clone more would save.
        compiled: Boolean, whether XLA compiles the clones already.
        several_steps: Boolean, whether one call runs several steps already.
    """
    larger_batch = "a larger batch, if the training allows it"
    fewer_clones = ["fewer clones"] if num_clones > 1 else []
    compile_it = (
        []
        if compiled
        else ["`jit_compile=True` in `clone_model`, if XLA takes the model"]
    )
    call_less = (
        [] if several_steps else ["`steps_per_execution=10` or so in `compile`"]
    )
    if bound_by == "compute":
        more = [f"`num_clones={num_clones + 1}`"] if saved >= 0.05 else []
        return (*more, *compile_it) or ("a faster device",)
    return {
        "update": (larger_batch + ": it has fewer updates for as many rows",),
        "transfer": (larger_batch, *fewer_clones),
        "metrics": ("fewer or simpler metrics in `compile`",),
        "other hosts": (
            "what else these hosts compute, and their network",
            larger_batch,
        ),
        "input": (
            "`dataset.prefetch(tf.data.AUTOTUNE)` as the last step of the "
            "input pipeline",
            "`num_parallel_calls=tf.data.AUTOTUNE` in its `map`, or `workers` "
            "of a `keras.utils.PyDataset`",
        ),
        OVERHEAD: (*call_less, larger_batch, *fewer_clones, *compile_it),
    }[bound_by]


def describe(
    seconds: float,
    bounds: dict[str, float],
    bound_by: str,
    another: float,
    advice: Sequence[str],
) -> str:
    """Return the verdict on a step in words."""
    parts = sorted(bounds.items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{kind} {part / seconds:.0%}"
        for kind, part in parts
        if part / seconds >= 0.005
    )
    gain = seconds / another
    more = (
        "One clone more would not make it faster."
        if gain < 1.02
        else f"One clone more would make it about {another * 1e3:.3g} ms "
        f"({gain:.2f} times as fast)."
    )
    return "\n".join(
        [
            f"A step takes {seconds * 1e3:.3g} ms, bound by {bound_by}: "
            f"{shares}.",
            more,
            "What to change: " + "; ".join(advice) + ".",
        ]
    )
