"""The tower function of a layer call: what each clone runs of it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import (
    _keras,
    exchange,
    layer_losses,
    sharding,
    traced,
)
from keras_clones.options import StepOptions
from keras_clones.scopes import CloneScope
from keras_clones.state import Changes, Variables
from keras_clones.tower import (
    TowerInput,
    Weights,
    alike_in_all,
    by_rows,
    find_changes,
    first_writes,
    kept_tensors,
    mapping,
    sources,
    tensors_in,
)

# Stands where an argument is a tensor.
_TENSOR = object()


class Arguments(NamedTuple):
    """What a layer is called with, taken apart.

    `leaves` are the tensors among it, then the masks that hang on them, of
    the tensors at `masked`. `others` are the leaves of `structure` that are
    no tensors, with `_TENSOR` for each that is.
    """

    structure: Any
    leaves: list[Any]
    others: list[Any]
    masked: list[int]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Arguments":
        """Take the arguments of a call apart."""
        kinds = (keras.Variable, tf.Variable, np.ndarray)
        flat = [
            tf.convert_to_tensor(leaf) if isinstance(leaf, kinds) else leaf
            for leaf in keras.tree.flatten((args, kwargs))
        ]
        leaves = [leaf for leaf in flat if tf.is_tensor(leaf)]
        masks = [_keras.get_mask(leaf) for leaf in leaves]
        masked = [i for i, mask in enumerate(masks) if mask is not None]
        others = [_TENSOR if tf.is_tensor(x) else x for x in flat]
        leaves += [masks[i] for i in masked]
        return cls((args, kwargs), leaves, others, masked)

    def pack(self, leaves: Sequence[Any]) -> tuple[Any, Any]:
        """Return positional and named arguments with other tensors."""
        num_masks = len(self.masked)
        for i, mask in zip(
            self.masked, leaves[len(leaves) - num_masks :], strict=True
        ):
            _keras.set_mask(leaves[i], mask)
        rest = iter(leaves)
        flat = [next(rest) if x is _TENSOR else x for x in self.others]
        return keras.tree.pack_sequence_as(self.structure, flat)

    def components(self) -> list[tf.Tensor]:
        """Return the dense tensors that the tensors are made of."""
        return tf.nest.flatten(self.leaves, expand_composites=True)

    def count_rows(self) -> sharding.Rows:
        """Return the rows of the call: those of its first tensor that has any.

        A first axis of one entry is taken for one that all rows share.
        """
        found = [leaf for leaf in self.leaves if sharding.has_rows(leaf)]
        if not found:
            return 0
        first = self._leading(found)
        rows = None if first.shape.rank is None else first.shape[0]
        return sharding.leaf_rows(first) if rows is None else rows

    @staticmethod
    def _leading(found: list[Any]) -> Any:
        wide = [t for t in found if t.shape.rank is None or t.shape[0] != 1]
        return (wide or found)[0]

    def split(self, shards: sharding.Shards) -> list[list[Any]]:
        """Return the leaves that each clone gets."""
        found = [leaf for leaf in self.leaves if sharding.has_rows(leaf)]
        first = self._leading(found) if found else None
        columns = [self._split(leaf, first, shards) for leaf in self.leaves]
        return [list(shard) for shard in zip(*columns, strict=True)] or [
            [] for _ in shards.sizes
        ]

    def _split(
        self, leaf: Any, first: Any, shards: sharding.Shards
    ) -> list[Any]:
        many = len(shards.sizes)
        if many == 1 or not sharding.has_rows(leaf):
            return [leaf] * many
        known = leaf.shape.rank is not None and leaf.shape[0] is not None
        if leaf is first:
            return sharding.split_leaf(leaf, shards)
        if isinstance(shards.rows, int) and known:
            if leaf.shape[0] != shards.rows:
                return [leaf] * many
            return sharding.split_leaf(leaf, shards)
        if known:
            # So many rows whatever the batch has are not the batch's.
            return [leaf] * many
        return self._split_if_same(leaf, shards)

    def _split_if_same(self, leaf: Any, shards: sharding.Shards) -> list[Any]:
        """Split a tensor if it has the rows of the call when the step runs."""
        own = sharding.leaf_rows(leaf)
        same = tf.equal(own, shards.rows)
        parts = [
            (
                tf.where(same, start, 0),
                tf.where(same, tf.maximum(size, 1), own),
            )
            for start, size in zip(shards.starts, shards.sizes, strict=True)
        ]
        return [sharding.slice_rows(leaf, *part) for part in parts]


class CallOutput(NamedTuple):
    """What a clone gives back of a call.

    `values` are tensors in the order of `CallNotes.kinds`.
    """

    values: list[Any]
    changes: Changes


class CallNotes(NamedTuple):
    """What is found out about a call while it is traced.

    `kinds` says how each value joins: `"rows"`, `"sum"` of the clones' parts,
    or `"first"` of values that are alike. `finish` makes what the layer
    returns of the joined values, and leaves on layers what it leaves.
    """

    assigned: list[keras.Variable]
    unknown: list[keras.Variable]
    kinds: list[str]
    finish: Callable[[list[Any]], Any]


class Body:
    """A layer's call as a function of `TowerInput`."""

    def __init__(
        self,
        layer: keras.Layer,
        method: Callable[..., Any],
        given: Arguments,
        variables: Variables,
        options: StepOptions,
        may_be_idle: bool,
        watched_others: tuple[int, ...],
    ) -> None:
        self.layer = layer
        self.variables = variables
        self.watched_others = watched_others
        self._method = method
        self._given = given
        self._options = options
        self._may_be_idle = may_be_idle

    def key(self) -> Any:
        """Return what two calls must have in common to share a tower."""
        others = tuple(
            None if x is _TENSOR else _hashable(x) for x in self._given.others
        )
        structure = repr(
            keras.tree.map_structure(lambda _: 0, self._given.structure)
        )
        return (
            id(self.layer),
            getattr(self._method, "__name__", ""),
            structure,
            others,
            tuple(self._given.masked),
            _keras.call_context(),
            self.watched_others,
            self._may_be_idle,
            tuple(id(v) for v in self.variables.trainable),
            _fingerprint(self.layer),
        )

    def __call__(self, inputs: TowerInput) -> tuple[CallOutput, CallNotes]:
        """Call the layer as a clone does."""
        layer, options = self.layer, self._options
        weights = Weights(inputs, self._may_be_idle)
        before = kept_tensors(layer)
        args, kwargs = self._given.pack(inputs.data)
        scope = CloneScope(mapping(self.variables, inputs))
        with scope, first_writes(inputs):
            with layer_losses.marking(layer) as marks:
                outputs = self._method(*args, **kwargs)
            losses = layer_losses.own(layer, marks, options.scalar_losses)
            _keras.clear_losses(layer)
        changes, notes = find_changes(
            layer, self.variables, inputs, scope, options.policies, weights
        )
        many = len(options.clones) > 1
        joining = _Joining(layer, inputs, weights, many)
        finish_outputs = joining.add_outputs(outputs)
        finish_kept = joining.add_kept(before)
        finish_losses = joining.add_losses(losses)

        def finish(values: list[Any]) -> Any:
            rest = iter(values)
            result = finish_outputs(rest)
            finish_kept(rest)
            finish_losses(rest)
            return result

        return CallOutput(joining.values, changes), CallNotes(
            notes.assigned, notes.unknown, joining.kinds, finish
        )


