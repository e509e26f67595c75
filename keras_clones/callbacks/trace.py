"""Read TensorFlow's profile of training steps into events of a timeline."""

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from keras_clones.callbacks import away
from keras_clones.callbacks.lanes import (
    COPIES,
    WAITING,
    Places,
    classify,
    known,
)
from keras_clones.devices.placement import short_name
from keras_clones.look.timeline import PIPELINE, Event, Window

# The name of the span around each call of the step function.
STEP = "keras_clones/step"
_OPERATION = re.compile(r"[^\s:]+:\w+")
_STATS = (
    *("name", "id", "step_id", "step_num", "kernel_type", "tf_op"),
    "memcpy_details",
)


class Span(NamedTuple):
    """An entry of a profile: what a line of a plane did, in seconds.

    A plane is a device or the host, a line a stream or a thread.
    """

    plane: str
    line: str
    name: str
    start: float
    end: float
    stats: Mapping[str, Any]


def read_spans(folder: str) -> list[Span]:
    """Read the profile that TensorFlow wrote into a folder.

    The times are seconds since the first entry.
    """
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    spans = []
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
        for plane in space.planes:
            spans += list(_spans_of(plane))
    first = min((span.start for span in spans), default=0)
    return [
        span._replace(
            start=(span.start - first) * 1e-12, end=(span.end - first) * 1e-12
        )
        for span in spans
    ]


def _spans_of(plane: Any) -> Iterator[Span]:
    """Yield the spans of a plane, with times in picoseconds."""
    wanted = {
        key: meta.name
        for key, meta in plane.stat_metadata.items()
        if meta.name in _STATS
    }

    def value(stat: Any) -> Any:
        kind = stat.WhichOneof("value")
        if kind == "ref_value":
            return plane.stat_metadata[stat.ref_value].name
        return getattr(stat, kind)

    for line in plane.lines:
        # Two threads may have one name.
        name = f"{line.name} {line.id}"
        for event in line.events:
            meta = plane.event_metadata[event.metadata_id]
            start = line.timestamp_ns * 1000 + event.offset_ps
            stats = {
                wanted[stat.metadata_id]: value(stat)
                for stat in (*meta.stats, *event.stats)
                if stat.metadata_id in wanted
            }
            end = start + event.duration_ps
            yield Span(plane.name, name, meta.name, start, end, stats)


def find_windows(
    spans: Iterable[Span], calls: Mapping[int, tuple[int, int]]
) -> list[Window]:
    """Return the calls of the step function, in their order.

    Args:
        spans: Iterable of the `Span`s of a profile.
        calls: Dict of `(epoch, steps)` by the number of a call's first step.

    Returns:
        A list of `Window`s. One lasts until the next of its epoch begins, so
        that what Python does between steps counts.
    """
    # An epoch whose data ran out has begun a step that the next begins anew.
    last = {
        span.stats["step_num"]: span
        for span in sorted(spans, key=lambda s: s.start)
        if span.name == STEP and span.stats["step_num"] in calls
    }
    marks = [
        (first, last[first].start, last[first].end) for first in sorted(last)
    ]
    windows = []
    for i, (first, start, end) in enumerate(marks):
        epoch, steps = calls[first]
        if i + 1 < len(marks) and calls[marks[i + 1][0]][0] == epoch:
            end = marks[i + 1][1]
        windows.append(Window(first, steps, start, end))
    return windows


def place(spans: Sequence[Span], places: Places) -> list[Event]:
    """Give the operations of a profile their lanes and phases.

    The host's own events show what a CPU computes. Of a GPU they show only
    how its work was started; the GPU's streams show that work.
    """
    events: list[Event] = []
    by_line: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        by_line.setdefault((span.plane, span.line), []).append(span)
    threads = []
    for (plane, line), found in by_line.items():
        if re.match(r"/device:GPU:\d+", plane):
            if line.startswith("Stream"):
                events += _stream_events(found, plane, places)
        elif plane.startswith("/host:"):
            threads.append(_nest(found))
    paths = _call_paths(threads)
    gpus = {lane for device, lane in places.devices.items() if "GPU" in device}
    for thread in threads:
        own = [*_host_events(thread, paths, places)]
        events += [event for event in own if event.lane not in gpus]
        events += _input_events(thread)
    return events


class _Nested(NamedTuple):
    """A span of a thread, and those around it, the nearest first."""

    span: Span
    around: list[Span]

    def nearest(self, name: str) -> Span | None:
        return next((s for s in self.around if s.name == name), None)


_START = "ExecutorState::ProcessAsync::Start"
_DONE = "ExecutorState::ProcessAsync::Done"


