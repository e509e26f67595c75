"""The picture of a deployment: data to shards to towers to home and back."""

import importlib.util
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from keras_clones.devices.placement import Clone, short_name
from keras_clones.look.footprint import Flow, Footprint
from keras_clones.look.report import (
    AT_HOME,
    flow_text,
    readable,
    sent_by,
    size_text,
    slots_text,
)
from keras_clones.look.timeline import PHASES

# All lengths are in inches. A tower's row holds two arrows and their labels.
_ROW = 1.0
_BATCH, _SHARD, _TOWER, _HOME = (0.2, 1.9), (2.9, 1.3), (5.6, 2.0), (10.6, 2.9)
_STAGE = 0.62


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


def check_path(path: Any) -> str:
    """Return the path of a picture, or say why it cannot be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "The picture is drawn with matplotlib: `pip install matplotlib`."
        )
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise TypeError(
            "Argument `path` must be a path of a file, such as "
            f"'clones.png'. Received: path={path!r}"
        )
    path = os.fspath(path)
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(
            "Argument `path` must be in a folder that exists and can be "
            f"written to. Received: path={path!r}, whose folder is {folder!r}"
        )
    if os.path.isdir(path) or (
        os.path.exists(path) and not os.access(path, os.W_OK)
    ):
        raise ValueError(
            "Argument `path` must be a file that can be written to. "
            f"Received: path={path!r}"
        )
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    extension = os.path.splitext(path)[1].removeprefix(".").lower()
    if extension not in known:
        raise ValueError(
            f"Argument `path` must end in one of {known}. "
            f"Received: path={path!r}"
        )
    return path


def label(
    clones: Sequence[Clone],
    homes: dict[str, str],
    rows: Sequence[int] | None,
    footprint: Footprint | None,
    why_not: str,
) -> Labels:
    """Return the labels of a deployment; the arguments are those of its page.

    The arrows to a tower have the shard, and the mirrors with all else that it
    gets; the one back has all that it sends.
    """
    known = footprint is not None
    a_row = footprint.a_row if footprint is not None else None
    shards, to_towers, mirrors, gradients = [], [], [], []
    for i, clone in enumerate(clones):
        n = None if rows is None else rows[i]
        shards.append("shard" if n is None else f"{n} rows")
        if clone.device == homes["variables"]:
            to_towers.append("0 B")
            mirrors.append(f"mirrors: {AT_HOME}")
            gradients.append(f"gradients: {AT_HOME}")
            continue
        if a_row is None:
            to_towers.append("" if known else why_not)
        elif n is None:
            to_towers.append(f"{readable(a_row)} a row")
        else:
            to_towers.append(f"about {readable(n * a_row)}")
        out = back = why_not
        if footprint is not None:
            out = flow_text(_without_shard(footprint), n)
            back = flow_text(sent_by(i, footprint), n)
        mirrors.append(f"mirrors: {out}")
        gradients.append(f"gradients: {back}")
    total = None if rows is None else sum(rows)
    sizes = [why_not] * 3
    if footprint is not None:
        sizes = [
            size_text(footprint.gradients, total),
            slots_text(footprint),
            readable(footprint.trainable + footprint.others),
        ]
    batch = ["global batch", short_name(homes["inputs"])]
    if total is not None:
        batch.append(f"{total} rows")
        if a_row is not None:
            batch.append(f"about {readable(total * a_row)}")
    return Labels(
        title=f"{len(clones)} clone{'s' if len(clones) > 1 else ''}",
        batch="\n".join(batch),
        shards=shards,
        to_towers=to_towers,
        towers=[
            f"{clone.scope or 'clone_0'}\n{short_name(clone.device)}"
            for clone in clones
        ],
        mirrors=mirrors,
        gradients=gradients,
        home=short_name(homes["variables"]),
        stages=[
            "loss",
            f"gradients added up\n{sizes[0]}",
            f"optimizer, its slots\n{sizes[1]}",
            f"variables\n{sizes[2]}",
        ],
    )


def _without_shard(footprint: Footprint) -> Flow | None:
    """Return what a clone gets besides its shard."""
    received = footprint.received
    if received is None or received.a_row is None or footprint.a_row is None:
        return received
    return received._replace(a_row=max(0, received.a_row - footprint.a_row))


def draw(labels: Labels) -> Any:
    """Return a `matplotlib.figure.Figure` of a deployment."""
    from matplotlib.figure import Figure

    inner = max(len(labels.towers) * _ROW, len(labels.stages) * _STAGE + 0.75)
    width, height = sum(_HOME) + 0.2, inner + 0.7
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    axes.text(0.2, 0.3, labels.title, size=13, weight="bold", va="center")
    middle = 0.55 + inner / 2
    _box(axes, _BATCH, middle, 1.1, labels.batch, "input")
    stages = _draw_home(axes, labels, middle, inner)
    first = middle - _ROW * (len(labels.towers) - 1) / 2
    for i, tower in enumerate(labels.towers):
        y = first + i * _ROW
        _box(axes, _SHARD, y, 0.5, labels.shards[i], "input")
        _box(axes, _TOWER, y, 0.72, tower, "forward")
        _arrow(axes, (sum(_BATCH), middle), (_SHARD[0], y), "input")
        _arrow(axes, (sum(_SHARD), y), (_TOWER[0], y), "input")
        _write(axes, (sum(_SHARD) + _TOWER[0]) / 2, y, labels.to_towers[i])
        near, far = sum(_TOWER), _HOME[0]
        _arrow(axes, (far, y - 0.12), (near, y - 0.12), "mirror")
        _arrow(axes, (near, y + 0.24), (far, y + 0.24), "gradient transfer")
        _write(axes, (near + far) / 2, y - 0.12, labels.mirrors[i])
        _write(axes, (near + far) / 2, y + 0.24, labels.gradients[i])
    x = _HOME[0] + _HOME[1] / 2
    for above, below in itertools.pairwise(stages):
        ends = (x, above + _STAGE * 0.39), (x, below - _STAGE * 0.39)
        _arrow(axes, *ends, "update")
    return figure


def _draw_home(
    axes: Any, labels: Labels, middle: float, height: float
) -> list[float]:
    """Draw the variables device; return where its stages are."""
    _box(axes, _HOME, middle, height, "", "other")
    top = middle - height / 2
    x, width = _HOME
    axes.text(x + width / 2, top + 0.22, labels.home, ha="center", va="center")
    step = (height - 0.45) / len(labels.stages)
    stages = [top + 0.4 + step * (i + 0.5) for i in range(len(labels.stages))]
    for y, text in zip(stages, labels.stages, strict=True):
        _box(axes, (x + 0.3, width - 0.6), y, _STAGE * 0.78, text, "update")
    return stages


def _box(
    axes: Any,
    place: tuple[float, float],
    y: float,
    height: float,
    text: str,
    phase: str,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, width = place
    axes.add_patch(
        FancyBboxPatch(
            (x, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=PHASES[phase] + "30",
            edgecolor=PHASES[phase],
        )
    )
    axes.text(x + width / 2, y, text, ha="center", va="center", size=9)


def _arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], phase: str
) -> None:
    arrow = {"arrowstyle": "-|>", "color": PHASES[phase], "linewidth": 1.4}
    arrow.update(shrinkA=1, shrinkB=1)
    axes.annotate("", end, start, arrowprops=arrow)


def _write(axes: Any, x: float, y: float, text: str) -> None:
    """Write a label above an arrow."""
    axes.text(x, y - 0.04, text, ha="center", va="bottom", size=8)
