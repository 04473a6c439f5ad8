"""A terminal of our own for tests: enough of one to say what stands on its screen, and what is in its scroll-back.

It knows what `ludic.telemetry.screen` and rich send, wraps long lines, scrolls, and wraps them anew when it is resized, as most
terminals do. An escape sequence that it does not know is an error.
"""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.cells import cell_len

_PIECE = re.compile(r"\x1b\[([?]?)([\d;]*)([A-Za-z])|([\x00-\x1f\x7f-\x9f])|([^\x00-\x1f\x7f-\x9f]+)")


class Terminal:
    """What was fed to it, as rows. `row` and `column` are the cursor's, counted from the first row ever written."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows: list[str] = [""]
        self.continues: list[bool] = [False]
        """Whether a row goes on with the line of the one above."""
        self.top = 0
        """The first row of the screen."""
        self.row = self.column = 0
        self.cursor_shown = self.wraps = True
        self.tallest = 0
        """The most rows that were cleared at once below the cursor: of a view, with the cursor's own."""

    @property
    def screen(self) -> list[str]:
        """The rows of the screen, without what is empty at their ends."""
        return [row.rstrip() for row in self.rows[self.top :]]

    @property
    def lines(self) -> list[str]:
        """All that was written, scroll-back first, as lines before they were wrapped."""
        lines: list[str] = []
        for row, continues in zip(self.rows, self.continues, strict=True):
            if continues:
                lines[-1] += row
            else:
                lines.append(row)
        return [line.rstrip() for line in lines]

    def feed(self, text: str) -> None:
        """Take `text` as a terminal does."""
        for private, numbers, letter, control, printed in (match.groups() for match in _PIECE.finditer(text)):
            if printed:
                for character in printed:
                    self._put(character)
            elif control:
                self._control(control)
            else:
                self._act(private + letter, int(numbers or 0) if numbers.isdigit() or not numbers else 0)
        assert "".join(match.group() for match in _PIECE.finditer(text)) == text, "an escape sequence that is unknown"

    def resize(self, width: int, height: int) -> None:
        """Wrap all lines anew; the cursor stays in its line."""
        line = sum(not continues for continues in self.continues[: self.row + 1]) - 1
        lines = self.lines
        self.width, self.height = width, height
        self.rows, self.continues = [], []
        for number, text in enumerate(lines):
            if number == line:
                self.row = len(self.rows)
            pieces = [text[start : start + width] for start in range(0, max(1, len(text)), width)]
            self.rows += pieces
            self.continues += [place > 0 for place in range(len(pieces))]
        self.column = 0
        self.top = min(max(0, len(self.rows) - height), self.row)
        del self.rows[self.top + height :], self.continues[self.top + height :]

    def _put(self, character: str) -> None:
        size = cell_len(character)
        if self.column + size > self.width:
            if self.wraps:
                self.column = 0
                self._down(continues=True)
            else:
                self.column = self.width - size
        row = self.rows[self.row].ljust(self.column)
        self.rows[self.row] = row[: self.column] + character + row[self.column + 1 :]
        self.column += size

    def _down(self, *, continues: bool = False) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")
            self.continues.append(continues)
        self.top = max(self.top, self.row - self.height + 1)

    def _control(self, control: str) -> None:
        assert control in "\r\n", f"{control!r} acts on a terminal"
        if control == "\r":
            self.column = 0
        else:
            self.column = 0  # as the terminal's driver has it
            self._down()

    def _act(self, letter: str, number: int) -> None:
        if letter == "A":
            assert self.row - number >= self.top, "the cursor is sent above the screen"
            self.row -= number
        elif letter == "J":
            self.tallest = max(self.tallest, len(self.rows) - self.row)
            self.rows[self.row] = self.rows[self.row][: self.column]
            del self.rows[self.row + 1 :], self.continues[self.row + 1 :]
        elif letter == "K":
            self.rows[self.row] = "" if number == 2 else self.rows[self.row][: self.column]
        elif letter in ("?h", "?l"):
            if number == 25:
                self.cursor_shown = letter == "?h"
            elif number == 7:
                self.wraps = letter == "?h"
        else:
            assert letter == "m", f"ESC [ {letter}"


class Session:
    """A command on a pseudo-terminal, whose output a `Terminal` takes."""

    def __init__(self, words: Sequence[str], *, width: int, height: int, cwd: Path, env: dict[str, str]) -> None:
        self.terminal = Terminal(width, height)
        self.raw = ""
        self._ours, theirs = pty.openpty()
        self._set_size(width, height)
        self.process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=env, start_new_session=True
        )
        os.close(theirs)
        self._bytes = b""

    def resize(self, width: int, height: int) -> None:
        """As a person pulls at the window, between two drawings: one that is cut in two leaves a part of itself."""
        self.until(lambda: self.raw.endswith("\x1b[?25h") and not self._bytes)
        self._set_size(width, height)
        self.terminal.resize(width, height)

    def until(self, seen: Callable[[], bool], *, limit_s: float = 120.0) -> None:
        """Take output until `seen`, or until it ends."""
        deadline = time.monotonic() + limit_s
        while not seen():
            assert time.monotonic() < deadline, "\n".join(self.terminal.lines[-40:])
            if not self._take(0.1):
                return

    def end(self, *, limit_s: float = 120.0) -> int:
        """Take all output; the exit code."""
        self.until(lambda: False, limit_s=limit_s)
        os.close(self._ours)
        return self.process.wait(limit_s)

    def _set_size(self, width: int, height: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def _take(self, wait_s: float) -> bool:
        """Whether the output goes on."""
        if not select.select([self._ours], [], [], wait_s)[0]:
            return True
        try:
            data = os.read(self._ours, 65_536)
        except OSError:  # the other end was closed
            return False
        self._bytes += data
        # Whole pieces only: the end may be in the middle of a letter or of an escape sequence.
        text = self._bytes.decode(errors="ignore")
        whole = re.sub(r"\x1b(\[[?\d;]*)?$", "", text)
        self._bytes = self._bytes[len(whole.encode()) :]
        self.raw += whole
        self.terminal.feed(whole)
        return bool(data)
