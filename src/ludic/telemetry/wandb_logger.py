"""Metrics, alerts and sampled rollouts at Weights & Biases.

W&B is an optional dependency and slow to import, so it is imported where a run is opened.
"""

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ludic.storage.inert import inert
from ludic.telemetry.console import LINE_LIMIT
from ludic.telemetry.sampled_rollouts import FIGURES, TEXTS, SampledRollouts

if TYPE_CHECKING:
    from wandb import Run

_FINISH_S = 60.0
"""How long W&B may upload at the end of a run; what is left stays on the disk, for `wandb sync`."""


def open_wandb_run(
    *,
    name: str | None = None,
    config: Mapping[str, object] | None = None,
    run_id: str | None,
    finish_s: float,
    captures_console: bool = True,
) -> "Run":
    """Begin a run at W&B, or go on with `run_id`. Its end waits `finish_s` seconds for uploads, if this W&B can be held to it.

    Without `captures_console` W&B takes nothing of what is printed; otherwise what it was told to take.

    Raises:
        ValueError: W&B refuses to start (no key, a bad setting); its reason on one line.
    """
    import wandb

    has_deadline = "finish_timeout" in wandb.Settings.model_fields and "WANDB_FINISH_TIMEOUT" not in os.environ
    chosen: dict[str, Any] = {"finish_timeout": finish_s} if has_deadline else {}
    if not captures_console:
        chosen["console"] = "off"
    settings = wandb.Settings(**chosen)
    try:
        run: Run = wandb.init(
            name=name,
            config=None if config is None else dict(config),
            id=run_id,
            resume=None if run_id is None else "allow",
            allow_val_change=True,  # of the settings, where a resumed run has others
            settings=settings,
        )
        run.define_metric("update")
        run.define_metric("*", step_metric="update")
    except wandb.Error as error:
        reason = inert(" ".join(str(error).split()))
        raise ValueError(f"--logger wandb: {reason}; WANDB_MODE=offline needs no account") from error
    return run


class WandbLogger:
    """Metrics under their own names at Weights & Biases, events as its alerts, a table of rollouts. `WANDB_MODE=offline` works.

    The horizontal axis is the metric `update`, not W&B's own step, which only goes up: W&B drops what is logged below it, so
    that a run resumed from an earlier checkpoint would lose its updates without a word. Updates that are made again are there
    twice, told apart by `started_from`, the update that their process began with; the summary has the later one.
    Offline, each process leaves a folder, all with the one run id: `wandb sync --append` them in order.

    Args:
        config: the run's settings.
        rollouts: what is shown of the rollouts, as tables of the metric `rollouts`.
        run_id: the run to go on with; None begins one.
        started_from: updates done before this process began.
        captures_console: False where a live view is drawn, each drawing of which would be uploaded.

    Raises:
        ValueError: W&B refuses to start (no key, a bad setting); its reason on one line.
    """

    def __init__(
        self,
        run_name: str,
        config: Mapping[str, object],
        *,
        rollouts: SampledRollouts,
        run_id: str | None = None,
        started_from: int = 0,
        captures_console: bool = True,
    ) -> None:
        self._started_from = started_from
        self._rollouts = rollouts
        self._run = open_wandb_run(
            name=inert(run_name), config=config, run_id=run_id, finish_s=_FINISH_S, captures_console=captures_console
        )

    def __repr__(self) -> str:
        return "the log at W&B"

    @property
    def run_id(self) -> str:
        """What a resumed run hands in."""
        return str(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Log the metrics of update `step`, and sampled rollouts of those before it."""
        self._log_rollouts(step)
        self._run.log({**metrics, "update": step, "started_from": self._started_from})

    def event(self, step: int, message: str, /) -> None:
        """Raise a W&B alert."""
        self._run.alert(title=f"step {step}", text=inert(message, LINE_LIMIT))

    def close(self) -> None:
        """Upload what is left, for at most a minute where this W&B can be held to that, and end the run."""
        try:
            self._log_rollouts(math.inf)
        finally:
            self._run.finish()

    def _log_rollouts(self, step: float) -> None:
        """A table for each update before `step` whose rollouts were sampled."""
        import wandb

        for at, rows in self._rollouts.before(step).items():
            table = wandb.Table(columns=["update", *TEXTS, *FIGURES], data=[[at, *row.values()] for row in rows])
            self._run.log({"rollouts": table, "update": at, "started_from": self._started_from})
