"""One training run as the flags describe it: prepare, open the engine, load the policy, train, print the result.

What it raises is a user's mistake in one line, as `ludic.cli.run_script` says it; everything else is a bug. An early end
leaves a checkpoint, and the command that continues it on standard error.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ludic.cli import check_engine_arguments, expand_home, prepare_out_dir, say, total_concurrency
from ludic.commands import given_command
from ludic.config import RunPaths, from_arguments
from ludic.config_file import check_parser, write_config
from ludic.doctor.machine import trainer_device
from ludic.report.start import write_start
from ludic.run.artifacts import check_artifacts, send_artifacts
from ludic.run.ending import finish
from ludic.run.engine import check_adapter_arguments, name_engines, open_engine, require_server
from ludic.run.forecast import check_forecast_arguments, forecast_run
from ludic.run.policy import load_models
from ludic.run.preparation import Parts, prepare
from ludic.run.ranks import (
    Start,
    check_rank_arguments,
    follow,
    joined_ranks,
    note_launch,
    resume_after_restart,
    start_learner,
)
from ludic.run.report_page import page_at_an_early_end
from ludic.run.resume import set_earlier_run_aside, set_later_checkpoints_aside
from ludic.run.task import Task
from ludic.storage.identity import identity
from ludic.storage.inert import InertFormatter, StandardErrorHandler
from ludic.storage.jsonl import drop_steps_after
from ludic.storage.run_lock import run_lock
from ludic.survival.signals import at_once
from ludic.task.prompts import render
from ludic.telemetry.activity import Activity, watched
from ludic.telemetry.loggers import MultiLogger, make_logger, parse_logger_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ludic.rollout.engine import InferenceEngine
    from ludic.train.learner import Learner
    from ludic.train.ranks import Ranks
    from ludic.train.summary import TrainingSummary
    from ludic.train.trainer import GRPOTrainer

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
SampleT = TypeVar("SampleT")

PROBE_LEN = 64
"""Tokens of the first prompt, by whose log-probs weight syncs are proven."""


async def train_from_flags(args: argparse.Namespace, task: Task[SampleT]) -> "TrainingSummary":
    """Train on `task` as the flags of `add_run_arguments` and `--model` say, with all the files and the closing words.
    With `--forecast` a forecast is made in place of that, and the summary is of no update.

    Raises:
        ValueError: a flag, the model or the data are not what they have to be; one line.
        EngineError: the server is not there, not the right one, or leased to another trainer.
    """
    started = time.perf_counter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn of the forked grading workers
    keep_compiled()
    handler = StandardErrorHandler()
    handler.setFormatter(InertFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, handlers=[handler])
    check_parser(args)
    with joined_ranks(args) as ranks:
        if ranks is not None and ranks.rank:
            follow(ranks, args)
            sys.exit()  # nothing of what the script does with the summary is this rank's to do
        return await _run(args, task, ranks, started)


def keep_compiled() -> None:
    """Have torch keep what it compiles in the user's cache folder: its own choice is the temporary one, which a restart of the
    machine empties. What is found there is keyed by torch with its versions, the code and the shapes."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "ludic" / "torchinductor"))


async def _run(
    args: argparse.Namespace, task: Task[SampleT], ranks: "Ranks | None", started: float
) -> "TrainingSummary":
    """The run, by the only process or by rank 0."""
    expand_home(args)
    check_artifacts(args, parse_logger_names(args.logger))
    check_engine_arguments(args)
    config = from_arguments(args)
    check_rank_arguments(args, config)
    check_adapter_arguments(args, config)
    require_server(args)
    await asyncio.to_thread(name_engines, args)
    paths = RunPaths(out_dir=prepare_out_dir(args.out_dir), name=task.file_name)
    check_forecast_arguments(args, paths)
    with run_lock(paths.out_dir, identity(paths.out_dir)):  # until the end: two runs would write the same files
        with at_once():
            resume_after_restart(args, paths)
            parts = prepare(args, config, paths, task)
            from transformers import set_seed

            importlib.import_module("ludic.train.trainer")  # takes seconds: before a server has to be kept informed
            set_seed(config.seed % 2**32)  # nothing of ludic draws from these generators; an environment may
        with contextlib.ExitStack() as after_the_engine:
            async with open_engine(
                argparse.Namespace(**{**vars(args), "model": parts.served_as}),
                parts.tokenizer,
                files=args.model,
                out_dir=paths.out_dir,
                max_seq_len=config.max_seq_len,
                say=say,
                probe=parts.train_prompts[0][:PROBE_LEN],
                fp32_head=config.fp32_head,
                adapter_rank=config.sent_rank,
            ) as engine:
                if args.forecast:
                    return await _forecast(parts, engine, started)
                summary = await _train(parts, engine, after_the_engine, ranks)
        finish(paths, summary, model=args.model, seconds=time.perf_counter() - started, before=parts.state)
        if args.wandb_artifacts:
            with at_once():
                send_artifacts(paths)
    return summary


