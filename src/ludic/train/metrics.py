"""Where a run's figures go: the seam between the loop and whatever writes them down."""

from collections.abc import Mapping
from typing import Protocol


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
