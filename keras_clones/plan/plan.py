"""How a step of Keras will flow, planned once for all that need to know.

The step goes by the plan, and what a user looks at tells of it.
"""

from typing import NamedTuple

import keras

from keras_clones.clone.tables import large_tables
from keras_clones.exchange.batch_norm import synchronized_layers
from keras_clones.plan import exactness, whole
from keras_clones.plan.build import resolve_jit_compile
from keras_clones.plan.options import StepOptions


class Plan(NamedTuple):
    """How a step of Keras flows, as far as its model tells before it runs.

    Attributes:
        loss_in_clones: Boolean, whether each clone computes the loss of its
            own shard. If not, the step runs once, by calls.
        reason: String, why the losses of shards do not average to that of
            the global batch, or `None` if they do.
        metrics_in_clones: Boolean, whether the clones update the metrics.
        outputs_leave: Boolean, whether outputs are brought home.
        synchronized: List of the layers that share sums over the clones.
        tables: List of the variables that stay home. Where XLA compiles what
            a clone runs, those do that a step foresees all look-ups in.
        jit_compile: Boolean, whether XLA compiles what a clone runs.
        may_change: Boolean, whether the loss leaves the clones where a
            reason shows.
        apart: `Whole`, the layers that are not called on shards.
    """

    loss_in_clones: bool
    reason: str | None
    metrics_in_clones: bool
    outputs_leave: bool
    synchronized: list[keras.layers.BatchNormalization]
    tables: list[keras.Variable]
    jit_compile: bool
    may_change: bool
    apart: whole.Whole

    def knowing(self, reason: str | None) -> "Plan":
        """Return the plan that also goes by what outputs show.

        Args:
            reason: String, why losses of shards do not average, or `None`.
        """
        reason = self.reason or reason
        if not (reason and self.may_change and self.loss_in_clones):
            return self._replace(reason=reason)
        return self._replace(
            loss_in_clones=False,
            reason=reason,
            metrics_in_clones=False,
            outputs_leave=True,
        )


def plan_step(
    model: keras.Model, options: StepOptions, training: bool, num_clones: int
) -> Plan:
    """Plan a step of Keras, compiled or not, before its outputs are there.

    Args:
        model: A cloned `keras.Model`.
        options: `StepOptions`.
        training: Boolean, whether it is a training step.
        num_clones: Integer, how many clones have rows.
    """
    jit_compile = model.compiled and resolve_jit_compile(model, options)
    synchronized = []
    if training and num_clones > 1:
        synchronized = synchronized_layers(model, options.batch_norm)
    apart = whole.find(model, options.whole, options.num_turns)
    reason = apart.reason or exactness.why_not_by_clone(model)
    may_change = options.loss == "auto"
    in_clones = options.loss != "gather" and not (
        apart.reason or (may_change and (reason or synchronized))
    )
    metrics = in_clones and exactness.metrics_add_up(model)
    needed = exactness.needs_outputs(model)
    return Plan(
        loss_in_clones=in_clones,
        reason=reason,
        metrics_in_clones=metrics,
        outputs_leave=not in_clones or (needed and not metrics),
        synchronized=synchronized,
        tables=large_tables(model),
        jit_compile=jit_compile,
        may_change=may_change,
        apart=apart,
    )
