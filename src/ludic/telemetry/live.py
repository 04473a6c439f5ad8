"""The live view of a training run: what it does now, where its seconds went, how its figures go, what a completion looks like.

Rows of text for a given number of columns and rows: nothing here writes to a terminal. Where rows are few, parts are left out,
the least needed first; where columns are few, bars go and rows are cut off at their end.
"""

import itertools
import math
import textwrap
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len, chop_cells
from rich.text import Text

from ludic.storage.inert import inert
from ludic.telemetry.activity import Activity, Batch
from ludic.telemetry.alarms import alarm_words
from ludic.telemetry.formatting import count, figure, format_metric, percent, seconds

_METRICS = {
    "reward_mean": "reward",
    "correct_rate": "correct",
    "avg_completion_length": "length",
    "entropy": "entropy",
    "logprob_gap": "logp gap",
}
"""Those with a sparkline."""
_PHASES = {
    "generation_s": "gen", "grading_s": "grading", "train_s": "train", "sync_s": "sync",
}  # fmt: skip
_LABEL_WIDTH = 11
_FIGURES_WIDTH = 44
_BAR_WIDTHS = (8, 48)
_RANGE_WIDTH = 22
"""Of the lowest and the highest value beside a sparkline."""
_RECENT_UPDATES = 20
"""By whose seconds the time that is left is told."""
_MOST_ROWS = 22
"""As many as a terminal of 24 rows has room for, so that no row is left above one that was made as small as that."""


