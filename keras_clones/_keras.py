"""Every private name of Keras that this package reaches, each with its why.

`tests/test_keras_private.py` fails when one of them moves.
"""

import contextlib
import copy
import functools
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from keras_clones._private import reach

# The versions are those that the tests passed on.
_private = functools.partial(
    reach,
    library="Keras",
    installed=keras.__version__,
    known="3.12 to 3.15, and keras-nightly 3.16.0.dev2026102704",
)
# Keras 3.16 no longer has the masks' functions in `backend`.
_get_keras_mask = _private(
    "keras.src.backend.common.masking.get_keras_mask",
    "keras.src.backend.get_keras_mask",
)
_set_keras_mask = _private(
    "keras.src.backend.common.masking.set_keras_mask",
    "keras.src.backend.set_keras_mask",
)
_get_global_attribute = _private(
    "keras.src.backend.common.global_state.get_global_attribute"
)
_set_global_attribute = _private(
    "keras.src.backend.common.global_state.set_global_attribute"
)
_global_seed_generator = _private(
    "keras.src.random.seed_generator.global_seed_generator"
)
_LossFunctionWrapper = _private("keras.src.losses.losses.LossFunctionWrapper")
_EpochIterator = _private("keras.src.trainers.epoch_iterator.EpochIterator")
_ArrayDataAdapter = _private(
    "keras.src.trainers.data_adapters.array_data_adapter.ArrayDataAdapter"
)
_TFEpochIterator = _private(
    "keras.src.backend.tensorflow.trainer.TFEpochIterator"
)
_ALL_METRICS = _private("keras.src.metrics.ALL_OBJECTS_DICT")


