"""`worker_dataset`: the data of a cluster, made and read on each host."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_clones import checks
from keras_clones.cluster.host_datasets import HostsDataset
from keras_clones.devices import hosts
from keras_clones.tensors import by_host


def worker_dataset(
    fn: Callable[[tf.distribute.InputContext], tf.data.Dataset],
) -> tf.data.Dataset:
    """Make a dataset on each host of the cluster, for clones to train on.

    Each replica reads its own data, which does not pass through the
    controller. A step takes one batch of every host that still has one: the
    rows of replica 0, then those of replica 1, and so on. Hosts may run out
    at different times; an epoch ends when all have. Pass what is returned to
    `fit`, `evaluate` or `predict` of a cloned model as it is.

    The function runs in the controller, once a host, and the operations of
    the dataset it returns run on that host: it reads files of the host's.
    What calls Python for each element (`from_generator`, `py_function`) can
    only run on the controller.

    Args:
        fn: Function that returns a batched `tf.data.Dataset`. It gets a
            `tf.distribute.InputContext` with the number of hosts
            (`num_input_pipelines`, `num_replicas_in_sync`) and which of them
            it is for (`input_pipeline_id`). Datasets of all hosts have the
            same `element_spec`, apart from the number of rows.

    Returns:
        A `tf.data.Dataset`. Without a cluster it is that of `fn`, for one
        host.

    Raises:
        TypeError: If `fn` is not callable, or returns something else.
        ValueError: If the datasets of two hosts have other types of elements.

    Example:

    >>> import tensorflow as tf
    >>> from keras_clones import worker_dataset
    >>> def rows(context):
    ...     dataset = tf.data.Dataset.range(10).shard(
    ...         context.num_input_pipelines, context.input_pipeline_id
    ...     )
    ...     return dataset.batch(5)
    >>> [batch.numpy().tolist() for batch in worker_dataset(rows)]
    [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    """
    if not callable(fn):
        raise TypeError(
            "Argument `fn` must be a function of a "
            "`tf.distribute.InputContext` that returns a `tf.data.Dataset`. "
            f"Received: fn={fn!r} (of type {type(fn).__name__})"
        )
    checks.check_backend()
    cluster = hosts.cluster()
    if cluster is None:
        return _made(fn, tf.distribute.InputContext(1, 0, 1), "this machine")
    return _on_hosts(fn, cluster.replicas)


def _on_hosts(fn: Any, replicas: tuple[hosts.Host, ...]) -> HostsDataset:
    def make(index: int, device: str) -> tf.data.Dataset:
        context = tf.distribute.InputContext(
            num_input_pipelines=len(replicas),
            input_pipeline_id=index,
            num_replicas_in_sync=len(replicas),
        )
        with tf.device(device):
            return _made(fn, context, hosts.host_name(device))

    datasets = [make(index, host.cpu) for index, host in enumerate(replicas)]
    specs = [
        tf.nest.map_structure(_with_open_rows, dataset.element_spec)
        for dataset in datasets
    ]
    for host, spec in zip(replicas, specs, strict=True):
        if spec != specs[0]:
            raise ValueError(
                "Expected `fn` to return datasets of the same `element_spec` "
                "for all hosts, apart from the number of rows. Received: "
                f"{specs[0]} for {replicas[0].name}, {spec} for {host.name}. "
                "Let every host give the same structure, types and shapes."
            )
    devices = tuple(host.cpu for host in replicas)
    return HostsDataset(specs[0], devices, datasets, make)


def _made(
    fn: Any, context: tf.distribute.InputContext, host: str
) -> tf.data.Dataset:
    """Return the dataset of one host."""
    try:
        dataset = fn(context)
    except Exception as error:
        _say_where(error, context, host)
        raise
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            "Expected `fn` to return a `tf.data.Dataset`. Received: "
            f"fn(context)={dataset!r} (of type {type(dataset).__name__}) for "
            f"{host}. Return the dataset, batched."
        )
    return dataset


def _say_where(
    error: Any, context: tf.distribute.InputContext, host: str
) -> None:
    """Say in an error which host's dataset was being made."""
    where = (
        f"This was raised while `fn` made the dataset of {host} "
        f"(input_pipeline_id={context.input_pipeline_id} of "
        f"{context.num_input_pipelines})."
    )
    if isinstance(error, tf.errors.OpError):
        error._message = f"{error.message}\n\n{where}"
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n\n{where}", *error.args[1:])
    elif not error.args:
        error.args = (where,)


def _with_open_rows(spec: Any) -> Any:
    """Return a type of a leaf whatever number of rows it has."""
    if not by_host.is_leaf(spec) or not spec.shape.rank:
        return spec
    shape = [None, *spec.shape[1:]]
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(
            shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype
        )
    return type(spec)(shape, spec.dtype)