def _nest(spans: Iterable[Span]) -> list[_Nested]:
    """Find what each span of a thread stands in, by the times."""
    nested: list[_Nested] = []
    stack: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        while stack and stack[-1].end <= span.start:
            stack.pop()
        nested.append(_Nested(span, stack[::-1]))
        stack.append(span)
    return nested


def _call_paths(threads: Iterable[list[_Nested]]) -> dict[int, str]:
    """Return the path of calls to each run of a function, by the run's id.

    The step's own run has an empty path. A run that no step has called, as
    one of the input pipeline, is left out.
    """
    callers: dict[int, tuple[int, str]] = {}
    paths: dict[int, str] = {}
    for thread in threads:
        for nested in thread:
            if nested.span.name != "FunctionRun":
                continue
            run = nested.span.stats["id"]
            call = nested.nearest(_START)
            if call is not None:
                callers[run] = (call.stats["step_id"], call.stats["name"])
            elif nested.nearest(STEP) is not None:
                paths[run] = ""
    for run in callers:
        names, top = [], run
        while top in callers:
            top, name = callers[top]
            names.append(name)
        if paths.get(top) == "":
            paths[run] = "/".join(reversed(names)) + "/"
    return paths


def _host_events(
    thread: list[_Nested], paths: Mapping[int, str], places: Places
) -> Iterator[Event]:
    """Yield what a thread of the host did for the steps."""
    ran = {
        id(call)
        for nested in thread
        if nested.span.name == "FunctionRun"
        and (call := nested.nearest(_START)) is not None
    }
    for nested in thread:
        span = nested.span
        if span.name == _START:
            # XLA runs the function of a clone as a whole.
            name, kind = span.stats["name"], span.stats.get("kernel_type", "")
            lane = places.clones.get(known(name, places.clones))
            if (
                lane
                and kind.endswith("PartitionedCall")
                and id(span) not in ran
            ):
                phase = "forward and backward"
                yield Event(lane, phase, span.start, span.end, name)
        elif _OPERATION.fullmatch(span.name):
            process = nested.nearest("ExecutorState::Process")
            run = -1 if process is None else process.stats["id"]
            if run in paths:
                path = paths[run] + span.name
                lane, phase = away.mark_of(
                    path, [*places.clones.values()]
                ) or classify(path, places)
                yield Event(lane, phase, span.start, span.end, span.name)
        elif span.name == _DONE and (host := _sent_by(span.stats, places)):
            yield Event(host, away.HOME, span.start, span.end)


def _sent_by(stats: Mapping[str, Any], places: Places) -> str | None:
    """Return the host whose results have arrived here, if any have."""
    received = stats.get("kernel_type", "").endswith("Recv")
    if not places.hosts.away or not received:
        return None
    name = stats["name"]
    lane = places.clones.get(known(name, places.clones), "")
    return away.host_sending(name) or places.hosts.of_lanes.get(lane)


def _stream_events(
    spans: Iterable[Span], plane: str, places: Places
) -> Iterator[Event]:
    """Yield what a stream of a GPU did."""
    device = short_name(plane)
    lane = places.devices.get(device, device)
    for span in spans:
        operation = str(span.stats.get("tf_op", "")).rpartition("::")[2]
        if span.name in COPIES:
            phase = COPIES[span.name]
        elif operation:
            phase = classify(operation, places)[1]
            # The name of what a clone runs does not say which clone's it is.
            if phase in ("other", "metrics") and "/" in operation:
                phase = "forward"
        else:
            phase = "forward and backward"
        yield Event(lane, phase, span.start, span.end, operation or span.name)


def _input_events(thread: list[_Nested]) -> Iterator[Event]:
    """Yield when a thread waited for a batch, or helped to make one."""
    for span, around in thread:
        lane = None
        # Keras 3.16 gets a batch outside of the graph of its step.
        in_step = any(outer.name == STEP for outer in around)
        if "get_next" in span.line or in_step:
            if re.match(r"IteratorGetNext\w*::DoCompute", span.name):
                lane = WAITING
            elif _makes_batch(span) and not any(map(_makes_batch, around)):
                lane = PIPELINE
        elif span.line.startswith("tf_data") and not around:
            lane = PIPELINE
        if lane is not None and span.end > span.start:
            yield Event(lane, "input", span.start, span.end, span.name)


def _makes_batch(span: Span) -> bool:
    """Say whether the thread that waits makes the batch: nothing prefetches."""
    return bool(re.match(r"Iterator::Root::(?!Prefetch)", span.name))
