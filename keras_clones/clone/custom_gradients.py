"""Functions with gradients of one's own: what they read are mirrors.

`tf.custom_gradient`, and with it `tf.recompute_grad`, finds out which
`tf.Variable`s a function reads, asks its gradient for theirs too, and lets no
other gradient through. A clone reads mirrors, which are tensors: they are
told to it as variables, in a clone alone.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.clone.swaps import Swaps


class Read(NamedTuple):
    """A variable that was read in a clone, and what was read."""

    variable: keras.Variable
    value: tf.Tensor


def of_mirrors() -> AbstractContextManager[None]:
    """Let such functions ask for mirrors, while any clone is traced or runs."""
    return _swaps.made()


@functools.cache
def _functions() -> dict[tuple[Any, str], tuple[Any, Any]]:
    """Return what is swapped by its place, and what takes its place."""
    module = _tf.custom_gradients
    found = {name: getattr(module, name) for name in _tf.DECORATORS}
    return {(module, name): (f, _asking(f)) for name, f in found.items()}


_swaps = Swaps(_functions)


def _asking(decorator: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs a function and tells which mirrors it has read."""

    def run(f: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        readers = getattr(_keras.stateless_scope(), "readers", None)
        if readers is None:
            return decorator(f, args, kwargs)
        again = _keras.in_this_scope_again()

        @functools.wraps(f)
        def reading(*args: Any, **kwargs: Any) -> Any:
            read: list[Read] = []
            readers.append(read)
            try:
                result, gradient = f(*args, **kwargs)
            finally:
                readers.pop()
            trained = [one for one in read if _is_mirror_to_train(one)]
            for one in trained:
                _tf.tell_watchers(one.value)
            return result, _inside(again, gradient, trained)

        return decorator(reading, args, kwargs)

    return run


def _is_mirror_to_train(one: Read) -> bool:
    trains = _keras.tf_variable(one.variable).trainable
    return trains and not isinstance(one.value, tf.Variable)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Let tapes watch mirrors that are read, as they watch variables."""
    readers = _keras.stateless_scope().readers
    readers.append(_Watching())
    try:
        yield
    finally:
        readers.pop()


class _Watching(list[Read]):
    """A reader that tells tapes what is read."""

    def append(self, one: Read) -> None:
        if _is_mirror_to_train(one):
            _tf.tell_tapes(one.value)


def _inside(
    again: Callable[[], Any],
    gradient: Callable[..., Any],
    read: Sequence[Read],
) -> Callable[..., Any]:
    """Return a gradient that runs where its function has run.

    It is asked for the gradients of variables in the order of their names, as
    on one device.
    """
    names = {
        id(one.value): _keras.tf_variable(one.variable).name for one in read
    }

    def run(*upstream: Any, variables: Any = None) -> Any:
        with again(), of_mirrors(), _watched():
            if variables is None:
                return gradient(*upstream)
            order = sorted(
                range(len(variables)),
                key=lambda i: (
                    names.get(id(variables[i]), variables[i].name)
                    if not tf.executing_eagerly()
                    else i
                ),
            )
            of_data, found = gradient(
                *upstream, variables=[variables[i] for i in order]
            )
            if len(found) != len(order):
                return of_data, found
            placed = dict(zip(order, found, strict=True))
            return of_data, [placed[i] for i in range(len(order))]

    return run
