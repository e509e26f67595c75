"""What a clone gives back of its shard, out of what its pieces came to."""

from typing import Any

from keras_clones.clone.changes import Notes
from keras_clones.exchange import in_turns, laying_out, tracing
from keras_clones.step.begin import Step
from keras_clones.step.tower import TowerOutput
from keras_clones.tensors import sharding


def run_pieces(
    step: Step, layout: laying_out.Layout, tower: tracing.TracedTower
) -> tuple[list[TowerOutput], Notes]:
    """Run a tower on the pieces of every clone, one after the other.

    Args:
        step: `Step` of Keras.
        layout: `Layout` of its batch.
        tower: `TracedTower` of its model.

    Returns:
        Tuple `(results, notes)`: one `TowerOutput` a clone, on its device,
        and the `Notes` of the tower.
    """
    variables = step.variables.trainable if step.training else []
    notes = [tower.notes]

    def run(i: int) -> in_turns.Part:
        result = tower.call(layout.inputs[i])
        if tower.concrete is None:
            result, notes[0] = result
        return _part(result, variables, step.plan.outputs_leave)

    return in_turns.take_turns(layout, run, _of_shard), notes[0]


def _part(
    result: TowerOutput, variables: Any, outputs_leave: bool
) -> in_turns.Part:
    added, rows = in_turns.split_gradients(result.gradients, variables)
    sums = result.loss, result.loss_values, result.metrics, added
    outputs = (result.outputs, result.masks) if outputs_leave else (None, [])
    return in_turns.Part(sums, (outputs, rows), result.changes)


def _of_shard(total: in_turns.Total) -> TowerOutput:
    loss, loss_values, metrics, added = total.added
    outputs, rows = zip(*total.listed, strict=True)
    joined, masks = sharding.join(list(outputs))
    return TowerOutput(
        outputs=joined,
        masks=masks,
        loss=loss,
        loss_values=loss_values,
        changes=total.changes,
        metrics=metrics,
        gradients=in_turns.join_gradients(added, rows),
    )
