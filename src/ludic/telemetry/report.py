"""What a run shows at its end: a table of before and after, and the reward curve as a terminal picture and as a PNG."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from ludic.storage.inert import inert
from ludic.telemetry.formatting import count, figure, percent, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from ludic.rollout.evaluation import EvaluationResult

_SMOOTHING = 0.85
"""Weight of the past in the smoothed reward: about the last seven updates count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """One figure before and after training; None where it was not measured.

    Example:
        >>> ComparisonRow(name="accuracy", before=0.11, after=0.52, kind="rate", before_ci95=(0.07, 0.16))
        ComparisonRow(name='accuracy', before=0.11, after=0.52, kind='rate', before_ci95=(0.07, 0.16), after_ci95=None)
    """

    name: str
    before: float | None
    after: float | None
    kind: Literal["rate", "count", "number", "seconds"] = "number"
    """`rate` is a fraction of 1, shown in percent, with the change in points."""
    before_ci95: tuple[float, float] | None = None
    after_ci95: tuple[float, float] | None = None


def comparison_table(
    rows: Sequence[ComparisonRow], *, title: str = "", headings: tuple[str, str] = ("before", "after")
) -> Table:
    """A table of before, after and change, to be printed with a rich `Console`.

    A rate with intervals is shown as `52.0% (45.1 to 58.8)`; its change is in percentage points.
    """
    table = _table(title)
    table.add_column("")
    for heading in (*headings, "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(inert(row.name)),
            _value(row.before, row.kind, row.before_ci95),
            _value(row.after, row.kind, row.after_ci95),
            _change(row),
        )
    return table


def _table(title: str) -> Table:
    """An empty table. Its title may hold a model's name, so it is text and not markup."""
    heading = Text(inert(title)) if title else None
    return Table(title=heading, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")


def evaluation_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[ComparisonRow]:
    """The rows of `comparison_table` for the summaries of two evaluations of the same problems."""

    def row(name: str, key: str, kind: Literal["rate", "number"]) -> ComparisonRow:
        intervals = {f"{when}_ci95": tuple(one[f"{key}_ci95"]) for when, one in (("before", before), ("after", after))
                     if f"{key}_ci95" in one}  # fmt: skip
        return ComparisonRow(name=name, before=before[key], after=after[key], kind=kind, **intervals)

    return [
        row("accuracy", "accuracy", "rate"),
        row("strict accuracy", "strict_accuracy", "rate"),
        row("no boxed answer", "parse_err_rate", "rate"),
        row("truncated", "truncation_rate", "rate"),
        row("tokens each", "avg_completion_length", "number"),
    ]


def evaluation_table(result: "EvaluationResult", *, title: str = "") -> Table:
    """One evaluation's figures, to be printed with a rich `Console`."""
    table = _table(title)
    table.add_column("")
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("95% interval", no_wrap=True)
    for label, rate, (low, high) in (
        ("accuracy, flexible (boxed, else last number)", result.accuracy, result.accuracy_ci95),
        ("accuracy, strict (boxed only)", result.strict_accuracy, result.strict_accuracy_ci95),
        ("accuracy, Qwen's (last digits)", result.qwen_accuracy, result.qwen_accuracy_ci95),
    ):
        table.add_row(label, percent(rate), f"{percent(low)} to {percent(high)}")
    for k in _telling_ks(len(result.pass_at_k)):
        table.add_row(f"pass@{k}, flexible", percent(result.pass_at_k[k]), "")
    table.add_section()
    for label, text in (
        ("correct_rate", percent(result.correct_rate)),
        ("parse_err_rate", percent(result.parse_err_rate)),
        ("truncation_rate", percent(result.truncation_rate)),
        ("grader_failures", count(result.grader_failures)),
        ("problems", count(result.num_problems)),
        ("completions", count(result.num_completions)),
        ("avg_completion_length, tokens", f"{result.avg_completion_length:,.1f}"),
        ("total_completion_tokens", count(result.total_completion_tokens)),
        ("prompt_tokens", count(result.prompt_tokens)),
        ("time", seconds(result.seconds)),
        ("completion tokens/s", count(result.tokens_per_s)),
    ):
        table.add_row(label, text, "")
    return table


def _telling_ks(num_samples: int) -> list[int]:
    """The powers of two up to `num_samples`, and itself; none for a single sample, whose pass@1 is the accuracy."""
    if num_samples == 1:
        return []
    return sorted({2**power for power in range(num_samples.bit_length())} | {num_samples})


def rate_with_interval(rate: float, ci95: tuple[float, float]) -> str:
    """`52.0% (45.1 to 58.8)`: a rate and its 95% interval, both in percent."""
    low, high = ci95
    return f"{percent(rate)} ({100 * low:.1f} to {100 * high:.1f})"


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
    import plotext  # not needed until a run ends, and slow to import

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
    low, high = _limits(rewards)
    chart.ruler("y").lim(low, high)
    ticks = _ticks(steps[0], steps[-1])
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
    title: str = "Mean reward per update",
) -> None:
    """Draw the reward per update, smoothed, with evaluation points, as a PNG.

    Both share one scale from 0 to 1 where the rewards are fractions too; other rewards have theirs on the left.

    Args:
        path: the file, replaced if it is there.
        steps: [N] update numbers.
        rewards: [N] mean rewards; those that are not finite are left out.
        evaluations: (update, accuracy as a fraction of 1) points, such as before and after training.
        title: above the picture.

    Raises:
        OSError: the file cannot be written.
    """
    # Not needed until a run ends, and slow to import. A bare Figure, without pyplot, has no state and needs no screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, rewards = _finite(steps, rewards)
    picture = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    axes.plot(steps, rewards, color="#9db8d9", linewidth=1, marker="o", markersize=3, label="mean reward of an update")
    if len(steps) > 2:
        axes.plot(steps, smoothed(rewards), color="#1f4e8c", linewidth=2.4, label="smoothed")
    axes.set_title(inert(title), loc="left", fontsize=13, fontweight="bold", parse_math=False)
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


def _value(value: float | None, kind: str, ci95: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    if kind == "rate":
        return percent(value) if ci95 is None else rate_with_interval(value, ci95)
    return {"count": count, "seconds": seconds, "number": figure}[kind](value)


def _change(row: ComparisonRow) -> Text:
    if row.before is None or row.after is None:
        return Text("-")
    change = row.after - row.before
    if row.kind == "rate":
        return Text(f"{100 * change:+.1f} points")
    return Text(f"{change:+,.0f}" if row.kind == "count" else f"{change:+.4g}")


def _finite(steps: Sequence[int], rewards: Sequence[float]) -> tuple[list[int], list[float]]:
    """The points that can be drawn."""
    points = [(step, reward) for step, reward in zip(steps, rewards, strict=True) if math.isfinite(reward)]
    return [step for step, _ in points], [reward for _, reward in points]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range to draw, a little wider than the values and never empty."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(first: int, last: int) -> list[int]:
    """At most seven whole numbers from `first` to `last`, evenly spread."""
    count_ = min(7, last - first + 1)
    if count_ < 2:
        return [first]
    return sorted({round(first + place * (last - first) / (count_ - 1)) for place in range(count_)})
