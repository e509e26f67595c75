"""Call a function once a clone: TF-Slim's `create_clones`."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import placement, sharding
from keras_clones.config import CPU, DeploymentConfig, check_integer
from keras_clones.mirrors import MirrorScope, Reads, assign_merged


class Clone(NamedTuple):
    """One call of a model function: what it returned, its scope and device."""

    outputs: Any
    scope: str
    device: str


class PerClone(NamedTuple):
    """An argument with another value for each clone.

    `rows` are the rows of each clone's shard, or `None` if they count alike.
    """

    values: list[Any]
    rows: list[Any] | None = None


class Clones(list):
    """A list of `Clone`s, and what `optimize_clones` needs to know of them.

    Attributes:
        home: Device string, where gradients are merged and applied.
        rows: List of the rows of each clone's shard, or `None`.
        variables: List of the `keras.Variable`s that the clones read.
        scopes: List of the scopes in which the clones ran.
    """

    home: str
    rows: list[Any] | None
    variables: list[keras.Variable]
    scopes: list[MirrorScope]


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


@tf.autograph.experimental.do_not_convert
def create_clones(
    config: DeploymentConfig,
    model_fn: Callable[..., Any],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[Clone]:
    """Call a function once a clone, in its scope and on its device.

    The function uses models and variables made before it, which every clone
    reads through mirrors. Make them under
    `tf.device(config.variables_device())`. What the first clone assigns to a
    variable counts (the statistics of `BatchNormalization`, say), and metrics
    add up over the clones. AutoGraph does not convert the function.

    Args:
        config: A `DeploymentConfig`.
        model_fn: Function that is called as `model_fn(*args, **kwargs)`. To
            train, it returns a scalar loss, a dict with a `"loss"`, a named
            tuple with a `loss`, or a list or tuple whose first item it is.
        args: List of arguments, the same for every clone, but for those that
            are a `PerClone`, as `split_batch` makes. Defaults to `None`: none.
            An iterator is drawn from once a clone.
        kwargs: Dict of arguments by name, likewise. Defaults to `None`: none.

    Returns:
        A list of one `Clone(outputs, scope, device)` a clone.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a `PerClone` has not one value a clone, the devices are
            not there, or the function makes variables.

    Example:

    >>> import keras, numpy as np
    >>> from keras_clones import DeploymentConfig, create_clones, split_batch
    >>> config = DeploymentConfig(num_clones=2, clone_on_cpu=True)
    >>> layer = keras.layers.Dense(1)
    >>> layer.build((None, 3))
    >>> shards = split_batch(np.ones((5, 3), "float32"), config.num_clones)
    >>> clones = create_clones(config, layer, [shards])
    >>> [(clone.scope, tuple(clone.outputs.shape)) for clone in clones]
    [('clone_0/', (3, 1)), ('clone_1/', (2, 1))]

    Reference:

    - TF-Slim, `deployment/model_deploy.py`.
    """
    check_arguments(config, model_fn, args, kwargs)
    placed = placement.place_clones(config)
    clones = call_clones(config, placed, model_fn, args, kwargs)
    assign_merged(clones.scopes, find_shares(clones.rows, clones), clones.home)
    return clones


def call_clones(
    config: DeploymentConfig,
    placed: Sequence[placement.Clone],
    model_fn: Callable[..., Any],
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> Clones:
    """Call a function once a clone, and assign no variable."""
    # What is inside of a `tf.function` cannot assign variables.
    model_fn = getattr(model_fn, "python_function", model_fn)
    clones = Clones()
    clones.home = config.variables_device()
    clones.rows = _rows(args, kwargs)
    clones.scopes = []
    reads = Reads(clones.home)
    for i, (scope, device) in enumerate(placed):
        mirrored = MirrorScope(reads, i, device)
        with name_scope(scope) as full, tf.device(device), mirrored:
            positional, named = pick(args, kwargs, i)
            outputs = model_fn(*positional, **named)
        clones.append(Clone(outputs, full or "", device))
        clones.scopes.append(mirrored)
    clones.variables = reads.variables
    return clones


def find_shares(
    weights: Sequence[Any] | None, clones: Sequence[Clone]
) -> list[tf.Tensor]:
    """Return each clone's share of the total, from weights of any sum."""
    if weights is None:
        weights = [1] * len(clones)
    weights = list(weights)
    numbers = [w for w in weights if not tf.is_tensor(w)]
    if (
        len(weights) != len(clones)
        or not all(math.isfinite(w) and w >= 0 for w in numbers)
        or (len(numbers) == len(weights) and sum(numbers) == 0)
    ):
        raise ValueError(
            f"Argument `weights` must have {len(clones)} numbers, one a clone, "
            "none of them negative and not all zero. "
            f"Received: weights={weights}"
        )
    # `tf.cast` takes a Python number for a float32.
    cast = [
        tf.cast(w if tf.is_tensor(w) else np.float64(w), tf.float64)
        for w in weights
    ]
    return [w / tf.add_n(cast) for w in cast]


def check_arguments(
    config: DeploymentConfig, model_fn: Any, args: Any, kwargs: Any
) -> None:
    """Say what is wrong with what clones are to be made of, if anything is."""
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
    for value in _flat(args, kwargs):
        lists = [value.values, value.rows] if _is_per_clone(value) else []
        for entries in lists:
            if entries is not None and len(entries) != config.num_clones:
                raise ValueError(
                    "A `PerClone` must have one value a clone. Received: "
                    f"num_clones={config.num_clones}, and a `PerClone` of "
                    f"{len(entries)}"
                )


def pick(
    args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, i: int
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of one clone."""

    def value(argument: Any) -> Any:
        return argument.values[i] if _is_per_clone(argument) else argument

    return (
        [value(argument) for argument in args or ()],
        {name: value(argument) for name, argument in (kwargs or {}).items()},
    )


def _rows(args: Any, kwargs: Any) -> list[Any] | None:
    """Return the rows of the first argument that tells them."""
    shards = [a for a in _flat(args, kwargs) if _is_per_clone(a)]
    return next((s.rows for s in shards if s.rows is not None), None)


def _flat(args: Any, kwargs: Any) -> list[Any]:
    return [*(args or ()), *(kwargs or {}).values()]


def _is_per_clone(value: Any) -> bool:
    return isinstance(value, PerClone)


def name_scope(scope: str) -> contextlib.AbstractContextManager[Any]:
    """Enter the scope of a clone; a single clone has none of its own."""
    return tf.name_scope(scope) if scope else contextlib.nullcontext()


def _as_tensor(value: Any) -> Any:
    known = value is None or tf.is_tensor(value)
    return value if known else tf.convert_to_tensor(value)
