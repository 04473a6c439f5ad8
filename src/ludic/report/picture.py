"""The main curves as a PNG, for a place that shows no HTML."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ludic.report.charts import CURVES, RUN_COLOURS
from ludic.report.runs import Run
from ludic.storage.inert import inert
from ludic.telemetry.report import smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = ("reward_mean", "accuracy", "avg_completion_length", "entropy", "grad_norm", "step_s")


def save_curves(path: Path, runs: Sequence[Run]) -> None:
    """Six curves of all runs, on white.

    Raises:
        OSError: the file cannot be written.
    """
    # A bare Figure, without pyplot, has no state and needs no screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    picture = Figure(figsize=(12, 6), dpi=140, layout="constrained")
    FigureCanvasAgg(picture)
    titles = {metric: title for metric, title, _, _ in CURVES}
    for axes, metric in zip(picture.subplots(2, 3).flat, _SHOWN, strict=True):
        axes.set_title(titles[metric], loc="left", fontsize=10, fontweight="bold")
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8, length=0)
        for place, run in enumerate(runs):
            _draw(axes, run, metric, RUN_COLOURS[place % len(RUN_COLOURS)])
    lines = [
        Line2D([], [], color=RUN_COLOURS[place % len(RUN_COLOURS)], label=inert(run.name, 60))
        for place, run in enumerate(runs)
    ]
    legend = picture.legend(handles=lines, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    picture.savefig(path, format="png", facecolor="white")


def _draw(axes: "Axes", run: Run, metric: str, colour: str) -> None:
    if metric == "accuracy":
        steps = [row["step"] for row in run.evaluations]
        rates = [row["accuracy"] for row in run.evaluations]
        below = [rate - row["accuracy_ci95"][0] for rate, row in zip(rates, run.evaluations, strict=True)]
        above = [row["accuracy_ci95"][1] - rate for rate, row in zip(rates, run.evaluations, strict=True)]
        if steps:
            axes.errorbar(steps, rates, yerr=[below, above], color=colour, fmt="o:", markersize=4, linewidth=1.2)
        return
    rows = [row for row in run.updates if row.get(metric) is not None]
    if not rows:
        return
    steps, values = [row["step"] for row in rows], [row[metric] for row in rows]
    if metric == "reward_mean" and len(rows) > 2:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.45)
        values = smoothed(values)
    axes.plot(steps, values, color=colour, linewidth=1.6)