def get_mask(tensor: Any) -> Any:
    """Return the mask a tensor carries: no public name reads it."""
    return _get_keras_mask(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Make a tensor carry a mask: no public name writes it."""
    if mask is not None:
        _set_keras_mask(tensor, mask)


def masked_epsilon() -> float:
    """Return what Keras adds to the number of entries that a mask keeps.

    The mean of a masked loss is a sum divided by that number, and Keras 3.12
    adds to it lest it divide by zero; later versions look.
    """
    return keras.config.epsilon() if _adds_epsilon() else 0.0


@functools.cache
def _adds_epsilon() -> bool:
    with tf.init_scope():
        one = tf.ones([1, 1], "float64")
        set_mask(one, tf.constant([True]))
        loss = keras.losses.MeanAbsoluteError(dtype="float64")
        return float(loss(tf.zeros_like(one), one)) != 1.0


def set_tf_variable(variable: keras.Variable, new: tf.Variable) -> None:
    """Give a Keras variable another TensorFlow variable to hold its value."""
    variable._value = new


def reindex_optimizer(optimizer: keras.optimizers.Optimizer) -> None:
    """Let an optimizer find its variables again after some have moved.

    It finds them by the identity of the TensorFlow variables.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    for other in [*getattr(optimizer, "optimizers", []), inner]:
        if other is not None:
            reindex_optimizer(other)
    if not optimizer.built:
        return
    held = optimizer._trainable_variables_indices
    was = {index: key for key, index in held.items()}
    keys = [optimizer._var_key(v) for v in optimizer._trainable_variables]
    optimizer._trainable_variables_indices = {k: i for i, k in enumerate(keys)}
    now = {was[i]: key for i, key in enumerate(keys) if i in was}
    if hasattr(optimizer, "_exclude_from_weight_decay"):
        optimizer._exclude_from_weight_decay = {
            now.get(key, key) for key in optimizer._exclude_from_weight_decay
        }
    # Keras 3.16 says once, as it builds, which of them decay.
    if hasattr(optimizer, "_weight_decay_by_var_key"):
        optimizer._weight_decay_by_var_key = {
            now.get(key, key): decays
            for key, decays in optimizer._weight_decay_by_var_key.items()
        }


@contextlib.contextmanager
def adding_at_once(variables: Iterable[keras.Variable]) -> Iterator[None]:
    """Let what is added to variables be added in one operation.

    Keras reads a variable and assigns the sum. What is added between these
    two by a step that runs at the same time would be lost.
    """

    def adds(variable: keras.Variable) -> Callable[[Any], Any]:
        own = variable.assign_add

        def assign_add(value: Any) -> Any:
            if in_scope_without_state():
                return own(value)
            return tf_variable(variable).assign_add(
                tf.cast(value, tf_variable(variable).dtype)
            )

        return assign_add

    unique = {id(variable): variable for variable in variables}.values()
    with all_replaced((v, "assign_add", adds(v)) for v in unique):
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an object have another attribute under a name for a time."""
    own = vars(owner).get(name)
    # `vars` passes by Keras's own tracking of what an object is given.
    vars(owner)[name] = value
    try:
        yield
    finally:
        vars(owner).pop(name, None)
        if own is not None:
            vars(owner)[name] = own


@contextlib.contextmanager
def all_replaced(attributes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Let objects have other attributes: owners, names and values."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in attributes:
            stack.enter_context(replaced(owner, name, value))
        yield


def wait_by(wait: Callable[[], None]) -> None:
    """Let `fit` and its kin wait by a function for what steps have started."""
    _TFEpochIterator.tf_sync = lambda _: wait()


def unreduced(
    optimizer: keras.optimizers.Optimizer,
) -> contextlib.AbstractContextManager[None]:
    """Keep an optimizer from passing all gradients through one operation.

    It adds them up over the replicas of a strategy, of which there are none,
    and all would go to the one device where that operation is.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return unreduced(inner)
    return replaced(optimizer, "_all_reduce_sum_gradients", list)


# The variables that an optimizer keeps of each weight, in lists in the order
# of the weights, empty or missing where it needs none.
_SLOTS = {
    keras.optimizers.Adadelta: (
        "_accumulated_grads",
        "_accumulated_delta_vars",
    ),
    keras.optimizers.Adagrad: ("_accumulators",),
    keras.optimizers.Adam: ("_momentums", "_velocities", "_velocity_hats"),
    keras.optimizers.AdamW: ("_momentums", "_velocities", "_velocity_hats"),
    keras.optimizers.Adamax: ("_m", "_u"),
    keras.optimizers.Ftrl: ("_accumulators", "_linears"),
    keras.optimizers.Lion: ("_momentums",),
    keras.optimizers.Nadam: ("_momentums", "_velocities"),
    keras.optimizers.RMSprop: (
        "_velocities",
        "_momentums",
        "_average_gradients",
    ),
    keras.optimizers.SGD: ("momentums",),
}
# What an update consists of. Whoever replaces one of them, of a class or of
# an object, has an update of their own.
_UPDATING = (
    *("update_step", "_apply_weight_decay", "_backend_update_step"),
    *("assign", "assign_add", "assign_sub"),
)
_AS_MADE = {
    kind: [getattr(kind, name) for name in _UPDATING] for kind in _SLOTS
}


def updates_as_made(optimizer: keras.optimizers.Optimizer) -> bool:
    """Say whether an optimizer is one of Keras's, with its own update."""
    kind = type(optimizer)
    return (
        kind in _AS_MADE
        and not set(_UPDATING) & vars(optimizer).keys()
        and all(
            getattr(kind, name) is made
            for name, made in zip(_UPDATING, _AS_MADE[kind], strict=True)
        )
    )


def slots_of(
    optimizer: keras.optimizers.Optimizer, variable: tf.Variable
) -> list[tf.Variable | None]:
    """Return what an optimizer of Keras's keeps of a variable.

    They are in the order of their names above, `None` where it needs none.
    """
    index = optimizer._get_variable_index(variable)
    lists = [getattr(optimizer, name, []) for name in _SLOTS[type(optimizer)]]
    return [tf_variable(kept[index]) if kept else None for kept in lists]


def decays(
    optimizer: keras.optimizers.Optimizer, variable: tf.Variable
) -> bool:
    """Say whether an optimizer's weight decay counts for a variable."""
    return optimizer._use_weight_decay(variable)


def momentum_product(optimizer: keras.optimizers.Nadam) -> keras.Variable:
    """Return what Nadam keeps of its momenta: their product so far."""
    return optimizer._u_product


KNOWN_OPTIMIZERS = tuple(_SLOTS)


@contextlib.contextmanager
def in_parts(
    optimizer: keras.optimizers.Optimizer,
    parts_of: Callable[[Any], list[keras.Variable] | None],
) -> Iterator[None]:
    """Let an optimizer update parts of variables in place of these.

    It keeps what it needs of weights in lists in the weights' order, and finds
    a weight's place by the identity of its TensorFlow variable.

    Args:
        optimizer: A built optimizer, also a wrapped one.
        parts_of: Function that returns the parts of a variable, weight or
            slot, and `None` of one that has none.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    with contextlib.ExitStack() as stack:
        if inner is not None:
            stack.enter_context(in_parts(inner, parts_of))
        swapped = _in_parts(optimizer, parts_of).items()
        stack.enter_context(all_replaced((optimizer, *one) for one in swapped))
        yield


def _in_parts(
    optimizer: keras.optimizers.Optimizer,
    parts_of: Callable[[Any], list[keras.Variable] | None],
) -> dict[str, Any]:
    """Return what an optimizer holds of weights, with parts in their place."""
    weights = optimizer._trainable_variables
    parts = {i: parts_of(weight) or [] for i, weight in enumerate(weights)}
    own = {id(v) for v in [*optimizer.variables, *weights, None]}

    def expand(i: int, one: Any) -> list[Any]:
        if not parts[i]:
            return [one]
        return [None] * len(parts[i]) if one is None else parts_of(one) or [one]

    made: dict[str, Any] = {
        name: [part for i, one in enumerate(kept) for part in expand(i, one)]
        for name, kept in vars(optimizer).items()
        if isinstance(kept, list)
        and name != "_variables"
        and len(kept) == len(weights)
        and all(id(one) in own for one in kept)
    }
    key = optimizer._var_key
    every = [p for i, one in enumerate(weights) for p in expand(i, one)]
    made["_trainable_variables_indices"] = {
        key(part): i for i, part in enumerate(every)
    }
    keys = {key(w): [key(p) for p in parts[i]] for i, w in enumerate(weights)}
    for name, kept in vars(optimizer).items():
        if name == "_exclude_from_weight_decay":
            made[name] = {*kept, *(p for k in kept for p in keys.get(k, []))}
        elif name == "_weight_decay_by_var_key":
            decays = {p: d for k, d in kept.items() for p in keys.get(k, [])}
            made[name] = {**kept, **decays}
        elif name == "_exclude_from_weight_decay_cache":
            made[name] = dict(kept)
    return made


def updating(
    optimizer: keras.optimizers.Optimizer,
    update_step: Callable[..., None],
    decay: Callable[..., None],
) -> contextlib.AbstractContextManager[None]:
    """Let functions update the variables of an optimizer.

    Args:
        optimizer: One of Keras's own optimizers.
        update_step: Function of the optimizer's own `update_step` and what it
            gets: gradient, variable and learning rate.
        decay: Function of the optimizer's own weight decay and the variables.
            Each update begins with it, also where nothing decays.
    """
    functions = {"update_step": update_step, "_apply_weight_decay": decay}
    return all_replaced(
        (optimizer, name, functools.partial(function, getattr(optimizer, name)))
        for name, function in functions.items()
    )


def slots(
    optimizer: keras.optimizers.Optimizer,
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Return the variables that an optimizer keeps of weights, with these.

    It keeps them in lists with one entry a weight, in the weights' order.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return slots(inner)
    weights = optimizer._trainable_variables if optimizer.built else []
    own = {id(variable) for variable in optimizer.variables}
    return [
        (slot, weight)
        for kept in vars(optimizer).values()
        if isinstance(kept, list) and len(kept) == len(weights)
        for slot, weight in zip(kept, weights, strict=True)
        if id(slot) in own and slot.shape == weight.shape
    ]


def optimizers(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Return the optimizers of a model: a step of its own may use several."""
    found = [
        one
        for layer in layers(model)
        for value in list(vars(layer).values())
        for one in _optimizers_in(value)
    ]
    return list({id(one): one for one in found}.values())


def _optimizers_in(value: Any) -> list[keras.optimizers.Optimizer]:
    """Return the optimizers in lists, tuples and dicts, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [one for entry in value for one in _optimizers_in(entry)]
    known = isinstance(value, keras.optimizers.Optimizer)
    return [value] if known else []


def optimized_variables(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """Return the variables that a built optimizer updates."""
    return optimizer._trainable_variables


def distribution_strategy(model: keras.Model) -> Any:
    """Return the `tf.distribute` strategy a model was made under."""
    return model._distribute_strategy


def layers(model: keras.Model) -> list[keras.Layer]:
    """Return a model and every layer below: `model.layers` has one level."""
    return list(model._flatten_layers())


def operation_nodes(function: keras.Function) -> list[Any]:
    """Return the nodes of a functional graph that call no layer, in order.

    `operations` has what is called, not what it is called with.
    """
    by_depth = function._nodes_by_depth
    return [
        node
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if not node.is_input and not isinstance(node.operation, keras.Layer)
    ]


def living_models(model: keras.Model) -> list[keras.Model]:
    """Return a model, those below it, and all others that there are.

    What a model shares with others, nothing else in Keras tells. One that is
    just being made is left out.
    """
    # `isinstance` would ask an object for its class, which may run its code.
    found = [o for o in gc.get_objects() if issubclass(type(o), keras.Model)]
    below = [one for one in layers(model) if isinstance(one, keras.Model)]
    made = [
        one
        for one in [*below, *found]
        if {"_layers", "compiled"} <= vars(one).keys()
    ]
    return list({id(one): one for one in made}.values())


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """Return the states of the model's seed generators, the global one last.

    They are among `model.variables`, with nothing that tells them apart.
    """
    states = [
        generator.state
        for layer in layers(model)
        for generator in layer._seed_generators
    ]
    return [*states, _global_seed_state()]


def own_seed_states(layer: keras.Layer) -> list[keras.Variable]:
    """Return the states of a layer's own seed generators."""
    return [generator.state for generator in layer._seed_generators]


def is_seed_state(variable: keras.Variable) -> bool:
    """Say whether a variable is the state of a seed generator, by its name."""
    return variable.name == "seed_generator_state" and variable.shape == (2,)


def _global_seed_state() -> keras.Variable:
    """Return the state behind `keras.random` calls without a seed.

    Made here if need be, since it cannot be made inside a tower, and without
    drawing from the user's `random` stream.
    """
    if _get_global_attribute("global_seed_generator") is None:
        stream = random.getstate()
        with tf.init_scope(), tf.device("/device:CPU:0"):
            _global_seed_generator()
        random.setstate(stream)
    return _global_seed_generator().state


def layer_metrics(model: keras.Model) -> list[keras.Metric]:
    """Return the metrics that layers made, not those given to `compile`."""
    return [metric for layer in layers(model) for metric in own_metrics(layer)]


def own_metrics(layer: keras.Layer) -> list[keras.Metric]:
    """Return the metrics that a layer itself made."""
    return layer._metrics


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Return the variables of a layer that are of no layer below it."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """Return the metric behind the logged `loss`."""
    return model._loss_tracker


def compiled_parts(model: keras.Model) -> list[Any]:
    """Return what a first step builds of the compiled losses and metrics."""
    parts = (model._compile_loss, model._compile_metrics)
    return [part for part in parts if part is not None]


def loss_trackers(model: keras.Model) -> list[keras.metrics.Mean]:
    """Return the metrics behind the logged losses of single outputs."""
    return [] if model._compile_loss is None else model._compile_loss.metrics


def compiled_losses(model: keras.Model) -> list[keras.losses.Loss]:
    """Return the losses given to `compile`, as Keras resolves them.

    It does so in the first step, and tells a cross-entropy by its outputs.
    """
    if model._compile_loss is None:
        return []
    if model._compile_loss._flat_losses is not None:
        return [entry.loss for entry in model._compile_loss._flat_losses]
    found = [
        keras.losses.get(loss)
        for loss in keras.tree.flatten(model.loss)
        if loss is not None and loss not in ("crossentropy", "ce")
    ]
    plain = _LossFunctionWrapper
    return [
        loss if isinstance(loss, keras.losses.Loss) else plain(loss)
        for loss in found
    ]


@contextlib.contextmanager
def wrapping_losses(
    model: keras.Model, wrap: Callable[[int, keras.losses.Loss], Any]
) -> Iterator[None]:
    """Let others be called in place of the compiled losses.

    Args:
        model: A compiled `keras.Model` whose losses are built.
        wrap: Function of a loss and its index to what is called in its place.
    """
    compiled = vars(model._compile_loss)
    held = compiled["_flat_losses"]
    compiled["_flat_losses"] = [
        entry._replace(loss=wrap(i, entry.loss)) for i, entry in enumerate(held)
    ]
    try:
        yield
    finally:
        compiled["_flat_losses"] = held


def loss_function(loss: keras.losses.Loss) -> tuple[Any, dict[str, Any]] | None:
    """Return the function behind a built-in loss, and its arguments."""
    plain = _LossFunctionWrapper
    if not isinstance(loss, plain) or (
        type(loss).call is not plain.call
        or type(loss).__call__ is not plain.__call__
    ):
        return None
    return loss.fn, loss._fn_kwargs


def has_compiled_metrics(model: keras.Model) -> bool:
    """Say whether `compile` got metrics, which need the outputs.

    `compile(metrics=[])` makes a container all the same, with none inside.
    """
    compiled = model._compile_metrics
    return compiled is not None and bool(compiled.metrics or not compiled.built)


def compiled_metrics(model: keras.Model) -> list[keras.Metric]:
    """Return the metrics given to `compile`, as Keras resolved them."""
    if model._compile_metrics is None:
        return []
    return model._compile_metrics.metrics


def metrics_to_build(model: keras.Model) -> list[Any]:
    """Return what `compile` got for metrics, if Keras has not resolved it.

    Names stand for functions and classes. An accuracy or a cross-entropy,
    which Keras tells by its outputs, is left out.
    """
    compiled = model._compile_metrics
    if compiled is None or compiled.built:
        return []
    given = [compiled._user_metrics, compiled._user_weighted_metrics]
    found = [
        _ALL_METRICS.get(metric) if isinstance(metric, str) else metric
        for metric in keras.tree.flatten(given)
    ]
    return [metric for metric in found if metric is not None]


def metric_variables(model: keras.Model) -> list[keras.Variable]:
    """Return the variables of the metrics given to `compile`, each once."""
    variables = [v for m in compiled_metrics(model) for v in m.variables]
    return list({id(v): v for v in variables}.values())


def update_compiled_metrics(
    model: keras.Model, y: Any, y_pred: Any, sample_weight: Any
) -> None:
    """Update the metrics given to `compile`, without reading results."""
    if model._compile_metrics is not None:
        model._compile_metrics.update_state(y, y_pred, sample_weight)


def metric_function(
    metric: keras.metrics.MeanMetricWrapper,
) -> tuple[Any, dict[str, Any]]:
    """Return the function that a metric averages, and its arguments."""
    return metric._fn, metric._fn_kwargs


def call(model: keras.Model, x: Any, training: bool) -> Any:
    """Call a model as Keras's own steps do."""
    if model._call_has_training_arg:
        return model(x, training=training)
    return model(x)


def compute_loss(
    model: keras.Model,
    x: Any,
    y: Any,
    y_pred: Any,
    sample_weight: Any,
    training: bool,
) -> tf.Tensor:
    """Call `compute_loss`, also one without the `training` argument."""
    return model._compute_loss(
        x=x,
        y=y,
        y_pred=y_pred,
        sample_weight=sample_weight,
        training=training,
    )


def as_loss(loss: Any) -> tf.Tensor:
    """Return an entry of `model.losses` as Keras adds it up."""
    loss = tf.convert_to_tensor(loss)
    return (
        loss if loss.dtype.is_floating else tf.cast(loss, keras.config.floatx())
    )


def kind_of_activity_losses() -> str:
    """Say what these are over the rows: sums before Keras 3.14, now means."""
    major, minor = keras.__version__.split(".")[:2]
    return "mean" if (int(major), int(minor)) >= (3, 14) else "sum"


@contextlib.contextmanager
def overriding_losses(model: keras.Model, losses: list[Any]) -> Iterator[None]:
    """Let `model.losses` return the given losses, and no others."""
    clear_losses(model)
    held = model._losses_override
    vars(model)["_losses_override"] = list(losses)
    try:
        yield
    finally:
        vars(model)["_losses_override"] = held


def is_built(model: keras.Model) -> bool:
    """Say whether every layer, the compiled loss and the metrics are built."""
    return all(layer.built for layer in layers(model)) and all(
        part.built for part in compiled_parts(model)
    )


def takes_batch_first(model: keras.Model) -> bool:
    """Say whether a step is traced for a batch that has been taken by then.

    From 3.16 on Keras takes it outside of the graph, where it takes one.
    """
    version = tuple(map(int, keras.__version__.split(".")[:2]))
    return version >= (3, 16) and model.steps_per_execution == 1


# What a thread that runs a part of a model must know of the one before it.
_THREAD_STATE = ("global_seed_generator", "dtype_policy", "current_call_ctx")


def thread_state() -> dict[str, Any]:
    """Return the part of Keras's state that each thread has of its own."""
    return {name: _get_global_attribute(name) for name in _THREAD_STATE}


@contextlib.contextmanager
def thread_state_of(held: dict[str, Any]) -> Iterator[None]:
    """Take over another thread's part of Keras's state."""
    for name, value in held.items():
        _set_global_attribute(name, value)
    yield


def set_moments(layer: keras.layers.BatchNormalization, moments: Any) -> None:
    """Let a layer get the moments of its batch from a function."""
    vars(layer)["_moments"] = moments


def unset_moments(layer: keras.layers.BatchNormalization) -> None:
    """Let a layer compute the moments of its batch itself again."""
    vars(layer).pop("_moments", None)


def overwrites_with_gradient(variable: keras.Variable) -> bool:
    """Say whether a variable is given its gradient for its next value."""
    return getattr(variable, "overwrite_with_gradient", False)


def embedding_table(layer: keras.layers.Embedding) -> keras.Variable:
    """Return the variable of an embedding: `embeddings` may be a tensor."""
    return layer._embeddings


def tf_variable(variable: keras.Variable) -> tf.Variable:
    """Return the TensorFlow variable behind one of Keras.

    `variable.value` is a tensor where Keras casts what it reads.
    """
    return variable._value


def own_losses(layer: keras.Layer) -> list[Any]:
    """Return what a layer passed to `add_loss`, without its sub-layers."""
    return layer._get_own_losses()


def add_own_loss(layer: keras.Layer, loss: Any) -> None:
    """Let a layer have a loss, as `add_loss` in its `call` does."""
    layer._losses.append(loss)


def clear_losses(layer: keras.Layer) -> None:
    """Forget what a layer and its sub-layers passed to `add_loss`."""
    # Before 3.14 Keras looks for them by value, which no graph can tell.
    for one in layers(layer):
        one._loss_ids.clear()
    layer._clear_losses()


def weight_regularizers(model: keras.Model) -> list[Any]:
    """Return the losses of a model's weight regularizers."""
    return model._get_regularization_losses()


def call_context() -> tuple[tuple[str, Any], ...]:
    """Return what outer calls say of inner ones, such as `training`."""
    context = _get_global_attribute("current_call_ctx")
    found = {} if context is None else vars(context)
    return tuple(sorted((k, v) for k, v in found.items() if k != "entry_layer"))


def call_again() -> Callable[[], AbstractContextManager[None]]:
    """Return what lets calls be inner ones of the outer calls there are now.

    These say what `training` is, and an outermost call would clear losses.
    """
    context = _get_global_attribute("current_call_ctx")

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        held = _get_global_attribute("current_call_ctx")
        made = copy.copy(context)
        if made is not None:
            # No call is the outermost, which would end this.
            made.entry_layer = None
        _set_global_attribute("current_call_ctx", made)
        try:
            yield
        finally:
            _set_global_attribute("current_call_ctx", held)

    return again


def stateless_scope() -> Any:
    """Return the scope that maps variables to values here, `None` without."""
    return _get_global_attribute("stateless_scope")


def in_this_scope_again() -> Callable[[], AbstractContextManager[None]]:
    """Return what goes by the scope of now later on, whatever is there then.

    To enter a scope twice would lose what was there before it.
    """
    scope = stateless_scope()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        held = stateless_scope()
        _set_global_attribute("stateless_scope", scope)
        try:
            yield
        finally:
            _set_global_attribute("stateless_scope", held)

    return again


def in_scope_without_state() -> bool:
    """Say whether Keras only looks at what a call would give or build."""
    stateless = stateless_scope()
    symbolic = _get_global_attribute("symbolic_scope")
    return stateless is not None or symbolic is not None


def get_logits(tensor: Any) -> Any:
    """Return the logits that a softmax or sigmoid hangs on its output."""
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Any, logits: Any) -> None:
    """Hang logits on an output, from which Keras's losses take them."""
    if logits is not None:
        tensor._keras_logits = logits


