"""Where a run's metrics go: the terminal, plain lines, a JSON lines file, Weights & Biases, or several at once.

The trainer knows one thing, the `MetricLogger` protocol; it has reduced the metrics before it logs them, so a logger
only writes. Metrics are always also appended to a JSON lines file, whichever loggers are chosen: a run that is worth
starting is worth reading afterwards. That file is the run's record, and a run that cannot write it stops. Any other logger
that fails (a closed terminal, a broken pipe, W&B out of reach) is switched off, with an event in the file, and the run goes
on.
"""

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console

from ludic.storage.inert import inert
from ludic.storage.jsonl import read_jsonl
from ludic.survival.signals import write_failure
from ludic.telemetry.alarms import Alarms
from ludic.telemetry.formatting import format_step, format_step_line
from ludic.telemetry.live import LiveLogger
from ludic.train.metrics import JsonlLogger, MetricLogger

if TYPE_CHECKING:
    from wandb import Run

_LINE_LIMIT = 2_000
_FINISH_S = 60.0
"""How long W&B may upload at the end of a run; what is left stays on the disk, for `wandb sync`."""

LOGGER_NAMES = ("rich", "print", "jsonl", "wandb", "none")


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
    run_id: str | None = None,
    started_from: int = 0,
) -> "MultiLogger":
    """The loggers that `names` lists (comma-separated), and always the metrics file; alarms among their events.

    Args:
        names: some of `rich`, `print`, `jsonl`, `wandb`; or `none`. `jsonl` asks for what happens anyway.
        metrics_path: the JSON lines file, appended to.
        run_name: the title on the terminal and the run's name at W&B.
        config: the run's settings, sent to W&B.
        total_steps: updates that the run is to make; None where that is not known.
        stream: where `rich` and `print` write; standard output if not given.
        run_id: the run at W&B that a resumed run goes on with; None begins one.
        started_from: updates that were done before this process began, 0 for a new run. What `metrics_path` has of them says
            which alarms were raised.

    Raises:
        ValueError: as `parse_logger_names`; also when W&B refuses to start.
        OSError: the metrics file cannot be written.
    """
    chosen = parse_logger_names(names)
    alarms = Alarms()
    if started_from and Path(metrics_path).exists():
        alarms.replay(read_jsonl(metrics_path))
    stream = _Outlet(sys.stdout if stream is None else stream)
    with ExitStack() as opened:  # if a later logger cannot start, the earlier ones are closed again
        record = JsonlLogger(metrics_path)
        opened.callback(record.close)
        others: list[MetricLogger] = []
        wandb: WandbLogger | None = None
        if "wandb" in chosen:
            wandb = WandbLogger(run_name, config, run_id=run_id, started_from=started_from)
            opened.callback(wandb.close)
            others.append(wandb)
        # The live display comes last, since it takes over the terminal.
        if "rich" in chosen and (console := Console(file=stream)).is_terminal:
            others.append(_Checked(LiveLogger(console, run_name, total_steps), stream))
        elif "rich" in chosen or "print" in chosen:
            others.append(_Checked(PrintLogger(stream, total_steps), stream))
        opened.pop_all()
    return MultiLogger(record, others, alarms=alarms, run_id=None if wandb is None else wandb.run_id)


class _Outlet(io.TextIOBase, TextIO):
    """The stream that people read. Its first failure is kept, and nothing is written to it from then on: the live display
    also draws from a thread of its own, where no caller would see an exception.

    What the stream's encoding lacks is written as an escape, so that a plain ASCII locale changes no run.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | ValueError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]  # of the stream, which rich asks for
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self.error = error
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.error = error
            else:
                self.error = write_failure(self._stream)  # the scripts' standard output raises nothing


class _Checked:
    """A logger on an `_Outlet`, whose failure it raises."""

    def __init__(self, logger: MetricLogger, outlet: _Outlet) -> None:
        self._logger, self._outlet = logger, outlet

    def __repr__(self) -> str:
        return repr(self._logger)

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        self._logger.log(step, metrics)
        self._check()

    def event(self, step: int, message: str, /) -> None:
        self._logger.event(step, message)
        self._check()

    def close(self) -> None:
        self._logger.close()

    def _check(self) -> None:
        if self._outlet.error is not None:
            raise self._outlet.error


class PrintLogger:
    """One plain line a step, for pipes and log files."""

    def __init__(self, stream: TextIO, total_steps: int | None) -> None:
        self._stream = stream
        self._total_steps = total_steps

    def __repr__(self) -> str:
        return "the log on standard output"

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Write the step's line."""
        self._write(format_step_line(step, self._total_steps, metrics))

    def event(self, step: int, message: str, /) -> None:
        """Write the message, with its step, on a line of its own."""
        self._write(f"{format_step(step, self._total_steps)}  {message}")

    def close(self) -> None:
        """Nothing to let go of: the stream is the caller's."""

    def _write(self, line: str) -> None:
        self._stream.write(inert(line, _LINE_LIMIT) + "\n")
        self._stream.flush()  # a pipe is block-buffered, and a line that comes an hour late is of no use


