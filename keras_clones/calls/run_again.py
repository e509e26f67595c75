"""A piece's run of a call once more, to run it backward: the same run again.

Going forward, a piece keeps nothing but what it gives back. Going back, it runs
once more with the gradient of that, and keeps what that takes for so long.
"""

from typing import Any

import tensorflow as tf

from keras_clones import _tf
from keras_clones.calls.call_tower import CallTower
from keras_clones.calls.forward import Run, Sharded, run_one
from keras_clones.calls.undone import left_as_it_is
from keras_clones.clone.inputs import TowerInput
from keras_clones.exchange import laying_out
from keras_clones.tensors import traced


def run(
    sharded: Sharded, made: CallTower, inputs: TowerInput, upstream: Any
) -> Run:
    """Run a piece once more, when the gradients of what it gave are there.

    It draws what it drew, by the same seeds, and nothing is assigned.

    Args:
        sharded: `Sharded` call.
        made: `CallTower` of it, with a way back.
        inputs: `TowerInput` of the piece.
        upstream: List of these gradients, `None` where there is none.
    """
    body = sharded.body
    after = [g for g in upstream if isinstance(g, tf.Tensor)]
    with tf.control_dependencies(after):
        if made.tower.concrete is not None:
            with _tf.stop_recording():
                return run_one(made, body, inputs, True)
        with sharded.busy(), left_as_it_is(body.layer):
            return run_one(made, body, inputs, True)


def check(sharded: Sharded, made: CallTower, layout: laying_out.Layout) -> None:
    """Check that a call comes to the same when it runs once more.

    Args:
        sharded: `Sharded` call.
        made: `CallTower` of it, with a way back.
        layout: `Layout` of its pieces.

    Raises:
        ValueError: If it draws by a state of TensorFlow's, or assigns a
            variable of TensorFlow's.
    """
    layer, concrete = sharded.body.layer, made.tower.concrete
    if concrete is None and tf.executing_eagerly():
        with left_as_it_is(layer):
            concrete = sharded.trace(layout, True, True).tower.concrete
    if concrete is None:
        return
    why = None
    if traced.draws_by_state(concrete):
        why = (
            "draws by a state of TensorFlow's. Draw with `keras.random` and a "
            "`keras.random.SeedGenerator` that the layer keeps"
        )
    elif traced.outside_variables(concrete):
        why = (
            "assigns a `tf.Variable`. Make it with `self.add_weight(..., "
            "trainable=False, aggregation=...)`"
        )
    if why is not None:
        raise ValueError(
            "Expected layers that come to the same when they run once more: "
            "where the loss sees all outputs, a piece runs forward, and again "
            "when it runs backward. Received: a call of layer "
            f"{layer.name!r}, which {why}, or pass `pieces=1`."
        )
