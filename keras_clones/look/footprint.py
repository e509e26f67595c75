"""How many bytes a model takes on the devices, and moves in a step."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone.state import Variables, model_variables
from keras_clones.plan import exactness
from keras_clones.plan.options import StepOptions
from keras_clones.plan.plan import Plan, plan_step

# What a clone gets besides: its share of the rows, the loss scale and its
# index.
_SHARE = 24
# What Keras makes of whole numbers from NumPy: int64.
_CLASS = 8
# What `Embedding` makes of its ids: int32.
_ID = 4


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
        devices: Dict of device strings by the part that lives there, one of
            `"trainable"`, `"others"` and `"slots"`.
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
    devices: dict[str, list[str]]


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
    mirrored = [
        v for v in variables.trainable + variables.others if id(v) not in tables
    ]
    gradients = _gradients(model, variables)
    received, sent = None, None
    if not exactness.overrides(model, "train_step"):
        received, sent = _flows(model, plan, tables)
        received = received._replace(
            fixed=received.fixed + num_bytes([*mirrored, *variables.seeds])
        )
        sent = add(sent, gradients)
    inputs = _row_bytes(getattr(model, "inputs", None))
    targets = _target_bytes(model)
    return Footprint(
        trainable=num_bytes(variables.trainable),
        others=num_bytes(others),
        slots=num_bytes(slots) if has_slots else None,
        mirrors=num_bytes(mirrored),
        gradients=gradients,
        a_row=_total(inputs, targets),
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
    )


def add(one: Flow, other: Flow) -> Flow:
    """Return the bytes of both."""
    return Flow(one.fixed + other.fixed, _total(one.a_row, other.a_row))


def _total(*sizes: int | None) -> int | None:
    """Return the sum of some bytes, if all of them are known."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


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
            ids = _ids(layer)
            rows.append(ids and ids * (_ID + _table_row(table)))
    dense = [v for v in variables.trainable if id(v) not in sparse]
    return Flow(num_bytes(dense), _total(*rows))


def _flows(
    model: keras.Model, plan: Plan, tables: dict[int, keras.Variable]
) -> tuple[Flow, Flow]:
    """Return what crosses to and from a clone, but mirrors and gradients."""
    inputs = _row_bytes(getattr(model, "inputs", None))
    targets = _target_bytes(model)
    outputs, gradients = _output_bytes(model)
    rows, ids = _looked_up(model, tables)
    statistics = [
        v
        for layer in _keras.layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        for v in layer.non_trainable_variables
    ]
    in_clones = plan.loss_in_clones
    metrics = _keras.metric_variables(model) if plan.metrics_in_clones else []
    out = _total(inputs, rows, targets if in_clones else gradients)
    if in_clones:
        outputs = _row_bytes(getattr(model, "outputs", None))
    back = _total(ids, outputs if plan.outputs_leave else 0)
    return (
        Flow(_SHARE, out),
        Flow(num_bytes([*statistics, *metrics]), back),
    )


def _plan(model: keras.Model, options: StepOptions) -> Plan:
    """Plan a training step, by the outputs too where the model has them."""
    plan = plan_step(model, options, True, len(options.clones))
    outputs = getattr(model, "outputs", None)
    if outputs is None or not model.compiled:
        return plan
    masks = [_keras.get_mask(output) for output in outputs]
    types = [tf.TensorSpec(output.shape, output.dtype) for output in outputs]
    return plan.knowing(exactness.why_not_on((), types, masks))


def _output_bytes(model: keras.Model) -> tuple[int | None, int | None]:
    """Return the bytes of outputs that leave a clone, and of their gradients.

    A softmax or sigmoid has its logits beside it, from which Keras computes
    cross-entropies; what is masked has its mask. Both are for a row.
    """
    outputs = getattr(model, "outputs", None)
    if outputs is None:
        return None, None
    losses = _losses_of_outputs(model, outputs)
    leave: list[int | None] = []
    back: list[int | None] = []
    for output, loss in zip(outputs, losses, strict=True):
        size = _row_bytes([output])
        by_logits = _has_logits(output) and "crossentropy" in _name(loss)
        apart = by_logits and exactness.needs_outputs(model)
        mask = _keras.get_mask(output)
        leave += [size, size if apart else 0]
        leave.append(0 if mask is None else _row_bytes([mask]))
        back.append(0 if loss is None else size)
    return _total(*leave), _total(*back)


