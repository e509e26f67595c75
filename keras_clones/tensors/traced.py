"""What a traced function tells of itself: by its graph, before it runs."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

_SAME_VALUES = ("Identity", "Cast", "Reshape")
_UNIQUE = ("Unique", "UniqueV2")
# What draws by a state of TensorFlow's. By a seed alone, `Stateless...` do.
_DRAWS = re.compile(
    r"(Random(Uniform|StandardNormal|Gamma|Poisson|Shuffle)(Int|V2)?"
    r"|TruncatedNormal|ParameterizedTruncatedNormal|Multinomial"
    r"|NonDeterministicInts|Rng(ReadAndSkip|Skip)"
    r"|Stateful(Standard|Random|Truncated|Uniform)\w+|\w+CandidateSampler)$"
)
# What passes no gradient on, whatever its inputs are.
_STOPS = ("StopGradient", "PreventGradient")


def is_continuous(value: Any) -> bool:
    """Say whether gradients may go through a value: real or complex."""
    return value.dtype.is_floating or value.dtype.is_complex


class RowGradient(NamedTuple):
    """A gradient of a table by rows, part by part as they were looked up.

    A plain look-up gives a row for every id, repeated as often as it was
    looked up. A look-up by ids that do not depend on the batch has the same
    ids in every clone, and one by a sparse tensor has each id once. Keras's
    optimizers square row by row, so merging has to tell them apart.
    """

    repeated: list[tf.IndexedSlices]
    constant: list[tf.IndexedSlices]
    unique: list[tf.IndexedSlices]


def row_gradient(
    gradient: tf.IndexedSlices, is_alike: Callable[[tf.Tensor], bool]
) -> RowGradient:
    """Take a gradient by rows apart, one part a look-up.

    Args:
        gradient: `tf.IndexedSlices` in a graph.
        is_alike: Function that says whether a tensor is alike in all clones.
    """
    parts = RowGradient([], [], [])
    for values, indices in _parts(gradient.values, gradient.indices):
        part = tf.IndexedSlices(values, indices, gradient.dense_shape)
        if is_alike(indices):
            parts.constant.append(part)
        elif _is_unique(indices):
            parts.unique.append(part)
        else:
            parts.repeated.append(part)
    return parts


def _parts(
    values: tf.Tensor, indices: tf.Tensor
) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Undo the joining of gradients that come from several look-ups."""
    joined = indices
    while joined.op.type in ("Identity", "Cast"):
        joined = joined.op.inputs[0]
    both = values.op, joined.op
    if (
        any(op.type != "ConcatV2" for op in both)
        or len({len(op.inputs) for op in both}) > 1
    ):
        return [(values, indices)]
    return [
        part
        for one, other in zip(
            list(both[0].inputs)[:-1], list(both[1].inputs)[:-1], strict=True
        )
        for part in _parts(one, tf.cast(other, indices.dtype))
    ]


def _is_unique(ids: tf.Tensor) -> bool:
    """Say whether ids have each row once."""
    while True:
        captures = getattr(ids.graph, "captures", ())
        outer = [out for out, inner in captures if inner is ids]
        if outer:
            # A function that runs another backward captures its tensors.
            ids = outer[0]
        elif ids.op.type in _SAME_VALUES:
            ids = ids.op.inputs[0]
        else:
            break
    # Gradients of rows that were added up by segments list each row once.
    by_segments = ids.op.type.startswith("SparseSegment")
    return by_segments or ids.op.type in _UNIQUE


def dependence(sources: Iterable[tf.Tensor]) -> Callable[[tf.Tensor], bool]:
    """Return what says whether a tensor depends on any of some others.

    It looks into the graph that a function is traced in from inside of that
    graph's own functions, such as the one that runs it backward.
    """
    found = {id(source) for source in sources}
    independent: set[int] = set()

    def depends(tensor: tf.Tensor) -> bool:
        seen = _ancestors([tensor], until=found, known=independent)
        if seen & found:
            return True
        independent.update(seen)
        return False

    return depends


def reaching(targets: Sequence[tf.Tensor]) -> set[int]:
    """Return the ids of what targets can have a gradient with respect to."""
    return _ancestors(targets, barriers=_STOPS)