class LiveView:
    """Takes in what a run logs, and draws it with what an `Activity` says of this moment.

    Args:
        title: of the run.
        total_steps: updates that it is to make; None where that is not known.
        ascii_only: the terminal's encoding has no blocks and lines.
    """

    def __init__(self, title: str, total_steps: int | None, activity: Activity, *, ascii_only: bool = False) -> None:
        self._title = inert(title, 60)
        self._total_steps = total_steps
        self._activity = activity
        self._ascii_only = ascii_only
        self._step = 0
        self._metrics: dict[str, float] = {}
        """Of the last update."""
        self._history: dict[str, list[float]] = {name: [] for name in _METRICS}
        self._evaluations: dict[int, float] = {}
        """Accuracies by their update."""
        self._alarm = ""
        self._started_s = time.monotonic()
        self._logged_s: deque[float] = deque(maxlen=_RECENT_UPDATES + 1)

    # -- what a run logs -------------------------------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the figures of an update, or of an evaluation."""
        self.take({"step": step, **metrics})
        if "reward_mean" in metrics:
            self._logged_s.append(time.monotonic())
            self._activity.forget(step)

    def event(self, step: int, message: str) -> None:
        """Take in an event; an alarm is shown."""
        self.take({"step": step, "event": message})

    def take(self, record: Mapping[str, object]) -> None:
        """Take in a line of the metrics file, of now or of earlier."""
        step = record.get("step")
        if not isinstance(step, int):
            return
        if (words := alarm_words(str(record.get("event", "")))) is not None:
            self._alarm = f"step {step}: {inert(words, 2_000)}"
        figures = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
        if "eval/accuracy" in figures:
            self._evaluations[step] = figures["eval/accuracy"]
        if "reward_mean" in figures:
            self._step, self._metrics = step, figures
            for name, values in self._history.items():
                values.append(figures.get(name, math.nan))

    # -- how it looks ----------------------------------------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Text]:
        """At most `height` rows, each of which has at most `width` columns; fewer where there is nothing to show."""
        text_rows = 6 if height >= 30 else 3
        height = max(0, min(height, _MOST_ROWS))
        # Parts in their places, each with its rank: who is least needed goes first.
        parts: list[tuple[int, list[Text]]] = [
            (4, [self._heading(width)]),
            (0, [self._step_row(width)]),
            (1, [self._generation_row(width)]),
            (2, [self._training_row(width)]),
            (3, [self._sync_row(width)]),
            (3, [self._evaluation_row(width)]),
            (6, [self._seconds_row()]),
            *((rank, [row]) for rank, row in zip((5, 7, 9, 10, 11), self._sparklines(width), strict=True)),
            (8, self._alarm_rows(width)),
        ]
        fixed = sum(len(rows) for _, rows in parts)
        parts.append((12, self._completion(width, min(height - fixed, 2 + text_rows))))
        while parts and sum(len(rows) for _, rows in parts) > height:
            parts.remove(max(parts, key=lambda part: part[0]))
        return [self._fitted(row, width) for _, rows in parts for row in rows]

    def _fitted(self, row: Text, width: int) -> Text:
        if self._ascii_only and not row.plain.isascii():
            row = Text(row.plain.encode("ascii", "backslashreplace").decode())
        row.truncate(max(1, width), overflow="crop" if self._ascii_only else "ellipsis")
        return row

    def _labelled(self, label: str, text: str, *, style: str = "") -> Text:
        return Text.assemble((f"{label:<{_LABEL_WIDTH}} ", "bold"), (text, style))

    def _heading(self, width: int) -> Text:
        elapsed = _whole(time.monotonic() - self._started_s)
        rule = ("-" if self._ascii_only else "─") * max(2, width - cell_len(self._title) - len(elapsed) - 3)
        return Text.assemble((f"{rule[:2]} ", "dim"), (self._title, "bold"), (f" {rule[2:]} ", "dim"), (elapsed, "dim"))

    def _progress(self, label: str, share: float | None, figures: str, width: int, *, active: bool) -> Text:
        """A row with a bar; without one where there is no `share` to tell, or no room."""
        row = Text.assemble((f"{label:<{_LABEL_WIDTH}} ", "bold cyan" if active else "bold"))
        room = width - _LABEL_WIDTH - _FIGURES_WIDTH - 3
        if room >= _BAR_WIDTHS[0]:
            length = min(room, _BAR_WIDTHS[1])
            filled = 0 if share is None else round(length * min(1.0, share))
            full, empty = ("#", "-") if self._ascii_only else ("━", "─")
            row.append(full * filled, "cyan" if active else "green")
            row.append((" " if share is None else empty) * (length - filled) + "  ", "dim")
        return row.append(figures, "" if active else "dim")

    def _step_row(self, width: int) -> Text:
        figures = [f"{self._step}" if self._total_steps is None else f"{self._step}/{self._total_steps}"]
        if speed := self._metrics.get("tokens_per_s"):
            figures.append(f"{count(speed)} tokens/s")
        if (left := self._time_left()) is not None:
            figures.append(f"left {_whole(left)}")
        share = self._step / self._total_steps if self._total_steps else None
        return self._progress("step", share, "  ".join(figures), width, active=True)

    def _time_left(self) -> float | None:
        if self._total_steps is None or len(self._logged_s) < 2:
            return None
        each = (self._logged_s[-1] - self._logged_s[0]) / (len(self._logged_s) - 1)
        return max(0.0, each * (self._total_steps - self._step) - (time.monotonic() - self._logged_s[-1]))

    def _generation_row(self, width: int) -> Text:
        batches = dict(self._activity.updates)  # the loop's thread may add to it at any time
        update, batch = next(((u, b) for u, b in batches.items() if not b.is_complete), (0, None))
        if batch is None:
            done = f"{seconds(self._metrics['generation_s'])} in update {self._step}" if self._metrics else "waiting"
            figures = f"update {max(batches)} is generated" if batches else done
            return self._progress("generation", 1.0 if batches else None, figures, width, active=False)
        figures = f"update {update}  {_amount(batch)}"
        return self._progress("generation", batch.num_done / batch.total, figures, width, active=True)

    def _training_row(self, width: int) -> Text:
        trained = self._activity.trained_tokens()
        if not trained:
            figures = f"{seconds(self._metrics['train_s'])} in update {self._step}" if self._metrics else "waiting"
            return self._progress("training", None, figures, width, active=False)
        batch = self._activity.updates.get(self._step + 1)
        total = (0 if batch is None else batch.num_sequence_tokens) * self._trained_share()
        figures = f"update {self._step + 1}  {count(trained)} tokens"
        return self._progress("training", trained / total if total else None, figures, width, active=True)

    def _trained_share(self) -> float:
        """The share of an update's tokens that is trained on, as in the last one: groups without variance are not."""
        names = ("total_completion_tokens", "prompt_tokens")
        sampled = sum(self._metrics.get(name, 0.0) for name in names)
        return self._metrics.get("trained_tokens", sampled) / sampled if sampled else 1.0

    def _sync_row(self, width: int) -> Text:
        activity = self._activity
        started_s, last = activity.sync_started_s, activity.last_sync
        took_s = last.seconds if last is not None else 0.0
        if started_s is not None:
            under_way_s = time.monotonic() - started_s
            figures = f"{seconds(under_way_s)}" + (f", the last took {seconds(took_s)}" if took_s else "")
            return self._progress("sync", under_way_s / took_s if took_s else None, figures, width, active=True)
        figures = f"version {last.policy_version} proven in {seconds(took_s)}" if last is not None else "waiting"
        return self._progress("sync", None, figures, width, active=False)

    def _evaluation_row(self, width: int) -> Text:
        batch = self._activity.evaluation
        if batch is not None and not batch.is_complete:
            figures = _amount(batch)
            if batch.num_scored:
                figures += f"  accuracy {percent(batch.num_correct / batch.num_scored)}"
            return self._progress("evaluation", batch.num_done / batch.total, figures, width, active=True)
        told = [f"{percent(accuracy)} at {step}" for step, accuracy in list(self._evaluations.items())]
        figures = "accuracy " + "  ".join([told[0], *told[1:][-1:]]) if told else "none yet"
        return self._progress("evaluation", None, figures, width, active=False)

    def _seconds_row(self) -> Text:
        if "step_s" not in self._metrics:
            return self._labelled("seconds", "no update yet", style="dim")
        told = [f"{label} {seconds(self._metrics[name])}" for name, label in _PHASES.items() if name in self._metrics]
        return self._labelled("seconds", "  ".join([f"update {seconds(self._metrics['step_s'])}", *told]))

    def _sparklines(self, width: int) -> Iterator[Text]:
        for name, label in _METRICS.items():
            values = [value for value in self._history[name] if math.isfinite(value)]
            if not values:
                yield self._labelled(label, "-", style="dim")
                continue
            shown = {value: format_metric(name, value) for value in (values[-1], min(values), max(values))}
            ends = f"{shown[min(values)]} to {shown[max(values)]}"
            row = self._labelled(label, f"{shown[values[-1]]:>9}  ")
            room = min(max(0, width - row.cell_len - _RANGE_WIDTH - 2), 60)
            line = sparkline(values, room, ascii_only=self._ascii_only)
            yield row.append(f"{line}{' ' * (room - len(line))}  ", "cyan").append(ends, "dim")

    def _alarm_rows(self, width: int) -> list[Text]:
        if not self._alarm:
            return [self._labelled("alarm", "none so far", style="dim")]
        lines = textwrap.wrap(self._alarm, max(20, width - _LABEL_WIDTH - 1), max_lines=2, placeholder=" ...")
        labels = ("alarm", "")
        return [self._labelled(label, line, style="yellow") for label, line in zip(labels, lines, strict=False)]

    def _completion(self, width: int, height: int) -> list[Text]:
        """One completion with its reward, in at most `height` rows."""
        shown = self._activity.completion
        if shown is None or height < 2:
            return []
        score = shown.score
        verdict = ("right" if score.correct else "wrong", "green" if score.correct else "red")
        answer = "no answer" if score.parse.answer is None else f"answer {inert(score.parse.answer, 40)}"
        heading = self._labelled("completion", f"reward {figure(score.reward)}  ")
        heading.append(*verdict).append(f"  {answer}, target {inert(shown.target, 40)}")
        rows = [heading]
        if height > 4:
            rows.append(Text(f"  {self._one_line(shown.question[:width])}", "dim"))
        return rows + [Text(f"  {row}") for row in self._wrapped(shown.text, width - 2, height - len(rows))]

    def _one_line(self, text: str) -> str:
        """`text`, inert, with a sign for each line break."""
        return (" / " if self._ascii_only else " ↵ ").join(inert(line) for line in text.strip().split("\n"))

    def _wrapped(self, text: str, width: int, height: int) -> list[str]:
        """Rows of `text`; of one that is too long the beginning and, after dots, the end."""
        width = max(width, 10)
        rows = chop_cells(self._one_line(text[: width * (height + 1)]), width)
        if len(text) <= width * (height + 1) and len(rows) <= height:
            return rows
        end = self._one_line(text[-width:])[4 - width :]
        return [*rows[: height - 1], f"... {end}"]


def _amount(batch: Batch) -> str:
    speed = f"{count(batch.tokens_per_s)} tokens/s" if batch.num_done else _whole(time.monotonic() - batch.started_s)
    return f"{batch.num_done}/{batch.total}  {speed}"


def _whole(value: float) -> str:
    """Seconds without fractions, which would flicker."""
    return f"{int(value)}s" if value < 60 else seconds(value)


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Finite `values` in at most `width` characters, each the mean of as many of them; from the lowest to the highest.

    Example:
        >>> sparkline([0.0, 0.1, 0.5, 1.0], 4), sparkline([0.0, 1.0, 2.0, 3.0], 2)
        ('▁▂▄█', '▁█')
    """
    blocks = "_.-=+*#@" if ascii_only else "▁▂▃▄▅▆▇█"
    width = min(width, len(values))
    edges = [place * len(values) // width for place in range(width + 1)] if width > 0 else [0]
    means = [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)
