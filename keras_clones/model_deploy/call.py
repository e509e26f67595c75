"""A function, and what each clone calls it with: TF-Slim's arguments, split."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones.devices.config import CPU, DeploymentConfig, check_integer
from keras_clones.tensors import sharding


class PerClone(NamedTuple):
    """An argument with another value for each clone.

    `rows` are the rows of each clone's shard, or `None` if they count alike.
    """

    values: list[Any]
    rows: list[Any] | None = None


class Call(NamedTuple):
    """A function, and what each clone calls it with."""

    model_fn: Callable[..., Any]
    args: Sequence[Any] | None
    kwargs: Mapping[str, Any] | None

    def function(self, i: int) -> Callable[[], Any]:
        """Return a function without arguments: the call of one clone."""
        # What is inside of a `tf.function` cannot assign variables.
        model_fn = getattr(self.model_fn, "python_function", self.model_fn)

        def value(argument: Any) -> Any:
            return argument.values[i] if _is_per_clone(argument) else argument

        args = [value(argument) for argument in self.args or ()]
        kwargs = {name: value(a) for name, a in (self.kwargs or {}).items()}
        return functools.partial(model_fn, *args, **kwargs)

    def arguments(self) -> list[Any]:
        """Return all arguments, one after the other."""
        return [*(self.args or ()), *(self.kwargs or {}).values()]

    def rows(self) -> list[Any] | None:
        """Return the rows of the first argument that tells them."""
        shards = [a for a in self.arguments() if _is_per_clone(a)]
        return next((s.rows for s in shards if s.rows is not None), None)

    def given(self, i: int) -> list[tf.Tensor]:
        """Return the tensors with rows that one clone gets by itself."""
        values = [a.values[i] for a in self.arguments() if _is_per_clone(a)]
        leaves = tf.nest.flatten(values, expand_composites=True)
        return [t for t in leaves if tf.is_tensor(t) and sharding.has_rows(t)]


def split_batch(batch: Any, num_clones: int) -> PerClone:
    """Split a global batch into one shard a clone, by rows, on `CPU:0`.

    Args:
        batch: A nest of tensors or arrays with as many rows, at least one a
            clone. The first shards get a row more where it does not divide
            evenly.
        num_clones: Integer, how many clones there are, at least 1.

    Returns:
        A `PerClone`: what `create_clones` takes for one of its arguments. Its
        `rows` let every row of the batch count alike.

    Raises:
        TypeError: If `num_clones` is not an integer.
        ValueError: If the batch has fewer rows than there are clones, or its
            leaves disagree.

    Example:

    >>> import numpy as np
    >>> from keras_clones import split_batch
    >>> shards = split_batch((np.ones((5, 3)), np.ones(5)), 2)
    >>> shards.rows
    [3, 2]
    >>> [tuple(x.shape) for x, y in shards.values]
    [(3, 3), (2, 3)]
    """
    num_clones = check_integer("num_clones", num_clones, 1)
    with tf.device(CPU):
        return _split_batch(batch, num_clones)


def _split_batch(batch: Any, num_clones: int) -> PerClone:
    batch = keras.tree.map_structure(_as_tensor, batch)
    rows = sharding.count_rows({"batch": batch})
    message = (
        "Expected a batch of at least one row a clone: use `drop_remainder="
        "True`, larger batches or fewer clones. Received: "
        f"num_clones={num_clones}"
    )
    if isinstance(rows, int):
        if rows < num_clones:
            raise ValueError(f"{message}, and a batch of {rows} rows.")
    else:
        check = tf.debugging.Assert(rows >= num_clones, [message, rows])
        with tf.control_dependencies([] if check is None else [check]):
            rows = tf.identity(rows)
    sizes = sharding.shard_sizes(rows, num_clones)
    return PerClone(sharding.split(batch, sizes), sizes)


def check_one_replica(config: DeploymentConfig) -> None:
    """Refuse a config that puts clones on each of several replicas.

    What each clone is called with goes by `num_clones`.
    """
    if config.num_replicas > 1:
        raise ValueError(
            "Expected all clones to count in `num_clones`, as each is given "
            "arguments of its own. Pass the devices of all replicas, such as "
            "`DeploymentConfig(2, devices=['/job:worker/task:0/CPU:0', "
            "'/job:worker/task:1/CPU:0'])`. "
            f"Received: num_clones={config.num_clones}, "
            f"num_replicas={config.num_replicas}"
        )


def check_arguments(config: DeploymentConfig, call: Call) -> None:
    """Say what is wrong with what clones are to be made of, if anything is."""
    model_fn, args, kwargs = call
    if not isinstance(config, DeploymentConfig):
        raise TypeError(
            "Argument `config` must be a `DeploymentConfig`. "
            f"Received: config={config!r}"
        )
    if not callable(model_fn):
        raise TypeError(
            "Argument `model_fn` must be a function. "
            f"Received: model_fn={model_fn!r}"
        )
    is_list = args is None or isinstance(args, (list, tuple))
    if not is_list or isinstance(args, PerClone):
        raise TypeError(
            "Argument `args` must be a list of arguments: write `[batch]` to "
            f"pass one. Received: args={args!r}"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            "Argument `kwargs` must be a dict of arguments by name. "
            f"Received: kwargs={kwargs!r}"
        )
    for value in call.arguments():
        lists = [value.values, value.rows] if _is_per_clone(value) else []
        for entries in lists:
            if entries is not None and len(entries) != config.num_clones:
                raise ValueError(
                    "A `PerClone` must have one value a clone. Received: "
                    f"num_clones={config.num_clones}, and a `PerClone` of "
                    f"{len(entries)}"
                )


def _is_per_clone(value: Any) -> bool:
    return isinstance(value, PerClone)


def _as_tensor(value: Any) -> Any:
    known = value is None or tf.is_tensor(value)
    return value if known else tf.convert_to_tensor(value)
