"""The live view of a run on a terminal: a line a step that scrolls away, above a table of the last step and a bar.

It is for terminals only; where the output is piped, `loggers.PrintLogger` takes its place.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ludic.storage.inert import inert
from ludic.telemetry.formatting import format_evaluation, format_metric, format_step, format_step_line

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 60
_LINE_LIMIT = 2_000

_TABLE: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "rollouts",
        (
            ("reward_mean", "reward"),
            ("reward_std", "spread"),
            ("correct_rate", "correct"),
            ("parse_err_rate", "no answer"),
            ("truncation_rate", "truncated"),
            ("avg_completion_length", "tokens each"),
            ("zero_variance_groups", "flat groups"),
        ),
    ),
    (
        "update",
        (
            ("loss", "loss"),
            ("grad_norm", "grad norm"),
            ("entropy", "entropy"),
            ("clip_fraction", "clipped"),
            ("kl", "KL"),
            ("logprob_gap", "logp gap"),
            ("learning_rate", "lr"),
        ),
    ),
    (
        "time",
        (
            ("generation_s", "generation"),
            ("grading_s", "grading"),
            ("train_s", "training"),
            ("sync_s", "sync"),
            ("step_s", "whole step"),
            ("tokens_per_s", "tokens/s"),
            ("staleness", "staleness"),
        ),
    ),
)


def sparkline(values: Iterable[float]) -> str:
    """`values` as a row of blocks from the lowest to the highest; a gap where one is not finite.

    Example:
        >>> sparkline([0.0, 0.5, 1.0])
        '▁▅█'
    """
    values = list(values)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BLOCKS) - 1

    def block(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return _BLOCKS[math.floor((value - low) / span * top + 0.5)] if span else _BLOCKS[0]

    return "".join(block(value) for value in values)


class LiveLogger:
    """Live display of a run through rich. `close` gives the terminal back."""

    def __init__(self, console: Console, run_name: str, total_steps: int | None) -> None:
        self._console = console
        self._run_name = run_name
        self._total_steps = total_steps
        self._metrics: dict[str, float] = {}
        self._rewards: deque[float] = deque(maxlen=_SPARKLINE_WIDTH)
        self._progress = Progress(
            TextColumn("updates"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("updates", total=total_steps)
        self._live = Live(self._view(), console=console, refresh_per_second=4)
        self._live.start()

    def __repr__(self) -> str:
        return "the live display"

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Print the step's line above the display and put its figures into the table."""
        self._metrics.update(metrics)
        if "reward_mean" in metrics:
            self._rewards.append(metrics["reward_mean"])
        if not all(name.startswith("eval/") for name in metrics):
            self._progress.update(self._task, completed=step)
        self._console.print(Text(inert(format_step_line(step, self._total_steps, metrics), _LINE_LIMIT)))
        self._live.update(self._view())

    def event(self, step: int, message: str, /) -> None:
        """Print the message above the display, in yellow."""
        line = inert(f"{format_step(step, self._total_steps)}  {message}", _LINE_LIMIT)
        self._console.print(Text(line, style="yellow"))

    def close(self) -> None:
        """Draw the display once more and leave it standing."""
        self._live.stop()

    def _view(self) -> Panel:
        parts: list[Table | Text | Progress] = []
        if self._metrics:
            parts += [_metrics_table(self._metrics), Text()]
        if evaluation := {name: value for name, value in self._metrics.items() if name.startswith("eval/")}:
            parts.append(Text.assemble(("last eval  ", "bold"), inert(format_evaluation(evaluation))))
        if len(self._rewards) > 1:
            parts.append(Text.assemble(("reward     ", "bold"), (sparkline(self._rewards), "green")))
        parts.append(self._progress)
        return Panel(Group(*parts), title=Text(inert(self._run_name)), border_style="dim")


def _metrics_table(metrics: Mapping[str, float]) -> Table:
    """The known metrics that are there, in up to three columns of names and figures that fit 80 characters."""
    columns = [
        (heading, [(label, format_metric(name, metrics[name])) for name, label in rows if name in metrics])
        for heading, rows in _TABLE
    ]
    columns = [(heading, rows) for heading, rows in columns if rows]
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0))
    for heading, _ in columns:
        table.add_column(heading, header_style="bold")
        table.add_column("", justify="right")
    for place in range(max((len(rows) for _, rows in columns), default=0)):
        cells = [rows[place] if place < len(rows) else ("", "") for _, rows in columns]
        table.add_row(*(Text(text) for cell in cells for text in cell))
    return table
