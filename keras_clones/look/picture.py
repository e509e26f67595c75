"""The picture of a deployment: data to shards to towers to home and back."""

import importlib.util
import itertools
import os
from typing import Any

from keras_clones.look.labels import Labels
from keras_clones.look.timeline import PHASES

# All lengths are in inches. A tower's row holds two arrows and their labels.
_ROW = 1.0
_BATCH, _SHARD, _TOWER, _HOME = (0.2, 1.9), (2.9, 1.3), (5.6, 2.0), (10.6, 2.9)
_STAGE = 0.62


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
    _box(axes, _BATCH, (middle, 1.1), labels.batch, "input")
    stages = _draw_home(axes, labels, middle, inner)
    first = middle - _ROW * (len(labels.towers) - 1) / 2
    for i, tower in enumerate(labels.towers):
        y = first + i * _ROW
        _box(axes, _SHARD, (y, 0.5), labels.shards[i], "input")
        _box(axes, _TOWER, (y, 0.72), tower, "forward")
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
    _box(axes, _HOME, (middle, height), "", "other")
    top = middle - height / 2
    x, width = _HOME
    axes.text(x + width / 2, top + 0.22, labels.home, ha="center", va="center")
    step = (height - 0.45) / len(labels.stages)
    stages = [top + 0.4 + step * (i + 0.5) for i in range(len(labels.stages))]
    inside = x + 0.3, width - 0.6
    for y, text in zip(stages, labels.stages, strict=True):
        _box(axes, inside, (y, _STAGE * 0.78), text, "update")
    return stages


def _box(
    axes: Any,
    across: tuple[float, float],
    down: tuple[float, float],
    text: str,
    phase: str,
) -> None:
    """Draw a box: its left side and width, its middle and height."""
    from matplotlib.patches import FancyBboxPatch

    (x, width), (y, height) = across, down
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
