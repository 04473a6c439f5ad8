"""Lines of JSON that a run may still be writing, without parsing those that are not wanted."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ludic.report.runs import Row

_STEP = re.compile(rb'\{"step": (\d+),')
"""How the trainer begins a line; another line is parsed for its step."""


def whole_lines(path: Path, end: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Each line with its number, up to the byte `end`; a last line that a run is still writing is left out."""
    seen = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            seen += len(line)
            if not line.endswith(b"\n") or (end is not None and seen > end):
                return
            yield number, line


def step_of(path: Path, number: int, line: bytes, fields: set[str]) -> int:
    """The update of a line; raises what `decoded` raises."""
    begins = _STEP.match(line)
    return int(begins[1]) if begins else int(decoded(path, number, line, fields)["step"])


def decoded(path: Path, number: int, line: bytes, fields: set[str]) -> Row:
    """The record in a line, which has at least these `fields`.

    Raises:
        ValueError: `file:line: reason` where it has not.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
    if not isinstance(record, dict) or not record.keys() >= fields:
        raise ValueError(f"{path}:{number}: this is no line of a training of this version of ludic")
    return record