class _Joining:
    """Collects what a clone gives back of a call, and how it joins."""

    def __init__(
        self,
        layer: keras.Layer,
        inputs: TowerInput,
        weights: Weights,
        many: bool,
    ) -> None:
        self.values: list[Any] = []
        self.kinds: list[str] = []
        self._layer = layer
        self._weights = weights
        self._many = many
        self._is_alike = alike_in_all(inputs)
        self._rows = {leaf.shape[0] for leaf in inputs.data if leaf.shape.rank}
        weights_of = [m for m in inputs.mirrors if m is not None]
        self._from_weights = traced.dependence(weights_of)

    def _add(self, value: Any, kind: str) -> None:
        if kind == "rows":
            value = self._weights.own_rows(value)
        elif kind == "mean":
            value, kind = self._weights.weigh(value), "sum"
        elif kind == "sum":
            value = self._weights.if_live(value)
        self.values.append(value)
        self.kinds.append(kind)

    def add_outputs(self, outputs: Any) -> Callable[[Any], Any]:
        flat = keras.tree.flatten(outputs)
        flat = [
            tf.convert_to_tensor(x) if isinstance(x, keras.Variable) else x
            for x in flat
        ]
        extras = []
        for x in flat:
            if tf.is_tensor(x):
                self._add(x, self._kind(x))
                hanging = (_keras.get_mask(x), _keras.get_logits(x))
                extras.append([h is not None for h in hanging])
                for hung in hanging:
                    if hung is not None:
                        self._add(hung, self._kind(hung))

        def finish(values: Any) -> Any:
            which = iter(extras)
            made = []
            for x in flat:
                if not tf.is_tensor(x):
                    made.append(x)
                    continue
                value = next(values)
                has_mask, has_logits = next(which)
                if has_mask:
                    _keras.set_mask(value, next(values))
                if has_logits:
                    _keras.set_logits(value, next(values))
                made.append(value)
            return keras.tree.pack_sequence_as(outputs, made)

        return finish

    def add_kept(self, before: Any) -> Callable[[Any], None]:
        """Add tensors that the call left on layers."""
        places = []
        layers = {id(one): one for one in _keras.layers(self._layer)}
        after = kept_tensors(self._layer)
        for (owner, name), ids in after.items():
            if before.get((owner, name)) == ids:
                continue
            layer = layers[owner]
            value = vars(layer)[name]
            found = tensors_in(value)
            if not tf.executing_eagerly():
                graph = tf.compat.v1.get_default_graph()
                if any(getattr(t, "graph", None) is not graph for t in found):
                    continue
            for tensor in found:
                self._add(tensor, self._kind(tensor))
            places.append((layer, name, value))

        def finish(values: Any) -> None:
            for layer, name, value in places:
                vars(layer)[name] = _replace_tensors(value, values)

        return finish

    def add_losses(self, losses: Any) -> Callable[[Any], None]:
        """Add what layers passed to `add_loss`."""
        owners = []
        for layer, loss, kind in losses:
            self._add(tf.convert_to_tensor(loss), kind)
            owners.append(layer)

        def finish(values: Any) -> None:
            for layer in owners:
                _keras.add_own_loss(layer, next(values))

        return finish

    def _kind(self, value: Any) -> str:
        if not self._many:
            return "rows" if sharding.has_rows(value) else "first"
        shape = value.shape
        if shape.rank == 0:
            alike = not tf.executing_eagerly() and self._is_alike(value)
            if alike:
                return "first"
            return "mean" if value.dtype.is_floating else self._same(value)
        if shape.rank is None or shape[0] is None:
            return "rows"
        if shape[0] in self._rows:
            alike = not tf.executing_eagerly() and self._is_alike(value)
            return "first" if alike and self._from_weights(value) else "rows"
        return self._same(value)

    def _same(self, value: Any) -> str:
        """Return `"first"` for what is alike in all clones, or say it is not.

        Outside of a graph only the values tell, once all clones have run.
        """
        if tf.executing_eagerly():
            return "same"
        if self._is_alike(value):
            return "first"
        raise ValueError(unlike(self._layer, value.shape))


