"""Replicas that step by themselves, on variables as they are.

One thread runs a step of each replica's clones on a batch of its own. None
waits for the others: a step reads the variables as it starts, and its update
is applied as it comes.
"""

import concurrent.futures
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones.cluster import watch
from keras_clones.exchange import from_hosts
from keras_clones.plan import at_home
from keras_clones.plan.options import StepOptions
from keras_clones.step import steps
from keras_clones.step.replica import Replica


class Replicas:
    """A train function that gives each batch to a replica that is free.

    Calls return before the step is done, as long as a replica is free for the
    next. `drain` waits for all.

    Args:
        replicas: Sequence of `Replica`s.
        max_staleness: Integer, how many updates may be applied at most
            between a step's reading of the variables and its own update, or
            `None`: any number.
        num_batches: Integer, how many batches a call takes.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        max_staleness: int | None,
        num_batches: int,
    ) -> None:
        self._free = list(replicas)
        self._alive = len(replicas)
        self._max_staleness = max_staleness
        self._num_batches = num_batches
        # How many updates each running step may miss.
        self._missed: dict[Replica, int] = {}
        self._changed = threading.Condition()
        self._pool = concurrent.futures.ThreadPoolExecutor(len(replicas))
        self._again: list[tuple[Replica, Any]] = []
        self._logs: Any = None
        self._error: BaseException | None = None

    def __call__(self, iterator: Iterator[Any]) -> Any:
        """Start steps on the next batches, and return the latest logs.

        What several hosts have read is a batch of each.
        """
        for _ in range(self._num_batches):
            for prefix, data in from_hosts.apart(next(iterator)):
                while self._again:
                    self._begin_again()
                self._begin(data, prefix)
                # The first step builds the model, and has the first logs.
                if self._logs is None:
                    self.drain()
        return self._logs

    def drain(self) -> None:
        """Wait until no step runs, and raise what any of them raised.

        Raises:
            ConnectionError: If no replica is left.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._again or not self._missed)
                self._raise()
                if not self._again:
                    return
            self._begin_again()

    def _begin_again(self) -> None:
        replica, data = self._again.pop()
        replica.forget()
        self._begin(data)

    def _begin(self, data: Any, prefix: str | None = None) -> None:
        """Start a step on a replica that is free, once it may start.

        Args:
            data: What the step is called with.
            prefix: String, what the devices of the replica that has the data
                begin with. It gets them if it is free.
        """
        with self._changed:
            self._changed.wait_for(self._may_start)
            self._raise()
            for running in self._missed:
                self._missed[running] += 1
            # The first of those that are free, if none has the data.
            self._free.sort(key=lambda one: one.prefix != prefix)
            replica = self._free.pop(0)
            self._missed[replica] = len(self._missed)
        try:
            # Keras has settings by thread, so traces are made in the user's.
            step = replica.step_on(data)
        except BaseException:
            with self._changed:
                self._end(replica)
            raise
        self._pool.submit(self._run, replica, step, data)

    def _may_start(self) -> bool:
        """Say whether a step may start, or an error is to be raised."""
        if self._error is not None:
            return True
        # Each step that runs may be applied before the others, and before the
        # one that starts.
        most = max([*(n + 1 for n in self._missed.values()), len(self._missed)])
        stale = self._max_staleness is not None and most > self._max_staleness
        return bool(self._free) and not (stale and self._missed)

    def _raise(self) -> None:
        """Raise what a step raised, once no other runs any more."""
        if self._error is not None:
            self._changed.wait_for(lambda: not self._missed)
            error, self._error = self._error, None
            self._again.clear()
            raise error

    def _end(self, replica: Replica) -> None:
        del self._missed[replica]
        self._free.append(replica)
        self._changed.notify_all()

    def _run(
        self, replica: Replica, step: Callable[[], Any], data: Any
    ) -> None:
        try:
            logs = step()
        except BaseException as error:
            self._fail(replica, data, error)
            return
        with self._changed:
            self._logs = logs
            self._end(replica)

    def _fail(self, replica: Replica, data: Any, error: BaseException) -> None:
        """Have a step run again, if what failed is that its host is lost."""
        lost = watch.explain(error)
        with self._changed:
            self._end(replica)
            if lost is None or not replica.is_lost() or self._alive == 1:
                self._error = self._error or lost or error
                return
            self._alive -= 1
            self._free.remove(replica)
            self._again.append((replica, data))
            warnings.warn(
                f"{replica.name} is lost, and the others go on. Its step is "
                "run again by another, so that an update of it may be applied "
                f"twice. {lost}",
                stacklevel=1,
            )


def make_replicas(
    model: keras.Model,
    options: StepOptions,
    groups: dict[str, tuple[Any, ...]],
    max_staleness: int | None,
    forget: Callable[[str], None],
) -> Replicas:
    """Return the train function of a model whose replicas do not wait.

    Args:
        model: A cloned `keras.Model`.
        options: `StepOptions` of all clones.
        groups: Dict of the clones by the prefix of their replica's devices.
        max_staleness: Integer or `None`, as for `Replicas`.
        forget: Function of such a prefix, called when that process is lost.
    """

    def step_of(clones: tuple[Any, ...]) -> Callable[[Any], Any]:
        own = options._replace(
            clones=clones,
            towers={},
            looks=None,
            balance=None,
            clocks=None,
            watch=None,
        )
        return lambda data: steps.train_step(model, own, data)

    replicas = [
        Replica(
            prefix,
            step_of(clones),
            functools.partial(at_home.all_variables, model),
            functools.partial(forget, prefix),
        )
        for prefix, clones in groups.items()
    ]
    return Replicas(replicas, max_staleness, model.steps_per_execution)


def get_metrics_result(
    model: keras.Model, made: Replicas
) -> Callable[[], dict[str, Any]]:
    """Return a method that waits for all steps before it tells of metrics.

    Keras asks for them at the end of each epoch, and each step asks for those
    so far.
    """
    method = type(model).get_metrics_result.__get__(model)

    def get() -> dict[str, Any]:
        if not tf.inside_function():
            made.drain()
        return method()

    return get
