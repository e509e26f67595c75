"""What the benchmark's results come to: rows, tables and a picture."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from keras_clones.benchmark.timed_fit import Cell

Results = Mapping[Cell, Sequence[Mapping[str, Any]]]

_HEADER = (
    *("model", "peer", "ms a step", "of plain", "first step, s"),
    *("peak MiB", "KiB moved a step"),
)


# What the picture calls each peer, and draws it in.
_PEERS = {
    "plain": ("plain Keras", "0.45"),
    "clones": ("clones", "C0"),
    "gather": ("clones, loss='gather'", "C4"),
    "mirrored": ("MirroredStrategy, its fastest reduction", "C1"),
    "central": ("CentralStorageStrategy", "C2"),
    "jax": ("Keras on JAX, with DataParallel", "C3"),
}


class Row(NamedTuple):
    """One line of the table; `None` is what is not known.

    `ratio` is to plain Keras of the same model, `first` the seconds to the
    first step, `memory` in MiB, `bytes` those moved a step.
    """

    model: str
    peer: str
    ms: float | None = None
    ratio: float | None = None
    first: float | None = None
    memory: float | None = None
    bytes: int | None = None
    error: str | None = None


class Control(NamedTuple):
    """Two independent processes: milliseconds a step alone and together."""

    model: str
    alone: float
    together: float


def label(cell: Cell) -> str:
    """Return how a table names a cell's peer."""
    if cell.peer == "plain":
        return "plain Keras"
    if cell.peer == "control":
        return "two processes"
    if cell.peer == "jax" and cell.clones == 1:
        return "jax"
    usual = Cell._field_defaults
    more = [
        f"{name}={value}"
        for name in ("update", "pieces")
        if (value := getattr(cell, name)) != usual[name]
    ]
    told = ", ".join([*([cell.reduction] if cell.reduction else []), *more])
    return f"{cell.peer} {cell.clones}" + (f" ({told})" if told else "")


