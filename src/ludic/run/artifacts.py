"""What a finished run leaves at W&B besides its metrics, with `--wandb-artifacts`: the report page and the model.

They are sent when the run's own files are whole and its server is let go, by taking up its run at W&B once more; so a slow
upload keeps no GPU, and one that fails costs nothing. A run that is cut short sends nothing: it is to be resumed.
"""

import argparse
from collections.abc import Sequence

from ludic.cli import say
from ludic.config import RunPaths
from ludic.storage.inert import inert
from ludic.storage.manifest import MANIFEST_FILE
from ludic.telemetry.wandb_logger import open_wandb_run

_FINISH_S = 3600.0
"""How long the upload may take; what is left stays on the disk, for `wandb sync`."""


def check_artifacts(args: argparse.Namespace, loggers: Sequence[str]) -> None:
    """Refuse `--wandb-artifacts` without the logger that has a run to add them to.

    Raises:
        ValueError: one line.
    """
    if args.wandb_artifacts and "wandb" not in loggers:
        raise ValueError(f"--wandb-artifacts needs W&B, and --logger is {args.logger}: add wandb to it")


def send_artifacts(paths: RunPaths) -> None:
    """Add the report page and the model of the last checkpoint to the run at W&B; says what came of it."""
    import wandb

    from ludic.train.checkpoint import latest_checkpoint, read_state

    checkpoint = latest_checkpoint(paths.checkpoints)
    state = None if checkpoint is None else read_state(checkpoint)
    if checkpoint is None or state is None or state.wandb_run_id is None:
        say("--wandb-artifacts: no checkpoint has a run at W&B, so nothing was sent")
        return
    model = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name != MANIFEST_FILE]
    report = [paths.report] if paths.report.exists() else []
    try:
        with open_wandb_run(run_id=state.wandb_run_id, finish_s=_FINISH_S) as run:
            for kind, files in (("report", report), ("model", model)):
                artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind, metadata={"update": state.step})
                for path in files:
                    artifact.add_file(str(path), policy="immutable")  # no second copy of a model on this disk
                if files:
                    run.log_artifact(artifact, aliases=["latest", f"update-{state.step}"])
    except (ValueError, OSError, wandb.Error) as error:  # the run itself is over and whole
        say(f"--wandb-artifacts: they were not sent ({inert(f'{type(error).__name__}: {error}')})")
    else:
        say(f"sent to W&B: {len(report)} report page, {len(model)} files of {checkpoint}")
