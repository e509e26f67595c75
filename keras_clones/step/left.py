"""What replicas that were lost have left to do."""

from typing import Any

from keras_clones.step.replica import Replica


class Left:
    """What replicas that were lost have left to do.

    Attributes:
        replicas: List of those that nothing is to wait for any more.
        unread: Set of what the devices of hosts begin with whose rows are
            lost, and are to be read again.
        steps: List of pairs, a batch of rows that are there and the prefix of
            the host that has them.
    """

    def __init__(self) -> None:
        self.replicas: list[Replica] = []
        self.unread: set[str] = set()
        self.steps: list[tuple[Any, str | None]] = []

    def __bool__(self) -> bool:
        return bool(self.replicas or self.unread or self.steps)