class WandbLogger:
    """Metrics under their own names at Weights & Biases, events as its alerts. `WANDB_MODE=offline` works.

    The horizontal axis is the metric `update`, not W&B's own step, which only goes up: W&B drops what is logged below it, so
    that a run resumed from an earlier checkpoint would lose its updates without a word. Updates that are made again are there
    twice, told apart by `started_from`, the update that their process began with; the summary has the later one.
    Offline, each process leaves a folder, all with the one run id: `wandb sync --append` them in order.

    Args:
        run_id: the run to go on with; None begins one.
        started_from: updates done before this process began.

    Raises:
        ValueError: W&B refuses to start (no key, a bad setting); its reason on one line.
    """

    def __init__(
        self, run_name: str, config: Mapping[str, object], *, run_id: str | None = None, started_from: int = 0
    ) -> None:
        import wandb  # an optional dependency, and slow to import

        self._started_from = started_from
        has_deadline = "finish_timeout" in wandb.Settings.model_fields and "WANDB_FINISH_TIMEOUT" not in os.environ
        settings = wandb.Settings(**({"finish_timeout": _FINISH_S} if has_deadline else {}))
        try:
            self._run: Run = wandb.init(
                name=inert(run_name),
                config=dict(config),
                id=run_id,
                resume=None if run_id is None else "allow",
                allow_val_change=True,  # of the settings, where a resumed run has others
                settings=settings,
            )
            self._run.define_metric("update")
            self._run.define_metric("*", step_metric="update")
        except wandb.Error as error:
            reason = inert(" ".join(str(error).split()))
            raise ValueError(f"--logger wandb: {reason}; WANDB_MODE=offline needs no account") from error

    def __repr__(self) -> str:
        return "the log at W&B"

    @property
    def run_id(self) -> str:
        """What a resumed run hands in."""
        return str(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Log the metrics of update `step`."""
        self._run.log({**metrics, "update": step, "started_from": self._started_from})

    def event(self, step: int, message: str, /) -> None:
        """Raise a W&B alert."""
        self._run.alert(title=f"step {step}", text=inert(message, _LINE_LIMIT))

    def close(self) -> None:
        """Upload what is left, for at most a minute where this W&B can be held to that, and end the run."""
        self._run.finish()


class MultiLogger:
    """Hands everything to the run's record and to each of the other loggers, in order.

    What the record raises is the caller's: a run that is not recorded stops. Another logger that raises is switched off.

    Args:
        record: the metrics file.
        others: may fail.
        alarms: look at the metrics of each update; what they raise is an event.
        run_id: of the logger at W&B, if there is one among the others.
    """

    def __init__(
        self,
        record: MetricLogger,
        others: Sequence[MetricLogger] = (),
        *,
        alarms: Alarms | None = None,
        run_id: str | None = None,
    ) -> None:
        self.record = record
        self.others = tuple(others)
        self._alarms = alarms
        self.run_id = run_id
        """What a checkpoint keeps, so that a resumed run goes on with the same run at W&B."""
        self._last_step = 0
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Log the same metrics to every logger, and what alarms they raise."""
        self._last_step = step
        self.record.log(step, metrics)
        for logger in self.others:
            try:
                logger.log(step, metrics)
            except Exception as error:  # other people's code, whose failures are not known in advance; see the class
                self._switch_off(logger, error)
        if self._alarms is not None and "reward_mean" in metrics:  # of an update; evaluations are logged apart
            for alarm in self._alarms.observe(step, metrics):
                self.event(step, str(alarm))

    def event(self, step: int, message: str, /) -> None:
        """Hand the message to every logger."""
        self._last_step = step
        self.record.event(step, message)
        for logger in self.others:
            try:
                logger.event(step, message)
            except Exception as error:
                self._switch_off(logger, error)

    def close(self) -> None:
        """Close every logger, last opened first, even where one of them fails."""
        if self._closed:
            return
        self._closed = True
        with contextlib.closing(self.record):
            for logger in reversed(self.others):
                try:
                    logger.close()
                except Exception as error:
                    self.record.event(self._last_step, _failure(logger, error))

    def _switch_off(self, logger: MetricLogger, error: Exception) -> None:
        if logger not in self.others:  # it failed again, at the event that tells of it
            return
        self.others = tuple(other for other in self.others if other is not logger)
        with contextlib.suppress(Exception):  # it has failed already
            logger.close()
        self.event(self._last_step, f"{_failure(logger, error)}; it is switched off, and the run goes on")


def _failure(logger: MetricLogger, error: Exception) -> str:
    return inert(f"{logger!r} failed ({type(error).__name__}: {error})")
