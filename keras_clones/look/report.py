"""What a user looks at: tables, as text and as HTML."""

import html
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from keras_clones.devices.placement import Clone, short_name, short_names
from keras_clones.look.footprint import Flow, Footprint

UNKNOWN = "not known"
# In place of the mirrors of a clone on the device of the variables: it reads
# the variables themselves.
AT_HOME = "at home"

# Device strings by what is there: `"variables"`, `"optimizer"`, `"inputs"`.
Homes: TypeAlias = Mapping[str, tuple[str, ...]]


class Table(NamedTuple):
    """A table of strings."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Page(NamedTuple):
    """Tables and lines below them, which a notebook shows as HTML."""

    tables: Sequence[Table]
    notes: Sequence[str] = ()

    def __repr__(self) -> str:
        parts = [_text(table) for table in self.tables]
        return "\n\n".join([*parts, *filter(None, ["\n".join(self.notes)])])

    def _repr_html_(self) -> str:
        parts = [_html(table) for table in self.tables]
        return "".join(
            [*parts, *(f"<p>{html.escape(note)}</p>" for note in self.notes)]
        )


def show(page: Page) -> None:
    """Print a page, or show it as HTML in a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    # A shell in a terminal has no kernel, and would not show HTML.
    if getattr(shell, "kernel", None) is not None:
        from IPython.display import display

        display(page)
    else:
        print(page)


def deployment_page(
    clones: Sequence[Clone],
    homes: Homes,
    rows: Sequence[int] | None,
    footprint: Footprint | None,
    why_not: str,
) -> Page:
    """Return the page of a deployment.

    Args:
        clones: Sequence of `Clone`s.
        homes: Dict of tuples of device strings by what is there: `"variables"`,
            `"optimizer"` and `"inputs"`.
        rows: Sequence of integers, the rows of a batch that each clone gets,
            or `None` if the batch is not known.
        footprint: `Footprint` of the model, `None` if there is none.
        why_not: String, what to show in its place.
    """
    tables = [
        _clone_table(clones, homes["variables"], rows, footprint, why_not),
        _home_table(homes, rows, footprint, why_not),
    ]
    if footprint is None:
        return Page(tables, [_remedy(why_not)])
    sizes = device_bytes(clones, homes, rows, footprint)
    lines = [
        [short_name(device), readable(size)] for device, size in sizes.items()
    ]
    notes = ["Besides, each clone needs memory for what its layers compute."]
    if not footprint.settled:
        notes.append(
            "The first step settles where the loss and the metrics are "
            "computed. Outputs that come home for them do not count before."
        )
    return Page([*tables, Table(["device", "bytes"], lines)], notes)


def _remedy(why_not: str) -> str:
    if why_not == "not built":
        return "The model is not built: bytes show once it is."
    return "The model is gone: bytes show while it is there."


def _clone_table(
    clones: Sequence[Clone],
    home: tuple[str, ...],
    rows: Sequence[int] | None,
    footprint: Footprint | None,
    why_not: str,
) -> Table:
    header = ["clone", "device"]
    columns = [
        [c.scope or "clone_0" for c in clones],
        [short_name(c.device) for c in clones],
    ]
    if rows is not None:
        header.append("rows")
        columns.append([str(n) for n in rows])
    header += ["mirrors", "gradients", "shard", "gets a step", "sends a step"]
    lines = []
    for i, clone in enumerate(clones):
        n = None if rows is None else rows[i]
        lines.append(
            [column[i] for column in columns]
            + _clone_cells(i, (clone.device,) == home, n, footprint, why_not)
        )
    return Table(header, lines)


def _clone_cells(
    i: int,
    at_home: bool,
    rows: int | None,
    footprint: Footprint | None,
    why_not: str,
) -> list[str]:
    if footprint is None:
        return [why_not] * 5
    shard = UNKNOWN
    if footprint.a_row is not None:
        a_row = footprint.a_row
        shard = (
            f"{readable(a_row)} a row"
            if rows is None
            else f"about {readable(rows * a_row)}"
        )
    kept = [size_text(footprint.gradients, rows), shard]
    if at_home:
        # Nothing crosses to a clone that is where the variables are.
        return [AT_HOME, *kept, readable(0), readable(0)]
    moved = [footprint.received, sent_by(i, footprint)]
    crossing = [flow_text(flow, rows) for flow in moved]
    return [readable(footprint.mirrors), *kept, *crossing]


