"""A step that runs once, on the global batch: its layer calls run on clones.

While a step runs, the `call` of the model's own layers is swapped on each
layer. The outermost calls split what they get by rows, run once a clone on
its device, and join what they return. Everything inside of a call, and
everything else that the step does, is as on one device. A whole layer, and
one that holds a whole layer, is a part of "everything else".
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls import sharded_call, sharing
from keras_clones.clone.undecorated import inside
from keras_clones.devices.homes import Homes
from keras_clones.exchange.beside_data import beside_data
from keras_clones.plan import at_home, build
from keras_clones.plan.options import StepOptions
from keras_clones.update.by_parts import by_parts
from keras_clones.update.update import faster

_METHODS = ("call", "quantized_call")
_lock = threading.Lock()


class _Active(threading.local):
    """The calls of the step that this thread makes, if it makes one."""

    calls: "sharing.Calls | None" = None


_active = _Active()


def run(
    model: keras.Model,
    options: StepOptions,
    training: bool,
    step: Callable[[], Any],
) -> Any:
    """Run a step whose calls of the model's layers run on the clones.

    Args:
        model: The cloned `keras.Model`.
        options: `StepOptions`.
        training: Boolean, whether it is a training step.
        step: Function without arguments that makes the step.

    Returns:
        What the step returns.
    """
    device = sharing.device_of_step(options)
    held = _active.calls
    layers = _keras.layers(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tf.device(device))
        stack.enter_context(_swapped(layers))
        stack.enter_context(_at_home(model, device, options.homes))
        if training:
            optimizers = _keras.optimizers(model)
            stack.enter_context(faster(optimizers, options.update))
            if options.homes.tables:
                stack.enter_context(by_parts(optimizers))
        _active.calls = made = sharing.Calls(model, options, training)
        stack.callback(setattr, _active, "calls", held)
        result = step()
    made.check_whole()
    return result


@contextlib.contextmanager
def _swapped(layers: Sequence[keras.Layer]) -> Iterator[None]:
    """Let the calls of layers be seen, on these layers and no others.

    Two threads may do so at once with layers that they share.
    """
    with _lock:
        for layer in layers:
            for name in _METHODS:
                _swap(layer, name)
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                for name in _METHODS:
                    _swap_back(layer, name)


def _swap(layer: keras.Layer, name: str) -> None:
    current = vars(layer).get(name)
    if isinstance(current, _Seen):
        current.count += 1
    elif hasattr(layer, name):
        # `vars` passes by the layer's own tracking of what it is given.
        vars(layer)[name] = _Seen(layer, getattr(layer, name), current)


def _swap_back(layer: keras.Layer, name: str) -> None:
    current = vars(layer).get(name)
    if not isinstance(current, _Seen):
        return
    current.count -= 1
    if current.count == 0:
        del vars(layer)[name]
        if current.own is not None:
            vars(layer)[name] = current.own


class _Seen:
    """A method of a layer, which runs on the clones where a step calls it.

    Attributes:
        own: What the layer had under this name itself, or `None`.
        count: Integer, how many steps have it at this time.
    """

    def __init__(self, layer: keras.Layer, method: Any, own: Any) -> None:
        self._layer = layer
        self._method = method
        self.own = own
        self.count = 1
        functools.update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls = _active.calls
        method = self._method if calls is None else inside(self._method)
        if calls is None or calls.busy or _keras.in_scope_without_state():
            return method(*args, **kwargs)
        return sharded_call.call(calls, self._layer, method, args, kwargs)


@contextlib.contextmanager
def _at_home(model: keras.Model, device: str, homes: Homes) -> Iterator[None]:
    """Let what a step makes and updates of the model be at home."""

    def make(method: Any, *args: Any, **kwargs: Any) -> Any:
        with build.outside(homes.main):
            made = method(*args, **kwargs)
        at_home.move_new(model, homes)
        return made

    def apply(method: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(method, "__self__", None)
        with tf.device(homes.main), beside_data(owner, homes):
            return method(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        optimizers = _keras.optimizers(model)
        layers = [layer for layer in _keras.layers(model) if not layer.built]
        parts = [*optimizers, *_keras.compiled_parts(model), *layers]
        for one in _apart(parts):
            stack.enter_context(_around(one, "build", make))
        moves = device != homes.main or homes.divide
        for one in _apart(optimizers) if moves else []:
            stack.enter_context(_around(one, "apply", apply))
        yield


def _apart(found: Sequence[Any]) -> list[Any]:
    return list({id(one): one for one in found}.values())


def _around(
    owner: Any, name: str, function: Callable[..., Any]
) -> contextlib.AbstractContextManager[None]:
    """Call a function with a method, in place of the method, of one object."""
    method = getattr(owner, name)
    calling = functools.wraps(method)(functools.partial(function, method))
    return _keras.replaced(owner, name, calling)
