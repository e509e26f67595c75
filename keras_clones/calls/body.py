"""A layer's call as a function of what one clone gets."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.calls import held
from keras_clones.calls.arguments import TENSOR, LayerCall
from keras_clones.calls.joining import Joining
from keras_clones.clone import given_rows, layer_losses
from keras_clones.clone.changes import Ran, by_rows, find_changes
from keras_clones.clone.inputs import (
    TowerInput,
    Weights,
    alike_in_all,
    drawing,
    first_writes,
    mapping,
)
from keras_clones.clone.leftovers import kept_tensors
from keras_clones.clone.scopes import CloneScope
from keras_clones.clone.state import Changes, Variables
from keras_clones.clone.undecorated import undecorated
from keras_clones.plan.options import StepOptions


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
    `backward` says how to run the traced call backward, and `extra` has the
    variables of nobody that it uses. `ends` says where the values of outputs
    end, and where those of losses begin. `looked_up` is what the clone was
    given of tables, and has asked for. `doubt` is what `Joining` found.
    """

    assigned: list[keras.Variable]
    unknown: list[keras.Variable]
    seen: list[keras.Variable]
    kinds: list[str]
    finish: Callable[[list[Any]], Any]
    backward: Backward | None = None
    extra: Sequence[tf.Variable] = ()
    ends: tuple[int, int] = (0, 0)
    looked_up: given_rows.Given = given_rows.NOTHING_GIVEN
    doubt: str | None = None


class Body:
    """A layer's call as a function of `TowerInput`."""

    def __init__(
        self,
        call: LayerCall,
        variables: Variables,
        options: StepOptions,
        may_be_idle: bool = False,
        watched_others: tuple[int, ...] = (),
    ) -> None:
        self.layer, self._method, self.given, _ = call
        self.variables = variables
        self.watched_others = watched_others
        self.exact = options.exact
        self.may_meet = options.may_meet
        self._options = options
        self._may_be_idle = may_be_idle

    def key(self) -> Any:
        """Return what two calls must have in common to share a tower."""
        others = tuple(
            None if x is TENSOR else _hashable(x) for x in self.given.others
        )
        structure = repr(
            keras.tree.map_structure(lambda _: 0, self.given.structure)
        )
        return (
            id(self.layer),
            getattr(self._method, "__name__", ""),
            structure,
            others,
            tuple(self.given.masked),
            held.key(self.given.held),
            _keras.call_context(),
            self.watched_others,
            self._may_be_idle,
            tuple(id(v) for v in self.variables.trainable),
            _fingerprint(self.layer),
        )

    def alike_in_all(
        self, inputs: TowerInput, looked_up: given_rows.Given
    ) -> Callable[[tf.Tensor], bool]:
        """Return what says whether a tensor is alike in all clones."""
        shards = self.given.differing(inputs.data)
        return alike_in_all(inputs, shards, looked_up)

    def by_rows(
        self, gradients: list[Any], inputs: TowerInput, notes: CallNotes
    ) -> list[Any]:
        """Take gradients by rows apart, as a clone's sources have them."""
        is_alike = self.alike_in_all(inputs, notes.looked_up)
        num = len(self.variables.trainable)
        tables = given_rows.by_table(gradients[:num], notes.looked_up, is_alike)
        return by_rows([*tables, *gradients[num:]], is_alike)

    def look(self, inputs: TowerInput) -> None:
        """Call the layer alone, for what is looked up in it."""
        args, kwargs = self.given.pack(inputs.data)
        scope = CloneScope(mapping(self.variables, inputs))
        inside = undecorated(self.layer)
        with scope, inside, self.given.holding(inputs.data):
            self._method(*args, **kwargs)

    def __call__(self, inputs: TowerInput) -> tuple[CallOutput, CallNotes]:
        """Call the layer as a clone does."""
        with self.drawing(inputs), self.given.holding(inputs.data):
            return self._call(inputs)

    def drawing(
        self, inputs: TowerInput
    ) -> contextlib.AbstractContextManager[None]:
        """Let a clone draw what it is to draw."""
        rows = self.given.differing(inputs.data)
        return drawing(inputs, rows, self._options.exact)

    def _call(self, inputs: TowerInput) -> tuple[CallOutput, CallNotes]:
        layer, options = self.layer, self._options
        weights = Weights(inputs, self._may_be_idle)
        before = kept_tensors(layer)
        args, kwargs = self.given.pack(inputs.data)
        tables = given_rows.give(self.variables.weights, inputs.look_ups)
        scope = CloneScope([*mapping(self.variables, inputs), *tables.mapping])
        inside = undecorated(layer)
        with scope, tables.looked_up(), first_writes(inputs), inside:
            with layer_losses.marking(
                layer, weights, options.num_turns > 1
            ) as marks:
                outputs = self._method(*args, **kwargs)
            losses = layer_losses.own(
                layer, marks, options.scalar_losses, options.exact
            )
            _keras.clear_losses(layer)
        is_alike = self.alike_in_all(inputs, tables)
        ran = Ran(inputs, scope, weights, is_alike)
        changes, notes = find_changes(
            layer, self.variables, ran, options.policies
        )
        many = options.num_turns > 1
        joining = Joining(layer, inputs, weights, many, is_alike)
        finish, ends = _join(joining, outputs, before, losses)
        return CallOutput(joining.values, changes), CallNotes(
            *notes[:3],
            joining.kinds,
            finish,
            ends=ends,
            looked_up=tables,
            doubt=joining.doubt,
        )


def _join(
    joining: Joining, outputs: Any, before: Any, losses: Any
) -> tuple[Callable[[list[Any]], Any], tuple[int, int]]:
    """Say how what a call came to joins: `finish` and `ends` of `CallNotes`."""
    finish_outputs = joining.add_outputs(outputs)
    num_outputs = len(joining.values)
    finish_kept = joining.add_kept(before)
    ends = (num_outputs, len(joining.values))
    finish_losses = joining.add_losses(losses)

    def finish(values: list[Any]) -> Any:
        rest = iter(values)
        result = finish_outputs(rest)
        finish_kept(rest)
        finish_losses(rest)
        return result

    return finish, ends


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)


def _fingerprint(layer: keras.Layer) -> Any:
    """Return the settings of layers, which a call may go by."""
    known = _keras.names_of_layers()
    return tuple(
        (name, setting)
        for one in _keras.layers(layer)
        for name, value in list(vars(one).items())
        if name not in _keras.CHANGING
        and (setting := _setting(value, name in known)) is not None
    )


_PLAIN = (bool, int, float, str, type(None))


def _setting(value: Any, plain_only: bool) -> Any:
    """Return a value by which settings compare, `None` for what is none."""
    if isinstance(value, _PLAIN):
        return (value,)
    if plain_only:
        return None
    if isinstance(value, (list, tuple)):
        return tuple(_setting(entry, False) for entry in value)
    if isinstance(value, dict):
        entries = value.items()
        return tuple((repr(k), _setting(v, False)) for k, v in entries)
    kept = getattr(value, "__dict__", None)
    if isinstance(kept, dict) and _keras.is_of_user(value):
        plain = [(k, v) for k, v in kept.items() if isinstance(v, _PLAIN)]
        return tuple(plain)
    return None
