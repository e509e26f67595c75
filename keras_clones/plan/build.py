"""Build what a model lacks before its clones run: they make no variables."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.devices import placement
from keras_clones.devices.homes import Homes
from keras_clones.plan import at_home
from keras_clones.plan.options import StepOptions


@contextlib.contextmanager
def outside(home: str) -> Iterator[None]:
    """Make variables at home, and outside of what is being traced.

    TensorFlow traces a function twice that makes variables, and most of the
    time of a first step goes into its trace.
    """

    def at_once(make: Callable[..., Any], **kwargs: Any) -> tf.Variable:
        # A value out of the trace itself has to be lifted out of it first.
        lifted = tf.is_symbolic_tensor(kwargs.get("initial_value"))
        kwargs["experimental_enable_variable_lifting"] = lifted
        return make(**kwargs)

    at_home = tf.device(home)
    with tf.init_scope(), at_home, tf.variable_creator_scope(at_once):
        yield


def build(model: keras.Model, batch: Any, homes: Homes, training: bool) -> None:
    """Create at home what the first step of Keras would create.

    Args:
        model: A `keras.Model`.
        batch: Tuple `(x, y, sample_weight)` of a global batch.
        homes: `Homes` of the variables.
        training: Boolean, whether the optimizer is needed, too.
    """
    optimizer = model.optimizer if training else None
    if _keras.is_built(model) and (optimizer is None or optimizer.built):
        return
    with outside(homes.main):
        if not _keras.is_built(model):
            _look_at(functools.partial(_rehearse, model), *batch)
        if training:
            build_optimizer(model)
    at_home.move_new(model, homes)


def build_by_call(
    layer: keras.Layer,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    homes: Homes,
) -> None:
    """Create at home what the first call of a layer would create.

    Keras has called `build` by now. What it left out is built by a call that
    computes nothing.
    """
    if not all(one.built for one in _keras.layers(layer)):

        def rehearse(args: Any, kwargs: Any) -> None:
            with keras.StatelessScope(), keras.SymbolicScope():
                method(*args, **kwargs)

        with outside(homes.main):
            _look_at(rehearse, args, kwargs)
    at_home.move(layer, homes)


def _look_at(function: Callable[..., None], *args: Any) -> None:
    """Trace a function for arguments of some types, and run nothing."""
    types = tf.nest.map_structure(_type_of, args)
    rehearsal = tf.function(function, autograph=False)
    # A model may have tapes of its own.
    with _tf.recording():
        rehearsal.get_concrete_function(*types)


def _type_of(x: Any) -> Any:
    """Return the type of a tensor, and what is no tensor as it is."""
    if not tf.is_tensor(x):
        return x
    spec = tf.type_spec_from_value(x)
    # Steps of Keras 3.16 know how many rows there are, and losses of no rows
    # do not add up in it.
    if (
        isinstance(spec, tf.TensorSpec)
        and spec.shape.rank
        and 0 in spec.shape[:1]
    ):
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
    return spec


def build_optimizer(model: keras.Model) -> None:
    """Create the variables of a model's optimizer, if it has not."""
    optimizer = model.optimizer
    if optimizer is not None and not optimizer.built:
        with keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(model.trainable_variables)


def _rehearse(model: keras.Model, x: Any, y: Any, sample_weight: Any) -> None:
    with keras.StatelessScope(collect_losses=True), keras.SymbolicScope():
        y_pred = _keras.call(model, x, training=False)
        if model.compiled and y is not None:
            _keras.compute_loss(model, x, y, y_pred, sample_weight, False)
            model.compute_metrics(x, y, y_pred, sample_weight)


def resolve_jit_compile(model: keras.Model, options: StepOptions) -> bool:
    """Say whether XLA compiles what each clone of a compiled model runs.

    Rows of a divided table come from its homes, which compiled code does not
    reach.
    """
    if options.homes.tables:
        return False
    if options.jit_compile != "auto":
        return bool(options.jit_compile)
    # Keras settles its own "auto" by whether the machine has a GPU. Without
    # one, a true value is what the user asked `compile` for.
    on_gpu = all("GPU" in clone.device for clone in options.clones)
    no_gpu = not placement.logical_devices("GPU")
    return bool(model.jit_compile and (on_gpu or no_gpu))
