"""Where a run's metrics go: the terminal, plain lines, a JSON lines file, Weights & Biases, or several at once.

The trainer knows one thing, the `MetricLogger` protocol; it has reduced the metrics before it logs them, so a logger
only writes. Metrics are always also appended to a JSON lines file, whichever loggers are chosen: a run that is worth
starting is worth reading afterwards.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console

from ludic.telemetry.formatting import format_step, format_step_line
from ludic.telemetry.jsonl import JsonlFile
from ludic.telemetry.live import LiveLogger

if TYPE_CHECKING:
    from wandb import Run

LOGGER_NAMES = ("rich", "print", "jsonl", "wandb", "none")


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


def parse_logger_names(names: str) -> tuple[str, ...]:
    """The names in a `--logger` value, in order and once each; a bad one is refused before a run starts.

    Raises:
        ValueError: an unknown or contradictory name, or one whose package is not installed.

    Example:
        >>> parse_logger_names("rich,wandb")
        ('rich', 'wandb')
    """
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        if name not in LOGGER_NAMES:
            raise ValueError(f"--logger {name!r} is not known: choose among {', '.join(LOGGER_NAMES)}, comma-separated")
    if not chosen:
        raise ValueError("--logger is empty: to log to the metrics file alone, use none")
    if "none" in chosen and len(chosen) > 1:
        raise ValueError(f"--logger {names} contradicts itself: none goes alone")
    if {"rich", "print"} <= set(chosen):
        raise ValueError(f"--logger {names} would write every step twice: choose rich or print")
    if "wandb" in chosen and importlib.util.find_spec("wandb") is None:
        raise ValueError("--logger wandb needs the package wandb: install it with `uv sync --extra examples`")
    return chosen


def make_logger(
    names: str,
    *,
    metrics_path: str | os.PathLike[str],
    run_name: str,
    config: Mapping[str, object],
    total_steps: int | None,
    stream: TextIO | None = None,
) -> "MultiLogger":
    """The loggers that `names` lists (comma-separated), and always the metrics file.

    Args:
        names: some of `rich`, `print`, `jsonl`, `wandb`; or `none`. `jsonl` asks for what happens anyway.
        metrics_path: the JSON lines file, appended to.
        run_name: the title on the terminal and the run's name at W&B.
        config: the run's settings, sent to W&B.
        total_steps: updates that the run is to make; None where that is not known.
        stream: where `rich` and `print` write; standard output if not given.

    Raises:
        ValueError: as `parse_logger_names`; also when W&B refuses to start.
        OSError: the metrics file cannot be written.
    """
    chosen = parse_logger_names(names)
    stream = sys.stdout if stream is None else stream
    with ExitStack() as opened:  # if a later logger cannot start, the earlier ones are closed again
        loggers: list[MetricLogger] = [JsonlLogger(metrics_path)]
        opened.callback(loggers[0].close)
        if "wandb" in chosen:
            loggers.append(WandbLogger(run_name, config))
            opened.callback(loggers[-1].close)
        # The live display comes last, since it takes over the terminal.
        if "rich" in chosen and (console := Console(file=stream)).is_terminal:
            loggers.append(LiveLogger(console, run_name, total_steps))
        elif "rich" in chosen or "print" in chosen:
            loggers.append(PrintLogger(stream, total_steps))
        opened.pop_all()
    return MultiLogger(loggers)


class PrintLogger:
    """One plain line a step, for pipes and log files."""

    def __init__(self, stream: TextIO, total_steps: int | None) -> None:
        self._stream = stream
        self._total_steps = total_steps

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Write the step's line."""
        self._write(format_step_line(step, self._total_steps, metrics))

    def event(self, step: int, message: str, /) -> None:
        """Write the message, with its step, on a line of its own."""
        self._write(f"{format_step(step, self._total_steps)}  {message}")

    def close(self) -> None:
        """Nothing to let go of: the stream is the caller's."""

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()  # a pipe is block-buffered, and a line that comes an hour late is of no use


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


class WandbLogger:
    """Metrics under their own names at Weights & Biases, events as its alerts. `WANDB_MODE=offline` works.

    Raises:
        ValueError: W&B refuses to start (no key, a bad setting); its reason on one line.
    """

    def __init__(self, run_name: str, config: Mapping[str, object]) -> None:
        import wandb  # an optional dependency, and slow to import

        try:
            self._run: Run = wandb.init(name=run_name, config=dict(config))
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--logger wandb: {reason}; WANDB_MODE=offline needs no account") from error

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Log the metrics at W&B's step `step`."""
        self._run.log(dict(metrics), step=step)

    def event(self, step: int, message: str, /) -> None:
        """Raise a W&B alert."""
        self._run.alert(title=f"step {step}", text=message)

    def close(self) -> None:
        """Upload what is left and end the run."""
        self._run.finish()


class MultiLogger:
    """Hands everything to each of its loggers, in order."""

    def __init__(self, loggers: Sequence[MetricLogger]) -> None:
        self.loggers = tuple(loggers)
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Log the same metrics to every logger."""
        for logger in self.loggers:
            logger.log(step, metrics)

    def event(self, step: int, message: str, /) -> None:
        """Hand the message to every logger."""
        for logger in self.loggers:
            logger.event(step, message)

    def close(self) -> None:
        """Close every logger, last opened first, even where one of them fails."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close)
