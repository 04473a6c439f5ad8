"""Commands that programs print, taken as they are printed."""

import re
import shlex
import sys


def printed_command(text: str) -> list[str]:
    """The one line of `text` that is a command of ours, for `subprocess`; this Python stands in for `uv run python`."""
    (line,) = (line.strip() for line in text.splitlines() if re.match(r"\s*(uv run |\S*/)?python3?(\.\d+)? \S", line))
    words = shlex.split(line)
    return [sys.executable, *words[3:]] if words[:3] == ["uv", "run", "python"] else words
