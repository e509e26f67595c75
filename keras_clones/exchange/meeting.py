"""Run one Python function a clone side by side, with points where all meet.

The functions take turns: one runs until it meets the others or returns, then
the next. So they run in one fixed order, as if they were one program. Each
has a thread of its own only to keep its place, and the threads end when the
step's graph is made; no thread runs while a step does.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_clones import _keras, warn
from keras_clones.devices.placement import PlacedClone

Combine = Callable[[list[Any]], list[Any]]


class _Message(NamedTuple):
    """What a clone hands over: a value to combine, a result or an error."""

    kind: str
    name: str = ""
    value: Any = None
    combine: Combine | None = None


class _Abandoned(BaseException):
    """Ends a clone whose neighbour has failed."""


class _Worker:
    """A clone's function, which runs while `resume` waits, and only then."""

    def __init__(self, function: Callable[[], Any], index: int) -> None:
        self.index = index
        self._function = function
        self._given: Any = None
        self._message = _Message("error")
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def resume(self, value: Any) -> _Message:
        """Run the function on, from where it met, until its next message."""
        self._given = value
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        return self._message

    def abandon(self) -> None:
        """End a function that waits to be resumed."""
        if self._thread.is_alive() and self._message.kind == "meet":
            self.resume(_Abandoned())

    def meet(self, message: _Message) -> Any:
        """Hand a message over and wait; return the worker's part of it."""
        self._message = message
        self._back.release()
        self._go.acquire()
        if isinstance(self._given, _Abandoned):
            raise self._given
        return self._given

    def _run(self) -> None:
        _current.worker = self
        try:
            self._message = _Message("done", value=self._function())
        except _Abandoned as error:
            self._message = _Message("error", value=error)
        except BaseException as error:
            self._message = _Message("error", value=error)
        self._back.release()


class _Current(threading.local):
    worker: _Worker | None = None


_current = _Current()


def current_clone() -> int | None:
    """Return the index of the clone whose function runs, `None` outside."""
    return None if _current.worker is None else _current.worker.index


def meet(name: str, value: Any, combine: Combine) -> Any:
    """Hand a value to the point where all clones meet; return one's part.

    Args:
        name: String, what the point is, the same in every clone.
        value: What this clone brings.
        combine: Function from the values of all clones to what each gets
            back, called once, outside of every clone.
    """
    worker = _current.worker
    if worker is None:
        raise RuntimeError(f"Clones meet at {name} only where they run.")
    return worker.meet(_Message("meet", name, value, combine))


def run_side_by_side(
    clones: Sequence[PlacedClone], function: Callable[[int], Any]
) -> list[Any]:
    """Call a function once a clone, each in its scope and on its device.

    Args:
        clones: Sequence of `PlacedClone`s.
        function: Function of the index of the clone. It may call `meet`.

    Returns:
        A list of what the calls returned.

    Raises:
        ValueError: If the clones do not come to the same meeting points.
    """
    here = _Here()
    workers = [
        _Worker(functools.partial(here.call, clone, function, i), i)
        for i, clone in enumerate(clones)
    ]
    parts: list[Any] = [None] * len(workers)
    try:
        while True:
            messages = []
            for worker, part in zip(workers, parts, strict=True):
                messages.append(worker.resume(part))
                if messages[-1].kind == "error":
                    raise messages[-1].value
            points = sorted({m.name or "its end" for m in messages})
            if len(points) > 1:
                raise ValueError(
                    "Expected every clone to run the same steps. Received: "
                    f"clones that came to different points: {points}. A step "
                    "must not depend on the device, or on Python state that "
                    "changes from call to call."
                )
            if messages[0].combine is None:
                return [message.value for message in messages]
            parts = messages[0].combine([m.value for m in messages])
    finally:
        for worker in workers:
            worker.abandon()


class _Here:
    """What a thread has to take over from the one that started it."""

    def __init__(self) -> None:
        self.graph = None
        if not tf.executing_eagerly():
            self.graph = tf.compat.v1.get_default_graph()
            # Each thread gets scopes of its own in the one graph.
            self.graph.switch_to_thread_local()
        self.keras_state = _keras.thread_state()
        self.warning = warn.as_here()

    def call(
        self, clone: PlacedClone, function: Callable[[int], Any], index: int
    ) -> Any:
        with contextlib.ExitStack() as stack:
            if self.graph is not None:
                stack.enter_context(self.graph.as_default())
            stack.enter_context(_keras.thread_state_of(self.keras_state))
            stack.enter_context(self.warning())
            stack.enter_context(tf.device(clone.device))
            stack.enter_context(tf.name_scope(clone.scope or "clone"))
            return function(index)
