"""Call a function once a clone: TF-Slim's `create_clones`."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones.clone import state, tables
from keras_clones.devices import placement
from keras_clones.devices.config import DeploymentConfig
from keras_clones.exchange import bringing_home, laying_out
from keras_clones.model_deploy.call import (
    Call,
    check_arguments,
    check_one_replica,
)
from keras_clones.model_deploy.reads import Mirrors, MirrorScope, rehearse
from keras_clones.tensors import sharding


class Made(NamedTuple):
    """What `optimize_clones` needs to know of how a clone was made.

    `home` is where gradients are merged. `rows` are those of the clone's
    shard, or `None` if clones count alike. `scope` is that of its variables,
    and `given` has the tensors with rows that it got and others did not.
    """

    home: str
    rows: Any
    scope: MirrorScope
    given: list[Any]


class _Clone(NamedTuple):
    outputs: Any
    scope: str
    device: str


class Clone(_Clone):
    """One call of a model function: what it returned, its scope and device."""

    made: Made | None = None


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
    add up over the clones. AutoGraph does not convert the function. Inside of
    a `tf.function` it is traced once more than there are clones, to find out
    which variables it reads: these are sent to the clones together.

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
    call = Call(model_fn, args, kwargs)
    check_arguments(config, call)
    placed = placement.place_clones(config)
    check_one_replica(config)
    home = placement.main_home()
    # In a graph, where all mirrors can travel together.
    travel = any(clone.device != home for clone in placed)
    read: list[keras.Variable] = []
    if travel and not tf.executing_eagerly():
        _, read = rehearse(call.function(0), home)
    clones = call_clones(home, placed, call, read)
    assign_merged(clones)
    return clones


def call_clones(
    home: str,
    placed: Sequence[placement.PlacedClone],
    call: Call,
    foreseen: Sequence[keras.Variable],
) -> list[Clone]:
    """Call a function once a clone, and assign no variable.

    Args:
        home: Device string, where the variables live.
        placed: Sequence of `placement.PlacedClone`s.
        call: `Call` to make.
        foreseen: Sequence of the `keras.Variable`s that are likely to be read.
    """
    rows = call.rows() or [None] * len(placed)
    mirrors = Mirrors(home, placed, foreseen)
    large = [v for v in foreseen if tables.is_large(v)]
    clones = []
    with tables.looked_up_at_home(large):
        for i, (scope, device) in enumerate(placed):
            mirrored = MirrorScope(mirrors, i)
            with name_scope(scope) as full, tf.device(device), mirrored:
                outputs = call.function(i)()
            clone = Clone(outputs, full or "", device)
            clone.made = Made(home, rows[i], mirrored, call.given(i))
            clones.append(clone)
    return clones


def layout_of(home: str, clones: Sequence[Clone]) -> laying_out.Layout:
    """Return where clones are, for what sends and merges what they have."""
    many = len(clones)
    placed = [
        placement.PlacedClone(clone.scope, clone.device) for clone in clones
    ]
    shards = sharding.divide(many, many)
    return laying_out.Layout(home, placed, shards, inputs=[], stay=[])


def scopes_of(clones: Sequence[Clone]) -> list[MirrorScope]:
    """Return the scopes of the clones that `create_clones` made."""
    return [clone.made.scope for clone in clones if clone.made is not None]


def rows_of(clones: Sequence[Clone]) -> list[Any] | None:
    """Return the rows of the clones' shards, `None` if they count alike."""
    rows = [clone.made and clone.made.rows for clone in clones]
    return None if any(number is None for number in rows) else rows


def assign_merged(clones: Sequence[Clone]) -> None:
    """Give every variable that clones assigned one new value.

    As in TF-Slim's `model_deploy`, what the first clone assigned counts. A
    variable's own `aggregation` is honoured: metrics have `"sum"`, so they
    count the rows of all clones.
    """
    scopes = scopes_of(clones)
    assigned = list({id(v): v for s in scopes for v in s.assigned()}.values())
    if not assigned:
        return
    policies = state.merge_policies(
        None,
        assigned,
        state.Policies(alone=len(clones) == 1, otherwise="first"),
        [False] * len(assigned),
    )
    names = [policy.name for policy in policies]
    layout = layout_of(scopes[0].mirrors.home, clones)
    with tf.device(layout.home):
        shares = find_shares(rows_of(clones), clones)

    def changes(i: int) -> state.Changes:
        return state.clone_changes(
            names,
            [scopes[i].mirror(variable) for variable in assigned],
            [scopes[i].get_current_value(variable) for variable in assigned],
            lambda value: value * tf.cast(shares[i], value.dtype),
            lambda value: value,
        )

    by_clone = []
    for i, clone in enumerate(clones):
        with name_scope(clone.scope), tf.device(clone.device):
            by_clone.append(changes(i))
    with tf.device(layout.home):
        averaged, added = bringing_home.add_up(
            layout, [(c.averaged, c.added) for c in by_clone]
        )
        merged = bringing_home.merge_changes(layout, by_clone, averaged, added)
        bringing_home.assign(assigned, merged, list(added))


def find_shares(
    weights: Sequence[Any] | None, clones: Sequence[Clone]
) -> list[Any]:
    """Return each clone's share of the total, from weights of any sum.

    Shares are numbers where the weights are, else float64 tensors.
    """
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
    if len(numbers) == len(weights):
        total = np.float64(sum(weights))
        return [np.float64(w) / total for w in weights]
    # `tf.cast` takes a Python number for a float32.
    cast = [
        tf.cast(w if tf.is_tensor(w) else np.float64(w), tf.float64)
        for w in weights
    ]
    return [w / tf.add_n(cast) for w in cast]


def name_scope(scope: str) -> contextlib.AbstractContextManager[Any]:
    """Enter the scope of a clone; a single clone has none of its own."""
    return tf.name_scope(scope) if scope else contextlib.nullcontext()
