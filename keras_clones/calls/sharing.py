"""What the layer calls of one step share: towers, mirrors, whole layers."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras, _tf
from keras_clones.calls import held
from keras_clones.calls.arguments import LayerCall
from keras_clones.clone import state
from keras_clones.clone.tables import large_tables
from keras_clones.devices import placement
from keras_clones.devices.divided import source_of
from keras_clones.exchange import laying_out
from keras_clones.plan import exactness, in_pieces, whole
from keras_clones.plan.build import resolve_jit_compile
from keras_clones.plan.options import StepOptions


class Mirrors(NamedTuple):
    """Variables that were read, and their mirrors: one list a clone."""

    graph: Any
    values: list[tf.Tensor | None]
    mirrors: list[list[tf.Tensor | None]]
    writes: list[int]


class Calls:
    """What the layer calls of one step share.

    Attributes:
        busy: Boolean, whether a call runs on the clones just now. What it
            calls in turn is an ordinary call.
        whole: `Whole`, the layers that are not called on shards.
        has_all_whole: Boolean, whether all that `whole` names are made.
        left: Dict of tensors that calls have left on layers, by their ids.
            A later call does not get them, unless it uses them.
    """

    def __init__(
        self, model: keras.Model, options: StepOptions, training: bool
    ) -> None:
        self.model = model
        self.options = options
        self.training = training
        self.busy = False
        self.towers: dict[Any, Any] = dict(options.towers)
        self.mirrors: dict[Any, Mirrors] = {}
        self.left: dict[int, Any] = {}
        self.jit_compile = resolve_jit_compile(model, options)
        self._graph = _graph()
        in_pieces.check(model, options, training)
        self.settle_whole()
        exactness.check_cudnn(model, [c.device for c in options.clones])

    def settle_whole(self) -> None:
        """Look for whole layers, some of which may not be made yet."""
        named = self.options.whole
        self.whole = whole.find(self.model, named, self.options.num_turns)
        self.has_all_whole = not whole.missing(self.model, named)

    def tables(self, layer: keras.Layer) -> list[keras.Variable]:
        """Return the tables of a layer that its clones look up at home."""
        return [] if self.jit_compile else large_tables(layer)

    def leave(self, call: LayerCall) -> None:
        """Note which tensors a call has left on layers."""
        self.left.update(held.left_by_call(call.layer, call.given.leaves))

    def use_left(self, tensors: Sequence[tf.Tensor]) -> None:
        """Let calls get tensors that others have left."""
        for tensor in tensors:
            self.left.pop(id(tensor))

    def looks(self) -> bool:
        """Say whether it is looked at whether rows stay apart in calls.

        A call in a loop of the step's graph may see something else each time.
        One in a function that the step calls does not.
        """
        graph = _graph()
        while graph is not self._graph and type(graph) is type(self._graph):
            graph = graph.outer_graph
            if graph is not None and _tf.is_within_xla(graph):
                return False
        return graph is self._graph

    def check_whole(self) -> None:
        """Check that what `whole` names is there, once all layers are."""
        if all(one.built for one in _keras.layers(self.model)):
            whole.check(self.model, self.options.whole)

    @contextlib.contextmanager
    def while_busy(self) -> Iterator[None]:
        """Let calls that happen now be ordinary calls."""
        held, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = held


def _graph() -> Any:
    """Return the graph that is made just now, `None` outside of one."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()


def device_of_step(options: StepOptions) -> str:
    """Return where a step's own mathematics runs.

    That is the first clone's device where it is a GPU, else where the
    variables are.
    """
    first = options.clones[0].device
    return first if "GPU" in first else options.home


def read(
    calls: Calls,
    layer: keras.Layer,
    variables: state.Variables,
    tables: Sequence[keras.Variable],
    clones: Sequence[placement.PlacedClone],
) -> Mirrors:
    """Read a layer's variables and send mirrors, or use those sent before.

    What was sent holds until a variable is assigned, in the same graph and
    for a tape that has seen it read.
    """
    graph = _graph()
    # A step may freeze parts in turns, which changes the order.
    order = tuple(id(v) for v in variables.weights)
    key = (id(graph), id(layer), len(clones), order, *map(id, tables))
    found = calls.mirrors.get(key)
    if found is not None and _still_holds(found, variables):
        return found
    values = laying_out.read_variables(variables, ())
    kept = [
        None if any(v is table for table in tables) else value
        for v, value in zip(variables.weights, values, strict=True)
    ]
    with _tf.stop_recording():
        homes = laying_out.homes_of(variables)
        mirrors = laying_out.send_mirrors(kept, homes, clones)
    writes = [] if graph is None else [_tf.num_writes(v) for v in values]
    made = Mirrors(graph, values, mirrors, writes)
    if graph is not None:
        calls.mirrors[key] = made
    return made


def _still_holds(found: Mirrors, variables: state.Variables) -> bool:
    for variable in variables.trainable:
        _tf.variable_accessed(source_of(variable))
    known = [source_of(v).handle for v in variables.weights]
    # A tape may have been told of a variable after it was read.
    if known and _tf.num_watching(known):
        for handle, value in zip(known, found.values, strict=True):
            wanted = _tf.num_watching([handle])
            # Of several tapes, nothing tells which saw the variable read.
            if wanted and not wanted == _tf.num_watching([value]) == 1:
                return False
    return found.writes == [_tf.num_writes(v) for v in found.values]
