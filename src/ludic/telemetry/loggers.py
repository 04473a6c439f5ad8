"""Where a run's metrics go: the terminal or plain lines, a JSON lines file, TensorBoard, Weights & Biases.

The JSON lines file is the run's record, written whichever loggers are chosen, and a run that cannot write it stops. Any other
logger that fails (a closed terminal, a broken pipe, W&B out of reach) is switched off, with an event in the file, and the run
goes on.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from ludic.storage.inert import inert
from ludic.storage.jsonl import read_jsonl
from ludic.telemetry.activity import Activity
from ludic.telemetry.alarms import Alarms
from ludic.telemetry.console import ConsoleLogger, has_place_for_view
from ludic.telemetry.sampled_rollouts import SampledRollouts
from ludic.telemetry.tensorboard_logger import TensorboardLogger
from ludic.telemetry.wandb_logger import WandbLogger
from ludic.train.metrics import JsonlLogger, MetricLogger

LOGGER_NAMES = ("rich", "print", "jsonl", "tensorboard", "wandb", "none")
_PACKAGES = ("tensorboard", "wandb")
"""Loggers that have the name of the package that they need."""


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
    for name in _PACKAGES:
        if name in chosen and importlib.util.find_spec(name) is None:
            raise ValueError(f"--logger {name} needs the package {name}: install it with `uv sync --extra examples`")
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
    rollouts_path: str | os.PathLike[str] | None = None,
    tensorboard_dir: str | os.PathLike[str] | None = None,
    activity: Activity | None = None,
) -> "MultiLogger":
    """The loggers that `names` lists (comma-separated), and always the metrics file; alarms among their events.

    Args:
        names: some of `rich`, `print`, `jsonl`, `tensorboard`, `wandb`; or `none`. `jsonl` asks for what happens anyway.
        metrics_path: the JSON lines file, appended to.
        run_name: the title on the terminal and the run's name at W&B.
        config: the run's settings, for TensorBoard and W&B.
        total_steps: updates that the run is to make; None where that is not known.
        stream: where `rich` and `print` write; standard output if not given.
        run_id: the run at W&B that a resumed run goes on with; None begins one.
        started_from: updates that were done before this process began, 0 for a new run. What `metrics_path` has of them says
            which alarms were raised.
        rollouts_path: the run's rollouts file, of which TensorBoard and W&B show a few; None shows none.
        tensorboard_dir: folder of TensorBoard's event files; by default `tensorboard` beside the metrics file.
        activity: what a live view shows of this moment; see `ludic.telemetry.activity.watched`.

    Raises:
        ValueError: as `parse_logger_names`; also when W&B refuses to start.
        OSError: the metrics file or TensorBoard's folder cannot be written.
    """
    chosen = parse_logger_names(names)
    alarms = Alarms()
    earlier = read_jsonl(metrics_path) if started_from and Path(metrics_path).exists() else []
    alarms.replay(earlier)
    others: list[MetricLogger] = []
    begun_id = None
    out = sys.stdout if stream is None else stream
    is_live = "rich" in chosen and has_place_for_view(out)
    with contextlib.ExitStack() as opened:  # where one of them does not start, those before it are closed again
        record = opened.enter_context(contextlib.closing(JsonlLogger(metrics_path)))
        if "tensorboard" in chosen:
            folder = Path(metrics_path).parent / "tensorboard" if tensorboard_dir is None else tensorboard_dir
            rollouts = SampledRollouts(rollouts_path, total_steps=total_steps)
            tensorboard = TensorboardLogger(folder, config, rollouts=rollouts, started_from=started_from)
            others.append(opened.enter_context(contextlib.closing(tensorboard)))
        if "wandb" in chosen:
            rollouts = SampledRollouts(rollouts_path, total_steps=total_steps)
            wandb = WandbLogger(
                run_name,
                config,
                rollouts=rollouts,
                run_id=run_id,
                started_from=started_from,
                captures_console=not is_live,
            )
            others.append(wandb)
            begun_id = wandb.run_id
        opened.pop_all()
    if {"rich", "print"} & set(chosen):  # last, since the live view takes over the terminal
        console = ConsoleLogger(
            out, run_name, total_steps, live=is_live, activity=activity or Activity(), earlier=earlier
        )
        others.append(console)
    return MultiLogger(record, others, alarms=alarms, run_id=begun_id, is_live=is_live)


class MultiLogger:
    """Hands everything to the run's record and to each of the other loggers, in order.

    What the record raises is the caller's: a run that is not recorded stops. Another logger that raises is switched off.

    Args:
        record: the metrics file.
        others: may fail.
        alarms: look at the metrics of each update; what they raise is an event.
        run_id: of the logger at W&B, if there is one; a checkpoint keeps it, so that a resumed run goes on with the same run.
        is_live: whether one of the others draws a live view.
    """

    def __init__(
        self,
        record: MetricLogger,
        others: Sequence[MetricLogger],
        *,
        alarms: Alarms,
        run_id: str | None,
        is_live: bool,
    ) -> None:
        self.run_id = run_id
        self.is_live = is_live
        self._record = record
        self._others = list(others)
        self._alarms = alarms
        self._last_step = 0

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Log the same metrics to every logger, and what alarms they raise."""
        self._last_step = step
        self._record.log(step, metrics)
        self._hand_on(lambda logger: logger.log(step, metrics))
        if "reward_mean" in metrics:  # of an update; evaluations are logged apart
            for alarm in self._alarms.observe(step, metrics):
                self.event(step, str(alarm))

    def event(self, step: int, message: str, /) -> None:
        """Hand the message to every logger."""
        self._last_step = step
        self._record.event(step, message)
        self._hand_on(lambda logger: logger.event(step, message))

    def close(self) -> None:
        """Close every logger, last opened first, even where one of them fails. Safe to call twice."""
        with contextlib.closing(self._record):
            while self._others:
                logger = self._others.pop()
                try:
                    logger.close()
                except Exception as error:
                    self._record.event(self._last_step, _failure(logger, error))

    def _hand_on(self, call: Callable[[MetricLogger], None]) -> None:
        for logger in list(self._others):
            if logger not in self._others:  # it failed at the event that told of another one's failure
                continue
            try:
                call(logger)
            except Exception as error:  # other people's code, whose failures are not known in advance; see the class
                self._others.remove(logger)
                with contextlib.suppress(Exception):  # it has failed already
                    logger.close()
                self.event(self._last_step, f"{_failure(logger, error)}; it is switched off, and the run goes on")


def _failure(logger: MetricLogger, error: Exception) -> str:
    return inert(f"{logger!r} failed ({type(error).__name__}: {error})")