def unlike(layer: keras.Layer, shape: Any) -> str:
    """Return what is said of an output that clones cannot join."""
    return (
        f"Expected what layer {layer.name!r} returns to have the rows of its "
        "input first, to be a scalar that is a mean over them, or not to "
        "depend on them, so that it can be joined from the clones. Received: "
        f"a value of shape {tuple(shape)} that depends on the rows. Return a "
        "value with rows, compute this one in the step or in `compute_loss`, "
        "which see the whole batch, or use one clone."
    )


def _replace_tensors(value: Any, values: Any) -> Any:
    """Return lists, tuples and dicts with other tensors in them."""
    if isinstance(value, dict):
        return {k: _replace_tensors(v, values) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        made = [_replace_tensors(entry, values) for entry in value]
        if hasattr(value, "_fields"):
            return type(value)(*made)
        return tuple(made) if isinstance(value, tuple) else made
    return next(values) if tensors_in(value) else value


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)


def _fingerprint(layer: keras.Layer) -> Any:
    """Return the plain settings of layers, which a call may go by."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (name, value)
        for one in _keras.layers(layer)
        for name, value in list(vars(one).items())
        if isinstance(value, plain) and name not in _keras.CHANGING
    )


class Backward(NamedTuple):
    """How to run a traced call backward.

    `function` takes the gradients of the floating values; `captured` says
    where each tensor that it captures is: an input of the call, a tensor
    outside of it, or one of the residuals that the call gives back.
    `reach` has, for each of these values, the positions of the sources that
    it can have a gradient with respect to.
    """

    function: Any
    captured: list[tuple[str, Any]]
    reach: list[set[int]]


class CallTower(NamedTuple):
    """A traced call: `backward` is `None` where a tape runs it backward.

    `extra` has the variables of nobody that it uses, which have gradients
    too.
    """

    tower: exchange.TracedTower
    backward: Backward | None
    extra: list[tf.Variable]


def floating(nest: Any) -> list[tf.Tensor]:
    """Return the floating tensors that a nest is made of."""
    leaves = tf.nest.flatten(nest, expand_composites=True)
    return [t for t in leaves if t is not None and t.dtype.is_floating]


def wanted(body: Body, inputs: TowerInput) -> list[Any]:
    """Return what of a clone's mirrors gradients are wanted for."""
    mirrors = inputs.mirrors[len(body.variables.trainable) :]
    return [
        *sources(body.variables, inputs),
        *(mirrors[i] for i in body.watched_others),
    ]