# What Keras itself sets on a layer as it is called.
CHANGING = ("_called", "built")


@functools.cache
def names_of_layers() -> frozenset[str]:
    """Return the names of what Keras keeps on every layer and model."""
    given = keras.Input((1,), name="given", dtype="float32")
    made = keras.layers.Identity(name="made")(given)
    one = keras.Model(given, made, name="one")
    other = keras.Sequential(name="other")
    return frozenset((*vars(one), *vars(other)))


def is_of_user(value: Any) -> bool:
    """Say whether an object is of a class that no library here made."""
    module = type(value).__module__.partition(".")[0]
    return module not in _LIBRARIES


_LIBRARIES = ("keras", "keras_clones", "tensorflow", "numpy", "builtins")


def iterations(
    optimizer: keras.optimizers.Optimizer | None,
) -> keras.Variable | None:
    """Return what counts an optimizer's steps, if it counts all of them."""
    kinds = (keras.optimizers.LossScaleOptimizer,)
    if isinstance(optimizer, kinds) or hasattr(optimizer, "optimizers"):
        return None
    return getattr(optimizer, "_iterations", None)


# What Keras keeps beside models: the generator behind draws without a seed,
# the policy of new layers, and the numbers in the names that it makes up.
_ASIDE = ("global_seed_generator", "dtype_policy", "object_name_uids")


