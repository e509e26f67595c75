"""Which share of the rows each clone gets, on devices of uneven speed."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

# The first steps compile and choose kernels; the next ones are measured.
WARM_UP_STEPS = 2
MEASURED_STEPS = 10


class Balance(NamedTuple):
    """Shares of the rows that are measured while a model trains.

    `fractions` holds one share a clone, which add up to 1; `seconds` what
    each clone took in the last measured step, from the batch being laid out
    to its results being there; `steps` how many steps have run.
    """

    fractions: tf.Variable
    seconds: tf.Variable
    steps: tf.Variable


def check_shares(shares: Any, num_clones: int) -> Any:
    """Return shares that add up to 1, `"auto"` or `None`, or say what is wrong.

    Raises:
        TypeError: If `shares` is not a list of numbers.
        ValueError: If there is not one positive number a clone.
    """
    if shares is None or (isinstance(shares, str) and shares == "auto"):
        return shares
    if isinstance(shares, (str, bytes)) or not isinstance(shares, Iterable):
        raise TypeError(
            "Argument `shares` must be a list with one positive number a "
            f"clone, 'auto' or None. Received: shares={shares!r}"
        )
    shares = list(shares)
    if len(shares) != num_clones:
        raise ValueError(
            f"Argument `shares` must have one number a clone: {num_clones}. "
            f"Received: shares={shares}, which has {len(shares)}."
        )
    for share in shares:
        known = isinstance(share, numbers.Real) and not isinstance(share, bool)
        number = float(share) if known else math.nan
        if not 0 < number < math.inf:
            raise ValueError(
                "Argument `shares` must have positive, finite numbers. To "
                "leave a device out, make fewer clones. "
                f"Received: shares={shares}, with {share!r} in it."
            )
    total = math.fsum(shares)
    return tuple(float(share) / total for share in shares)


def start(num_clones: int, home: str) -> Balance:
    """Return a balance that has measured nothing yet: even shares."""
    with tf.init_scope(), tf.device(home):
        even = tf.fill([num_clones], tf.constant(1 / num_clones, tf.float64))
        return Balance(
            fractions=tf.Variable(even, trainable=False),
            seconds=tf.Variable(tf.zeros_like(even), trainable=False),
            steps=tf.Variable(0, trainable=False, dtype=tf.int64),
        )


def observe(balance: Balance, seconds: Sequence[tf.Tensor]) -> None:
    """Take in what each clone took for its shard of one training step.

    Args:
        balance: `Balance`, which changes while it is measured and then stays.
        seconds: Sequence of scalar float64 tensors, one a clone.
    """
    steps = balance.steps.assign_add(1)
    measured = tf.logical_and(
        steps > WARM_UP_STEPS, steps <= WARM_UP_STEPS + MEASURED_STEPS
    )
    now = tf.stack(seconds)
    old = balance.fractions.read_value()
    new = next_fractions(old, now)
    balance.fractions.assign(tf.where(measured, new, old))
    balance.seconds.assign(tf.where(measured, now, balance.seconds))


def next_fractions(fractions: tf.Tensor, seconds: tf.Tensor) -> tf.Tensor:
    """Return shares that bring the clones' times closer together.

    A share moves by the square root of how much faster its clone was: noise
    counts half, and what is fixed in a clone's time does not overshoot.
    """
    fastest = tf.reduce_min(seconds)
    moved = fractions * tf.sqrt(fastest / tf.maximum(seconds, 1e-9))
    return moved / tf.reduce_sum(moved)


def is_settled(balance: Balance) -> bool:
    """Say whether the shares have been measured, and stay as they are."""
    return int(balance.steps.numpy()) >= WARM_UP_STEPS + MEASURED_STEPS


def report_line(balance: Balance) -> str:
    """Return a line on which shares were chosen, and why."""
    shares = ", ".join(f"{f:.1%}" for f in balance.fractions.numpy())
    times = ", ".join(f"{1e3 * s:.1f}" for s in balance.seconds.numpy())
    return (
        f"shares='auto': the clones get {shares} of the rows. In the last of "
        f"{MEASURED_STEPS} measured steps they took {times} ms."
    )
