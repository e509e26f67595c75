"""Moving what a model has by now to where it is at home."""

from collections.abc import Iterable, Sequence

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone.state import model_variables
from keras_clones.devices import moving
from keras_clones.devices.divided import parts_of
from keras_clones.devices.homes import Homes


def move(layer: keras.Layer, homes: Homes) -> list[keras.Variable]:
    """Move every variable of a model, or a layer, that there is to its home.

    Returns:
        The variables that were moved.
    """
    weights = model_variables(layer).weights
    optimizers = _keras.optimizers(layer)
    return moving.move_variables(
        homes_of(weights, optimizers, all_variables(layer), homes), homes.main
    )


def join(model: keras.Model, homes: Homes) -> list[keras.Variable]:
    """Make one variable again of each that is divided; return these."""
    divided = [v for v in all_variables(model) if parts_of(v) is not None]
    pairs = [(variable, homes.main) for variable in divided]
    return moving.move_variables(pairs, homes.main)


def move_new(layer: keras.Layer, homes: Homes) -> None:
    """Move what was just made, at one home, to others if there are any."""
    if homes.divide:
        with tf.init_scope():
            move(layer, homes)
        for optimizer in _keras.optimizers(layer):
            _keras.reindex_optimizer(optimizer)


def all_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Return the variables of a model, its metrics and its optimizers."""
    variables = [v for group in model_variables(layer) for v in group]
    if getattr(layer, "compiled", False):
        variables += layer.metrics_variables
    for optimizer in _keras.optimizers(layer):
        variables += optimizer.variables
    return variables


def homes_of(
    weights: Sequence[keras.Variable],
    optimizers: Iterable[keras.optimizers.Optimizer],
    variables: Sequence[keras.Variable],
    homes: Homes,
) -> list[tuple[keras.Variable, str | tuple[str, ...]]]:
    """Return variables with their homes: slots are beside their weights.

    Args:
        weights: Sequence of the weights, whose homes are chosen.
        optimizers: Iterable of the optimizers whose slots go by them.
        variables: Sequence of the variables to return. What is neither a
            weight nor of one is at the main home.
        homes: `Homes` of the model.
    """
    chosen: dict[int, str | tuple[str, ...]] = {
        id(weight): home for weight, home in homes.choose(weights)
    }
    for optimizer in optimizers:
        for slot, weight in _keras.slots(optimizer):
            chosen[id(slot)] = chosen.get(id(weight), homes.main)
    return [(one, chosen.get(id(one), homes.main)) for one in variables]