@contextlib.contextmanager
def global_state_kept() -> Iterator[None]:
    """Restore what Keras keeps beside models, whatever is done within.

    Draws without a seed come from a generator of the same state.
    """
    held = {name: _get_global_attribute(name) for name in _ASIDE}
    floatx = keras.config.floatx()
    uids = held["object_name_uids"]
    if uids is not None:
        _set_global_attribute("object_name_uids", uids.copy())
    _set_global_attribute("global_seed_generator", None)
    try:
        if held["global_seed_generator"] is not None:
            state = held["global_seed_generator"].state.numpy()
            _global_seed_state().assign(state)
        yield
    finally:
        keras.config.set_floatx(floatx)
        for name, value in held.items():
            _set_global_attribute(name, value)


@contextlib.contextmanager
def made_in(dtype: str | None) -> Iterator[None]:
    """Make what is made within in a type of numbers; `None` changes none."""
    if dtype is None:
        yield
        return
    policy = _get_global_attribute("dtype_policy")
    floatx = keras.config.floatx()
    keras.config.set_floatx(dtype)
    _set_global_attribute("dtype_policy", keras.DTypePolicy(dtype))
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        _set_global_attribute("dtype_policy", policy)


def global_seed_state() -> keras.Variable:
    """Return the state behind `keras.random` calls without a seed."""
    return _global_seed_state()


