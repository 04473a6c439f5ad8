"""How far something is: live on a terminal, now and then a plain line where the output is piped."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
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
        self._stream = sys.stdout if stream is None else stream
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last_done = 0
        self._last_s = 0.0

    def __enter__(self) -> "EvaluationDisplay":
        console = Console(file=self._stream)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                expand=True,
            )
            self._task = self._progress.add_task(self._title, total=None, figures="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, progress: "EvaluationProgress") -> None:
        """Show this state."""
        speed = progress.completion_tokens / progress.seconds if progress.seconds > 0 else 0.0
        figures = f"accuracy {percent(progress.accuracy)}  {count(speed)} tok/s"
        if self._progress is not None:
            done, total = progress.num_done, progress.num_problems
            self._progress.update(self._task, completed=done, total=total, figures=figures)
            return
        if self._is_worth_a_line(progress):
            self._last_done, self._last_s = progress.num_done, progress.seconds
            width = len(str(progress.num_problems))
            line = f"{self._title}  {progress.num_done:>{width}}/{progress.num_problems}  {figures}"
            self._stream.write(f"{line}  {seconds(progress.seconds)}\n")
            self._stream.flush()

    def _is_worth_a_line(self, progress: "EvaluationProgress") -> bool:
        if progress.num_done == progress.num_problems:
            return True
        silence_s = progress.seconds - self._last_s
        many = progress.num_done - self._last_done >= progress.num_problems / _LINES
        return progress.num_done > 0 and (
            (many and silence_s >= _SHORTEST_SILENCE_S) or silence_s >= _LONGEST_SILENCE_S
        )


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
        self._stream = sys.stdout if stream is None else stream
        self._live: Live | None = None
        self._last_s = time.monotonic()

    def __enter__(self) -> "StatusLine":
        console = Console(file=self._stream)
        if console.is_terminal:
            self._live = Live(Text(), console=console, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, text: str) -> None:
        """Show this state; on a terminal what does not fit is cut off at its end."""
        live = self._live  # another thread may leave the block
        if live is not None:
            live.update(Text(text, no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self._last_s >= _STATUS_SILENCE_S:
            self._last_s = time.monotonic()
            self._say(text)
