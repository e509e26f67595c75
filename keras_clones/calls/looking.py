"""One call of a layer, run as one clone and as two do, and compared."""

from typing import Any

import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.calls.arguments import LayerCall
from keras_clones.calls.body import Body
from keras_clones.calls.runs import Ran, compare_state, compare_values, rounding
from keras_clones.calls.undone import remember
from keras_clones.clone import state
from keras_clones.devices.placement import PlacedClone
from keras_clones.exchange import laying_out
from keras_clones.exchange.batch_norm import synchronized_layers
from keras_clones.plan.options import StepOptions
from keras_clones.tensors import sharding

# Weights below are set aside: a gate of zero would hide what it lets through.
_SMALL = 0.05
_MOST_ENTRIES = 10_000_000


def run(call: LayerCall, options: StepOptions, num: int) -> Ran:
    """Run a call on a number of clones."""
    home = options.home
    clones = tuple(PlacedClone(f"clone_{i}", home) for i in range(num))
    shards = sharding.divide(int(call.given.count_rows()), num)
    variables = state.model_variables(call.layer)
    body = Body(call, variables, options._replace(clones=clones))
    read = laying_out.read_variables(variables, ())
    mirrors = [[_without_zeros(value) for value in read]] * num
    data = call.given.split(shards)
    synchronized = synchronized_layers(call.layer, "sync") if num > 1 else []
    with _tf.stop_recording(), tf.device(home):
        group = options.group(clones, training=False)
        seeds = laying_out.read_seeds(variables)
        layout = laying_out.lay_out(shards, group, seeds, data, mirrors)
        undo = remember(_keras.layers(call.layer))

        def run_clone(i: int) -> Any:
            try:
                return body(layout.inputs[i])
            finally:
                # What counts its calls is to come to the same in each. Where
                # clones meet, none is done before the others are on their way.
                if not synchronized:
                    undo()

        ran = laying_out.each(layout, run_clone, synchronized)
    outputs, notes = zip(*ran, strict=True)
    return Ran(layout, list(outputs), list(notes))


def judge(call: LayerCall, options: StepOptions, one: Ran) -> str | None:
    """Say what of a call two clones come to otherwise, if anything."""
    what = differs(call, options, one)
    if what is None or what == "rows":
        return what
    # What is drawn by TensorFlow itself differs from run to run.
    again = run(call, options, 1)
    same = compare_values(one, again, _tolerance(call)) is None
    return what if same else None


def differs(call: LayerCall, options: StepOptions, one: Ran) -> str | None:
    """Say what of a call comes out otherwise, be it from run to run."""
    if int(call.given.count_rows()) < 2:
        return None
    return _compare(call, options, one, _tolerance(call))


def _tolerance(call: LayerCall) -> float:
    return max(rounding(x) for x in _keras.layers(call.layer))


def _compare(
    call: LayerCall, options: StepOptions, one: Ran, tolerance: float
) -> str | None:
    try:
        two = run(call, options, 2)
    except Exception:
        return "rows"
    found = compare_values(one, two, tolerance)
    if found == "kept" and not call.leaves:
        found = None
    if found is None and options.exact:
        found = compare_state(one, two, tolerance, _without_zeros)
    return found


def _without_zeros(value: Any) -> Any:
    """Return the value of a weight, not one that is zero or has diverged.

    Of a step that some shards make NaN, nothing but NaN would be left to see.
    """
    if (
        not value.dtype.is_floating
        or value.shape.num_elements() > _MOST_ENTRIES
    ):
        return value
    if not value.shape.num_elements():
        return value
    finite = tf.math.is_finite(value)
    value = tf.where(finite, value, tf.cast(_SMALL, value.dtype))
    largest = tf.reduce_max(tf.abs(value))
    added = 0.3 if value.shape.rank < 2 else 0.1
    return value + tf.cast(added, value.dtype) if largest < _SMALL else value
