"""Begin a step of Keras: check its batch, and build what the model lacks."""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones.clone import state
from keras_clones.clone.state import Variables
from keras_clones.plan import exactness, in_pieces, whole
from keras_clones.plan.build import build
from keras_clones.plan.options import StepOptions
from keras_clones.plan.plan import Plan, plan_step
from keras_clones.tensors import sharding
from keras_clones.tensors.by_host import HostBatch


class Step(NamedTuple):
    """One step of Keras on one global batch.

    `hosts` is the batch as the hosts of a cluster have read it, `None` where
    the controller has. What is taken from `batch` then comes from them.
    """

    model: keras.Model
    options: StepOptions
    variables: Variables
    batch: tuple[Any, Any, Any]
    rows: sharding.Rows
    training: bool
    plan: Plan
    hosts: HostBatch | None = None


def begin(
    model: keras.Model,
    options: StepOptions,
    batch: tuple[Any, Any, Any],
    rows: sharding.Rows,
    training: bool,
) -> Step:
    """Check a batch, and build what the model still lacks.

    Args:
        model: A cloned `keras.Model`.
        options: `StepOptions`.
        batch: Tuple `(x, y, sample_weight)` of nests of tensors.
        rows: Integer or scalar int32 tensor, the rows of the batch.
        training: Boolean, whether it is a training step.
    """
    build(model, batch, options.homes, training)
    whole.check(model, options.whole)
    exactness.check_cudnn(model, [clone.device for clone in options.clones])
    in_pieces.check(model, options, training)
    num_clones = sharding.enough(rows, options.num_turns)
    plan = plan_step(model, options, training, num_clones)
    return Step(
        model=model,
        options=options,
        variables=state.model_variables(model),
        batch=batch,
        rows=rows,
        training=training,
        plan=plan,
    )


def unpack(data: Any, with_targets: bool) -> tuple[Any, Any, Any]:
    """Return the inputs, targets and weights of a batch as tensors."""
    data = as_tensors(data)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    return (x, y, sample_weight) if with_targets else (x, None, None)


def as_tensors(data: Any) -> Any:
    """Return the leaves of a batch as tensors; `None` stays `None`."""

    def one(value: Any) -> Any:
        known = value is None or tf.is_tensor(value)
        return value if known else tf.convert_to_tensor(value)

    return keras.tree.map_structure(one, data)
