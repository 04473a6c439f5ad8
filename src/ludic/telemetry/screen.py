"""The lower end of a terminal: a view that is drawn again and again, and lines that go to the scroll-back above it.

The cursor rests on an empty row *above* the view, at its left, and is never hidden between two drawings. A drawing begins there
and clears all that is below. So nothing has to be known of what stands on the screen: whatever else was written meanwhile (a
`^C`, a warning of a C library) becomes scroll-back, a terminal that was resized and wrapped the view anew is cleared, and a
process that ends without a word leaves a cursor. rich's `Live` keeps the cursor below its view and counts rows upward, which is
wrong after both.
"""

import contextlib
import io
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.text import Text

REFRESH_S = 0.25

_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"  # a letter that is wider than rich takes it for is cut off, and wraps no row
_CLEAR_BELOW = "\r\x1b[J"


class Screen:
    """Draws `view` on the terminal of `console` four times a second, in a thread. Safe to use from several threads.

    While it is there, what is written to `sys.stdout` and `sys.stderr` goes above the view, where they are this terminal.

    Args:
        console: on a terminal.
        view: the rows for so many columns and rows.
    """

    def __init__(self, console: Console, view: Callable[[int, int], list[Text]]) -> None:
        self._console = console
        self._view = view
        self.lock = threading.RLock()  # a signal's handler may print in the thread that draws
        """Of what stands on the terminal, and of what is to."""
        self._ended = threading.Event()
        self._streams = (sys.stdout, sys.stderr)
        self._proxies: list[_LinesAbove] = []
        self._thread = threading.Thread(target=self._refresh, name="ludic-live-view", daemon=True)

    def start(self) -> None:
        """Take over the terminal."""
        out, err = self._streams
        if self._console.file.isatty() and out.isatty():
            sys.stdout = self._proxy(out)
            if err.isatty():  # and not a file that standard error was sent to
                sys.stderr = self._proxy(err)
        self._draw("")
        self._thread.start()

    def stop(self) -> None:
        """Give the terminal back, with the lines on it and without the view. Safe to call twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if self._proxies:
            sys.stdout, sys.stderr = self._streams
        for proxy in self._proxies:
            proxy.close()
        with self.lock:
            self._console.file.write(_CLEAR_BELOW)

    def write_line(self, line: Text) -> None:
        """Write a line above the view; the terminal wraps it."""
        with self._console.capture() as captured:
            self._console.print(line, soft_wrap=True)
        self._draw(captured.get())

    def _proxy(self, stream: TextIO) -> "_LinesAbove":
        self._proxies.append(_LinesAbove(stream, self))
        return self._proxies[-1]

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_S):
            self._draw("")

    def _draw(self, above: str) -> None:
        with self.lock:
            if self._ended.is_set():
                self._console.file.write(above)
                return
            view = ""
            with contextlib.suppress(Exception):  # of any kind: what is printed matters, a view that fails does not
                view = self._drawn()
            self._console.file.write(f"{_HIDE}{_CLEAR_BELOW}{above}{view}{_SHOW}")  # at once, so that nothing flickers

    def _drawn(self) -> str:
        """The view, and the way back to the row above it."""
        width, height = self._console.size
        rows = self._view(width, max(0, height - 2))  # one row is for the cursor, one for the scroll-back
        if not rows:
            return ""
        with self._console.capture() as captured:
            for row in rows:
                self._console.print(row, soft_wrap=True, end="")
                self._console.print(end="\n")
        text = captured.get().removesuffix("\n")
        return f"\n{_NO_WRAP}{text}{_WRAP}\r\x1b[{len(rows)}A"


class _LinesAbove(io.TextIOBase, TextIO):
    """Stands in for a stream of the terminal: whole lines go above the view."""

    def __init__(self, stream: TextIO, screen: Screen) -> None:
        self._stream = stream
        self._screen = screen
        self._begun = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        with self._screen.lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                self._screen.write_line(Text.from_ansi(line))
        return len(text)

    def close(self) -> None:
        """Hand on what is left, and leave the stream open."""
        with self._screen.lock:
            if self._begun:
                self._stream.write(self._begun)
                self._begun = ""
