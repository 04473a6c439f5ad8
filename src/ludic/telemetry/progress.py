"""How far something is: live on a terminal, now and then a plain line where the output is piped."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ludic.storage.inert import inert
from ludic.telemetry.formatting import count, percent, seconds

if TYPE_CHECKING:
    from ludic.rollout.evaluation import EvaluationProgress

_LINES = 10
"""About so many plain lines in all, where problems come in steadily."""
_SHORTEST_SILENCE_S = 1.0
_LONGEST_SILENCE_S = 30.0
_STATUS_SILENCE_S = 10.0


class EvaluationDisplay:
    """Pass it to `evaluate` as `on_progress`, inside a `with` that gives the terminal back.

    Example:
        >>> with EvaluationDisplay("test") as display:  # doctest: +SKIP
        ...     result = await evaluate(engine, environment, samples, on_progress=display, ...)
    """

    def __init__(self, title: str, *, stream: TextIO | None = None) -> None:
        self._title = inert(title)
        self._console = Console(file=stream)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(self._title, total=None, figures="")
        self._last_done = 0
        self._last_s = 0.0

    def __enter__(self) -> "EvaluationDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._progress.disable:  # rich 13.9 would end plain lines with an empty one
            self._progress.stop()

    def __call__(self, progress: "EvaluationProgress") -> None:
        """Show this state."""
        done, total = progress.num_done, progress.num_problems
        speed = progress.completion_tokens / progress.seconds if progress.seconds > 0 else 0.0
        figures = f"accuracy {percent(progress.accuracy)}  {count(speed)} tok/s"
        self._progress.update(self._task, completed=done, total=total, figures=figures)
        silence_s = progress.seconds - self._last_s
        many = done - self._last_done >= total / _LINES and silence_s >= _SHORTEST_SILENCE_S
        if self._progress.disable and (done == total or (done > 0 and (many or silence_s >= _LONGEST_SILENCE_S))):
            self._last_done, self._last_s = done, progress.seconds
            line = f"{self._title}  {done:>{len(str(total))}}/{total}  {figures}  {seconds(progress.seconds)}"
            self._console.print(Text(line), soft_wrap=True)


class StatusLine:
    """What is being waited for: within its `with`, one line in place on a terminal; otherwise a plain line every ten seconds.

    Safe to use from several threads.

    Args:
        say: writes a plain line.

    Example:
        >>> with StatusLine(print) as status:  # doctest: +SKIP
        ...     status.show("server loading, 12 s: Loading safetensors checkpoint shards")
    """

    def __init__(self, say: Callable[[str], None], *, stream: TextIO | None = None) -> None:
        self._say = say
        self._live = Live(console=Console(file=stream), transient=True)
        self._last_s = time.monotonic()

    def __enter__(self) -> "StatusLine":
        if self._live.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, text: str) -> None:
        """Show this state; on a terminal what does not fit is cut off at its end."""
        if self._live.is_started:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self._last_s >= _STATUS_SILENCE_S:
            self._last_s = time.monotonic()
            self._say(text)
