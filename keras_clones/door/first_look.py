"""First steps, after which layers may have to be called whole.

Where shards would let a layer come to something else, it is called whole from
then on, and the step runs again on the same batches, from where it began.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras, warn
from keras_clones.calls import looks, own_code, rows_apart, telling
from keras_clones.calls.batches import Kept
from keras_clones.door.step_function import Remembered, StepFunction
from keras_clones.plan import exactness
from keras_clones.tensors import sharding
from keras_clones.tensors.by_host import OfHosts, joined

_PREDICTS = "predict_function"
# How many steps that find nothing to look at can be undone.
_MOST_RUNS = 3


def run(step: StepFunction, found: looks.Looks, data: Any) -> Any:
    """Run a step, and once more if layers have to be called whole.

    Rows are looked at when it is done: a look within a running step would
    wait for the threads that the step runs in.

    Args:
        step: `StepFunction`.
        found: `Looks` of the deployment.
        data: What it gets: an iterator, or a list of batches to predict.

    Raises:
        ValueError: If what was found is refused. The step is undone.
    """
    before = Remembered(step) if _may_undo(step, found) else None
    result = failed = None
    spec = getattr(data, "element_spec", None)
    data = _taken(step, found, data)
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
    batches = _kept(step, found, spec)
    if failed is None or findings or told:
        again = _called_whole(step, told, batches, before, failed)
        if again is not None:
            return again.run()
    for one in told:
        if not one.fails:
            warn.warn(one.message)
    if failed is not None:
        raise failed
    return result


def _may_undo(step: StepFunction, found: looks.Looks) -> bool:
    """Say whether a step may have to be undone, so that it can be.

    Where batches never have rows enough to look at, it is given up.
    """
    found.num_runs += 1
    early = found.num_runs <= _MOST_RUNS
    return step.made.exact or (early and own_code.runs_own_code(step.model))


def _taken(step: StepFunction, found: looks.Looks, data: Any) -> Any:
    """Keep what is taken of data, where no graph takes it.

    A graph takes batches from its iterator, and hands them over when it runs.
    """
    taken: list[Any] = []
    found.batches.taken = taken

    def take() -> Iterator[Any]:
        for batch in data:
            taken.append(batch)
            yield batch

    if step.name == _PREDICTS:
        taken.extend(data)
    elif not isinstance(data, tf.data.Iterator):
        return take()
    elif _keras.takes_batch_first(step.model) and not isinstance(data, OfHosts):
        # There is one, or the data ends here.
        taken.append(next(data))
        return iter(taken)
    return data


def _kept(step: StepFunction, found: looks.Looks, spec: Any) -> Kept:
    """Return the batches that a step took, and let go of them.

    Args:
        step: `StepFunction` that ran.
        found: `Looks` of the deployment.
        spec: Structure of `tf.TypeSpec`s, what its iterator said of them.
    """
    batches, found.batches.kept = found.batches.kept, []
    if step.name == _PREDICTS:
        batches = found.batches.taken
    return Kept(batches, None if step.model.run_eagerly else spec)


def _run(
    step: StepFunction,
    found: looks.Looks,
    data: Any,
    before: Remembered | None,
) -> Any:
    """Run a step, and remember what is made until it assigns it."""
    found.refused = None
    with found.deferred(None if before is None else before.see_new):
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
    findings = found.findings(step.name)
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
    own = step.name.replace("function", "step")
    if exactness.overrides(model, own) or not built:
        # A look would leave a model half built.
        return []
    call = looks.call_of(model, x, step.name == looks.TRAINING)
    return found.at_once(step.made.step_options(), call)


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


class _Again(NamedTuple):
    """A step that is to run again, with layers that are called whole.

    `failed` is what it failed by, if it did.
    """

    step: StepFunction
    layers: list[keras.Layer]
    batches: Kept
    before: Remembered
    message: str
    failed: Exception | None

    def run(self) -> Any:
        """Run it, as it was before if layers cannot be called whole."""
        made = self.step.made
        options = made.options
        self.before.undo()
        try:
            made.call_whole(self.layers)
            made.looks.batches.drawn.again()
            result = self._run_anew()
        except Exception as error:
            self.before.undo()
            if self.failed is not None:
                made.options = options
                made.looks.start_again()
                self.step.make_anew()
                raise self.failed from None
            # Nothing is looked at any more.
            made.options = options._replace(looks=None)
            warn.warn(
                f"{self.message} They cannot be called whole here: {error}"
            )
            return self._run_anew()
        names = [layer.name for layer in self.layers]
        warn.warn(
            f"{self.message} So {names} are called whole from now on: on the "
            "global batch, on the first clone's device. The step was run again "
            "from where it began."
        )
        return result

    def _run_anew(self) -> Any:
        function = self.step.made_anew()
        if self.step.name == _PREDICTS:
            return function(self.batches.batches)
        return function(self.batches.iterator())


def _called_whole(
    step: StepFunction,
    told: Sequence[warn.Found],
    batches: Kept,
    before: Remembered | None,
    failed: Exception | None,
) -> _Again | None:
    """Return a step to run again, if layers have to and can be called whole."""
    made = step.made
    layers = {id(layer): layer for one in told for layer in one.layers}
    for known in made.whole:
        layers.pop(id(known), None)
    # Pieces take turns, so none of them has all rows.
    in_pieces = made.pieces > 1 or made.pieces_grow
    if made.exact or in_pieces or not layers or not batches.batches:
        return None
    if before is None or not before.has(step.model.variables):
        return None
    message = " ".join(one.message for one in told)
    return _Again(step, list(layers.values()), batches, before, message, failed)
