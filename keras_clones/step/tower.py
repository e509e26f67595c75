"""The tower function: the pure function that a clone runs on its shard."""

import contextlib
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras
from keras_clones.clone import given_rows, layer_losses
from keras_clones.clone.changes import Notes, Ran, by_rows, find_changes
from keras_clones.clone.inputs import (
    TowerInput,
    Weights,
    alike_in_all,
    drawing,
    first_writes,
    mapping,
    sources,
)
from keras_clones.clone.leftovers import kept_tensors
from keras_clones.clone.scopes import CloneScope
from keras_clones.clone.state import Changes
from keras_clones.clone.undecorated import undecorated
from keras_clones.plan import counting
from keras_clones.step.begin import Step
from keras_clones.tensors import sharding


class TowerOutput(NamedTuple):
    """What a clone gives back.

    Losses, metrics and gradients are the clone's parts: their sums over the
    clones are those of the global batch. `loss_values` are the losses of
    single outputs that Keras logs, `metrics` what the batch adds to the
    compiled metrics' variables, `gradients` those of the scaled loss.
    `changes` are new values of the variables in `Notes.assigned`.
    """

    outputs: Any
    masks: list[Any]
    loss: Any
    loss_values: list[tf.Tensor]
    changes: Changes
    metrics: list[tf.Tensor]
    gradients: list[Any]


class _Forward(NamedTuple):
    """What a forward pass came to: outputs, the loss, and who was watched.

    `scope` is what it ran in, `given` what it got of tables.
    """

    outputs: Any
    loss: tf.Tensor
    tape: tf.GradientTape
    scope: CloneScope
    given: given_rows.Given


class Tower:
    """A model that computes its own loss, as a function of `TowerInput`.

    The forward pass and the loss run inside one scope that maps every
    variable to its mirror: apart, the gradients of weight regularizers would
    be lost without a word.

    Args:
        step: `Step` whose clones run it. They compute gradients if it trains,
            and update compiled metrics, from zero, by their own shards if it
            is planned so.
        may_be_idle: Boolean, whether a clone may have no row of its own.
    """

    def __init__(self, step: Step, may_be_idle: bool) -> None:
        model = step.model
        self._model = model
        self._variables = step.variables
        self._options = step.options
        self._training = step.training
        self._may_be_idle = may_be_idle
        self._trackers = _keras.loss_trackers(model)
        self._metrics = (
            _keras.metric_variables(model)
            if step.plan.metrics_in_clones
            else []
        )

    def __call__(self, inputs: TowerInput) -> tuple[TowerOutput, Notes]:
        """Return what a clone comes to, without side effects."""
        leaves = keras.tree.flatten(inputs.data)
        rows = list(filter(sharding.has_rows, leaves))
        with drawing(inputs, rows, self._options.exact):
            return self._run(inputs)

    def look(self, inputs: TowerInput) -> None:
        """Run the forward pass alone, for what is looked up in it."""
        self._run_forward(inputs, Weights(inputs, self._may_be_idle))

    def _run(self, inputs: TowerInput) -> tuple[TowerOutput, Notes]:
        weights = Weights(inputs, self._may_be_idle)
        before = kept_tensors(self._model)
        forward = self._run_forward(inputs, weights)
        scope, given = forward.scope, forward.given
        is_alike = alike_in_all(inputs, given=given)
        gradients = []
        if self._training:
            found = self._run_backward(inputs, forward)
            found = given_rows.by_table(found, given, is_alike)
            gradients = by_rows(found, is_alike)
        changes, notes = find_changes(
            self._model,
            self._variables,
            Ran(inputs, scope, weights, is_alike),
            self._options.policies,
            self._from_zero(),
        )
        output = self._weigh(scope, weights, forward, changes, gradients)
        keeps = kept_tensors(self._model) != before
        rowless = any(
            tf.is_symbolic_tensor(one) and is_alike(one)
            for one in keras.tree.flatten(forward.outputs)
            if not sharding.is_composite(one)
        )
        return output, notes._replace(keeps=keeps, rowless=rowless)

    def _from_zero(self) -> list[keras.Variable]:
        """Return the variables that the clone updates from zero."""
        trackers = [v for m in self._trackers for v in m.variables]
        return [*trackers, *self._metrics]

    def _run_forward(self, inputs: TowerInput, weights: Weights) -> _Forward:
        model, options, training = self._model, self._options, self._training
        x, y, sample_weight = inputs.data
        zeros = [(v, tf.zeros(v.shape, v.dtype)) for v in self._from_zero()]
        given = given_rows.give(self._variables.weights, inputs.look_ups)
        mirrors = mapping(self._variables, inputs)
        scope = CloneScope([*mirrors, *given.mapping, *zeros])
        tape = tf.GradientTape(watch_accessed_variables=False)
        with tape, scope, given.looked_up(), first_writes(inputs):
            if training:
                tape.watch(sources(self._variables, inputs))
            marking = layer_losses.marking(
                model, weights, options.num_turns > 1
            )
            with marking as marks, undecorated(model):
                outputs = _keras.call(model, x, training)
            local = layer_losses.local(
                model, marks, options.scalar_losses, weights, options.exact
            )
            with (
                _keras.overriding_losses(model, local),
                self._counting(inputs),
            ):
                loss = _keras.compute_loss(
                    model, x, y, outputs, sample_weight, training
                )
            if self._metrics:
                with tf.name_scope("update_metrics"):
                    _keras.update_compiled_metrics(
                        model, y, outputs, sample_weight
                    )
        return _Forward(outputs, loss, tape, scope, given)

    def _counting(
        self, inputs: TowerInput
    ) -> contextlib.AbstractContextManager[None]:
        """Let losses count by their entries, where these are counted."""
        if inputs.counts is None:
            return contextlib.nullcontext()
        counts = counting.Counts(inputs.counts, inputs.numbers[0])
        return _keras.wrapping_losses(self._model, counts.wrap)

    def _run_backward(self, inputs: TowerInput, forward: _Forward) -> list[Any]:
        loss, tape = forward.loss, forward.tape
        seed = tf.cast(tf.reduce_prod(inputs.numbers[:2]), loss.dtype)
        with tf.name_scope("backward_pass"):
            return tape.gradient(
                loss, sources(self._variables, inputs), output_gradients=seed
            )

    def _weigh(
        self,
        scope: CloneScope,
        weights: Weights,
        forward: _Forward,
        changes: Changes,
        gradients: list[Any],
    ) -> TowerOutput:
        """Return the clone's parts of what all clones come to."""
        outputs = forward.outputs
        masks = map(_keras.get_mask, keras.tree.flatten(outputs))
        values = [_tracked_value(scope, m) for m in self._trackers]
        metrics = [scope.get_current_value(v) for v in self._metrics]
        return TowerOutput(
            outputs=keras.tree.map_structure(weights.own_rows, outputs),
            masks=[
                None if mask is None else weights.own_rows(mask)
                for mask in masks
            ],
            loss=weights.weigh(forward.loss),
            loss_values=[weights.weigh(value) for value in values],
            changes=changes,
            metrics=[weights.if_live(value) for value in metrics],
            gradients=gradients,
        )


def _tracked_value(
    scope: keras.StatelessScope, tracker: keras.metrics.Mean
) -> tf.Tensor:
    """Return what a tracker, zero at first, was updated with."""
    total, count = (scope.get_current_value(v) for v in tracker.variables)
    return tf.math.divide_no_nan(total, tf.cast(count, total.dtype))
