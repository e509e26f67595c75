"""Running operations beside the data that they work on.

An update of a weight that is at home elsewhere, and what comes before it, such
as clipping and decay, runs there: neither the weight nor its gradient crosses
the network for it. This holds for any optimizer, since it goes by the graph.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.devices.homes import Homes
from keras_clones.devices.naming import canonical_device


@contextlib.contextmanager
def beside_data(
    optimizer: keras.optimizers.Optimizer, homes: Homes
) -> Iterator[None]:
    """Run each operation where the first large tensor that it gets is.

    Outside of a graph, operations run where they would.

    Args:
        optimizer: The `keras.optimizers.Optimizer` that is to update.
        homes: `Homes` of the weights.
    """
    if not homes.divide or tf.executing_eagerly():
        yield
        return
    graph = tf.compat.v1.get_default_graph()
    with graph.device(_Chooser(homes)), _keras.unreduced(optimizer):
        yield


class _Chooser:
    """Says on which device an operation of a graph is to run."""

    def __init__(self, homes: Homes) -> None:
        self._known = homes.all

    def __call__(self, operation: tf.Operation) -> str:
        for tensor in operation.inputs:
            if tensor.dtype != tf.resource and tensor.shape.rank == 0:
                continue
            home = self._home(tensor)
            if home is not None:
                return home
        return operation.device

    def _home(self, tensor: Any) -> str | None:
        """Return at which of the homes a tensor is, if that is known."""
        if not hasattr(tensor, "graph"):
            return self._if_known(tensor.device)
        operation = tensor.op
        if operation.type == "Placeholder":
            outer = _captured(tensor)
            return None if outer is None else self._home(outer)
        # A read is where the variable is, and says nothing of that itself.
        if operation.type in ("ReadVariableOp", "Identity"):
            found = self._home(operation.inputs[0])
            return found or self._if_known(operation.device)
        return self._if_known(operation.device)

    def _if_known(self, device: str) -> str | None:
        found = canonical_device(device) if device else None
        return found if found in self._known else None


def _captured(tensor: tf.Tensor) -> Any:
    """Return what a tensor of a function's graph is outside of it."""
    for outer, inner in tensor.graph.captures:
        if inner is tensor:
            return outer
    return None
