"""Step functions of a cloned model that can fail without harm."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras, errors, looks, sharding, undone
from keras_clones.deployed import Deployment


def guard(
    model: keras.Model,
    made: Deployment,
    name: str,
    function: Callable[..., Any],
    variables: Callable[[], Iterable[keras.Variable]],
) -> Callable[..., Any]:
    """Return a step function that can be called again after it has failed.

    A `tf.function` whose first trace failed cannot be, so it is made anew.

    Args:
        model: A cloned `keras.Model`.
        made: Its `Deployment`.
        name: String, which of its step functions it is.
        function: The step function.
        variables: Function that returns all variables that a step may change.
    """

    def run(*args: Any) -> Any:
        if name != "train_function":
            return function(*args)
        if made.looks is None or made.looks.is_settled:
            return function(*args)
        return _run_and_look(
            model, made.looks, made.exact, lambda: function(*args), variables
        )

    def step_function(*args: Any) -> Any:
        try:
            result = run(*args)
            made.report_balance()
            return result
        except (StopIteration, tf.errors.OutOfRangeError):
            raise
        except Exception as error:
            setattr(model, name, None)
            if message := sharding.disagreement(error):
                raise ValueError(message) from error
            errors.add_note_of_run(error, len(made.clones))
            raise

    return step_function


def _run_and_look(
    model: keras.Model,
    found: looks.Looks,
    exact: bool,
    run: Callable[[], Any],
    variables: Callable[[], Iterable[keras.Variable]],
) -> Any:
    """Run a step, then look whether rows stay apart in what it called.

    What is refused is undone: a look within a running step would wait for
    the threads that the step runs in.
    """
    undo = _remember(model, variables()) if exact else None
    found.refused = None
    try:
        with found.deferred():
            result = run()
    except (StopIteration, tf.errors.OutOfRangeError):
        raise
    except Exception as error:
        if found.refused is not None:
            raise found.refused from None
        # Rows that know each other may be what it failed by.
        _tell(found, exact, undo, error)
        raise
    _tell(found, exact, undo)
    return result


def _tell(
    found: looks.Looks,
    exact: bool,
    undo: Callable[[], None] | None,
    cause: Exception | None = None,
) -> None:
    try:
        looks.tell(found.findings(), exact)
    except ValueError as error:
        found.start_again()
        if undo is not None:
            undo()
        raise error from cause


def _remember(
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
