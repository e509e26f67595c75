"""The picture of a comparison: difference by step, time by clones."""

from typing import Any

from keras_clones.comparing.records import Findings, Run, named
from keras_clones.look.timeline import PHASES

# Below this, a logarithmic axis has no room: no difference at all.
_LEAST = 1e-17


def draw(found: Findings) -> Any:
    """Return a `matplotlib.figure.Figure` of a comparison."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_differences(left, found)
    _draw_times(right, found)
    return figure


def _draw_differences(axes: Any, found: Findings) -> None:
    """Draw each run's largest difference at each step, and the limit."""
    runs = [run for run in found.runs if run.num_clones and run.by_step]
    for run in runs:
        values = [max(value, _LEAST) for value in run.by_step]
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, marker="o", markersize=3, label=run.name)
    if runs:
        steps = range(1, len(runs[0].limits) + 1)
        axes.plot(steps, runs[0].limits, "--", color="gray", label="rounding")
        axes.legend(fontsize=8)
    axes.set_yscale("log")
    axes.set(
        title=f"Difference from plain Keras, in {found.dtype}",
        xlabel="step",
        ylabel="largest difference / size",
    )
    axes.grid(alpha=0.3)


def _draw_times(axes: Any, found: Findings) -> None:
    """Draw the step by number of clones, with plain Keras and the ideal."""
    plain = found.runs[0]
    runs = [run for run in found.runs if run.num_clones and run.seconds]
    counts = sorted({run.num_clones for run in runs})
    for mended, color in ((False, "forward"), (True, "backward")):
        own = [run for run in runs if bool(run.options) == mended]
        if own:
            label = f"clones with {named(own[0].options)}"
            axes.plot(
                [run.num_clones for run in own],
                [_ms(run) for run in own],
                "o-",
                color=PHASES[color],
                label=label if mended else "clones",
            )
    if plain.seconds:
        axes.axhline(_ms(plain), color="gray", label="plain Keras")
        ideal = [_ms(plain) / n for n in counts]
        axes.plot(counts, ideal, ":", color="gray", label="ideal")
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.set(title="Time of a step", xlabel="clones", ylabel="ms")
    if counts:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _ms(run: Run) -> float:
    return 1e3 * (run.seconds or 0.0)
