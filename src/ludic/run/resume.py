"""Where a run begins: anew, with an earlier run's files set aside, or at a checkpoint of its own."""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ludic.cli import say
from ludic.config import GRPOConfig, RunPaths
from ludic.survival.resumed_model import find_resumed_model, keep_model

if TYPE_CHECKING:
    from ludic.train.checkpoint import TrainerState


def find_start(args: argparse.Namespace, paths: RunPaths) -> "tuple[Path, TrainerState] | None":
    """The checkpoint that --resume means, with its state; None without the flag.

    Raises:
        ValueError: there is none.
    """
    if args.resume is None:
        return None
    from ludic.train.checkpoint import find_checkpoint, read_state, verify_checkpoint

    if args.resume == "latest":
        newest = find_checkpoint(paths.checkpoints)
        for line in newest.passed_over:
            say(f"passed over: {line}")
        found = newest.path
    else:
        found = Path(args.resume)
        verify_checkpoint(found)
    if found is None:
        raise ValueError(f"--resume: there is no checkpoint in {paths.checkpoints}; leave the flag out to start a run")
    state = read_state(found)
    say(f"continuing from {found} (update {state.step})")
    return found, state


def resumed_model(
    args: argparse.Namespace,
    config: GRPOConfig,
    paths: RunPaths,
    resume_from: "tuple[Path, TrainerState]",
    unreachable: bool,
) -> str:
    """Where the files are of the model that the run began with; said where they are not there any more.

    Raises:
        ValueError: --model is another model, or the KL term needs the weights of the one that is gone.
    """
    checkpoint, state = resume_from
    files, is_first = find_resumed_model(
        args.model, state.model, checkpoint, unreachable=unreachable, trust_remote_code=args.trust_remote_code
    )
    if is_first:
        return files
    if config.lora_rank and not os.path.samefile(files, checkpoint):
        # Whether it is the model that was moved is seen by the fingerprint in the adapter's file.
        say(f"the run began with {state.model}, which is not there: {files} is taken if its weights are the same")
        return files
    if config.kl_coef > 0 and not config.lora_rank:
        raise ValueError(
            f"--kl-coef {config.kl_coef} compares with the model that the run began with, {state.model}, which is not there "
            "and in no checkpoint: put it back there, or pass --kl-coef 0"
        )
    if config.lora_rank:
        raise ValueError(
            f"--lora-rank {config.lora_rank} trains an adapter over the model that the run began with, {state.model}, which is "
            f"not there: put it back there, name the folder that it is in now with --model, or start a new run with --model "
            f"{checkpoint}, into which the adapter is merged"
        )
    say(f"the run began with {state.model}, which is not read: configuration and tokenizer are those of {files}")
    if args.start_server and os.path.samefile(files, checkpoint):
        return str(keep_model(checkpoint, paths.out_dir / "resumed_model"))
    return files


def set_earlier_run_aside(paths: RunPaths) -> None:
    """Move what an earlier run left in this folder out of the way of a new one."""
    written = [*paths.grown, paths.prompt, paths.start, paths.config, paths.summary, paths.curve, paths.report]
    _set_aside(paths, [*written, paths.checkpoints, paths.tensorboard])


def set_later_checkpoints_aside(paths: RunPaths, step: int) -> None:
    """Move those of the updates after `step`, which a run that goes on there makes again, out of its way."""
    from ludic.train.checkpoint import checkpoint_step, list_checkpoints

    _set_aside(paths, [path for path in list_checkpoints(paths.checkpoints) if (checkpoint_step(path) or 0) > step])


def _set_aside(paths: RunPaths, old: list[Path]) -> None:
    """Nothing is lost, and nothing is mixed."""
    old = [path for path in old if path.exists()]
    if not old:
        return
    parent = paths.out_dir / "earlier_runs"
    parent.mkdir(exist_ok=True)
    # A name of its own even for two runs within one second.
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=parent))
    for path in old:
        shutil.move(path, folder / path.name)
    say(f"an earlier run's files were moved to {folder}")