def _has_logits(output: Any) -> bool:
    """Say whether Keras hangs logits on an output."""
    layer, _, index = output._keras_history
    if isinstance(layer, keras.Model):
        return _has_logits(layer.outputs[index])
    squash = (keras.activations.softmax, keras.activations.sigmoid)
    return isinstance(layer, keras.layers.Softmax) or (
        getattr(layer, "activation", None) in squash
    )


def _looked_up(
    model: keras.Model, tables: dict[int, keras.Variable]
) -> tuple[int | None, int | None]:
    """Return the bytes of the rows that large tables send to a clone.

    The second number is that of the ids, which come home to look them up.
    Both are for a row of the batch.
    """
    rows, total = 0, 0
    for layer in _keras.layers(model) if tables else []:
        if not isinstance(layer, keras.layers.Embedding):
            continue
        table = tables.get(id(_keras.embedding_table(layer)))
        if table is not None:
            ids = _ids(layer)
            if ids is None:
                return None, None
            rows += ids * _table_row(table)
            total += ids * _ID
    return rows, total


def _ids(layer: keras.layers.Embedding) -> int | None:
    """Return how many rows of its table a layer looks up, a row of a batch.

    That is of its first call, where a model calls a layer several times.
    """
    try:
        return _elements(layer.input)
    except (AttributeError, ValueError):
        return None


def _table_row(table: keras.Variable) -> int:
    return table.shape[-1] * tf.as_dtype(table.dtype).size


def _target_bytes(model: keras.Model) -> int | None:
    """Return the bytes of a row of the targets, going by the losses."""
    outputs = getattr(model, "outputs", None)
    if outputs is None or not model.compiled:
        return None if outputs is None else 0
    losses = _losses_of_outputs(model, outputs)
    total = 0
    for output, loss in zip(outputs, losses, strict=True):
        elements = _elements(output)
        if elements is None:
            return None
        if loss is None:
            continue
        if "sparse" in _name(loss) and len(output.shape) > 1:
            total += elements // output.shape[-1] * _CLASS
        else:
            total += elements * tf.as_dtype(output.dtype).size
    return total


def _losses_of_outputs(model: keras.Model, outputs: Sequence[Any]) -> list[Any]:
    """Return what `compile` got for a loss of each output."""
    losses = keras.tree.flatten(model.loss) if model.compiled else []
    if len(losses) == len(outputs):
        return losses
    return [losses[0] if losses else None] * len(outputs)


def _name(loss: Any) -> str:
    """Return what a loss is called, in small letters and one word."""
    name = f"{type(loss).__name__} {getattr(loss, '__name__', loss)}"
    return name.lower().replace("_", "")


def _row_bytes(tensors: Sequence[Any] | None) -> int | None:
    """Return the bytes of a row of symbolic tensors, if they are fixed."""
    if tensors is None:
        return None
    sizes = [(_elements(t), tf.as_dtype(t.dtype).size) for t in tensors]
    return _total(*(n and n * size for n, size in sizes))


def _elements(tensor: Any) -> int | None:
    """Return the elements of a row of a symbolic tensor, if they are fixed."""
    shape = tensor.shape[1:]
    unknown = tensor.dtype == "string" or getattr(tensor, "sparse", False)
    return None if unknown or None in shape else math.prod(shape)


def num_bytes(variables: Any) -> int:
    """Return the bytes of variables."""
    return sum(
        math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables
    )


def _devices(variables: Sequence[keras.Variable]) -> list[str]:
    """Return where variables live, each device once."""
    specs = [tf.DeviceSpec.from_string(v.value.device) for v in variables]
    return sorted({f"/device:{s.device_type}:{s.device_index}" for s in specs})
