"""Functions of modules that are others, while any clone is traced or runs."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Places = Mapping[tuple[Any, str], tuple[Any, Any]]


class Swaps:
    """Functions, and what takes their places while anyone needs it.

    Threads share modules, so that the last one to leave puts them back.

    Args:
        places: Function that returns a dict of places, a module and a name
            each, to what is there and what takes its place.
    """

    def __init__(self, places: Callable[[], Places]) -> None:
        self._places = places
        self._lock = threading.Lock()
        self._users = 0

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Swap them for a time."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                for (module, name), (_, other) in self._places().items():
                    setattr(module, name, other)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for (module, name), (own, _) in self._places().items():
                        setattr(module, name, own)
