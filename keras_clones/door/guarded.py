"""Step functions of a cloned model that can fail without harm."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_clones.cluster import watch
from keras_clones.door import first_look
from keras_clones.door.step_function import StepFunction
from keras_clones.exchange import errors
from keras_clones.tensors import sharding


def guard(step: StepFunction) -> Callable[..., Any]:
    """Return a step function that can be called again after it has failed.

    A `tf.function` whose first trace failed cannot be, so it is made anew.
    """
    made = step.made

    def run(*args: Any) -> Any:
        if made.looks is None or made.looks.is_settled(step.name):
            return step.function(*args)
        return first_look.run(step, made.looks, *args)

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
