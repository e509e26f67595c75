"""Count what a training step moves over the links between hosts.

    python -m keras_clones launch --replicas 2 --ps 1 tests/cluster/count.py

prints a line of JSON: by number of clones a replica and home of the weights,
the bytes of parameters and what each link carries: bytes, messages, and the
bytes that the summary says, if it says any.
"""

import collections
import json
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import keras_clones
from keras_clones import (
    DeploymentConfig,
    clone_model,
    deployment,
    use_virtual_devices,
)
from keras_clones.benchmark.transfers import count_transfers
from keras_clones.devices.hosts import host_name
from keras_clones.look import footprint
from keras_clones.look.links import bytes_by_link


def layers(width=256):
    hidden = [keras.layers.Dense(width, "relu") for _ in range(4)]
    model = keras.Sequential(
        [keras.Input((width,)), *hidden, keras.layers.Dense(3, "softmax")]
    )
    optimizer = keras.optimizers.AdamW(clipnorm=1.0, use_ema=True)
    return model, optimizer


def links(cluster, clones, variables):
    """Return the bytes of the parameters, and [bytes, messages] by link."""
    model, optimizer = layers()
    config = DeploymentConfig(
        clones,
        num_replicas=len(cluster.replicas),
        num_ps_tasks=len(cluster.ps),
    )
    clone_model(model, config=config, variables=variables)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    batch = np.ones((8, 256), "float32"), np.zeros(8, "int32")
    iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
    step = tf.function(
        lambda: model.train_step(next(iterator)), autograph=False
    )
    made = deployment(model)
    sizes = bytes_by_link(
        made.clones,
        made.inputs_device,
        made.shard_sizes(8),
        footprint.measure(model, made.step_options()),
    )
    shown = repr(made._page(8))
    found = collections.defaultdict(lambda: [0, 0])
    for transfer in count_transfers(step):
        ends = [
            host_name(device.partition("/device:")[0])
            for device in (transfer.source, transfer.target)
        ]
        if ends[0] != ends[1]:
            link = found[" to ".join(ends)]
            link[0] += transfer.bytes
            link[1] += 1
    parameters = sum(4 * np.prod(v.shape) for v in model.trainable_variables)
    for ends, size in sizes.items():
        found[" to ".join(ends)].append(size)
        assert f"{ends[0]} to {ends[1]}" in shown
    return {"parameters": int(parameters), **found}


def main():
    use_virtual_devices(3)
    cluster = keras_clones.connect()
    homes = ["controller", "spread"] + ["greedy"] * bool(cluster.ps)
    found = {
        f"{clones} {variables}": links(cluster, clones, variables)
        for clones in (1, 3)
        for variables in homes
    }
    print("LINKS", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
