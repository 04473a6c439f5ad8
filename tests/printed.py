"""Commands that programs print, taken as they are printed."""

import re
import shlex
import sys

_COMMAND = re.compile(r"\s*(CUDA_VISIBLE_DEVICES=\S* )?(uv run |\S*/)?python3?(\.\d+)? \S")


def printed_command(text: str) -> list[str]:
    """The one line of `text` that is a command of ours, for `subprocess`; this Python stands in for `uv run python`."""
    (line,) = (line for line in text.splitlines() if _COMMAND.match(line))
    words = shlex.split(line)
    if words[0].startswith("CUDA_VISIBLE_DEVICES="):  # the tests' own, which a child has anyway
        words = words[1:]
    return [sys.executable, *words[3:]] if words[:3] == ["uv", "run", "python"] else words
