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

from ludic.cli import check_engine_arguments, expand_home, prepare_out_dir, say
from ludic.commands import given_command
from ludic.config import GRPOConfig, RunPaths, from_arguments
from ludic.doctor.machine import trainer_device
from ludic.run.ending import finish
from ludic.run.engine import open_engine, require_server
from ludic.run.preparation import Parts, prepare
from ludic.run.resume import set_earlier_run_aside, set_later_checkpoints_aside
from ludic.run.task import Task
from ludic.storage.identity import identity
from ludic.storage.inert import InertFormatter
from ludic.storage.jsonl import drop_steps_after
from ludic.storage.run_lock import RunLock
from ludic.survival.signals import at_once
from ludic.task.pretrained import load_full_config, load_model, stored_dtype
from ludic.task.prompts import render
from ludic.telemetry.loggers import MultiLogger, make_logger, parse_logger_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ludic.rollout.engine import InferenceEngine
    from ludic.train.summary import TrainingSummary
    from ludic.train.trainer import GRPOTrainer

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
SampleT = TypeVar("SampleT")

PROBE_LEN = 64
"""Tokens of the first prompt, by whose log-probs weight syncs are proven."""


async def train_from_flags(args: argparse.Namespace, task: Task[SampleT]) -> "TrainingSummary":
    """Train on `task` as the flags of `add_run_arguments` and `--model` say, with all the files and the closing words.

    Raises:
        ValueError: a flag, the model or the data are not what they have to be; one line.
        EngineError: the server is not there, not the right one, or held by another trainer.
    """
    started = time.perf_counter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn of the forked grading workers
    handler = logging.StreamHandler()
    handler.setFormatter(InertFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, handlers=[handler])
    expand_home(args)
    parse_logger_names(args.logger)
    check_engine_arguments(args)
    config = from_arguments(args)
    require_server(args)
    paths = RunPaths(out_dir=prepare_out_dir(args.out_dir), name=task.file_name)
    with RunLock(paths.out_dir, identity(paths.out_dir)):  # until the end: two runs would write the same files
        with at_once():
            parts = prepare(args, config, paths, task)
            from transformers import set_seed

            importlib.import_module("ludic.train.trainer")  # takes seconds: before a server has to be kept informed
            set_seed(config.seed % 2**32)  # nothing of ludic draws from these generators; an environment may
        async with _open_engine(args, config, paths, parts) as engine:
            summary = await _train(args, config, paths, parts, engine)
        before = parts.resume_from[1] if parts.resume_from else None
        finish(paths, summary, model=args.model, seconds=time.perf_counter() - started, before=before)
    return summary


def _open_engine(
    args: argparse.Namespace, config: GRPOConfig, paths: RunPaths, parts: Parts[Any]
) -> "contextlib.AbstractAsyncContextManager[InferenceEngine]":
    return open_engine(
        args if args.engine == "local" else argparse.Namespace(**{**vars(args), "model": parts.served_as}),
        parts.tokenizer,
        files=args.model,
        out_dir=paths.out_dir,
        max_seq_len=config.max_seq_len,
        say=say,
        probe=parts.train_prompts[0][:PROBE_LEN],
        fp32_head=config.fp32_head,
    )


async def _train(
    args: argparse.Namespace, config: GRPOConfig, paths: RunPaths, parts: Parts[SampleT], engine: "InferenceEngine"
) -> "TrainingSummary":
    from ludic.train.trainer import GRPOTrainer

    device = training_device(args)
    # What takes long is done aside: the event loop tells the server meanwhile that this trainer lives.
    thread = None if args.engine == "local" else device
    policy, dtype, reference = await _aside(thread, _load_models, args, config, parts, device)
    await _clear_the_way(paths, parts, thread)  # not before there is a run that takes the earlier one's place
    _write_prompt(paths, parts)
    with contextlib.closing(_logger(args, config, paths, parts)) as metric_logger:
        trainer = await _aside(
            thread,
            GRPOTrainer,
            config=config,
            model=policy,
            model_name=args.model,
            tokenizer=parts.tokenizer,
            engine=engine,
            environment=parts.environment,
            train_samples=parts.samples.train,
            train_prompts=parts.train_prompts,
            eval_samples=parts.samples.evaluation,
            metric_logger=metric_logger,
            paths=paths,
            eval_concurrency=args.concurrency,
            model_dtype=dtype,
            reference_model=reference,
            resume_from=parts.resume_from,
            task=parts.settings,
            wandb_run_id=metric_logger.run_id,
        )
        with _resume_explained(trainer, parts):
            return await trainer.run()


def _load_models(
    args: argparse.Namespace, config: GRPOConfig, parts: Parts[Any], device: Any
) -> "tuple[PreTrainedModel, Any, PreTrainedModel | None]":
    """The policy, the dtype of its files, and the reference model where a KL penalty needs one."""
    start = args.model if parts.resume_from is None else str(parts.resume_from[0])
    policy, dtype = load_policy(start, device, args, resumes=parts.resume_from is not None)
    return policy, dtype, load_policy(args.model, device, args)[0] if config.kl_coef > 0 else None


async def _clear_the_way(paths: RunPaths, parts: Parts[Any], thread: Any) -> None:
    if parts.resume_from is None:
        set_earlier_run_aside(paths)
        return
    step = parts.resume_from[1].step
    for path in (paths.metrics, paths.rollouts):  # what came after the checkpoint is made again
        await _aside(thread, drop_steps_after, path, step)
    set_later_checkpoints_aside(paths, step)


def _write_prompt(paths: RunPaths, parts: Parts[Any]) -> None:
    first = parts.environment.messages(parts.samples.train[0])
    record = {"messages": first, "text": render(parts.tokenizer, first)}
    paths.prompt.write_text(json.dumps(record, indent=2) + "\n")


def _logger(args: argparse.Namespace, config: GRPOConfig, paths: RunPaths, parts: Parts[Any]) -> MultiLogger:
    state = parts.resume_from[1] if parts.resume_from else None
    model = state.model if state else args.model
    return make_logger(
        args.logger,
        metrics_path=paths.metrics,
        run_name=f"GRPO {Path(model).name}",
        config={**dataclasses.asdict(config), "model": model, **parts.samples.settings},
        total_steps=config.train_steps,
        run_id=state.wandb_run_id if state else None,
        started_from=state.step if state else 0,
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


def load_policy(
    path: str, device: Any, args: argparse.Namespace, resumes: bool = False
) -> tuple["PreTrainedModel", Any]:
    """The model with fp32 masters on `device`, those of the checkpoint where the run `resumes`; the dtype that it came in.

    Raises:
        ValueError: there is no such model; one line.
    """
    import torch

    from ludic.train.checkpoint import masters_folder

    config = load_full_config(path, trust_remote_code=args.trust_remote_code)
    weights = masters_folder(Path(path)) if resumes else path  # a new run starts from what is served
    model = load_model(weights, dtype=torch.float32, trust_remote_code=args.trust_remote_code)
    return torch.nn.Module.to(model, device), stored_dtype(config)


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
