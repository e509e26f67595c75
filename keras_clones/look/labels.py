"""What stands in the boxes and on the arrows of a picture of a deployment."""

from collections.abc import Sequence
from typing import NamedTuple

from keras_clones.devices.placement import PlacedClone, short_name
from keras_clones.look.footprint import Flow, Footprint
from keras_clones.look.report import (
    AT_HOME,
    Homes,
    flow_text,
    readable,
    sent_by,
    size_text,
    slots_text,
)


class Labels(NamedTuple):
    """What stands in the boxes and on the arrows of a picture.

    `shards`, `towers`, `to_towers`, `mirrors` and `gradients` have one label
    a clone. `stages` are the boxes at home, from the top.
    """

    title: str
    batch: str
    shards: Sequence[str]
    to_towers: Sequence[str]
    towers: Sequence[str]
    mirrors: Sequence[str]
    gradients: Sequence[str]
    home: str
    stages: Sequence[str]


def label(
    clones: Sequence[PlacedClone],
    homes: Homes,
    rows: Sequence[int] | None,
    footprint: Footprint | None,
    why_not: str,
) -> Labels:
    """Return the labels of a deployment; the arguments are those of its page.

    The arrows to a tower have the shard, and the mirrors with all else that it
    gets; the one back has all that it sends.
    """
    home = homes["variables"]
    arrows = [
        _arrows(i, (clone.device,) == home, rows, footprint, why_not)
        for i, clone in enumerate(clones)
    ]
    return Labels(
        title=f"{len(clones)} clone{'s' if len(clones) > 1 else ''}",
        batch=_batch(homes["inputs"][0], rows, footprint),
        shards=[
            "shard" if rows is None else f"{rows[i]} rows"
            for i in range(len(clones))
        ],
        to_towers=[shard for shard, _, _ in arrows],
        towers=[
            f"{clone.scope or 'clone_0'}\n{short_name(clone.device)}"
            for clone in clones
        ],
        mirrors=[f"mirrors: {out}" for _, out, _ in arrows],
        gradients=[f"gradients: {back}" for _, _, back in arrows],
        home=(
            short_name(home[0])
            if len(home) == 1
            else f"spread over {len(home)} devices"
        ),
        stages=_stages(rows, footprint, why_not),
    )


def _arrows(
    i: int,
    at_home: bool,
    rows: Sequence[int] | None,
    footprint: Footprint | None,
    why_not: str,
) -> tuple[str, str, str]:
    """Return what goes to a clone: its shard and the rest; and what comes."""
    if at_home:
        return "0 B", AT_HOME, AT_HOME
    if footprint is None:
        return why_not, why_not, why_not
    n, a_row = None if rows is None else rows[i], footprint.a_row
    shard = ""
    if a_row is not None and n is None:
        shard = f"{readable(a_row)} a row"
    elif a_row is not None and n is not None:
        shard = f"about {readable(n * a_row)}"
    out = flow_text(_without_shard(footprint), n)
    return shard, out, flow_text(sent_by(i, footprint), n)


def _batch(
    device: str, rows: Sequence[int] | None, footprint: Footprint | None
) -> str:
    lines = ["global batch", short_name(device)]
    if rows is not None:
        lines.append(f"{sum(rows)} rows")
        if footprint is not None and footprint.a_row is not None:
            lines.append(f"about {readable(sum(rows) * footprint.a_row)}")
    return "\n".join(lines)


def _stages(
    rows: Sequence[int] | None, footprint: Footprint | None, why_not: str
) -> list[str]:
    """Return what stands in the boxes at home, from the top."""
    sizes = [why_not] * 3
    if footprint is not None:
        sizes = [
            size_text(footprint.gradients, None if rows is None else sum(rows)),
            slots_text(footprint),
            readable(footprint.trainable + footprint.others),
        ]
    return [
        "loss",
        f"gradients added up\n{sizes[0]}",
        f"optimizer, its slots\n{sizes[1]}",
        f"variables\n{sizes[2]}",
    ]


def _without_shard(footprint: Footprint) -> Flow | None:
    """Return what a clone gets besides its shard."""
    received = footprint.received
    if received is None or received.a_row is None or footprint.a_row is None:
        return received
    return received._replace(a_row=max(0, received.a_row - footprint.a_row))