def best(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the best of each figure over the repeats of a cell.

    A cell that failed in one repeat and not in another has not failed.
    """
    done = [result for result in results if "error" not in result]
    if not done:
        return {"error": results[-1]["error"]} if results else {}

    def least(name: str) -> Any:
        known = [r[name] for r in done if r.get(name) is not None]
        return min(known, default=None)

    return {name: least(name) for name in ("ms", "first", "memory", "bytes")}


def fastest(cells: Sequence[Cell], results: Results) -> Cell:
    """Return the fastest of some cells, the first if none has a time."""
    return min(
        cells, key=lambda cell: best(results[cell]).get("ms") or float("inf")
    )


def make_rows(results: Results) -> list[Row]:
    """Return one row a model and peer, with the fastest reduction of each."""
    plain = {
        cell.model: best(repeats).get("ms")
        for cell, repeats in results.items()
        if cell.peer == "plain"
    }
    groups: dict[Any, list[Cell]] = {}
    for cell in results:
        if cell.peer != "control":
            key = cell._replace(reduction=None)
            groups.setdefault(key, []).append(cell)
    rows = []
    for group in groups.values():
        cell = fastest(group, results)
        figures = best(results[cell])
        reference, ms = plain.get(cell.model), figures.get("ms")
        ratio = ms / reference if ms and reference else None
        rows.append(Row(cell.model, label(cell), ratio=ratio, **figures))
    return rows


def make_controls(results: Results) -> list[Control]:
    """Return what each model's pairs of processes came to."""
    controls = []
    for cell, repeats in results.items():
        done = [r for r in repeats if "error" not in r]
        if cell.peer == "control" and done:
            alone = min(r["alone"] for r in done)
            together = min(max(r["together"]) for r in done)
            controls.append(Control(cell.model, alone, together))
    return controls


def failures(results: Results) -> list[str]:
    """Return a line on each cell that failed, with why."""
    return [
        f"{cell.model}, {label(cell)}: failed: {figures['error']}"
        for cell, figures in ((c, best(r)) for c, r in results.items())
        if "error" in figures
    ]


def _cells(row: Row) -> list[str]:
    """Return a row as the strings of its columns."""
    if row.error is not None:
        return [row.model, row.peer, "failed", "", "", "", ""]
    return [
        row.model,
        row.peer,
        _number(row.ms, 2),
        _number(row.ratio, 2),
        _number(row.first, 1),
        _number(row.memory, 0),
        _number(None if row.bytes is None else row.bytes / 1024, 1),
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _control_cells(control: Control) -> list[str]:
    ratio = control.together / control.alone
    return [
        control.model,
        _number(control.alone, 2),
        _number(control.together, 2),
        _number(ratio, 2),
    ]


def _tables(results: Results) -> list[tuple[list[list[str]], int]]:
    """Return tables of strings, each with how many columns are names."""
    rows, controls = make_rows(results), make_controls(results)
    tables = [([list(_HEADER), *map(_cells, rows)], 2)]
    if controls:
        header = ["two processes", "ms alone", "ms together", "of alone"]
        tables.append(([header, *map(_control_cells, controls)], 1))
    return tables


def plain_text(results: Results) -> str:
    """Return tables to read in a terminal, and what failed."""
    parts = [_aligned(*table) for table in _tables(results)]
    failed = "\n".join(failures(results))
    return "\n\n".join([*parts, *([failed] if failed else [])])


def markdown(results: Results) -> str:
    """Return tables to paste into a Markdown file."""
    return "\n\n".join(_piped(*table) for table in _tables(results))


def _aligned(table: list[list[str]], num_names: int) -> str:
    """Align the names to the left, and the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if i < num_names else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _piped(table: list[list[str]], num_names: int) -> str:
    marks = ["---" if i < num_names else "---:" for i in range(len(table[0]))]
    lines = [f"| {' | '.join(line)} |" for line in table]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]])


def picture_formats() -> list[str]:
    """Return the ends of file names that a picture can have."""
    from matplotlib.figure import Figure

    return sorted(Figure().canvas.get_supported_filetypes())


def draw(rows: Sequence[Row], path: str) -> None:
    """Write a picture of the time of a step, a chart of bars a model."""
    figure(rows).savefig(path, dpi=150)


def figure(rows: Sequence[Row]) -> Any:
    """Return a `matplotlib.figure.Figure` of the time of a step.

    A bar is labelled with its number of clones or replicas; the legend, which
    is there once, says what its color is.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    timed = [row for row in rows if row.ms is not None]
    models = list(dict.fromkeys(row.model for row in timed)) or [""]
    num_columns = min(len(models), 3)
    num_rows = -(-len(models) // num_columns)
    most = max(sum(r.model == m for r in timed) for m in models)
    # A figure of its own needs no window system, and leaves pyplot alone.
    picture = Figure(
        (1 + 3.2 * num_columns, 0.4 + (1.1 + 0.28 * most) * num_rows),
        layout="constrained",
    )
    charts = picture.subplots(num_rows, num_columns, squeeze=False).flat
    for chart in charts[len(models) :]:
        chart.remove()
    for chart, model in zip(charts, models, strict=False):
        _draw_bars(chart, [row for row in timed if row.model == model])
        chart.set_title(model)
    picture.supylabel("clones or replicas", size="medium")
    used = {_peer(row) for row in timed}
    picture.legend(
        handles=[
            Patch(color=color, label=name)
            for peer, (name, color) in _PEERS.items()
            if peer in used
        ],
        loc="outside lower center",
        ncols=min(len(_PEERS), 2 * num_columns),
        frameon=False,
    )
    return picture


def _draw_bars(chart: Any, rows: Sequence[Row]) -> None:
    """Draw the bars of one model."""
    drawn = chart.barh(
        range(len(rows)),
        [row.ms for row in rows],
        color=[_PEERS[_peer(row)][1] for row in rows],
    )
    chart.bar_label(drawn, [_number(row.ms, 1) for row in rows], padding=3)
    chart.set_yticks(range(len(rows)), [_short_label(row) for row in rows])
    chart.invert_yaxis()
    chart.margins(x=0.2)
    chart.set_xlabel("ms a step")
    chart.spines[["top", "right"]].set_visible(False)


def _peer(row: Row) -> str:
    return row.peer.split()[0]


def _short_label(row: Row) -> str:
    """Return what stands beside a bar: how many clones, and their options."""
    found = re.search(r"(\d+)( \(\w+=.*)?", row.peer)
    return "".join(filter(None, found.groups())) if found else "plain"
