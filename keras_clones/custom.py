"""A model's own train, test or predict step, run in every clone.

The step runs side by side in the clones, each on its shard. Where it applies
gradients or updates a metric, the clones meet: the gradients are merged and
applied once, the metric sees the global batch once, and the step goes on.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import (
    _keras,
    exactness,
    gradients,
    rendezvous,
    sharding,
    state,
)
from keras_clones.placement import Clone
from keras_clones.synchronize import over_clones, synchronized_layers


class _Batch(NamedTuple):
    """A global batch laid out over clones for a step of the user's own."""

    clones: Sequence[Clone]
    home: str
    shards: list[Any]
    sizes: list[sharding.Rows]
    shares: list[tf.Tensor]


def run(
    model: keras.Model,
    name: str,
    data: Any,
    rows: sharding.Rows,
    clones: Sequence[Clone],
    home: str,
    batch_norm: str,
    fractions: Any = None,
) -> Any:
    """Run a model's own step on clones.

    Args:
        model: A built `keras.Model` whose class overrides the step.
        name: String, `"train_step"`, `"test_step"` or `"predict_step"`.
        data: Nest of tensors, what `fit` hands to the step.
        rows: Integer or scalar int32 tensor, the rows of the data.
        clones: Sequence of `Clone`s, no more than there are rows.
        home: Device string, where the variables live.
        batch_norm: String, the policy of `BatchNormalization` layers.
        fractions: Sequence of floats or tensor, the clones' fractions of the
            rows. Defaults to `None`: even ones.

    Returns:
        What the step returns: outputs joined by rows to predict, else logs,
        averaged over the clones by their rows.
    """
    own_step = getattr(type(model), name)
    if len(clones) == 1:
        with tf.device(clones[0].device):
            return own_step(model, data)
    sizes = sharding.shard_sizes(rows, len(clones), fractions)
    total = tf.cast(rows, tf.float64)
    shares = [tf.cast(size, tf.float64) / total for size in sizes]
    batch = _Batch(clones, home, sharding.split(data, sizes), sizes, shares)
    seeds = state.model_variables(model).seeds
    states = [seed.value.read_value() for seed in seeds]

    def step(i: int) -> tuple[Any, _keras.CloneScope]:
        mapping = zip(seeds, state.offset_seeds(states, i), strict=True)
        with _keras.CloneScope(mapping, collect_losses=True) as scope:
            return own_step(model, batch.shards[i]), scope

    layers = synchronized_layers(model, batch_norm)
    with _meeting_points(batch), over_clones(layers, shares):
        returned = rendezvous.run_side_by_side(clones, step)
    outcomes, scopes = zip(*returned, strict=True)
    _merge_state(model, scopes, shares, batch_norm)
    if name == "predict_step":
        return sharding.join(list(outcomes))
    return keras.tree.map_structure(
        lambda *logs: _merge_log(logs, shares), *outcomes
    )


@contextlib.contextmanager
def _meeting_points(batch: _Batch) -> Iterator[None]:
    """Let the clones meet wherever a step changes what they share."""
    graph = None if tf.executing_eagerly() else _graph()

    def meeting(combine: Callable[..., Any]) -> Callable[..., Any]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                if rendezvous.current_clone() is None:
                    return original(self, *args, **kwargs)
                point = f"`{self.name}.{original.__name__}`"
                if graph is not None and _graph() is not graph:
                    raise ValueError(
                        f"{point} was called inside of `tf.cond`, "
                        "`tf.while_loop` or a `tf.function`, where clones "
                        "cannot meet. Call it from the step itself: take "
                        "`@tf.function` off the step, and use "
                        "`gradient_accumulation_steps` of the optimizer "
                        "instead of a condition."
                    )

                def at_home(values: list[Any]) -> list[Any]:
                    with tf.device(batch.home):
                        result = combine(original, self, batch, values)
                    return [result] * len(values)

                return rendezvous.meet(point, (args, kwargs), at_home)

            return method

        return wrap

    points: list[tuple[type, str, Callable[..., Any]]] = [
        (keras.optimizers.Optimizer, "apply", _apply_once),
        (keras.Metric, "update_state", _update_once),
        (keras.Metric, "reset_state", _reset_once),
    ]
    with contextlib.ExitStack() as stack:
        for base, name, combine in points:
            stack.enter_context(_wrapping(base, name, meeting(combine)))
        yield


