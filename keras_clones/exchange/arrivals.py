"""When what the clones of a step come to is there."""

from typing import Any

import tensorflow as tf

from keras_clones.devices import clocks
from keras_clones.exchange.laying_out import ARRIVALS, Layout


def seconds_until_there(
    layout: Layout, results: list[Any]
) -> list[tf.Tensor] | None:
    """Measure what each clone took, from its rows being laid out.

    Args:
        layout: `Layout` of the rows.
        results: List with one nest a clone.

    Returns:
        A list of scalar float64 tensors, one a clone, or `None` if nothing is
        measured.
    """
    ends = tell(layout, results)
    if ends is None or layout.started is None:
        return None
    return [end - layout.started for end in ends]


def tell(
    layout: Layout, results: list[Any], way: str = "forth"
) -> list[tf.Tensor] | None:
    """Let each clone tell home when what it comes to is there.

    Of that, one number goes home, once all of it is there: a GPU is not done
    when its kernels are queued, and home does not see what clones on other
    hosts do.

    Args:
        layout: `Layout` of the rows.
        results: List with one nest a clone, or a piece.
        way: String, `"back"` if they run backward by themselves.

    Returns:
        A list of scalar float64 tensors, one a clone: seconds. `None` if
        there is no one to tell, or one clone, or too few rows for all clones.
    """
    measured = layout.clocks
    if measured is None:
        return None
    turns = layout.turns
    if len(turns) == 1 or len(turns) < len(measured.ends):
        return None
    # A clone is done when its last piece is.
    last = [own[-1] for own in turns]
    if len(results) > len(turns):
        results = [results[i] for i in last]
    ends = []
    for i, (clock, result) in enumerate(
        zip(measured.ends, results, strict=True)
    ):
        with tf.name_scope(f"{ARRIVALS}/{way}/of_{i}/"):
            number = _when_there(result, layout.clones[last[i]].device)
            with tf.device(layout.home):
                ends.append(clocks.seconds_now(clock, tf.identity(number)))
    return ends


def _when_there(nest: Any, device: str) -> tf.Tensor:
    """Return a number from a device that is there when all of a nest is."""
    leaves = tf.nest.flatten(nest, expand_composites=True)
    tensors = [leaf for leaf in leaves if tf.is_tensor(leaf)]
    with tf.device(device), tf.control_dependencies(tensors):
        first = tensors[0] if tensors else tf.zeros([1])
        return tf.identity(tf.reshape(first, [-1])[:1])