async def _train(
    parts: Parts[SampleT],
    engine: "InferenceEngine",
    after_the_engine: contextlib.ExitStack,
    ranks: "Ranks | None",
) -> "TrainingSummary":
    from ludic.train.trainer import GRPOTrainer

    args = parts.args
    device = training_device(args) if ranks is None else ranks.device
    # What takes long is done aside: the event loop tells the server meanwhile that this trainer lives.
    thread = None if args.engine == "local" else device
    policy, dtype, reference, learner = await _aside(thread, _load_learner, parts, device, ranks)
    await _clear_the_way(parts, thread)  # not before there is a run that takes the earlier one's place
    after_the_engine.enter_context(page_at_an_early_end(parts.paths.metrics, parts.paths.report))
    first = parts.environment.messages(parts.samples.train[0])
    prompt = {"messages": first, "text": render(parts.tokenizer, first)}
    parts.paths.prompt.write_text(json.dumps(prompt, indent=2) + "\n")
    _write_start(parts)
    activity = _activity(parts)
    with contextlib.closing(_logger(parts, activity)) as metric_logger:
        engine, environment = watched(activity if metric_logger.is_live else None, engine, parts.environment)
        trainer = await _aside(
            thread,
            GRPOTrainer,
            config=parts.config,
            model=policy,
            model_name=args.model,
            tokenizer=parts.tokenizer,
            engine=engine,
            environment=environment,
            train_samples=parts.samples.train,
            train_prompts=parts.train_prompts,
            eval_samples=parts.samples.evaluation,
            metric_logger=metric_logger,
            paths=parts.paths,
            eval_concurrency=total_concurrency(args),
            model_dtype=dtype,
            reference_model=reference,
            resume_from=parts.resume_from,
            learner=learner,
            task=parts.settings,
            wandb_run_id=metric_logger.run_id,
        )
        if trainer.learner.adapter is not None:
            say(trainer.learner.adapter.summary)
        activity.trained_tokens = lambda: trainer.learner.num_accumulated_tokens
        with _resume_explained(trainer, parts):
            return await trainer.run()


async def _forecast(parts: Parts[Any], engine: "InferenceEngine", started: float) -> "TrainingSummary":
    from ludic.train.learner import Learner

    device = training_device(parts.args)
    thread = None if parts.args.engine == "local" else device
    policy, dtype, reference, _ = await _aside(thread, _load_learner, parts, device, None)
    learner = await _aside(thread, Learner, parts.config, policy, reference_model=reference)
    return await forecast_run(parts, engine, learner, dtype=dtype, started=started)


def _load_learner(
    parts: Parts[Any], device: Any, ranks: "Ranks | None"
) -> "tuple[PreTrainedModel, Any, PreTrainedModel | None, Learner | None]":
    """`load_models`, and where several ranks share the work, the learner that has sharded them and rank 0's whole copy."""
    checkpoint = parts.resume_from[0] if parts.resume_from else None
    policy, dtype, reference = load_models(parts.args, parts.config, checkpoint, device if ranks is None else "cpu")
    if ranks is None:
        return policy, dtype, reference, None
    learner = start_learner(ranks, Start(parts.args.model, checkpoint, parts.config), policy, reference)
    return learner.model, dtype, reference, learner


async def _clear_the_way(parts: Parts[Any], thread: Any) -> None:
    if parts.state is None:
        set_earlier_run_aside(parts.paths)
        note_launch(parts.paths.out_dir)
        return
    note_launch(parts.paths.out_dir)
    for path in parts.paths.grown:  # what came after the checkpoint is made again
        await _aside(thread, drop_steps_after, path, parts.state.step)
    set_later_checkpoints_aside(parts.paths, parts.state.step)


def _write_start(parts: Parts[Any]) -> None:
    """The flags, to be taken again, and the settings, the command, versions and the machine, for the report; of a resumed
    run, those of the last start."""
    model = parts.state.model if parts.state else parts.args.model
    settings = {"model": model, **dataclasses.asdict(parts.config), **parts.settings}
    command = given_command(without=())
    write_start(parts.paths.start, command=command, settings=settings)
    write_config(parts.paths.config, parts.args.resolved, command=command)


def _activity(parts: Parts[Any]) -> Activity:
    return Activity(
        rollouts_per_update=parts.config.rollouts_per_update,
        num_eval_problems=len(parts.samples.evaluation[: parts.config.eval_limit]),
        started_from=parts.state.step if parts.state else 0,
    )


def _logger(parts: Parts[Any], activity: Activity) -> MultiLogger:
    state = parts.state
    model = state.model if state else parts.args.model
    return make_logger(
        parts.args.logger,
        metrics_path=parts.paths.metrics,
        run_name=f"GRPO {Path(model).name}",
        config={**dataclasses.asdict(parts.config), "model": model, **parts.samples.settings},
        total_steps=parts.config.train_steps,
        run_id=state.wandb_run_id if state else None,
        started_from=state.step if state else 0,
        rollouts_path=parts.paths.rollouts,
        tensorboard_dir=parts.paths.tensorboard,
        activity=activity,
    )


@contextlib.contextmanager
def _resume_explained(trainer: "GRPOTrainer[Any]", parts: Parts[Any]) -> Iterator[None]:
    """When the run ends before its time, say how to continue it."""
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished and trainer.last_checkpoint is not None and parts.is_resumable:
            command = given_command("--resume", without=("--resume",))
            sys.stderr.write(f"what is done is kept in {trainer.last_checkpoint}; continue with:\n  {command}\n")


def training_device(args: argparse.Namespace) -> Any:
    """The GPU that trains: not the one that a server started by us has, where there are two."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", trainer_device(args))
    torch.cuda.set_device(device)
    return device


async def _aside(
    device: Any, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """`function` on another thread, with this one's GPU; None: on this thread, where a signal ends it at once."""
    if device is None:
        with at_once():
            return function(*args, **kwargs)

    def work() -> Result:
        if device.type == "cuda":  # each thread has a current device of its own
            import torch

            torch.cuda.set_device(device)
        return function(*args, **kwargs)

    return await asyncio.to_thread(work)
