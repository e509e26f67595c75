"""How many bytes a model takes on the devices, and moves in a step."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone.state import Variables, model_variables
from keras_clones.devices.divided import parts_of
from keras_clones.devices.moving import device_of, home_of
from keras_clones.look import row_bytes
from keras_clones.plan import exactness
from keras_clones.plan.options import StepOptions
from keras_clones.plan.plan import Plan, plan_step

# What a clone gets besides: its share of the rows, the loss scale and its
# index.
_SHARE = 24
_ID = row_bytes.ID_BYTES


class Flow(NamedTuple):
    """Bytes that a training step makes, or moves to or from a clone.

    `fixed` are those that do not depend on the batch. `a_row` are those of
    each row of the shard, `None` where the model does not tell.
    """

    fixed: int
    a_row: int | None

    def of(self, rows: int) -> int | None:
        """Return the bytes of a shard of so many rows, if they are known."""
        return None if self.a_row is None else self.fixed + rows * self.a_row


class DividedRows(NamedTuple):
    """Bytes of a divided table that a step moves, for a row of the batch.

    `homes` are device strings, each of which has about as many of the rows.
    `received` are bytes of rows to a clone, `sent` those of ids and gradients
    from it.
    """

    homes: tuple[str, ...]
    received: int
    sent: int


class Footprint(NamedTuple):
    """Bytes of a model's parts, and of what a step moves.

    Attributes:
        trainable: Integer, of the trainable variables.
        others: Integer, of the other variables of the model.
        slots: Integer, of the optimizer's variables, `None` if it has none
            yet.
        mirrors: Integer, of what a clone gets of the variables: all but
            large embedding tables.
        gradients: `Flow`, of the gradients that a clone computes.
        a_row: Integer, of a row of the batch, `None` if that is not known.
        received: `Flow` to a clone on a device of its own, `None` if the
            model has a train step of its own.
        sent: `Flow` from such a clone, likewise.
        seeds: Integer, of the seeds, which the first clone sends back.
        compiled: Boolean, whether the model has an optimizer.
        settled: Boolean, whether a first step has settled where the loss and
            the metrics are computed.
        devices: Dict of bytes by device string, by the part, one of
            `"trainable"`, `"others"` and `"slots"`.
        by_home: Dict of the bytes of mirrors and of dense gradients, by the
            device string of the home of the weights.
        divided: List of the `DividedRows` of tables whose rows are divided.
    """

    trainable: int
    others: int
    slots: int | None
    mirrors: int
    gradients: Flow
    a_row: int | None
    received: Flow | None
    sent: Flow | None
    seeds: int
    compiled: bool
    settled: bool
    devices: dict[str, dict[str, int]]
    by_home: dict[str, tuple[int, int]]
    divided: list[DividedRows]


def is_built(model: keras.Model) -> bool:
    """Say whether all variables of a model are there.

    A functional model has them from the start, whatever its layers say.
    """
    return getattr(model, "inputs", None) is not None or all(
        layer.built for layer in _keras.layers(model)
    )


def measure(model: keras.Model, options: StepOptions) -> Footprint:
    """Return the bytes of a built model's parts.

    What depends on the batch follows from the model's inputs, outputs and
    losses, so it is an estimate.

    Args:
        model: A built `keras.Model`, compiled or not.
        options: `StepOptions` of its deployment.
    """
    variables = model_variables(model)
    compiled = model.compiled and model.optimizer is not None
    has_slots = compiled and model.optimizer.built
    slots = list(model.optimizer.variables) if has_slots else []
    others = variables.others + variables.seeds
    plan = _plan(model, options)
    tables = {id(table): table for table in plan.tables}
    mirrored = [v for v in variables.weights if id(v) not in tables]
    gradients = _gradients(model, variables)
    received, sent = None, None
    if not exactness.overrides(model, "train_step"):
        received, sent = _flows(model, plan, tables)
        received = received._replace(
            fixed=received.fixed + num_bytes([*mirrored, *variables.seeds])
        )
        sent = add(sent, gradients)
    inputs = row_bytes.of_tensors(getattr(model, "inputs", None))
    targets = row_bytes.of_targets(model)
    return Footprint(
        trainable=num_bytes(variables.trainable),
        others=num_bytes(others),
        slots=num_bytes(slots) if has_slots else None,
        mirrors=num_bytes(mirrored),
        gradients=gradients,
        a_row=row_bytes.total_of(inputs, targets),
        received=received,
        sent=sent,
        seeds=num_bytes(variables.seeds),
        compiled=compiled,
        settled=not model.compiled or _keras.is_built(model),
        devices={
            "trainable": _devices(variables.trainable),
            "others": _devices(others),
            "slots": _devices(slots),
        },
        by_home=_by_home(mirrored, variables.trainable),
        divided=_divided(model),
    )


def _divided(model: keras.Model) -> list[DividedRows]:
    """Return what moves of divided tables, where the look-ups are known."""
    found = []
    for layer in _keras.layers(model):
        if not isinstance(layer, keras.layers.Embedding) or not layer.built:
            continue
        table = _keras.embedding_table(layer)
        homes, ids = home_of(table), row_bytes.num_ids(layer)
        if isinstance(homes, tuple) and ids is not None:
            rows, its = ids * row_bytes.of_table(table), ids * _ID
            back = rows + its if table.trainable else 0
            found.append(DividedRows(homes, rows, its + back))
    return found


def _by_home(
    mirrored: Sequence[keras.Variable], trainable: Sequence[keras.Variable]
) -> dict[str, tuple[int, int]]:
    """Return the bytes of mirrors, and of gradients, by home."""
    trained = {id(v) for v in trainable}
    sent = _devices(mirrored)
    back = _devices([v for v in mirrored if id(v) in trained])
    return {home: (size, back.get(home, 0)) for home, size in sent.items()}


def add(one: Flow, other: Flow) -> Flow:
    """Return the bytes of both."""
    return Flow(
        one.fixed + other.fixed, row_bytes.total_of(one.a_row, other.a_row)
    )


def _gradients(model: keras.Model, variables: Variables) -> Flow:
    """Return the bytes of a clone's gradients.

    That of an embedding has the rows that were looked up, with their ids. A
    regularizer makes it a dense one.
    """
    trained = {id(v): v for v in variables.trainable}
    sparse: dict[int, keras.Variable] = {}
    rows: list[int | None] = []
    for layer in _keras.layers(model):
        if not isinstance(layer, keras.layers.Embedding):
            continue
        table = _keras.embedding_table(layer)
        if table.regularizer is None and id(table) in trained:
            sparse[id(table)] = table
            ids = row_bytes.num_ids(layer)
            rows.append(
                ids and ids * (row_bytes.ID_BYTES + row_bytes.of_table(table))
            )
    dense = [v for v in variables.trainable if id(v) not in sparse]
    return Flow(num_bytes(dense), row_bytes.total_of(*rows))


def _flows(
    model: keras.Model, plan: Plan, tables: dict[int, keras.Variable]
) -> tuple[Flow, Flow]:
    """Return what crosses to and from a clone, but mirrors and gradients."""
    inputs = row_bytes.of_tensors(getattr(model, "inputs", None))
    targets = row_bytes.of_targets(model)
    outputs, gradients = row_bytes.of_outputs(model)
    rows, ids = row_bytes.looked_up(model, tables)
    statistics = [
        v
        for layer in _keras.layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        for v in layer.non_trainable_variables
    ]
    in_clones = plan.loss_in_clones
    metrics = _keras.metric_variables(model) if plan.metrics_in_clones else []
    others = targets if in_clones else gradients
    # XLA's clones are given rows with the ids, others ask for them.
    to, back_home = (ids, 0) if plan.jit_compile else (0, ids)
    out = row_bytes.total_of(inputs, rows, to, others)
    if in_clones:
        outputs = row_bytes.of_tensors(getattr(model, "outputs", None))
    back = row_bytes.total_of(back_home, outputs if plan.outputs_leave else 0)
    return (
        Flow(_SHARE, out),
        Flow(num_bytes([*statistics, *metrics]), back),
    )


def _plan(model: keras.Model, options: StepOptions) -> Plan:
    """Plan a training step, by the outputs too where the model has them."""
    plan = plan_step(model, options, True, options.num_turns)
    outputs = getattr(model, "outputs", None)
    if outputs is None or not model.compiled:
        return plan
    masks = [_keras.get_mask(output) for output in outputs]
    types = [tf.TensorSpec(output.shape, output.dtype) for output in outputs]
    return plan.knowing(
        exactness.why_not_on((), types, masks, options.watch is None)
    )


def num_bytes(variables: Any) -> int:
    """Return the bytes of variables."""
    return sum(
        math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables
    )


def _devices(variables: Sequence[keras.Variable]) -> dict[str, int]:
    """Return the bytes of variables by the device where they live."""
    found: dict[str, int] = {}
    for variable in variables:
        for part in parts_of(variable) or [variable]:
            device = device_of(part)
            found[device] = found.get(device, 0) + num_bytes([part])
    return dict(sorted(found.items()))