def compile_arguments(model: keras.Model) -> dict[str, Any] | None:
    """Return what `compile` got, as it got it: the public way makes text."""
    held = getattr(model, "_compile_config", None)
    return None if held is None else dict(held.config)


def fit_of(
    callback: keras.callbacks.Callback,
) -> tuple[keras.callbacks.CallbackList, Any] | None:
    """Return the callbacks of the `fit` that calls one, and its batches.

    `fit` has both in its local names only, and hands neither on.
    """
    held: keras.callbacks.CallbackList | None = None
    frame: Any = sys._getframe(1)
    while frame is not None:
        names = frame.f_locals
        own = names.get("self")
        if isinstance(own, keras.callbacks.CallbackList) and any(
            one is callback for one in own.callbacks
        ):
            held = own
        epochs = names.get("epoch_iterator")
        if held is not None and isinstance(epochs, _EpochIterator):
            return held, epochs
        frame = frame.f_back
    return None


def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Let `fit` begin with another epoch than its argument says."""
    model._initial_epoch = epoch


def build_all(model: keras.Model, spec: Any) -> None:
    """Make all variables of a model, its metrics and its optimizer.

    Args:
        model: Model.
        spec: Structure of `tf.TensorSpec`, of a batch of its data.
    """
    kinds = (tf.TensorSpec, tf.RaggedTensorSpec, tf.SparseTensorSpec)
    # A part of the batch that is left out is an optional.
    model._symbolic_build(
        data_batch=keras.tree.map_structure(
            lambda one: one if isinstance(one, kinds) else None, spec
        )
    )


def begin_with_logs(model: keras.Model, logs: dict[str, Any]) -> None:
    """Let an epoch that has no step left end with the logs of its last."""
    held = model._get_metrics_result_or_logs

    def with_logs(of_step: Any) -> Any:
        vars(model).pop("_get_metrics_result_or_logs", None)
        return held(of_step or logs)

    vars(model)["_get_metrics_result_or_logs"] = with_logs


def replace_batches(
    epochs: Any, iterators: Any, wrap: Callable[[Any], Iterator[Any]]
) -> None:
    """Let the batches of a `fit` come from elsewhere.

    Args:
        epochs: The batches of a `fit`, as `fit_of` has them.
        iterators: Iterable that makes an iterator of all batches.
        wrap: Function that gets what makes the first and the last step and
            the iterator of each execution of an epoch, and gives them on.
    """
    held = epochs._enumerate_iterator
    epochs._get_iterator = lambda: iterators
    epochs._enumerate_iterator = lambda: wrap(held)


def dataset_of(epochs: Any) -> Any:
    """Return the dataset behind the batches of a `fit`."""
    return epochs._distributed_dataset


def open_iterator(epochs: Any) -> Any:
    """Return the iterator that the next epoch goes on with, if any."""
    return epochs._current_iterator if epochs.steps_per_epoch else None


def set_open_iterator(epochs: Any, iterator: Any, seen: int) -> None:
    """Let the next epoch go on with an iterator, some batches of it seen."""
    epochs._current_iterator = iterator
    epochs._steps_seen = seen


def set_known_batches(epochs: Any, number: int | None) -> None:
    """Say how many batches there are, as the first epoch found out."""
    if epochs._num_batches is None:
        epochs._num_batches = number


def known_batches(epochs: Any) -> int | None:
    """Return how many batches there are, if that is known by now."""
    return epochs._num_batches


def is_of_arrays(epochs: Any) -> bool:
    """Say whether the data of a `fit` are arrays that it shuffles."""
    adapter = epochs.data_adapter
    return isinstance(adapter, _ArrayDataAdapter) and bool(adapter._shuffle)


def shuffle_arrays(epochs: Any, shuffle: Callable[[Any], Any]) -> Any:
    """Return the dataset of arrays that a function shuffles.

    Keras's own order comes from a kernel of TensorFlow's, which is either
    another in every process or the same in every epoch.

    Args:
        epochs: The batches of a `fit`.
        shuffle: Function of a tensor of row numbers.
    """
    adapter = epochs.data_adapter
    if hasattr(adapter, "_tf_shuffle"):
        # Keras 3.16 has a method for it.
        with replaced(adapter, "_tf_shuffle", shuffle):
            return adapter.get_tf_dataset()
    held, mine = tf.random.shuffle, threading.get_ident()

    def instead(value: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != mine:
            return held(value, *args, **kwargs)
        return shuffle(value)

    tf.random.shuffle = instead
    try:
        return adapter.get_tf_dataset()
    finally:
        tf.random.shuffle = held


def py_dataset_of(epochs: Any) -> keras.utils.PyDataset | None:
    """Return the `PyDataset` behind the batches of a `fit`, if it is one."""
    return getattr(epochs.data_adapter, "py_dataset", None)


def shuffles_py_dataset(epochs: Any) -> str | None:
    """Say who draws the order of a `PyDataset`: Keras, its workers, none."""
    adapter = epochs.data_adapter
    if py_dataset_of(epochs) is None or not adapter.shuffle:
        return None
    if adapter.py_dataset.num_batches is None:
        return None
    return "Keras" if adapter.enqueuer is None else "workers"


def order_py_dataset(epochs: Any, order: Callable[[int], Any]) -> None:
    """Let a function of their number say the order of the batches."""
    adapter = epochs.data_adapter

    def batches() -> Iterator[Any]:
        for index in order(adapter.py_dataset.num_batches):
            yield adapter._standardize_batch(adapter.py_dataset[int(index)])

    adapter._finite_generator = batches