def _ancestors(
    tensors: Sequence[tf.Tensor],
    until: Iterable[int] = (),
    known: Iterable[int] = (),
    barriers: Sequence[str] = (),
) -> set[int]:
    """Return the ids of tensors and all they come from, in outer graphs too.

    Args:
        tensors: Sequence of tensors in graphs.
        until: Set of ids: the search ends where it meets one of these.
        known: Set of ids: what is before these is not looked at.
        barriers: Sequence of types of operations that are not passed.
    """
    stack, seen = list(tensors), set()
    outer: dict[int, dict[int, tf.Tensor]] = {}
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen or id(tensor) in known:
            continue
        if not hasattr(tensor, "graph"):
            continue
        seen.add(id(tensor))
        if id(tensor) in until:
            break
        graph = tensor.graph
        if id(graph) not in outer:
            captures = getattr(graph, "captures", ())
            outer[id(graph)] = {id(inner): out for out, inner in captures}
        if id(tensor) in outer[id(graph)]:
            stack.append(outer[id(graph)][id(tensor)])
        if tensor.op.type not in barriers:
            stack += tensor.op.inputs
    return seen


def same(one: tf.Tensor, other: tf.Tensor) -> bool:
    """Say whether two tensors of a graph are made alike from the same."""
    stack, seen = [(one, other)], set()
    while stack:
        one, other = stack.pop()
        if one is other or (id(one), id(other)) in seen:
            continue
        seen.add((id(one), id(other)))
        ops = one.op, other.op
        if one.value_index != other.value_index or any(
            op.op_def.is_stateful or (not op.inputs and op.type != "Const")
            for op in ops
        ):
            return False
        if len({op.type for op in ops}) > 1 or _settings(ops[0]) != _settings(
            ops[1]
        ):
            return False
        if len({len(op.inputs) for op in ops}) > 1:
            return False
        stack += zip(ops[0].inputs, ops[1].inputs, strict=True)
    return True


def _settings(operation: Any) -> dict[str, Any]:
    """Return what is said of an operation, without what is for TensorFlow."""
    attributes = operation.node_def.attr
    return {k: v for k, v in attributes.items() if not k.startswith("_")}


def is_compiled(concrete: Any) -> bool:
    """Say whether XLA compiles a function."""
    attributes = concrete.function_def.attr
    # Reading a key that is not there would add it.
    return "_XlaMustCompile" in attributes and attributes["_XlaMustCompile"].b


def has_loops(concrete: Any) -> bool:
    """Say whether a function has loops."""
    return any("While" in op.type for op in concrete.graph.get_operations())


def calls_python(concrete: Any) -> bool:
    """Say whether a function calls Python code that has a gradient.

    What it keeps for that has the name of the operation, not of the call.
    """
    return any(
        op.type == "EagerPyFunc" for op in concrete.graph.get_operations()
    )


def has_state_of_no_variable(concrete: Any) -> bool:
    """Say whether a function draws from `tf.random`, prints or calls Python.

    Within a `tf.function`, TensorFlow runs calls of such functions one after
    the other, unless each works on resources of its own. XLA takes none that
    nothing is kept in.
    """
    if is_compiled(concrete):
        return False
    return not any(t.dtype == tf.resource for t in concrete.inputs) and any(
        op.op_def.is_stateful and op.type != "Placeholder"
        for op in concrete.graph.get_operations()
    )


def draws_by_state(concrete: Any) -> bool:
    """Say whether a function draws other numbers each time that it runs."""
    graph = concrete.graph.as_graph_def()
    inside = [node for f in graph.library.function for node in f.node_def]
    return any(_DRAWS.match(node.op) for node in (*graph.node, *inside))


def outside_variables(concrete: Any) -> list[tf.Variable]:
    """Return the variables that a function assigns itself."""
    inner = {id(i): o for o, i in concrete.graph.captures}
    assigned = {
        id(inner[id(handle)])
        for op in concrete.graph.get_operations()
        for handle in _assigned(op)
        if id(handle) in inner
    }
    return [v for v in concrete.graph.variables if id(v.handle) in assigned]


def _assigned(op: tf.Operation) -> Sequence[tf.Tensor]:
    """Return what an operation assigns, also within a branch or a loop."""
    if op.type.startswith(("Assign", "ResourceScatter")):
        return list(op.inputs)[:1]
    if not op.type.endswith(("If", "Case", "While", "PartitionedCall")):
        return []
    # TensorFlow notes on such an operation which resources it only reads.
    try:
        read = op.get_attr("_read_only_resource_inputs")
    except ValueError:
        return []
    return [
        tensor
        for i, tensor in enumerate(op.inputs)
        if tensor.dtype == tf.resource and i not in read
    ]
