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
from keras_clones.step.left import Left
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
        self._left = Left()
        self._iterator: Any = iter(())
        self._logs: Any = None
        self._error: BaseException | None = None

    def __call__(self, iterator: Iterator[Any]) -> Any:
        """Start steps on the next batches, and return the latest logs.

        What several hosts have read is a batch of each.
        """
        self._iterator = iterator
        for _ in range(self._num_batches):
            if not self._begin_next(1):
                raise StopIteration
        return self._logs

    def _begin_next(self, batches: int) -> bool:
        """Begin steps on some batches of each host; say whether any had one."""
        found = False
        while True:
            try:
                for prefix, data in from_hosts.read_apart(
                    self._iterator, batches
                ):
                    found = True
                    self._begin_again()
                    self._begin(data, prefix)
                    # The first step builds the model, and has the first logs.
                    if self._logs is None:
                        self.wait()
                return found
            except from_hosts.LostRowsError as error:
                self._lose(*error.args)
                batches = 0

    def drain(self) -> None:
        """Wait until all steps are done, and raise what any of them raised.

        Raises:
            ConnectionError: If no replica is left.
        """
        self.wait()
        # What a lost host had read is read again.
        while self._begin_next(0):
            self.wait()
        from_hosts.settle(self._iterator)

    def wait(self) -> None:
        """Wait until no step runs, and run again those of lost replicas."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._left or not self._missed)
                self._raise()
                if not self._left:
                    return
            self._begin_again()

    def _begin_again(self) -> None:
        """Do without replicas that are lost, and run their steps again."""
        while self._left:
            with self._changed:
                left, self._left = self._left, Left()
            for replica in left.replicas:
                replica.forget()
            for lost in left.unread:
                self._iterator.read_again(lost)
            for data, prefix in left.steps:
                self._begin(data, prefix)

    def _lose(self, prefix: str, why: ConnectionError) -> None:
        """Do without a replica whose host does not read any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: all(one.prefix != prefix for one in self._missed)
            )
            self._raise()
            if not self._drop_lost(why):
                raise why
            self._left.unread.add(prefix)
        self._begin_again()

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
        self._pool.submit(self._run, replica, step, (data, prefix))

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
            self._left = Left()
            raise error

    def _end(self, replica: Replica) -> None:
        del self._missed[replica]
        self._free.append(replica)
        self._changed.notify_all()

    def _run(
        self,
        replica: Replica,
        step: Callable[[], Any],
        given: tuple[Any, str | None],
    ) -> None:
        try:
            logs = step()
        except BaseException as error:
            self._fail(replica, given, error)
            return
        with self._changed:
            self._logs = logs
            self._end(replica)

    def _fail(
        self,
        replica: Replica,
        given: tuple[Any, str | None],
        error: BaseException,
    ) -> None:
        """Have a step run again, if what failed is that a host is lost."""
        lost = watch.explain(error)
        prefix = given[1]
        with self._changed:
            self._end(replica)
            rows_lost = prefix is not None and watch.is_lost(prefix)
            if lost is None or not (replica.is_lost() or rows_lost):
                self._error = self._error or lost or error
            elif not self._drop_lost(lost):
                self._error = self._error or lost
            elif prefix is not None and rows_lost:
                self._left.unread.add(prefix)
            else:
                self._left.steps.append(given)

    def _drop_lost(self, why: ConnectionError) -> bool:
        """Let no step begin on replicas that are lost; say if any is left."""
        lost = [one for one in self._free if one.is_lost()]
        if len(lost) == self._alive:
            return False
        for replica in lost:
            self._alive -= 1
            self._free.remove(replica)
            self._left.replicas.append(replica)
            warnings.warn(
                f"{replica.name} is lost, and the others go on. Its step is "
                "run again by another, so that an update of it may be applied "
                "twice; what its host had read in this epoch "
                "(`worker_dataset`) is read again by another, and may count "
                f"twice. {why}",
                stacklevel=1,
            )
        return True


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
