"""The charts, as Bokeh documents in JSON: the curves over updates, the seconds, the evaluations.

The page embeds them with Bokeh's own script. It colours text and grids for light and dark itself, and says the figures under
the pointer in the captions, where those of several runs do not cover each other. The charts of one document share their range
of updates, so that a zoom moves all of them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.models import (
    BasicTicker,
    BasicTickFormatter,
    BoxZoomTool,
    ColumnDataSource,
    DataRange1d,
    NumeralTickFormatter,
    Range1d,
    WheelZoomTool,
)
from bokeh.models.annotations import Span
from bokeh.plotting import figure

from ludic.report import timings
from ludic.report.runs import Row, Run
from ludic.telemetry.report import smoothed

RUN_COLOURS = ("#3f7fd1", "#d9733a", "#2f9e77", "#a45cc0", "#c9a227", "#4aa3b5", "#8a6f52", "#7d8590")
"""Of the runs, in order; legible on white and on black, and told apart by people who confuse red and green."""
PART_COLOURS = {
    "wait": "#b9c0c9",
    "train": "#3f7fd1",
    "sync": "#d9733a",
    "other": "#7d8590",
    "generation": "#2f9e77",
    "grading": "#c9a227",
    "evaluation": "#a45cc0",
}
EVENT_COLOUR = "#d1495b"
_FEW = 60
"""Updates that have a dot each."""
CURVES: tuple[tuple[str, str, str, bool], ...] = (
    ("reward_mean", "Reward", "mean of an update; the strong line is smoothed", False),
    ("accuracy", "Accuracy on held-out problems", "with 95% intervals", True),
    ("avg_completion_length", "Completion length", "tokens, mean", False),
    ("truncation_rate", "Truncated", "share of completions that met the token limit", True),
    ("parse_err_rate", "No answer found", "share of completions", True),
    ("zero_variance_share", "Groups without variance", "share whose rewards are all alike", True),
    ("entropy", "Entropy", "nats a token", False),
    ("logprob_gap", "Log-prob gap", "nats a token between sampler and trainer", False),
    ("grad_norm", "Gradient norm", "before clipping", False),
    ("staleness", "Staleness", "updates, mean", False),
    ("tokens_per_s", "Speed", "completion tokens a second of the whole update", False),
    ("step_s", "Seconds of an update", "from its first request to its synced weights", False),
)
"""Metric, title, what it is, whether it is a share that is shown in percent."""

Documents = dict[str, Any]


def curves(runs: Sequence[Run]) -> Documents:
    """One chart for each metric that a run has, all runs in it; alarms and events are lines at their update."""
    low, high = _step_limits(runs)
    steps = Range1d(start=low, end=high, reset_start=low, reset_end=high)
    charts = {}
    for metric, _, _, is_share in CURVES:
        values = DataRange1d(only_visible=True, default_span=_largest(runs, metric) or 0.1)  # the span of a flat curve
        chart = _chart(x_range=steps, is_share=is_share, y_range=values)
        for place, run in enumerate(runs):
            before = len(chart.renderers)
            _draw(chart, run, metric, RUN_COLOURS[place % len(RUN_COLOURS)])
            for renderer in chart.renderers[before:]:
                renderer.tags = [f"run-{place}"]  # by which the page hides a run
        if chart.renderers:
            for place, run in enumerate(runs):
                _draw_events(chart, place, run)
            for name in ("chosen", "pointed"):  # lines at updates, which the page moves
                chart.add_layout(Span(location=0, dimension="height", line_width=1, visible=False, name=name))
            charts[f"chart-{metric}"] = chart
    return _document(charts)


def times(runs: Sequence[Run]) -> Documents:
    """For each run its seconds an update, stacked, and its timeline."""
    charts = {}
    for place, run in enumerate(runs):
        if run.updates:
            charts[f"chart-seconds-{place}"] = _stacked_seconds(run)
            charts[f"chart-timeline-{place}"] = _timeline(run)
    return _document(charts)


def evaluations(evaluated: Sequence[Row]) -> Documents:
    """pass@k and majority votes of every evaluation with several completions a problem."""
    several = [(place, one) for place, one in enumerate(evaluated) if one["samples"] > 1]
    if not several:
        return {}
    ks = sorted({k for _, one in several for k in one["k"]})
    chart = _chart(x_range=[str(k) for k in ks], is_share=True, height=280)
    for place, one in several:
        colour = RUN_COLOURS[place % len(RUN_COLOURS)]
        for kind, dash in (("pass_at_k", "solid"), ("majority_at_k", "dashed")):
            source = ColumnDataSource({"k": [str(k) for k in one["k"]], "rate": one[kind]})
            chart.line("k", "rate", source=source, color=colour, line_dash=dash, line_width=1.8)
            chart.scatter("k", "rate", source=source, color=colour, size=6)
    return _document({"chart-pass-at-k": chart})


def _document(charts: dict[str, figure]) -> Documents:
    """A Bokeh document and the element that each of its charts goes to."""
    document = Document()
    for chart in charts.values():
        document.add_root(chart)
    return {"document": document.to_json(deferred=False), "roots": {chart.id: name for name, chart in charts.items()}}


def _chart(*, x_range: Any, is_share: bool = False, height: int = 170, y_range: Any = None) -> figure:
    """An empty chart. Its `y_range` are the names of lanes, or a range, by default that of the data that is seen."""
    chart = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=x_range,
        y_range=DataRange1d(only_visible=True) if y_range is None else y_range,
        window_axis="x",
        toolbar_location=None,
        tools=[],
        min_border_right=14,
        output_backend="canvas",
    )
    zoom, wheel = BoxZoomTool(dimensions="width"), WheelZoomTool(dimensions="width", modifiers={"ctrl": True})
    chart.add_tools(zoom, wheel)
    chart.toolbar.active_drag, chart.toolbar.active_scroll = zoom, wheel
    chart.background_fill_color = chart.border_fill_color = chart.outline_line_color = None
    chart.xgrid.visible = False
    chart.axis.axis_line_color = None
    chart.axis.minor_tick_line_color = chart.axis.major_tick_line_color = None
    chart.axis.major_label_text_font = "system-ui, sans-serif"
    chart.axis.major_label_text_font_size = "11px"
    if not isinstance(y_range, list):  # lanes have names
        chart.yaxis.ticker = BasicTicker(desired_num_ticks=4)
        chart.yaxis.formatter = NumeralTickFormatter(format="0.[0]%") if is_share else BasicTickFormatter()
    return chart


def _largest(runs: Sequence[Run], metric: str) -> float:
    """The largest size of a metric in any run."""
    rows = [row for run in runs for row in (*run.updates, *run.evaluations)]
    return max((abs(float(row[metric])) for row in rows if row.get(metric) is not None), default=0.0)


def _step_limits(runs: Sequence[Run]) -> tuple[float, float]:
    steps = [row["step"] for run in runs for row in (*run.updates, *run.evaluations)]
    if not steps:
        return (0.0, 1.0)
    low, high = min(steps), max(steps)
    margin = max(0.5, 0.01 * (high - low))
    return low - margin, high + margin


def _draw(chart: figure, run: Run, metric: str, colour: str) -> None:
    if metric == "accuracy":
        _draw_accuracy(chart, run, colour)
        return
    rows = [row for row in run.updates if row.get(metric) is not None]
    if not rows:
        return
    values = [float(row[metric]) for row in rows]
    steps = np.array([row["step"] for row in rows], dtype=np.int32)
    source = ColumnDataSource({"step": steps, "value": np.array(values)})
    smooth = metric == "reward_mean" and len(rows) > 2
    faint = 0.45 if smooth else 1.0
    chart.line("step", "value", source=source, color=colour, line_width=1 if smooth else 1.6, line_alpha=faint)
    if len(rows) <= _FEW:
        chart.scatter("step", "value", source=source, color=colour, size=3.5, alpha=faint)
    if smooth:
        source.data["smoothed"] = np.array(smoothed(values))
        chart.line("step", "smoothed", source=source, color=colour, line_width=2.2)


def _draw_accuracy(chart: figure, run: Run, colour: str) -> None:
    if not run.evaluations:
        return
    source = ColumnDataSource(
        {
            "step": [row["step"] for row in run.evaluations],
            "value": [row["accuracy"] for row in run.evaluations],
            "low": [row["accuracy_ci95"][0] for row in run.evaluations],
            "high": [row["accuracy_ci95"][1] for row in run.evaluations],
        }
    )
    chart.segment("step", "low", "step", "high", source=source, color=colour, line_width=2, line_alpha=0.5)
    chart.line("step", "value", source=source, color=colour, line_width=1.2, line_dash="dotted")
    chart.scatter("step", "value", source=source, color=colour, size=7)


def _draw_events(chart: figure, place: int, run: Run) -> None:
    if run.events:
        steps = sorted({row["step"] for row in run.events})
        source = ColumnDataSource({"step": steps})
        spans = chart.vspan("step", source=source, color=EVENT_COLOUR, line_width=1.2, line_dash="dashed")
        spans.tags = [f"run-{place}"]


def _stacked_seconds(run: Run) -> figure:
    chart = _chart(x_range=DataRange1d(range_padding=0.02), height=220, y_range=DataRange1d(start=0))
    parts = [timings.seconds_of(row) for row in run.updates]
    names = list(timings.TRAINER)
    data: Row = {name: np.array([one[name] for one in parts]) for name in (*names, "generation")}
    data["update"] = np.array([row["step"] for row in run.updates], dtype=np.int32)
    source = ColumnDataSource(data)
    colours = [PART_COLOURS[name] for name in names]
    chart.vbar_stack(names, x="update", width=0.86, source=source, color=colours, line_color=None)
    chart.line("update", "generation", source=source, color=PART_COLOURS["generation"], line_width=1.8)
    return chart


def _timeline(run: Run) -> figure:
    blocks = timings.timeline(run)
    present = {block["lane"] for block in blocks}
    lanes = [lane for lane in ("evaluation", "rollouts", "trainer") if lane in present] or ["trainer"]
    end = max((block["end"] for block in blocks), default=1.0)
    seen = Range1d(start=0, end=end, bounds=(0, end))
    chart = _chart(x_range=seen, height=50 + 34 * len(lanes), y_range=lanes)
    source = ColumnDataSource(
        {
            "lane": [block["lane"] for block in blocks],
            "left": np.array([block["start"] for block in blocks]),
            "right": np.array([block["end"] for block in blocks]),
            "update": np.array([block["step"] for block in blocks], dtype=np.int32),
            "colour": [PART_COLOURS[block["part"]] for block in blocks],
        }
    )
    chart.hbar(y="lane", left="left", right="right", height=0.7, source=source, color="colour", line_color=None)
    chart.ygrid.visible = False
    return chart
