"""Where a run's figures go: the seam between the loop and whatever writes them down, and the file that is a run's record."""

import os
import time
from collections.abc import Mapping
from typing import Protocol

from ludic.storage.jsonl import JsonlFile


class MetricLogger(Protocol):
    """Takes a run's figures and words. One thread at a time."""

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Write the metrics of update `step`; several calls may speak of one step."""
        ...

    def event(self, step: int, message: str, /) -> None:
        """Write a line that a person should see: a warning, an alarm, a checkpoint."""
        ...

    def close(self) -> None:
        """Write what is left and let go of files and the terminal. Safe to call twice."""
        ...


class JsonlLogger:
    """`{"step": 3, "time": ..., "loss": ...}`, one line a call, written before the call returns.

    `time` is Unix time in seconds. An event is `{"step": 3, "time": ..., "event": "..."}`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = JsonlFile(path)

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Append the metrics of `step`."""
        self._file.append({"step": step, "time": time.time(), **metrics})

    def event(self, step: int, message: str, /) -> None:
        """Append the message."""
        self._file.append({"step": step, "time": time.time(), "event": message})

    def close(self) -> None:
        """Close the file."""
        self._file.close()
