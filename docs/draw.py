"""Draw the pictures of these pages: `python docs/draw.py`.

The two ways of a step are drawn here. The picture of the benchmark is drawn
from the table in `benchmark.md`, those of clones and of a step by running a
small model on virtual CPU devices.
"""

import os
import pathlib
import re

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_clones import (
    CloneProfiler,
    clone_model,
    deployment,
    use_virtual_devices,
)
from keras_clones.benchmark import results
from keras_clones.look.timeline import PHASES

DOCS = pathlib.Path(__file__).parent
PICTURES = DOCS / "pictures"
WIDTH = 560
INK = "#333333"


class Drawing:
    """An SVG, written piece by piece."""

    def __init__(self, height, title):
        self.title = title
        self.height = height
        self.parts = []

    def box(self, x, y, width, height, lines, phase, align="middle"):
        """Draw a box with lines of text, of which the first is bold."""
        color = PHASES[phase]
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" '
            f'fill="{color}" fill-opacity="0.16" stroke="{color}" '
            'stroke-width="1.5"/>'
        )
        middle = y + height / 2 - 10 * (len(lines) - 1)
        for i, line in enumerate(lines):
            place = x + width / 2 if align == "middle" else x + 12
            bold = i == 0
            self.text(place, middle + 20 * i + 5, line, align, bold)

    def text(self, x, y, line, align="middle", bold=False):
        """Write a line of text."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{align}"{weight}>{line}</text>'
        )

    def arrow(self, *points, phase="other"):
        """Draw a line through points, with a head at its end."""
        color = {"other": INK}.get(phase, PHASES[phase])
        (x, y), (before_x, before_y) = points[-1], points[-2]
        path = " ".join(f"{a},{b}" for a, b in points)
        # All last pieces are upright or level.
        right = (x > before_x) - (x < before_x)
        down = (y > before_y) - (y < before_y)
        back_x, back_y = x - 9 * right, y - 9 * down
        head = (
            f"{x},{y} {back_x + 5 * down},{back_y + 5 * right} "
            f"{back_x - 5 * down},{back_y - 5 * right}"
        )
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" '
            f'stroke-width="2"/><polygon points="{head}" fill="{color}"/>'
        )

    def write(self, path):
        """Write the file."""
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} '
            f'{self.height}" width="{WIDTH}" height="{self.height}" '
            'role="img" font-family="Helvetica, Arial, sans-serif" '
            f'font-size="15" fill="{INK}"><title>{self.title}</title>'
            f'<rect width="{WIDTH}" height="{self.height}" fill="white"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def draw_by_towers():
    drawing = Drawing(690, "A step by towers")
    columns = (75, 305)
    drawing.box(
        160, 12, 240, 54, ["global batch, 256 rows", "on CPU:0"], "input"
    )
    for i, x in enumerate(columns):
        middle = x + 90
        drawing.arrow((280, 66), (280, 86), (middle, 86), (middle, 112))
        drawing.box(x, 112, 180, 34, ["shard, 128 rows"], "input")
        drawing.arrow((middle, 146), (middle, 190))
        drawing.box(
            x,
            190,
            180,
            94,
            [f"clone_{i} on GPU:{i}", "forward", "loss", "backward"],
            "forward",
        )
        drawing.arrow((middle, 284), (middle, 356), phase="gradient transfer")
    drawing.text(280, 90 + 15, "split by rows")
    drawing.text(280, 312, "losses, gradients,")
    drawing.text(280, 331, "sums of metrics")
    drawing.box(75, 356, 410, 34, ["added up on CPU:0"], "gradient transfer")
    drawing.arrow((280, 390), (280, 426))
    drawing.box(
        75,
        426,
        410,
        54,
        [
            "one update by the optimizer",
            "with the gradient of the global batch",
        ],
        "update",
    )
    drawing.arrow((280, 480), (280, 516))
    drawing.box(
        75,
        516,
        410,
        54,
        ["variables, at home on CPU:0", "each is read once a step"],
        "mirror",
    )
    drawing.arrow((75, 543), (30, 543), (30, 237), (75, 237), phase="mirror")
    drawing.arrow(
        (485, 543), (530, 543), (530, 237), (485, 237), phase="mirror"
    )
    drawing.text(
        280, 605, "At the sides: the mirrors, one copy of the variables"
    )
    drawing.text(280, 627, "for each clone, sent anew in each step.")
    drawing.text(280, 660, "The clones run side by side.")
    drawing.write(PICTURES / "by_towers.svg")


def draw_by_calls():
    drawing = Drawing(730, "A step by calls")
    drawing.box(
        160, 12, 240, 54, ["global batch, 256 rows", "on CPU:0"], "input"
    )
    drawing.arrow((280, 66), (280, 100))
    drawing.box(20, 100, 520, 616, [], "other")
    drawing.text(280, 126, "the step's own Python, once", bold=True)
    drawing.box(
        75, 146, 410, 34, ["noise, tapes, masks, assignments"], "metrics"
    )
    drawing.arrow((280, 180), (280, 206))
    drawing.box(40, 206, 480, 250, [], "forward")
    drawing.text(280, 232, "each outermost call of a layer", bold=True)
    drawing.text(280, 256, "inputs split by rows, mirrors sent")
    for i, x in enumerate((60, 310)):
        middle = x + 95
        drawing.arrow((middle, 268), (middle, 298), phase="mirror")
        drawing.box(
            x,
            298,
            190,
            74,
            [f"clone_{i} on GPU:{i}", "the layer,", "on 128 rows"],
            "forward",
        )
        drawing.arrow((middle, 372), (middle, 404), phase="gradient transfer")
    drawing.box(60, 404, 440, 34, ["outputs joined: 256 rows"], "input")
    drawing.arrow((280, 456), (280, 486))
    drawing.box(
        75,
        486,
        410,
        54,
        ["loss, once", "over the global batch"],
        "metrics",
    )
    drawing.arrow((280, 540), (280, 566))
    drawing.box(
        75,
        566,
        410,
        54,
        ["gradient", "each call runs backward on the clones, too"],
        "backward",
    )
    drawing.arrow((280, 620), (280, 646))
    drawing.box(
        75,
        646,
        410,
        54,
        ["optimizers and metrics, once", "variables stay at home on CPU:0"],
        "update",
    )
    drawing.write(PICTURES / "by_calls.svg")


def rows_of_table():
    """Return the rows of the table of steps in `benchmark.md`."""
    text = (DOCS / "benchmark.md").read_text()
    text, _, _ = text.partition("![")  # the table above the picture
    lines = re.findall(r"^\| ([\w-]+) \| (\d[^\n]*) \|$", text, re.MULTILINE)
    peers = ("clones 1", "clones 2", "mirrored 2", "clones 4", "mirrored 4")
    rows = []
    for model, cells in lines:
        plain, *ratios = map(float, cells.split(" | "))
        rows.append(results.Row(model, "plain Keras", plain))
        for peer, ratio in zip(peers, ratios, strict=True):
            rows.append(results.Row(model, peer, plain * ratio))
    return rows


def draw_by_running():
    use_virtual_devices(3)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, 2, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    model = clone_model(model, devices=["CPU:1", "CPU:2"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    x = np.random.default_rng(0).normal(size=(1280, 32, 32, 3))
    y = np.arange(1280) % 10
    profiler = CloneProfiler((8, 14), PICTURES / "step")
    model.fit(x, y, batch_size=64, verbose=0, callbacks=[profiler])
    (PICTURES / "step.json").unlink()
    deployment(model).plot(PICTURES / "clones.png", 64)
    deployment(model).summary(64)


def main():
    PICTURES.mkdir(exist_ok=True)
    draw_by_towers()
    draw_by_calls()
    results.draw(rows_of_table(), PICTURES / "benchmark.png")
    draw_by_running()


if __name__ == "__main__":
    main()
