"""Tell which variables get gradients with each row once, by their graph.

A plain lookup gives `IndexedSlices` with a row for every look-up, repeated as
often as it was looked up. A lookup by a sparse tensor looks each distinct id
up once, so its gradient has each row once. Keras's optimizers treat the two
differently (they square row by row), so merging has to keep them apart.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

_SAME_VALUES = ("Identity", "Cast", "Reshape")
_UNIQUE = ("Unique", "UniqueV2")
_LOOKUPS = ("GatherV2", "ResourceGather")


def looked_up_once(tables: Sequence[tf.Tensor | None]) -> frozenset[int]:
    """Return the positions of the tables whose every look-up is of unique ids.

    Args:
        tables: Sequence of tensors in a graph, the values of variables, or
            `None` where there is none.
    """
    return frozenset(
        position
        for position, table in enumerate(tables)
        if (lookups := _lookups(table))
        and all(_is_unique(lookup.inputs[1]) for lookup in lookups)
    )


def _lookups(table: tf.Tensor | None) -> list[Any]:
    """Return the operations that look rows of a table up."""
    found = []
    if table is None:
        return []
    for consumer in table.consumers():
        if consumer.type in _LOOKUPS and consumer.inputs[0] is table:
            found.append(consumer)
        elif consumer.type == "Identity":
            found += _lookups(consumer.outputs[0])
    return found


def _is_unique(ids: tf.Tensor) -> bool:
    """Say whether ids went through an operation that leaves each once."""
    while ids.op.type in _SAME_VALUES:
        ids = ids.op.inputs[0]
    return ids.op.type in _UNIQUE
