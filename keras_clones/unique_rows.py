"""Tell which variables get gradients with each row once, by their graph.

A plain lookup gives `IndexedSlices` with a row for every look-up, repeated as
often as it was looked up. A lookup by a sparse tensor looks each distinct id
up once, or adds rows up by segments, so its gradient has each row once.
Keras's optimizers treat the two differently (they square row by row), so
merging has to keep them apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

_SAME_TABLE = ("Identity", "Cast", "ReadVariableOp")
_SAME_VALUES = ("Identity", "Cast", "Reshape")
_UNIQUE = ("Unique", "UniqueV2")
_LOOKUPS = ("GatherV2", "ResourceGather")
# Whose gradients have a row for each row of the table that was used.
_SEGMENTS = tuple(
    f"SparseSegment{kind}{suffix}"
    for kind in ("Sum", "Mean", "SqrtN")
    for suffix in ("", "WithNumSegments")
)


def looked_up_once(
    function: Any,
    mirrors: Sequence[tf.Tensor | None],
    handles: Mapping[int, tf.Tensor],
) -> frozenset[int]:
    """Return the positions of the tables whose every look-up is of unique ids.

    Args:
        function: Concrete function whose first inputs are the mirrors.
        mirrors: Sequence of tensors, the values of variables, or `None` where
            the function reads the variable itself.
        handles: Dict of the resources of those variables by position.
    """
    captured = {id(outer): inner for outer, inner in function.graph.captures}
    sent = [i for i, mirror in enumerate(mirrors) if mirror is not None]
    tables = dict(zip(sent, function.inputs, strict=False))
    for position, handle in handles.items():
        if id(handle) in captured:
            tables[position] = captured[id(handle)]
    return frozenset(
        position
        for position, table in tables.items()
        if (lookups := _lookups(table)) and all(map(_is_unique, lookups))
    )


def _lookups(table: tf.Tensor) -> list[Any]:
    """Return the operations that look rows of a table up."""
    found = []
    for consumer in table.consumers():
        if consumer.inputs[0] is not table:
            continue
        if consumer.type in _LOOKUPS + _SEGMENTS:
            found.append(consumer)
        elif consumer.type in _SAME_TABLE:
            found += _lookups(consumer.outputs[0])
    return found


def _is_unique(lookup: Any) -> bool:
    """Say whether a look-up's gradient has each row once."""
    if lookup.type in _SEGMENTS:
        return True
    ids = lookup.inputs[1]
    while ids.op.type in _SAME_VALUES:
        ids = ids.op.inputs[0]
    return ids.op.type in _UNIQUE
