"""Clones on other hosts, which TensorFlow's profiler does not see.

It traces the controller's process alone. What is seen there is when rows are
laid out, when a number arrives that a clone sends once its gradients are
there, and when the gradients of its host do.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from keras_clones.exchange.laying_out import ARRIVALS
from keras_clones.look.timeline import Event, Window

# What events are of that become others here.
STARTED, THERE, HOME = "started", "there", "home"
# The phase of a clone that computes out of sight.
AWAY = "on another host"
_ARRIVAL = re.compile(
    ARRIVALS + r"(?:_\d+)?/(forth|back)/(?:of_(\d+)|start)/.*:Assign"
)
_HOST = re.compile(
    r"bring_home(?:_\d+)?/on_[A-Z]+_\d+_of_([A-Za-z]\w*?)_(\d+)(?:_\d+)?/"
)
# Slower than the others by this is worth telling.
_SLOW = 1.25


class Hosts(NamedTuple):
    """Which hosts the lanes of clones are of.

    Attributes:
        of_lanes: Dict of names of hosts, such as `"worker 1"`, by lanes, in
            the order of the clones. Empty where there is no cluster.
        here: String, the controller's name.
        seconds: Dict, how long a step the slowest clone of each host takes,
            from the rows being laid out until its gradients are there.
        shared: Boolean, whether shares of the rows go by that already.
    """

    of_lanes: Mapping[str, str] = {}
    here: str = ""
    seconds: Mapping[str, float] = {}
    shared: bool = False

    @property
    def away(self) -> list[str]:
        """The lanes of clones on other hosts."""
        return [
            lane for lane, host in self.of_lanes.items() if host != self.here
        ]


def mark_of(path: str, lanes: Sequence[str]) -> tuple[str, str] | None:
    """Return what an operation shows of a clone's times: lane and phase.

    Args:
        path: String, as for `classify`.
        lanes: Sequence of the lanes of the clones.

    Returns:
        `None` if it shows nothing.
    """
    found = _ARRIVAL.search(path)
    if found is None:
        return None
    way, number = found.groups()
    if number is None:
        return "", f"{STARTED} {way}"
    return lanes[int(number)], f"{THERE} {way}"


def host_sending(name: str) -> str | None:
    """Return the host whose sum of gradients an operation has, if one has."""
    found = _HOST.search(name)
    return " ".join(found.groups()) if found else None


def show(events: Iterable[Event], hosts: Hosts) -> list[Event]:
    """Put what clones on other hosts do into their lanes, as far as known.

    From the rows being laid out until its gradients are there a clone is
    away, then its host sends their sum.

    Args:
        events: Iterable of `Event`s, some of them marks of times.
        hosts: `Hosts` of the clones.
    """
    events = sorted(events, key=lambda e: e.start)
    shown: list[Event] = []
    started: dict[str, float] = {}
    there: dict[str, float] = {}
    for event in events:
        mark, _, way = event.phase.partition(" ")
        if mark == STARTED:
            started[way], there = event.end, {}
        elif mark == THERE:
            if event.lane in hosts.away and way in started:
                since, until = started[way], event.start
                shown.append(Event(event.lane, AWAY, since, until))
                there[event.lane] = until
        elif mark != HOME:
            shown.append(event)
        else:
            lanes = [x for x in hosts.away if hosts.of_lanes[x] == event.lane]
            if lanes and there.keys() >= set(lanes):
                # Their sum leaves once the last of them is there.
                since = max(there[lane] for lane in lanes)
                shown += [
                    Event(lane, "gradient transfer", since, event.end)
                    for lane in lanes
                ]
    return shown


def seconds_by_host(
    events: Iterable[Event], windows: Sequence[Window], hosts: Hosts
) -> dict[str, float]:
    """Return how long a step the slowest clone of each host takes.

    That is from the rows being laid out until its gradients are there.

    Args:
        events: Iterable of `Event`s, some of them marks of times.
        windows: Sequence of `Window`s.
        hosts: `Hosts` of the clones.
    """
    steps = sum(window.steps for window in windows)
    total: dict[str, float] = {}
    ordered = sorted(events, key=lambda e: e.start)
    for window in windows:
        latest: dict[str, dict[str, float]] = {"forth": {}, "back": {}}
        started: dict[str, float] = {}
        for event in ordered:
            if not window.start <= event.start <= window.end:
                continue
            mark, _, way = event.phase.partition(" ")
            if mark == STARTED:
                _add(total, latest[way])
                started[way], latest[way] = event.end, {}
            elif mark == THERE and way in started:
                host = hosts.of_lanes[event.lane]
                latest[way][host] = event.start - started[way]
        for one in latest.values():
            _add(total, one)
    return {host: seconds / steps for host, seconds in total.items()}


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for host, seconds in more.items():
        total[host] = total.get(host, 0.0) + seconds


def slowest(hosts: Hosts) -> str | None:
    """Return the replica that all others wait for, if it is much slower."""
    if len(hosts.seconds) < 2:
        return None
    *_, others, last = sorted(hosts.seconds.items(), key=lambda item: item[1])
    return last[0] if last[1] >= _SLOW * others[1] else None


def advise(hosts: Hosts) -> tuple[str, ...]:
    """Return what to change where one replica is much slower."""
    name = slowest(hosts)
    if name is None or hosts.shared:
        return ()
    return (f'`shares="auto"` in `clone_model`, for fewer rows on {name}',)


def describe(hosts: Hosts) -> str:
    """Return in words how long replicas take, and which is last."""
    unseen = (
        "What clones on other hosts do is out of the profiler's sight: their "
        "lanes show how long they are away"
    )
    if len(hosts.seconds) < 2:
        return f"{unseen}, where that is measured."
    *_, others, last = sorted(hosts.seconds.values())
    name = slowest(hosts)
    if name is None:
        return (
            f"{unseen}. All replicas take about as long: the slowest has its "
            f"gradients after {last * 1e3:.3g} ms."
        )
    clones = [
        lane.split(" ")[0]
        for lane, host in hosts.of_lanes.items()
        if host == name
    ]
    return (
        f"{unseen}. All wait for {name} ({', '.join(clones)}): its gradients "
        f"are there after {last * 1e3:.3g} ms, {last / others:.2g} times as "
        f"long as the next replica takes ({others * 1e3:.3g} ms)."
    )
