"""Step functions of a cloned model that can fail without harm."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls import looks, rows_apart, undone
from keras_clones.cluster import watch
from keras_clones.door.deployed import Deployment
from keras_clones.exchange import errors
from keras_clones.plan import exactness
from keras_clones.tensors import sharding
from keras_clones.tensors.by_host import joined
from keras_clones.warn import RefusedError


class StepFunction(NamedTuple):
    """A step function of a cloned model, and what it takes to run it again.

    Attributes:
        model: A cloned `keras.Model`.
        made: Its `Deployment`.
        name: String, which of its step functions it is.
        function: The step function itself.
        variables: Function that returns all variables that it may change.
    """

    model: keras.Model
    made: Deployment
    name: str
    function: Callable[..., Any]
    variables: Callable[[], Iterable[keras.Variable]]


def guard(step: StepFunction) -> Callable[..., Any]:
    """Return a step function that can be called again after it has failed.

    A `tf.function` whose first trace failed cannot be, so it is made anew.
    """
    made = step.made

    def run(*args: Any) -> Any:
        if step.name != "train_function":
            return step.function(*args)
        if made.looks is None or made.looks.is_settled:
            return step.function(*args)
        return _run_and_look(step, made.looks, args)

    def step_function(*args: Any) -> Any:
        try:
            if made.config.sync:
                watch.check()
            result = run(*args)
            made.report_balance()
            return result
        except (StopIteration, tf.errors.OutOfRangeError):
            raise
        except Exception as error:
            setattr(step.model, step.name, None)
            if message := sharding.disagreement(error):
                raise ValueError(message) from error
            errors.add_note_of_run(error, len(made.clones))
            raise

    return step_function


def _run_and_look(
    step: StepFunction, found: looks.Looks, args: Sequence[Any]
) -> Any:
    """Run a step, then look whether rows stay apart in what it called.

    What is refused is undone: a look within a running step would wait for
    the threads that the step runs in.
    """
    model, made = step.model, step.made
    exact = made.exact
    undo = remember(model, step.variables()) if exact else None
    found.refused = None
    try:
        with found.deferred():
            result = step.function(*args)
    except (StopIteration, tf.errors.OutOfRangeError):
        raise
    except Exception as error:
        if found.refused is not None:
            raise found.refused from None
        # Rows that know each other may be what it failed by.
        findings = found.findings()
        if not findings and not isinstance(error, RefusedError):
            findings = _look_at_next(model, made, found, args[0])
        _tell(found, findings, exact, undo, error)
        raise
    _tell(found, found.findings(), exact, undo)
    return result


def _look_at_next(
    model: keras.Model, made: Deployment, found: looks.Looks, data: Any
) -> list[rows_apart.Finding]:
    """Look at the batch that a step of Keras could not be traced for."""
    if exactness.overrides(model, "train_step") or model.run_eagerly:
        return []
    try:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(joined(next(data)))
    except Exception:
        return []
    return found.at_once(made.step_options(), model, x)


def _tell(
    found: looks.Looks,
    findings: Sequence[rows_apart.Finding],
    exact: bool,
    undo: Callable[[], None] | None,
    cause: Exception | None = None,
) -> None:
    try:
        looks.tell(findings, exact)
    except ValueError as error:
        found.start_again()
        if undo is not None:
            undo()
        raise error from cause


def remember(
    model: keras.Model, variables: Iterable[keras.Variable]
) -> Callable[[], None]:
    """Return a function that gives variables back the values they have.

    An optimizer that is built until then is not built again.
    """
    held = [(v, np.array(_keras.tf_variable(v).numpy())) for v in variables]
    unbuilt = [one for one in _keras.optimizers(model) if not one.built]
    forget = undone.remember(unbuilt)

    def undo() -> None:
        forget()
        for variable, value in held:
            variable.assign(value)

    return undo