def sent_by(i: int, footprint: Footprint) -> Flow | None:
    """Return what a clone sends: the first one also sends the seeds back."""
    sent = footprint.sent
    if sent is None or i > 0:
        return sent
    return sent._replace(fixed=sent.fixed + footprint.seeds)


def flow_text(flow: Flow | None, rows: int | None) -> str:
    """Return what crosses in a step in words, as far as it is known."""
    if flow is None:
        return UNKNOWN
    about = "" if rows == 0 else "about "
    return about + size_text(flow, rows)


def size_text(flow: Flow, rows: int | None) -> str:
    """Return the bytes of a shard, or those of each row if it is not known."""
    if rows == 0:
        return readable(0)
    if flow.a_row is None:
        return f"{readable(flow.fixed)} + the shard's"
    if flow.a_row == 0:
        return readable(flow.fixed)
    if rows is None:
        return f"{readable(flow.fixed)} + {readable(flow.a_row)} a row"
    return readable(flow.fixed + rows * flow.a_row)


def slots_text(footprint: Footprint) -> str:
    """Return the bytes of the optimizer's variables, or why there are none."""
    if footprint.slots is not None:
        return readable(footprint.slots)
    return "made in the first step" if footprint.compiled else "not compiled"


def _home_table(
    homes: Homes,
    rows: Sequence[int] | None,
    footprint: Footprint | None,
    why_not: str,
) -> Table:
    home = short_names(homes["variables"])
    optimizer = short_names(homes["optimizer"])
    lines = [
        ["trainable variables", home, why_not],
        ["other variables", home, why_not],
        ["optimizer slots", home, why_not],
        ["gradients, added up", optimizer, why_not],
        ["optimizer", optimizer, ""],
        ["global batch", short_names(homes["inputs"]), why_not],
    ]
    if footprint is not None:
        a_row = footprint.a_row
        sizes = {
            "trainable": readable(footprint.trainable),
            "others": readable(footprint.others),
            "slots": slots_text(footprint),
        }
        for line, part in zip(lines, sizes, strict=False):
            line[1] = short_names(footprint.devices[part]) or line[1]
            line[2] = sizes[part]
        total = None if rows is None else sum(rows)
        lines[3][2] = size_text(footprint.gradients, total)
        lines[5][2] = UNKNOWN
        if a_row is not None:
            lines[5][2] = (
                f"{readable(a_row)} a row"
                if rows is None
                else f"about {readable(sum(rows) * a_row)}"
            )
    return Table(["part", "device", "bytes"], lines)


def device_bytes(
    clones: Sequence[Clone],
    homes: Homes,
    rows: Sequence[int] | None,
    footprint: Footprint,
) -> dict[str, int]:
    """Return the bytes on each device, of what is in the other tables.

    A part on several devices counts for the first of them.
    """
    found: dict[str, int] = {}

    def add(device: str, size: int) -> None:
        found[device] = found.get(device, 0) + size

    def gradients(shard: int) -> int:
        fixed, each = footprint.gradients
        return fixed + shard * (each or 0)

    a_row = footprint.a_row or 0
    parts = {
        "trainable": footprint.trainable,
        "others": footprint.others,
        "slots": footprint.slots or 0,
    }
    for part, size in parts.items():
        there = footprint.devices[part] or {homes["variables"][0]: size}
        for device, its_size in there.items():
            add(device, its_size)
    add(homes["optimizer"][0], gradients(sum(rows or ())))
    add(homes["inputs"][0], sum(rows or ()) * a_row)
    for i, clone in enumerate(clones):
        add(clone.device, gradients(rows[i] if rows else 0))
        if (clone.device,) != homes["variables"]:
            add(clone.device, footprint.mirrors)
        add(clone.device, rows[i] * a_row if rows else 0)
    return found


def readable(size: int) -> str:
    """Return a number of bytes with three digits and a unit: 1 KiB is 1024 B.

    It is the only unit of what is printed.
    """
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _text(table: Table) -> str:
    lines = [table.header, *table.rows]
    widths = [max(len(cell) for cell in c) for c in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def _html(table: Table) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        inside = (f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(line("td", row) for row in table.rows)
    return (
        f"<table><thead>{line('th', table.header)}</thead>"
        f"<tbody>{body}</tbody></table>"
    )
