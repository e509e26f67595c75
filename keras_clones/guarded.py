"""Step functions of a cloned model that can fail without harm."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_clones import _keras, build, errors, looks, sharding
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
        build.build_ahead(model, made.variables_device)
        if made.looks is None or made.looks.is_settled:
            return function(*args)
        return _run_and_look(made, made.looks, function, args, variables)

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
    made: Deployment,
    found: looks.Looks,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    variables: Callable[[], Iterable[keras.Variable]],
) -> Any:
    """Run a step, then look whether rows stay apart in what it called.

    What is refused is undone: a look within a running step would wait for
    the threads that the step runs in.
    """
    held = []
    if made.exact:
        # Tracing makes the variables that a step makes, and runs nothing.
        if hasattr(function, "get_concrete_function"):
            function.get_concrete_function(*args)
        known = [_keras.tf_variable(v) for v in variables()]
        held = [(v, np.array(v.numpy())) for v in known]
    with found.deferred():
        result = function(*args)
    try:
        looks.tell(found.findings(), made.exact)
    except ValueError:
        found.start_again()
        for variable, value in held:
            variable.assign(value)
        raise
    return result
