"""What a run shows at its end: a table of before and after, and the reward curve as a terminal picture and as a PNG."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from ludic.storage.inert import inert
from ludic.telemetry.formatting import figure, format_metric, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from ludic.rollout.evaluation import EvaluationResult

_SMOOTHING = 0.85
"""Weight of the past in the smoothed reward: about the last seven updates count."""


def comparison_table(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    title: str = "",
    headings: tuple[str, str] = ("before", "after"),
) -> Table:
    """The summaries of two evaluations of the same problems and their change, to be printed with a rich `Console`.

    A rate with a 95% interval is shown as `52.0% (45.1 to 58.8)`; its change is in percentage points.
    """

    def rate(summary: Mapping[str, Any], key: str) -> str:
        low, high = summary.get(f"{key}_ci95", (None, None))
        return percent(summary[key]) + ("" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})")

    table = _table(title, "", *headings, "change")
    accuracies = ["accuracy", *(key for key in after if key.endswith("_accuracy") and key in before)]
    rates = {key.replace("_", " "): key for key in accuracies}
    for label, key in {**rates, "no answer": "parse_err_rate", "truncated": "truncation_rate"}.items():
        change = f"{100 * (after[key] - before[key]):+.1f} points"
        table.add_row(Text(label), rate(before, key), rate(after, key), change)
    lengths = [summary["avg_completion_length"] for summary in (before, after)]
    table.add_row("tokens each", *map(figure, lengths), f"{lengths[1] - lengths[0]:+.4g}")
    return table


def _table(title: str, *headings: str) -> Table:
    # The title may hold a model's name, so it is text and not markup.
    table = Table(
        title=Text(inert(title)) if title else None, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left"
    )
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=place > 0)
    return table


def evaluation_table(result: "EvaluationResult", *, title: str = "") -> Table:
    """One evaluation's figures, to be printed with a rich `Console`."""
    table = _table(title, "", "figure", "95% interval")
    headline, *others = result.rules
    for rule, found in result.rules.items():
        low, high = found.ci95
        label = f"accuracy, {rule}" if others else "accuracy"
        table.add_row(Text(label), percent(found.accuracy), f"{percent(low)} to {percent(high)}")
    samples = len(result.pass_at_k)
    if samples > 1:  # the pass@1 of a single sample is the accuracy
        for name, shares in (("pass", result.pass_at_k), ("maj", result.maj_at_k)):
            for k in result.maj_at_k:
                table.add_row(Text(f"{name}@{k}, {headline}" if others else f"{name}@{k}"), percent(shares[k]), "")
    table.add_section()
    for label, name in (
        ("correct_rate", "correct_rate"),
        ("parse_err_rate", "parse_err_rate"),
        ("truncation_rate", "truncation_rate"),
        ("grader_failures", "grader_failures"),
        ("problems", "num_problems"),
        ("completions", "num_completions"),
        ("avg_completion_length, tokens", "avg_completion_length"),
        ("total_completion_tokens", "total_completion_tokens"),
        ("prompt_tokens", "prompt_tokens"),
        ("time", "seconds"),
        ("completion tokens/s", "tokens_per_s"),
    ):
        table.add_row(label, format_metric(name, getattr(result, name)), "")
    return table


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential moving average of `values`, corrected for its start as in Adam (Kingma and Ba 2014)."""
    averages, average = [], 0.0
    for place, value in enumerate(values, start=1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * value
        averages.append(average / (1 - _SMOOTHING**place))
    return averages


def reward_curve_text(steps: Sequence[int], rewards: Sequence[float], *, width: int = 80, height: int = 16) -> str:
    """The reward per update as a picture of `width` x `height` characters, without colour codes.

    Each update is a dot, the smoothed reward a line. Rewards that are not finite are left out; without any finite
    reward the picture is one sentence.
    """
    import numpy as np  # like plotext not needed until a run ends, and slow to import: --help has no use for it
    import plotext

    steps, rewards = _finite(steps, rewards)
    if not steps:
        return "no finite reward was logged, so there is no curve to draw"
    chart = plotext.figure
    chart.clear()
    plotext.terminal.limit(False, False)  # the size asked for, whatever terminal is or is not there
    chart.plot_size(width, height)
    chart.title("mean reward per update (dots) and smoothed (line)")
    chart.draw(chart.signal(steps, rewards, marker="•"))
    chart.draw(chart.signal(steps, smoothed(rewards), marker="braille").lines(True))
    margin = 0.05 * (max(rewards) - min(rewards)) or 0.5
    chart.ruler("y").lim(min(rewards) - margin, max(rewards) + margin)
    ticks = np.unique(np.linspace(steps[0], steps[-1], 7).round().astype(int)).tolist()  # whole numbers, evenly spread
    chart.ruler("x").ticks(ticks, [str(tick) for tick in ticks])
    text = str(chart.build().string(colorless=True))
    chart.clear()
    return "\n".join(line.rstrip() for line in text.splitlines())


def save_reward_curve(
    path: str | os.PathLike[str],
    steps: Sequence[int],
    rewards: Sequence[float],
    *,
    evaluations: Sequence[tuple[int, float]] = (),
) -> None:
    """Draw the reward per update, smoothed, with evaluation points, as a PNG.

    Both share one scale from 0 to 1 where the rewards are fractions too; other rewards have theirs on the left.

    Args:
        path: the file, replaced if it is there.
        steps: [N] update numbers.
        rewards: [N] mean rewards; those that are not finite are left out.
        evaluations: (update, accuracy as a fraction of 1) points, such as before and after training.

    Raises:
        OSError: the file cannot be written.
    """
    # Not needed until a run ends, and slow to import. A bare Figure, without pyplot, has no state and needs no screen.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, rewards = _finite(steps, rewards)
    picture = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    axes = picture.add_subplot()
    axes.plot(steps, rewards, color="#9db8d9", linewidth=1, marker="o", markersize=3, label="mean reward of an update")
    if len(steps) > 2:
        axes.plot(steps, smoothed(rewards), color="#1f4e8c", linewidth=2.4, label="smoothed")
    axes.set_title("Mean reward per update", loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel("update")
    axes.set_ylabel("mean reward")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    handles = axes.get_legend_handles_labels()[0]
    if evaluations:
        axes.margins(x=0.06)
        if all(0 <= reward <= 1 for reward in rewards):
            axes.set_ylabel("mean reward, accuracy")
            handles += _draw_evaluations(axes, evaluations)
        else:
            right = axes.twinx()
            right.set_ylabel("accuracy", color="#a3293c")
            right.spines[["top", "left"]].set_visible(False)
            handles += _draw_evaluations(right, evaluations)
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, format="png", facecolor="white")


def _draw_evaluations(axes: "Axes", evaluations: Sequence[tuple[int, float]]) -> "list[Line2D]":
    """Accuracy on a scale from 0 to 1, each point with its figure."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FixedLocator

    steps, accuracies = zip(*evaluations, strict=True)
    lines = axes.plot(steps, accuracies, color="#d1495b", linestyle="--", linewidth=1.4, marker="D", markersize=7)
    lines[0].set_label("accuracy on held-out problems")
    for step, accuracy in evaluations:
        label = axes.annotate(percent(accuracy), (step, accuracy), xytext=(0, 9), textcoords="offset points")
        label.set(ha="center", color="#a3293c", fontsize=10, fontweight="bold")
        label.set_path_effects([withStroke(linewidth=3, foreground="white")])  # legible across a curve
    axes.set_ylim(-0.02, 1.1)  # room for a point at 0, and for the label of one at 100%
    axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
    return lines


def _finite(steps: Sequence[int], rewards: Sequence[float]) -> tuple[list[int], list[float]]:
    """The points that can be drawn."""
    points = [(step, reward) for step, reward in zip(steps, rewards, strict=True) if math.isfinite(reward)]
    return [step for step, _ in points], [reward for _, reward in points]
