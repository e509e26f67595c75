"""What a comparison came to in words: tables, text, HTML and records."""

import math
from collections.abc import Mapping
from typing import Any

from keras_clones.comparing.records import (
    NOISE,
    Cause,
    Difference,
    Findings,
    Run,
    named,
)
from keras_clones.devices.placement import short_name
from keras_clones.look.page import Page, Table, readable

# How many of the variables that differ are shown.
_SHOWN = 8


def page(found: Findings) -> Page:
    """Return the page of a comparison."""
    tables = [_runs_table(found)]
    differing = found.differing
    if differing is not None:
        tables.append(_differences_table(differing))
    if found.causes:
        tables.append(_causes_table(found.causes))
    return Page(tables, notes(found))


def notes(found: Findings) -> list[str]:
    """Return the lines below the tables: the verdict, and what to do."""
    lines = [verdict(found), found.advice.text, found.judged, *found.notes]
    lines += [f"{run.name}: {run.failed}" for run in found.runs if run.failed]
    if found.options:
        given = ", ".join(
            f"{key}={text}" for key, text in found.options.items()
        )
        lines.append(f"All clones were made with `{given}`.")
    whole = list(dict.fromkeys(n for run in found.runs for n in run.whole))
    if whole:
        lines.append(
            f"Called whole, since shards would let them differ: {whole}."
        )
    fastest = [run for run in found.runs if run.verdict]
    if fastest:
        run = min(fastest, key=lambda run: run.seconds or math.inf)
        lines.append(f"{run.name}: {' '.join(str(run.verdict).split())}")
    return [line for line in lines if line]


def verdict(found: Findings) -> str:
    """Say in one sentence or two whether clones train the same model."""
    ran = [
        run
        for run in found.runs
        if run.num_clones and not (run.failed or run.options)
    ]
    if not ran:
        return "No clones ran, so nothing is known of them."
    differing = found.differing
    if differing is None:
        names = _and([run.name for run in ran])
        verb = "trains" if len(ran) == 1 and ran[0].num_clones == 1 else "train"
        return f"Same: {names} {verb} what plain Keras trains, up to rounding."
    first = differing.wrong[0]
    same = [run.name for run in ran if run.same]
    text = (
        f"Different: {differing.name} train another model than plain Keras. "
        f"First at step {first.first}: {first.kind} {first.name!r}, by "
        f"{first.largest:.1e} of its size, where rounding explains "
        f"{first.limit:.1e}. "
    )
    if same:
        text += f"{_and(same)}: the same. "
    return text + _explanation(found)


def _explanation(found: Findings) -> str:
    if found.explained:
        mended = [run for run in found.runs if run.options]
        if not mended:
            return "What is known to let it differ is in the table."
        return f"With `{named(mended[0].options)}` it is the same: tried."
    return (
        "Not explained: please report it, with `comparison.to_dict()` (which "
        "has the versions) and the function that makes the model, or the "
        "smallest one that shows it."
    )


def _runs_table(found: Findings) -> Table:
    plain = found.runs[0]
    header = ["", "same?", "largest difference", "step", "of plain Keras"]
    header += ["first step", "peak memory", "gets a step", "sends a step"]
    rows = []
    for run in found.runs:
        rows.append(
            [
                run.name,
                _same(run),
                _largest(run),
                _seconds(run.seconds),
                _ratio(run, plain),
                _seconds(run.first_seconds),
                _memory(run),
                _each(run.received),
                _each(run.sent),
                run.bound_by or "",
            ]
        )
    return Table([*header, "bound by"], rows)


def _same(run: Run) -> str:
    if run.failed:
        return "failed"
    if not run.num_clones:
        return ""
    return "same" if run.same else "different"


def _largest(run: Run) -> str:
    if not run.differences or not run.num_clones:
        return ""
    # Of what is nothing but rounding, as a bias before a normalization, any
    # difference is large beside its size.
    told = [
        d for d in run.differences if d.first is not None or d.limit < NOISE
    ]
    return f"{max(d.largest for d in told or run.differences):.1e}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _ratio(run: Run, plain: Run) -> str:
    if run.seconds is None or plain.seconds is None:
        return ""
    return f"{run.seconds / plain.seconds:.2f}"


def _memory(run: Run) -> str:
    if run.seconds is None:
        return ""
    if run.memory is None:
        return "not measured"
    return ", ".join(
        f"{one if one == 'process' else short_name(one)} {readable(size)}"
        for one, size in run.memory.items()
    )


def _each(words: tuple[str, ...]) -> str:
    """Return what crosses to or from each clone, once if it is alike."""
    if not words:
        return ""
    first, *others = words
    unlike = [word for word in others if word != first]
    if not unlike:
        return f"{first} a clone"
    same = len(set(others)) == 1
    return f"{first}, then {others[0]} each" if same else ", ".join(words)


def _differences_table(run: Run) -> Table:
    rows = [
        [
            str(d.first),
            d.name,
            d.kind,
            f"{d.largest:.1e}",
            f"{d.limit:.1e}",
        ]
        for d in run.wrong[:_SHOWN]
    ]
    if len(run.wrong) > _SHOWN:
        rows.append(["...", f"{len(run.wrong) - _SHOWN} more", "", "", ""])
    header = [f"differs from step ({run.name})", "name", "what it is"]
    return Table([*header, "largest difference", "rounding explains"], rows)


def _causes_table(causes: tuple[Cause, ...]) -> Table:
    rows = []
    for cause in causes:
        tried = {None: "not tried", True: "mends it", False: "does not mend it"}
        rows.append(
            [
                _some(cause.layers),
                cause.why,
                named(cause.mends) or "no option",
                tried[cause.tried] if cause.mends else "",
            ]
        )
    return Table(["layers", "what is known", "option", "tried"], rows)


def _some(names: tuple[str, ...]) -> str:
    more = [f"{len(names) - 3} more"] if len(names) > 3 else []
    return ", ".join([*names[:3], *more])


def _and(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def as_dict(found: Findings) -> dict[str, Any]:
    """Return a comparison as dicts, lists, strings and numbers."""
    differing = found.differing
    return {
        "same": found.same,
        "verdict": verdict(found),
        "first": _difference(differing.wrong[0]) if differing else None,
        "runs": [_run(run) for run in found.runs],
        "causes": [
            {**c._asdict(), "layers": list(c.layers), "mends": _plain(c.mends)}
            for c in found.causes
        ],
        "explained": found.explained,
        "advice": {
            **found.advice._asdict(),
            "options": _plain(found.advice.options),
        },
        "dtype": found.dtype,
        "judged": found.judged,
        "notes": list(found.notes),
        "rows": found.rows,
        "versions": dict(found.versions),
        "options": dict(found.options),
    }


def _run(run: Run) -> dict[str, Any]:
    lists = ("by_step", "limits", "received", "sent", "warnings", "whole")
    return {
        **run._asdict(),
        **{name: list(getattr(run, name)) for name in lists},
        "differences": [_difference(d) for d in run.differences],
        "same": run.same,
        "options": _plain(run.options),
        "memory": dict(run.memory) if run.memory is not None else None,
    }


def _difference(difference: Difference) -> dict[str, Any]:
    return dict(difference._asdict())


def _plain(value: Any) -> Any:
    """Return options as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    known = value is None or isinstance(value, (bool, int, float, str))
    return value if known else repr(value)
