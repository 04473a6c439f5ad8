"""A run on the terminal or in a log: a line a step, and on a terminal below them the live view."""

import io
from collections.abc import Iterable, Mapping
from typing import TextIO

from rich.console import Console
from rich.text import Text

from ludic.storage.inert import inert
from ludic.survival.signals import write_failure
from ludic.telemetry.activity import Activity
from ludic.telemetry.formatting import format_step, format_step_line
from ludic.telemetry.live import LiveView
from ludic.telemetry.screen import Screen

LINE_LIMIT = 2_000
"""Characters of a line; what others wrote may be longer."""
WIDE = 120
"""Columns of a terminal that has room for a step's whole line."""


def has_place_for_view(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that moves its cursor. FORCE_COLOR makes rich take a pipe for a terminal."""
    console = Console(file=stream)
    return stream.isatty() and console.is_terminal and not console.is_dumb_terminal


class ConsoleLogger:
    """Writes a line a step. `close` gives the terminal back.

    Args:
        live: draw the live view too; `stream` has a place for it.
        activity: what the view shows of this moment.
        earlier: what was logged before this process began, for the view.
    """

    def __init__(
        self,
        stream: TextIO,
        run_name: str,
        total_steps: int | None,
        *,
        live: bool,
        activity: Activity,
        earlier: Iterable[Mapping[str, object]] = (),
    ) -> None:
        self._outlet = _Outlet(stream)
        self._total_steps = total_steps
        self._view: LiveView | None = None
        self._screen: Screen | None = None
        self._console = Console(file=self._outlet)
        if not live:
            # Lines are plain and as long as they are, on a terminal too.
            self._console = Console(file=self._outlet, force_terminal=False)
            return
        ascii_only = self._console.options.ascii_only
        self._view = LiveView(run_name, total_steps, activity, ascii_only=ascii_only)
        for record in earlier:
            self._view.take(record)
        self._screen = Screen(self._console, self._view.rows)
        self._screen.start()

    def __repr__(self) -> str:
        return "the log on standard output" if self._screen is None else "the live view"

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Write the step's line and hand its figures to the view.

        Raises:
            OSError, ValueError: the terminal or the pipe was closed, or the disk is full.
        """
        if self._view is not None:
            self._view.log(step, metrics)
        brief = self._screen is not None and self._console.width < WIDE  # a view beside it has the other figures
        self._write(format_step_line(step, self._total_steps, metrics, brief=brief))

    def event(self, step: int, message: str, /) -> None:
        """Write the message with its step on a line of its own, on a terminal in yellow. Raises as `log`."""
        if self._view is not None:
            self._view.event(step, message)
        self._write(f"{format_step(step, self._total_steps)}  {message}", style="yellow")

    def close(self) -> None:
        """Take the view off the terminal, whose lines stay; the stream is the caller's."""
        if self._screen is not None:
            self._screen.stop()

    def _write(self, line: str, style: str = "") -> None:
        text = Text(inert(line, LINE_LIMIT), style=style)
        if self._screen is not None:
            self._screen.write_line(text)
        else:
            self._console.print(text, soft_wrap=True)
        if self._outlet.failure is not None:
            raise self._outlet.failure


class _Outlet(io.TextIOBase, TextIO):
    """The stream that people read. Its first failure is kept, and nothing is written to it from then on: the live view
    also draws from a thread of its own, where no caller would see an exception.

    What the stream's encoding lacks is written as an escape, so that a plain ASCII locale changes no run.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | ValueError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]  # of the stream, which rich asks for
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
                self._stream.flush()  # a pipe is block-buffered, and a line that comes an hour late is of no use
                self.failure = write_failure(self._stream)  # a script's standard output raises nothing
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self.failure = error
        return len(text)
