"""`compare`: whether clones train what plain Keras trains, and how fast."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_clones import checks
from keras_clones.comparing import (
    advice,
    check,
    copies,
    explaining,
    kept_batches,
    timing,
    training,
)
from keras_clones.comparing.comparison import Comparison
from keras_clones.comparing.copies import Source
from keras_clones.comparing.kept_batches import Batches
from keras_clones.comparing.records import NOISE, Cause, Findings, Run, joined
from keras_clones.comparing.training import Plain
from keras_clones.door.attach import clone_model, deployment

_NO_REPEAT = (
    "Plain Keras does not come to the same when it trains again, as where "
    "Python or `tf.random` draws: what differs by less does not show. Draw "
    "with `keras.random` and a `keras.random.SeedGenerator`."
)


def compare(
    model: keras.Model | Callable[[], keras.Model],
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = None,
    num_clones: Sequence[int] = check.NUM_CLONES,
    steps: int = 10,
    dtype: str | None = None,
    verbose: int = 1,
    **options: Any,
) -> Comparison:
    """Compare clones of a model with plain Keras: what they train, how fast.

    It copies the compiled model, once plain and once for each number of
    clones, with the same weights, optimizer and seeds, trains each copy with
    `fit` on the same batches, and compares every variable, optimizer variable
    and log after every step. Where clones differ by more than rounding, it
    looks for what is known to cause it, and tries the options that mend it.
    Then it times the copies in turns. The model itself, its optimizer, the
    streams of random numbers and Keras's settings stay as they are, also if
    it fails or is interrupted.

    What counts as rounding is measured: plain Keras is trained again from
    weights that differ by one unit in the last place, and, if it draws
    nothing at random, on batches whose rows change places. What is within 100
    times what that comes to, or within 1e-10 in float64 and 1e-5 in float32,
    is rounding.

    Args:
        model: A compiled `keras.Model`, or a function without arguments that
            makes one, for a model that cannot be copied by its config.
        x: What `fit` takes: a nest of arrays, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator of batches, of which
            `steps` batches are read and kept.
        y: Nest of arrays, the targets, with arrays. Defaults to `None`.
        batch_size: Integer, the rows of a global batch, with arrays. Defaults
            to `None`: 32.
        num_clones: Sequence of integers, the numbers of clones. Defaults to
            `(1, 2, 4)`, or those of them that the machine's GPUs allow.
        steps: Integer, how many training steps to compare. Defaults to 10.
        dtype: String, `"float64"` or `"float32"`: which type of numbers to
            judge the differences in, the latter standing for the model's own.
            Defaults to `None`: float64 if the model can be made and trained
            in it, else its own. Times are always those of its own.
        verbose: Integer, 1 to print what is going on, 0 not to. Defaults
            to 1.
        **options: Arguments of `clone_model`, such as `batch_norm="sync"`.

    Returns:
        A `Comparison`, with `same`, `first`, `causes`, `advice`, `runs`,
        `summary()`, `plot(path)` and `to_dict()`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the model is not compiled
            or cannot be copied, there are fewer batches than steps, or fewer
            devices than clones.

    Example:

    >>> import keras
    >>> from keras_clones import compare
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = keras.ops.ones((20, 3)), keras.ops.ones((20, 1))
    >>> found = compare(
    ...     model, x, y, batch_size=5, num_clones=[2], steps=3, verbose=0
    ... )
    >>> found.same
    True
    """
    checks.check_backend()
    check.check_numbers(batch_size, steps, dtype, verbose)
    counts = check.check_counts(num_clones, options)
    if isinstance(model, keras.Model):
        copies.check_compiled(model)
    asked = _Asked(counts, dtype, options, print if verbose else _say_nothing)
    batches = kept_batches.read(x, y, batch_size, steps)
    with copies.keeping_global_state(), warnings.catch_warnings():
        # What copies warn of is evidence, and not for the user to act on.
        warnings.simplefilter("ignore")
        source = copies.find_source(model, batches.parts[0])
        return Comparison(_compare(source, batches, asked))


def _say_nothing(text: str) -> None:
    pass


class _Asked(NamedTuple):
    """What `compare` is asked for, and what it tells of itself by."""

    counts: Sequence[int]
    dtype: str | None
    options: dict[str, Any]
    say: Callable[[str], None]


def _compare(source: Source, batches: Batches, asked: _Asked) -> Findings:
    """Train, judge, explain and time; return all that was found."""
    say, options, steps = asked.say, asked.options, len(batches.parts)
    say(f"Training plain Keras for {steps} steps, and again to see rounding.")
    plain, note = _train_plain(source, batches, asked.dtype)

    def train(n: int, more: Mapping[str, Any]) -> Run:
        run = _train_clones(source, batches, plain, n, joined(options, more))
        run = run._replace(options=more)
        say(f"{run.name}: {_told(run)}.")
        return run

    def explain(run: Run) -> list[Cause]:
        model = copies.copy_of(source, plain.dtype)
        return explaining.find(model, run, plain, options)

    runs, causes = _judge(asked.counts, train, explain)
    say("Timing a step of each, in turns.")
    noted = [batches.note, note, "" if plain.repeats else _NO_REPEAT]
    timed = timing.time_runs(source, batches, [Run(0), *runs], options)
    judged_in = plain.dtype or keras.config.floatx()
    return Findings(
        runs=tuple(timed),
        causes=tuple(causes),
        explained=advice.explains(causes),
        advice=advice.advise(timed, options),
        dtype=judged_in,
        judged=advice.how_judged(judged_in, plain),
        notes=tuple(filter(None, noted)),
        rows=batches.rows,
        versions=advice.versions(),
        options={key: repr(value) for key, value in options.items()},
    )


def _judge(
    counts: Sequence[int],
    train: Callable[[int, Mapping[str, Any]], Run],
    explain: Callable[[Run], list[Cause]],
) -> tuple[list[Run], list[Cause]]:
    """Train each number of clones; explain and mend where one differs."""
    runs = [train(n, {}) for n in counts]
    differing = next((run for run in runs if run.wrong), None)
    if differing is None:
        return runs, []
    return _mend(runs, differing, explain(differing), train)


def _mend(
    runs: list[Run],
    differing: Run,
    causes: list[Cause],
    train: Callable[[int, Mapping[str, Any]], Run],
) -> tuple[list[Run], list[Cause]]:
    """Try what mends the fewest clones that differ, then with all others."""
    done: list[Run] = []

    def attempt(more: Mapping[str, Any]) -> Run:
        done.append(train(differing.num_clones, more))
        return done[-1]

    causes = explaining.attempt(causes, attempt)
    mends = explaining.mending(causes)
    if not mends:
        return runs, causes
    for run in [run for run in runs if run.wrong]:
        same = [
            one
            for one in done
            if (one.num_clones, one.options) == (run.num_clones, mends)
        ]
        runs = [*runs, *(same[:1] or [train(run.num_clones, mends)])]
    return runs, causes


def _train_plain(
    source: Source, batches: Batches, dtype: str | None
) -> tuple[Plain, str]:
    """Train plain Keras in float64 if it can, else in the model's own type.

    Returns:
        The `Plain`, and what to note of the type.
    """
    if dtype == "float32":
        return training.train_plain(source, batches, None), ""
    try:
        return training.train_plain(source, batches, "float64"), ""
    except (tf.errors.ResourceExhaustedError, MemoryError):
        raise
    except Exception as error:
        if dtype == "float64":
            raise ValueError(
                "Expected a model that trains in float64. Received: one that "
                f"does not ({training.first_line(error)}). Pass "
                "`dtype='float32'` to judge it in its own type."
            ) from error
        reason = training.first_line(error)
    plain = training.train_plain(source, batches, None)
    note = f"Judged in the model's own type, since float64 fails: {reason}"
    return plain, note


def _train_clones(
    source: Source,
    batches: Batches,
    plain: Plain,
    n: int,
    options: Mapping[str, Any],
) -> Run:
    """Train a number of clones, and judge them by plain Keras."""
    try:
        model = copies.copy_of(source, plain.dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clone_model(model, num_clones=n, **options)
        found, warned = training.train_against(
            model, batches, plain.history, plain.dtype
        )
    except Exception as error:
        return Run(n, failed=training.why_failed(error))
    told = (plain.limits < NOISE) | (found > plain.limits)
    beyond = (np.where(told, found, 0.0) / plain.limits).argmax(axis=1)
    at = np.arange(len(found)), beyond
    return Run(
        n,
        differences=training.judge(plain, found),
        by_step=tuple(found[at].tolist()),
        limits=tuple(plain.limits[at].tolist()),
        warnings=(*training.texts(caught), *warned),
        whole=_found_whole(model),
    )


def _found_whole(model: keras.Model) -> tuple[str, ...]:
    """Return the names of layers that are called whole without being told."""
    made = deployment(model)
    known = made.whole if made is not None else ()
    return tuple(x.name for x in known if isinstance(x, keras.Layer))


def _told(run: Run) -> str:
    if run.failed:
        return run.failed
    if run.same:
        return "the same as plain Keras"
    return f"differs at step {run.wrong[0].first}, first {run.wrong[0].name!r}"