@contextlib.contextmanager
def _wrapping(
    base: type, name: str, wrap: Callable[[Any], Any]
) -> Iterator[None]:
    """Wrap a method in every class below `base` that has its own."""
    classes, found = [base], {}
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        if name in vars(cls):
            found[cls] = vars(cls)[name]
    # A base of the public class may hold the method.
    for cls in base.__mro__:
        if name in vars(cls):
            found[cls] = vars(cls)[name]
    try:
        for cls, original in found.items():
            setattr(cls, name, wrap(original))
        yield
    finally:
        for cls, original in found.items():
            setattr(cls, name, original)


def _apply_once(
    original: Any, optimizer: Any, batch: _Batch, values: list[Any]
) -> Any:
    """Apply the gradients of the global batch, merged from the clones'."""

    def arguments(
        grads: Any, trainable_variables: Any = None
    ) -> tuple[list[Any], list[Any] | None]:
        known = trainable_variables
        return list(grads), None if known is None else list(known)

    calls = [arguments(*args, **kwargs) for args, kwargs in values]
    variables = calls[0][1]
    if variables is None:
        variables = _keras.optimized_variables(optimizer)
    if not optimizer.built:
        name = keras.name_scope(optimizer.name, caller=optimizer)
        with tf.init_scope(), tf.device(batch.home), name:
            optimizer.build(variables)
    columns = zip(*(grads for grads, _ in calls), strict=True)
    merged = [
        _merge_gradient(variable, column, batch.shares)
        for variable, column in zip(variables, columns, strict=True)
    ]
    return original(optimizer, merged, variables)


def _merge_gradient(
    variable: keras.Variable, column: Sequence[Any], shares: list[tf.Tensor]
) -> Any:
    if _keras.overwrites_with_gradient(variable):
        return gradients.largest(column)
    pairs = zip(column, shares, strict=True)
    return gradients.merge([gradients.scale(g, share) for g, share in pairs])


def _update_once(
    original: Any, metric: Any, batch: _Batch, values: list[Any]
) -> Any:
    """Update a metric with what the clones have of the global batch."""
    args, kwargs = keras.tree.map_structure(
        lambda *leaves: _join_argument(metric, leaves, batch), *values
    )
    return original(metric, *args, **kwargs)


def _reset_once(
    original: Any, metric: Any, batch: _Batch, values: list[Any]
) -> Any:
    return original(metric)


def _join_argument(metric: Any, leaves: Sequence[Any], batch: _Batch) -> Any:
    """Return what one device would give a metric, by what clones give it.

    Rows are joined. A whole number without rows counts something and is added
    up, a floating point one is taken for a mean over the rows.
    """
    first = leaves[0]
    if first is None or isinstance(first, (bool, str, keras.Variable)):
        return first
    if isinstance(first, int):
        return sum(leaves)
    if sharding.is_composite(first):
        return sharding.join(list(leaves))
    tensors = [tf.convert_to_tensor(leaf) for leaf in leaves]
    if tensors[0].shape.rank == 0:
        if tensors[0].dtype.is_integer:
            return tf.add_n(tensors)
        return _merge_log(tensors, batch.shares)
    for tensor, size in zip(tensors, batch.sizes, strict=True):
        if isinstance(size, int) and tensor.shape[0] not in (None, size):
            raise ValueError(
                f"Expected what `{metric.name}.update_state` gets to have a "
                f"row for each of the shard's {size}, or none. Received: a "
                f"tensor of shape {tensor.shape}. Give the metric a tensor "
                "with rows, or a scalar that is a mean over them."
            )
    joined = tf.concat(tensors, axis=0)
    masks = [_keras.get_mask(leaf) for leaf in leaves]
    if masks[0] is not None:
        _keras.set_mask(joined, tf.concat(masks, axis=0))
    return joined


def _merge_state(
    model: keras.Model,
    scopes: Sequence[_keras.CloneScope],
    shares: list[tf.Tensor],
    batch_norm: str,
) -> None:
    """Give every variable that the clones assigned its merged value."""
    seeds = {id(v) for v in state.model_variables(model).seeds}
    assigned = scopes[0].assigned_variables()
    policies = state.merge_policies(model, assigned, batch_norm)
    exactness.warn_of_inexact_state(model, assigned, batch_norm)
    for variable, policy in zip(assigned, policies, strict=True):
        merged = state.merge(
            "first" if id(variable) in seeds else policy,
            variable.value,
            [scope.assigned(variable) for scope in scopes],
            shares,
        )
        variable.assign(merged)


def _merge_log(values: Sequence[Any], shares: list[tf.Tensor]) -> Any:
    """Average a value over the clones, if it is one that can be."""
    first = values[0]
    if not tf.is_tensor(first) or not first.dtype.is_floating:
        return first
    return gradients.average(values, shares)


def _graph() -> Any:
    return tf.compat.v1.get_default_graph()
