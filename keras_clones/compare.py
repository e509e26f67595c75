"""`compare`: do clones of a model train what plain Keras trains, how fast?"""

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_clones import (
    _keras,
    checks,
    compare_causes,
    compare_copy,
    compare_data,
    compare_run,
    compare_time,
    placement,
)
from keras_clones.attach import clone_model
from keras_clones.compare_copy import Source
from keras_clones.compare_data import Batches
from keras_clones.compare_run import Plain
from keras_clones.comparison import Comparison
from keras_clones.comparison_records import Advice, Cause, Findings, Run
from keras_clones.config import check_integer
from keras_clones.option_checks import check_choice

_DTYPES = (None, "float64", "float32")
# Options of `clone_model` that say how many clones there are, or where.
_NUMBERS = ("config", "devices", "num_clones", "model")
_NUM_CLONES = (1, 2, 4)
# What is faster by less than this is as fast.
_GAIN = 1.05


def compare(
    model: keras.Model | Callable[[], keras.Model],
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = None,
    num_clones: Sequence[int] = _NUM_CLONES,
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
    counts = _check(num_clones, batch_size, steps, dtype, verbose, options)
    if isinstance(model, keras.Model):
        compare_copy.check_compiled(model)
    say = print if verbose else _say_nothing
    batches = compare_data.read(x, y, batch_size, steps)
    with compare_copy.keeping_global_state():
        source = compare_copy.find_source(model, batches.parts[0])
        return Comparison(_compare(source, batches, counts, dtype, options, say))


def _say_nothing(text: str) -> None:
    pass


def _check(
    num_clones: Any,
    batch_size: Any,
    steps: Any,
    dtype: Any,
    verbose: Any,
    options: Mapping[str, Any],
) -> list[int]:
    """Check the arguments; return the numbers of clones that there can be."""
    if batch_size is not None:
        check_integer("batch_size", batch_size, 1)
    check_integer("steps", steps, 1)
    check_choice("dtype", dtype, _DTYPES)
    check_choice("verbose", verbose, (0, 1, 2))
    given = sorted(set(options) & set(_NUMBERS))
    known = set(clone_model.__kwdefaults__ or {}) - set(_NUMBERS)
    unknown = sorted(set(options) - known - set(_NUMBERS))
    if given or unknown:
        raise TypeError(
            f"Expected arguments of `clone_model` out of {sorted(known)}: the "
            "numbers of clones are in `num_clones`, and each takes the first "
            f"devices. Received: {[*given, *unknown]}"
        )
    if isinstance(num_clones, (str, bytes)) or not isinstance(
        num_clones, Sequence
    ):
        raise TypeError(
            "Argument `num_clones` must be a list of integers, such as "
            f"`[1, 2]`. Received: num_clones={num_clones!r}"
        )
    counts = [check_integer("num_clones", n, 1) for n in num_clones]
    if not counts:
        raise ValueError(
            "Argument `num_clones` must have at least one number of clones. "
            f"Received: num_clones={num_clones!r}"
        )
    gpus = placement.logical_devices("GPU")
    on_cpu = options.get("clone_on_cpu", False)
    if num_clones is _NUM_CLONES and gpus and not on_cpu:
        counts = [n for n in counts if n <= len(gpus)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in counts:
            config = placement.choose_config(n, None, on_cpu)
            placement.place_clones(config)
    return sorted(set(counts))


def _compare(
    source: Source,
    batches: Batches,
    counts: Sequence[int],
    dtype: str | None,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> Findings:
    """Train, judge, explain and time; return all that was found."""
    steps = len(batches.parts)
    say(f"Training plain Keras for {steps} steps, and again to see rounding.")
    plain, exact, notes = _train_plain(source, batches, dtype)

    def train(n: int, more: Mapping[str, Any]) -> Run:
        asked = compare_causes.joined(options, more)
        return _train_clones(source, batches, plain, exact, n, asked)

    runs = []
    for n in counts:
        runs.append(train(n, {}))
        say(f"{runs[-1].name}: {_told(runs[-1])}.")
    causes: list[Cause] = []
    first = next((run for run in runs if run.wrong), None)
    if first is not None:
        model = compare_copy.copy_of(source, exact)
        causes = compare_causes.find(model, first, plain, options)

        def attempt(more: dict[str, Any]) -> Run:
            say(f"Trying {first.name} with {_named(more)}.")
            return train(first.num_clones, more)

        causes = compare_causes.attempt(causes, attempt)
    say("Timing a step of each.")
    rows = _num_rows(batches.parts[0])
    runs = _time(source, batches, rows, runs, options)
    mends = compare_causes.mending(causes)
    own = keras.config.dtype_policy().name
    return Findings(
        runs=tuple(runs),
        causes=tuple(causes),
        explained=first is not None and _explains(causes),
        advice=_advise(runs, options, mends, first),
        dtype=exact or own,
        judged=_how_judged(exact or own, plain),
        notes=tuple([note for note in [batches.note, *notes] if note]),
        rows=rows,
        versions=_versions(),
        options={key: repr(value) for key, value in options.items()},
    )


def _train_plain(
    source: Source, batches: Batches, dtype: str | None
) -> tuple[Plain, str | None, list[str]]:
    """Train plain Keras in float64 if it can, else in the model's own type.

    Returns:
        The `Plain`, the name of the type (`None` for the model's own) and
        what to note of it.
    """
    if dtype == "float32":
        return compare_run.train_plain(source, batches, None), None, []
    try:
        plain = compare_run.train_plain(source, batches, "float64")
        return plain, "float64", []
    except (tf.errors.ResourceExhaustedError, MemoryError):
        raise
    except Exception as error:
        if dtype == "float64":
            raise ValueError(
                "Expected a model that trains in float64. Received: one that "
                f"does not ({_first_line(error)}). Pass `dtype='float32'` to "
                "judge it in its own type."
            ) from error
        reason = _first_line(error)
    plain = compare_run.train_plain(source, batches, None)
    note = f"Judged in the model's own type, since float64 fails: {reason}"
    return plain, None, [note]


def _train_clones(
    source: Source,
    batches: Batches,
    plain: Plain,
    dtype: str | None,
    n: int,
    options: Mapping[str, Any],
) -> Run:
    """Train a number of clones, and judge them by plain Keras."""
    try:
        model = compare_copy.copy_of(source, dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clone_model(model, num_clones=n, **options)
        found, warned = compare_run.train_against(
            model, batches, plain.history, dtype
        )
    except Exception as error:
        return Run(n, failed=_why_failed(error))
    beyond = (found / plain.limits).argmax(axis=1)
    at = np.arange(len(found)), beyond
    return Run(
        n,
        differences=compare_run.judge(plain, found),
        by_step=tuple(found[at].tolist()),
        limits=tuple(plain.limits[at].tolist()),
        warnings=tuple([*compare_run.texts(caught), *warned]),
    )


def _why_failed(error: Exception) -> str:
    if isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError)):
        return "out of memory"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _told(run: Run) -> str:
    if run.failed:
        return run.failed
    if run.same:
        return "the same as plain Keras"
    return f"differs at step {run.wrong[0].first}, first {run.wrong[0].name!r}"


def _named(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _time(
    source: Source,
    batches: Batches,
    rows: int,
    runs: Sequence[Run],
    options: dict[str, Any],
) -> list[Run]:
    """Time plain Keras and each number of clones that trained, in turns."""

    def make(n: int) -> keras.Model:
        model = compare_copy.copy_of(source)
        return clone_model(model, num_clones=n, **options) if n else model

    found: dict[int, Run] = {}
    candidates: dict[int, compare_time.Candidate] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run in [Run(0), *runs]:
            n = run.num_clones
            found[n] = run
            if run.failed:
                continue
            try:
                candidates[n] = compare_time.Candidate(
                    lambda n=n: make(n), batches
                )
            except (tf.errors.ResourceExhaustedError, MemoryError) as error:
                found[n] = run._replace(failed=_why_failed(error))
        compare_time.take_turns(list(candidates.values()))
        for n, candidate in candidates.items():
            timing = candidate.timing(rows)
            found[n] = found[n]._replace(**timing._asdict())
    return list(found.values())


def _advise(
    runs: Sequence[Run],
    options: dict[str, Any],
    mends: dict[str, Any],
    differing: Run | None,
) -> Advice:
    """Say which number of clones and options to use, and by how much."""
    plain = runs[0]
    needed = mends if differing is not None else {}
    fit = [
        run
        for run in runs[1:]
        if run.seconds and (run.same or (mends and not run.failed))
    ]
    best = min(fit, key=lambda run: run.seconds or 0.0, default=None)
    if best is None or not plain.seconds or not best.seconds:
        text = "Use plain Keras: no number of clones trained the same model."
        return Advice(0, {}, 1.0, text)
    gain = plain.seconds / best.seconds
    if gain < _GAIN:
        text = (
            f"Use plain Keras: {best.name}, the fastest, take a step in "
            f"{1 / gain:.2f} times its time."
        )
        return Advice(0, {}, 1.0, text)
    used = compare_causes.joined(options, {} if best.same else needed)
    call = ", ".join([f"num_clones={best.num_clones}", *filter(None, [_named(used)])])
    text = f"Use `clone_model(model, {call})`: {gain:.2f} times as fast as plain Keras"
    text += "." if best.same else ", timed without the option that mends it."
    return Advice(best.num_clones, used, gain, text)


def _explains(causes: Sequence[Cause]) -> bool:
    """Say whether causes explain a difference: tried, or with no option.

    Where options were tried and mend nothing, something else is wrong, too.
    """
    tried = [cause.tried for cause in causes if cause.tried is not None]
    return any(tried) if tried else any(not c.suspected for c in causes)


def _how_judged(dtype: str, plain: Plain) -> str:
    text = (
        f"Judged in {dtype}. Rounding is what is within "
        f"{compare_run.SPREAD} times the spread of plain Keras itself, from "
        "weights that differ by one unit in the last place"
    )
    if plain.drew:
        return text + " (its batches drawn at random, rows keep their places)."
    if plain.by_order:
        return text + ". Plain Keras goes by the order of a batch's rows."
    return text + " and with the rows of each batch in another order."


def _num_rows(batch: Any) -> int:
    leaves = keras.tree.flatten(batch)
    return next(int(x.shape[0]) for x in leaves if x is not None and len(x.shape))


def _versions() -> dict[str, str]:
    from keras_clones import __version__

    return {
        "keras_clones": __version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "devices": ", ".join(
            d.name for d in tf.config.list_logical_devices()
        ),
    }
