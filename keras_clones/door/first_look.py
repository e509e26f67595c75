"""First steps of training, after which layers may have to be called whole.

Where shards would let a layer come to something else, it is called whole from
then on, and the step runs again on the same batches, from where it began.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, warn
from keras_clones.calls import looks, own_code, rows_apart, telling
from keras_clones.calls.batches import Kept
from keras_clones.door.step_function import Remembered, StepFunction
from keras_clones.plan import exactness
from keras_clones.tensors import sharding
from keras_clones.tensors.by_host import joined


def run(step: StepFunction, found: looks.Looks, args: Sequence[Any]) -> Any:
    """Run a step, and once more if layers have to be called whole.

    Rows are looked at when it is done: a look within a running step would
    wait for the threads that the step runs in.

    Args:
        step: `StepFunction` that trains.
        found: `Looks` of the deployment.
        args: Sequence of what the step function gets.

    Raises:
        ValueError: If what was found is refused. The step is undone.
    """
    needed = step.made.exact or own_code.runs_own_code(step.model)
    before = Remembered(step) if needed else None
    result = failed = None
    data = _taken(found, *args)
    with warn.collecting() as told:
        try:
            result = _run(step, found, data, before)
        except (StopIteration, tf.errors.OutOfRangeError):
            raise
        except Exception as error:
            if found.refused is not None:
                raise found.refused from None
            failed = error
            if message := sharding.disagreement(error):
                told.append(warn.Found(message, [step.model], fails=True))
        findings = _findings(step, found, data, failed)
        if before is not None and not step.model.run_eagerly:
            # A look may have built what no step has come to.
            before.see_new()
        _tell(step, found, findings, before, failed)
    spec = None
    if not step.model.run_eagerly:
        spec = getattr(args[0], "element_spec", None)
    batches, found.batches.kept = Kept(found.batches.kept, spec), []
    if failed is None or findings or told:
        again = _called_whole(step, told, batches, before)
        if again is not None:
            return again()
    for one in told:
        if not one.fails:
            warn.warn(one.message)
    if failed is not None:
        raise failed
    return result


def _taken(found: looks.Looks, data: Any) -> Any:
    """Keep what is taken from an iterator that TensorFlow does not know.

    A graph takes batches of the others, and hands them over when it runs.
    """
    if hasattr(data, "element_spec"):
        return data

    taken: list[Any] = []

    def take() -> Iterator[Any]:
        for batch in data:
            taken.append(batch)
            yield batch

    found.batches.taken = taken
    return take()


def _run(
    step: StepFunction,
    found: looks.Looks,
    data: Any,
    before: Remembered | None,
) -> Any:
    """Run a step, and remember what is made until it assigns it."""
    found.refused = None
    see_new = (lambda: None) if before is None else before.see_new
    with found.deferred(see_new):
        return step.function(data)


def _findings(
    step: StepFunction,
    found: looks.Looks,
    data: Any,
    failed: Exception | None,
) -> list[rows_apart.Finding]:
    """Return the layers in which rows know each other.

    They may be what a step failed by.
    """
    findings = found.findings()
    if failed is None or findings or isinstance(failed, warn.RefusedError):
        return findings
    model, batches = step.model, found.batches
    if model.run_eagerly:
        return []
    try:
        # A step that fails while it is traced has not taken its batch.
        batches.kept = batches.kept or batches.taken or [next(data)]
        batch = joined(batches.kept[0])
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
    except Exception:
        return []
    built = all(layer.built for layer in _keras.layers(model))
    if exactness.overrides(model, "train_step") or not built:
        # A look would leave a model half built.
        return []
    return found.at_once(step.made.step_options(), model, x)


def _tell(
    step: StepFunction,
    found: looks.Looks,
    findings: Sequence[rows_apart.Finding],
    before: Remembered | None,
    failed: Exception | None,
) -> None:
    """Tell of findings, or refuse them and undo the step."""
    try:
        telling.tell(findings, step.made.exact)
    except ValueError as error:
        found.start_again()
        if before is not None:
            before.undo()
        raise error from failed


def _called_whole(
    step: StepFunction,
    told: Sequence[warn.Found],
    batches: Kept,
    before: Remembered | None,
) -> Callable[[], Any] | None:
    """Undo a step, and let layers be called whole, if they can be.

    Returns:
        A function that runs the step again, or `None`.
    """
    model, made = step.model, step.made
    layers = {id(layer): layer for one in told for layer in one.layers}
    for known in made.whole:
        layers.pop(id(known), None)
    # Pieces take turns, so none of them has all rows.
    in_pieces = made.pieces > 1 or made.pieces_grow
    if made.exact or in_pieces or not layers or not batches.batches:
        return None
    if before is None or not before.has(model.variables):
        return None
    before.undo()
    message = " ".join(one.message for one in told)
    return lambda: _run_again(
        step, list(layers.values()), batches, before, message
    )


def _run_again(
    step: StepFunction,
    layers: list[keras.Layer],
    batches: Kept,
    before: Remembered,
    message: str,
) -> Any:
    """Run a step whose layers are called whole, or as before if it fails."""
    made, options = step.made, step.made.options
    names = [layer.name for layer in layers]
    drawn = made.looks.batches.drawn
    try:
        made.call_whole(layers)
        drawn.again()
        result = step.made_anew()(batches.iterator())
    except Exception as error:
        before.undo()
        # Nothing is looked at any more.
        made.options = options._replace(looks=None)
        warn.warn(f"{message} They cannot be called whole here: {error}")
        return step.made_anew()(batches.iterator())
    warn.warn(
        f"{message} So {names} are called whole from now on: on the global "
        "batch, on the first clone's device. The step was run again from "
        "where it began."
    )
    return result
