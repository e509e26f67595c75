"""A timeline of training steps: its events, its files, its picture."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# What goes on in a step, in the order of the legend and of the drawing.
PHASES = {
    "other": "#bbbbbb",
    "input": "#f0b400",
    "mirror": "#7b3fa0",
    "forward": "#1f77b4",
    "backward": "#7fb8e6",
    "forward and backward": "#4f97cd",
    "on another host": "#c9b79c",
    "gradient transfer": "#d65fb0",
    "update": "#d62728",
    "metrics": "#2ca02c",
}
# Batches are made in the background here: only waiting for one costs time.
PIPELINE = "input pipeline"
# Seconds between two operations that pass for the work of the first.
GAP = 2e-5
# Characters of a line that the picture of a step has room for.
_TITLE_WIDTH = 115


class Event(NamedTuple):
    """What a lane did from one second to another."""

    lane: str
    phase: str
    start: float
    end: float
    name: str = ""


class Window(NamedTuple):
    """One call of the step function: training step `first` and the next."""

    first: int
    steps: int
    start: float
    end: float


def join(events: Iterable[Event]) -> list[Event]:
    """Close the small gaps between the events of a lane, sorted by start."""
    joined: list[Event] = []
    last: dict[str, int] = {}
    for event in sorted(events, key=lambda e: e.start):
        i = last.get(event.lane)
        if i is not None and 0 < event.start - joined[i].end <= GAP:
            joined[i] = joined[i]._replace(end=event.start)
        if i is None or event.end >= joined[i].end:
            last[event.lane] = len(joined)
        joined.append(event)
    return joined


def clip(events: Iterable[Event], window: Window) -> list[Event]:
    """Return the parts of events that lie in a window."""
    return [
        e._replace(start=max(e.start, window.start), end=min(e.end, window.end))
        for e in events
        if e.start < window.end and e.end > window.start
    ]


def intervals(
    events: Iterable[Event], lane: str, phase: str
) -> list[tuple[float, float]]:
    """Return when a lane was in a phase, as disjoint `(start, end)`."""
    found: list[tuple[float, float]] = []
    spans = [(e.start, e.end) for e in events if e[:2] == (lane, phase)]
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def typical(windows: Sequence[Window]) -> Window:
    """Return the window whose steps take the median time."""
    by_length = sorted(windows, key=lambda w: (w.end - w.start) / w.steps)
    return by_length[len(by_length) // 2]


def chrome_trace(
    events: Iterable[Event], lanes: Sequence[str], window: Window
) -> dict[str, Any]:
    """Return a window as a trace that chrome://tracing and Perfetto load.

    Events of one lane that overlap go to rows of their own.
    """
    inside = sorted(clip(events, window), key=lambda e: e.start)
    ends: dict[str, list[float]] = {lane: [0.0] for lane in lanes}
    placed = []
    for event in inside:
        rows = ends[event.lane]
        row = next((i for i, e in enumerate(rows) if e <= event.start), None)
        if row is None:
            row = len(rows)
            rows.append(0.0)
        rows[row] = event.end
        placed.append((event, row))
    threads = [(lane, row) for lane in lanes for row in range(len(ends[lane]))]
    named: list[tuple[str, int, dict[str, Any]]] = [
        ("process_name", 0, {"name": "keras_clones"})
    ]
    for tid, (lane, row) in enumerate(threads):
        name = lane if row == 0 else f"{lane} ({row + 1})"
        named.append(("thread_name", tid, {"name": name}))
        named.append(("thread_sort_index", tid, {"sort_index": tid}))
    trace: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "tid": tid, "name": name, "args": args}
        for name, tid, args in named
    ]
    trace += [
        {
            "ph": "X",
            "pid": 0,
            "tid": threads.index((event.lane, row)),
            "name": event.name or event.phase,
            "cat": event.phase,
            "ts": (event.start - window.start) * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "args": {"phase": event.phase},
        }
        for event, row in placed
    ]
    return {"traceEvents": trace, "displayTimeUnit": "ms"}


def draw(
    events: Iterable[Event],
    lanes: Sequence[str],
    window: Window,
    title: str,
) -> Any:
    """Draw a window: a row a lane, a color a phase.

    Args:
        events: Iterable of `Event`s.
        lanes: Sequence of the lanes' names, the first on top.
        window: `Window` to draw.
        title: String, what stands above the picture. Each of its lines is
            broken where it would leave the picture.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure

    inside = clip(join(events), window)
    lines = [textwrap.fill(line, _TITLE_WIDTH) for line in title.split("\n")]
    title = "\n".join(lines)
    height = 1.5 + 0.2 * (1 + title.count("\n")) + 0.5 * len(lanes)
    figure = Figure(figsize=(11, height), dpi=110)
    axes = figure.add_subplot()
    for phase, color in PHASES.items():
        for y, lane in enumerate(lanes):
            bars = [
                ((start - window.start) * 1e3, (end - start) * 1e3)
                for start, end in intervals(inside, lane, phase)
            ]
            # The thin edge keeps the shortest events visible.
            axes.broken_barh(bars, (y - 0.36, 0.72), color=color, linewidth=0.3)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(0, (window.end - window.start) * 1e3)
    axes.set_xlabel("milliseconds")
    figure.suptitle(title, x=0.01, ha="left", size=11)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_axisbelow(True)
    _add_legend(figure, {event.phase for event in inside})
    figure.set_layout_engine("constrained")
    return figure


def _add_legend(figure: Any, used: set[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=color, label=phase)
        for phase, color in PHASES.items()
        if phase in used
    ]
    # Nine in a row are wider than the picture.
    rows = -(-len(handles) // 6)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=-(-len(handles) // rows),
        frameon=False,
    )
