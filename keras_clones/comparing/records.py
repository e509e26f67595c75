"""Records of what a comparison of clones with plain Keras found."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Where rounding explains differences of this size, values are all rounding.
NOISE = 1e-2
# Why a run has failed that pieces may mend.
OUT_OF_MEMORY = "out of memory"


class Difference(NamedTuple):
    """How far one variable or log is from plain Keras.

    `largest` is the largest difference over the largest magnitude, of all
    steps, and `limit` what rounding explains at that step. `first` is the
    first step that it does not explain, counted from 1, or `None`.
    """

    name: str
    kind: str
    largest: float
    limit: float
    first: int | None


class Run(NamedTuple):
    """What training with one number of clones came to; 0 is plain Keras.

    `differences` has one entry a variable, optimizer variable and log, in the
    order of the model. `by_step` is, for each step, the difference that is
    furthest from rounding, and `limits` what rounding explains of it.
    `seconds` is the median step and `first_seconds` the time to the end of
    the first one. `memory` is the peak by device, in bytes; without a GPU
    what the process grew by, where the system tells, else `None`. `received`
    and `sent` say in words what crosses to and from each clone. `warnings` are
    those of keras_clones. `failed` says why there is no more. `options` are
    those that mend a difference, where the clones train with them. `whole`
    has the names of layers that the first step found and called whole.
    """

    num_clones: int
    differences: tuple[Difference, ...] = ()
    by_step: tuple[float, ...] = ()
    limits: tuple[float, ...] = ()
    seconds: float | None = None
    first_seconds: float | None = None
    memory: dict[str, int] | None = None
    received: tuple[str, ...] = ()
    sent: tuple[str, ...] = ()
    bound_by: str | None = None
    verdict: str | None = None
    warnings: tuple[str, ...] = ()
    failed: str | None = None
    options: Mapping[str, Any] = {}
    whole: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the run is called."""
        if not self.num_clones:
            return "plain Keras"
        text = f"{self.num_clones} clone{'s' if self.num_clones > 1 else ''}"
        return f"{text} with {named(self.options)}" if self.options else text

    @property
    def wrong(self) -> tuple[Difference, ...]:
        """The differences that rounding does not explain, first ones first."""
        found = [d for d in self.differences if d.first is not None]
        return tuple(sorted(found, key=lambda d: d.first or 0))

    @property
    def same(self) -> bool:
        """Whether it trained the same model, up to rounding."""
        return self.failed is None and not self.wrong


def named(options: Mapping[str, Any]) -> str:
    """Return arguments as they are written in a call."""
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return options together: lists and dicts of them add up."""
    result = dict(one)
    for key, value in other.items():
        held = result.get(key)
        if isinstance(held, Mapping) and isinstance(value, Mapping):
            value = {**held, **value}
        elif isinstance(held, (list, tuple)) and isinstance(value, list):
            value = [*held, *value]
        result[key] = value
    return result


class Cause(NamedTuple):
    """What is known to let clones differ, and which option mends it.

    `mends` are arguments of `clone_model`, empty if none does. `tried` says
    whether the model trained with them is the same, `None` if that was not
    tried. `suspected` says that nothing but a try tells.
    """

    layers: tuple[str, ...]
    why: str
    mends: dict[str, Any]
    tried: bool | None = None
    suspected: bool = False


class Advice(NamedTuple):
    """Which number of clones and options to use, and how much that gains.

    `num_clones` is 0 for plain Keras. `gain` is how many times as fast as
    plain Keras it is.
    """

    num_clones: int
    options: dict[str, Any]
    gain: float
    text: str


class Findings(NamedTuple):
    """All that a comparison found.

    `runs` has plain Keras first. `dtype` and `judged` say in which type of
    numbers differences were judged, and what counts as rounding. `rows` are
    those of a batch. `versions` and `options` are what a report needs.
    """

    runs: tuple[Run, ...]
    causes: tuple[Cause, ...]
    explained: bool
    advice: Advice
    dtype: str
    judged: str
    notes: tuple[str, ...]
    rows: int
    versions: dict[str, str]
    options: dict[str, str]

    @property
    def same(self) -> bool:
        """Whether clones ran, and all that did trained the same model."""
        ran = [run for run in self.runs if run.num_clones and not run.failed]
        return bool(ran) and not any(run.wrong for run in ran)

    @property
    def differing(self) -> Run | None:
        """The run of the fewest clones that differ, or `None`."""
        found = [run for run in self.runs if run.wrong]
        return min(found, key=lambda run: run.num_clones, default=None)