def trace(
    body: Body,
    layout: exchange.Layout,
    watched: bool,
    jit_compile: bool,
    inline: bool,
    synchronized: Sequence[Any] = (),
    in_graph: bool = False,
) -> CallTower:
    """Trace a call once for all clones, and how to run it backward.

    Args:
        body: `Body` of the call.
        layout: `Layout` of its rows.
        watched: Boolean, whether gradients may be wanted.
        jit_compile: Boolean, whether XLA compiles it.
        inline: Boolean, whether it becomes part of the step's graph.
        synchronized: Sequence of layers that share sums over the clones.
        in_graph: Boolean, whether it is traced also outside of a graph.
            Defaults to `False`: there the Python function itself runs.
    """
    found: dict[str, Any] = {"backward": None, "extra": []}
    options = exchange.function_options(inline, jit_compile)

    def with_residuals(inputs: TowerInput) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            if watched:
                tape.watch([*floating(inputs.data), *wanted(body, inputs)])
            output, notes = body(inputs)
        residuals: list[tf.Tensor] = []
        if watched and floating(output.values):
            found["backward"], found["extra"], residuals = _trace_backward(
                body, inputs, output, tape, options
            )
        return (output, residuals), notes

    made = exchange.callable_tower(
        body.layer, with_residuals, inline, jit_compile
    )
    tower = exchange.trace(made, layout, synchronized, in_graph)
    if tower.concrete is None:
        return CallTower(tower._replace(call=body), None, [])
    if jit_compile and watched and traced.has_loops(tower.concrete):
        # What a loop keeps to run backward cannot leave what XLA compiles.
        return trace(body, layout, watched, False, inline)
    return CallTower(tower, found["backward"], found["extra"])


def _trace_backward(
    body: Body,
    inputs: TowerInput,
    output: CallOutput,
    tape: tf.GradientTape,
    options: dict[str, Any],
) -> tuple[Backward, list[tf.Variable], list[tf.Tensor]]:
    """Trace how to run a call backward, inside of its own trace.

    Returns:
        `Backward`, the variables of nobody, and the residuals that the call
        has to give back.
    """
    targets = floating(output.values)
    known = wanted(body, inputs)
    extra = [
        v for v in tape.watched_variables() if not any(v is k for k in known)
    ]
    found = [*known, *floating(inputs.data), *extra]
    is_alike = alike_in_all(inputs)

    def backward(gradients: list[tf.Tensor]) -> list[Any]:
        return by_rows(
            tape.gradient(targets, found, output_gradients=gradients), is_alike
        )

    types = [tf.TensorSpec(t.shape, t.dtype) for t in targets]
    function = tf.function(backward, autograph=False, **options)
    concrete = function.get_concrete_function(types)
    graph = tf.compat.v1.get_default_graph()
    given = tf.nest.flatten(inputs, expand_composites=True)
    at = {id(t): i for i, t in enumerate(given)}
    outer = {id(inner): out for out, inner in graph.captures}
    captured: list[tuple[str, Any]] = []
    residuals: list[tf.Tensor] = []
    for tensor in concrete.captured_inputs:
        if id(tensor) in at:
            captured.append(("input", at[id(tensor)]))
        elif id(tensor) in outer:
            captured.append(("outside", outer[id(tensor)]))
        else:
            captured.append(("residual", len(residuals)))
            residuals.append(tensor)
    inner = {id(out): id(i) for out, i in graph.captures}
    ids = [
        inner.get(id(s.handle)) if isinstance(s, tf.Variable) else id(s)
        for s in found
    ]
    reach = []
    for target in targets:
        reached = traced.reaching([target]) if len(targets) > 1 else set(ids)
        reach.append({i for i, one in enumerate(ids) if one in reached})
    return Backward(concrete, captured, reach), extra, residuals


def run_backward(
    backward: Backward,
    inputs: TowerInput,
    residuals: Sequence[tf.Tensor],
    values: Sequence[tf.Tensor],
    gradients: Sequence[Any],
) -> list[Any]:
    """Return the gradients of a clone's call with respect to its sources.

    Args:
        backward: `Backward` of the call.
        inputs: `TowerInput` of the clone.
        residuals: Sequence of the tensors that the call gave back for this.
        values: Sequence of the floating values that it gave back.
        gradients: Sequence of their gradients, `None` where there is none.
    """
    given = tf.nest.flatten(inputs, expand_composites=True)
    found = {"input": given, "residual": residuals}
    backward.function.set_external_captures(
        [
            what if where == "outside" else found[where][what]
            for where, what in backward.captured
        ]
    )
    known = [i for i, g in enumerate(gradients) if g is not None]
    pulled = backward.function(
        [
            tf.zeros_like(value) if g is None else tf.cast(g, value.dtype)
            for value, g in zip(values, gradients, strict=True)
        ]
    )
    reached: set[int] = set().union(*(backward.reach[i] for i in known))
    return [g if i in reached else None for i, g in enumerate(pulled)]
