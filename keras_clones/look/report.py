"""What a user looks at: the tables of a deployment."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from keras_clones.devices.placement import PlacedClone, short_name, short_names
from keras_clones.look.footprint import Flow, Footprint
from keras_clones.look.links import bytes_by_link
from keras_clones.look.page import Page, Table, readable

UNKNOWN = "not known"
# In place of the mirrors of a clone on the device of the variables: it reads
# the variables themselves.
AT_HOME = "at home"

# Device strings by what is there: `"variables"`, `"optimizer"`, `"inputs"`.
Homes: TypeAlias = Mapping[str, tuple[str, ...]]


def deployment_page(
    clones: Sequence[PlacedClone],
    homes: Homes,
    rows: Sequence[int] | None,
    footprint: Footprint | None,
    why_not: str,
) -> Page:
    """Return the page of a deployment.

    Args:
        clones: Sequence of `PlacedClone`s.
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
    tables.append(Table(["device", "bytes"], lines))
    links = bytes_by_link(clones, homes["inputs"][0], rows, footprint)
    if links:
        tables.append(_link_table(links))
    return Page(tables, notes)


def _link_table(links: Mapping[tuple[str, str], int | None]) -> Table:
    """Return what a step moves between hosts."""
    lines = [
        [
            f"{source} to {target}",
            UNKNOWN if n is None else f"about {readable(n)}",
        ]
        for (source, target), n in links.items()
    ]
    return Table(["network link", "bytes a step"], lines)


def _remedy(why_not: str) -> str:
    if why_not == "not built":
        return "The model is not built: bytes show once it is."
    return "The model is gone: bytes show while it is there."


def _clone_table(
    clones: Sequence[PlacedClone],
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
    clones: Sequence[PlacedClone],
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
