"""The random streams of Python and NumPy, which steps and data may draw from.

Threads that read data draw while a step runs: a stream that is put back where
it was would give them the same numbers once more. So it is put back for what
is known to draw from it, and as long as that runs.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_State = tuple[Any, ...]


def now() -> _State:
    """Return where the streams are."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return random.getstate(), name, keys.tobytes(), *rest


def put(state: _State) -> None:
    """Put the streams where they were."""
    python, name, keys, *rest = state
    random.setstate(python)
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))


class Draws:
    """Whether a function draws from the streams: if each of its runs did."""

    def __init__(self) -> None:
        self._start = now()
        self._ran = self._quiet = False

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, whose runs are watched."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before = now()
            try:
                return function(*args, **kwargs)
            finally:
                self._ran = True
                self._quiet = self._quiet or now() == before

        return run

    def undo(self) -> None:
        """Put the streams where they were at first, if it does."""
        if self._ran and not self._quiet:
            put(self._start)


class Replayed:
    """Lets steps that are made again draw what they drew.

    Where nothing else has drawn, the streams are put back for good. Otherwise
    each step that drew begins with what it drew from, and leaves the streams
    as they are.
    """

    def __init__(self) -> None:
        self._ran: list[tuple[_State, _State]] = []
        self._again: list[_State | None] = []

    def start(self) -> None:
        """Forget what steps drew from that do not run again."""
        self._ran = []

    def again(self) -> None:
        """Let the steps that come draw what those drew that were made."""
        ran, self._ran = self._ran, []
        if not ran:
            return
        starts = [start for start, _ in ran]
        if [end for _, end in ran] == [*starts[1:], now()]:
            put(starts[0])
        else:
            self._again = [
                start if end != start else None for start, end in ran
            ]

    @contextlib.contextmanager
    def of_step(self) -> Iterator[None]:
        """Let a step that is made draw from where it did, if it is again."""
        held = now()
        again = self._again.pop(0) if self._again else None
        if again is not None:
            put(again)
        before = now()
        try:
            yield
        finally:
            self._ran.append((before, now()))
            if again is not None:
                put(held)
