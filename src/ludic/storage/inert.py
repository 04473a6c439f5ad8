"""What others wrote (a model, a data set, a server), shown so that nothing in it acts on a terminal.

Brackets stay as they are: rich is given a `Text`, never a string that it reads as markup.
"""

import logging
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

_MARKS_IN_A_ROW = 3
"""Combining marks on one letter; no living script needs more, and a pile of them covers the lines above."""
_LOG_LIMIT = 4_000


def inert(text: str, limit: int = 600) -> str:
    r"""`text` on one line of at most `limit` characters, and ` ...` where it was cut, with nothing that acts on a terminal.

    What is not printable is shown as Python writes it: line breaks, escape sequences, C0 and C1 controls, backspaces and
    bells, directional marks, zero-width characters, halves of surrogate pairs; and combining marks from the fourth in a
    row on. Letters of all scripts stay.

    Example:
        >>> print(inert("\x1b]0;owned\x07 7\r8 \u202e9"))
        \x1b]0;owned\x07 7\r8 \u202e9
        >>> print(inert("seven, eight", limit=5))
        seven ...
    """
    shown = "".join(_visible(text[: limit + 1]))
    return shown if len(shown) <= limit else shown[:limit] + " ..."


def inert_lines(text: str, limit: int = 600) -> str:
    """`text` with its line feeds, and each line of it `inert`."""
    return "\n".join(inert(line, limit) for line in text.split("\n"))


def _visible(text: str) -> Iterator[str]:
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character) in ("Mn", "Me") else 0
        acts = not character.isprintable() or marks > _MARKS_IN_A_ROW
        yield character.encode("unicode_escape").decode("ascii") if acts else character


class StandardErrorHandler(logging.Handler):
    """Writes log lines to what `sys.stderr` is at the time: a live view stands in for it while it is there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line."""
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # as all handlers of the standard library: a log line must not end what it tells of
            self.handleError(record)


class InertFormatter(logging.Formatter):
    """A log line in which nothing acts on a terminal, and which stays one line; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return inert(super().formatMessage(record), _LOG_LIMIT)

    def formatException(self, ei: Any) -> str:
        return inert_lines(super().formatException(ei), _LOG_LIMIT)
