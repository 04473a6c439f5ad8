"""All of a run that needs no engine: found, loaded and checked before anything is spent."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ludic.cli import hide_loading_bars, say
from ludic.config import GRPOConfig, RunPaths
from ludic.doctor import check_token_ids, quick_checks
from ludic.run.resume import find_start, resumed_model
from ludic.run.task import Samples, Task
from ludic.survival.changed_settings import changed_settings
from ludic.task.environment import Environment
from ludic.task.hub import cache_without_hub
from ludic.task.pretrained import load_full_config
from ludic.task.prompts import chat_template_fingerprint, encode_prompt, load_tokenizer, recorded_moment, rendering
from ludic.task.template_checks import describe_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ludic.train.checkpoint import TrainerState

SampleT = TypeVar("SampleT")


class Parts(NamedTuple, Generic[SampleT]):
    """What a run is made of, beside its model and its engine."""

    tokenizer: "PreTrainedTokenizerBase"
    environment: Environment[SampleT]
    samples: Samples[SampleT]
    train_prompts: list[list[int]]
    """The token ids of each training sample's prompt: [P]."""
    settings: dict[str, Any]
    """What makes this run the one that it is, beside its configuration: compared when it is resumed."""
    resume_from: "tuple[Path, TrainerState] | None"
    served_as: str
    """The model's name on the server."""
    is_resumable: bool


def prepare(args: argparse.Namespace, config: GRPOConfig, paths: RunPaths, task: Task[SampleT]) -> Parts[SampleT]:
    """Find, load and check all that needs no engine. Afterwards `args.model` has the files, whatever a server calls it.

    Raises:
        ValueError: something is missing, or does not fit; one line.
    """
    served_as, resume_from = _find_model(args, config, paths, task)
    say(f"loading {args.model}")
    load_full_config(args.model, trust_remote_code=args.trust_remote_code)  # an adapter or quantised weights end here
    samples, environment = task.load_samples(args, config), task.environment
    tokenizer = load_tokenizer(
        args.model,
        args.chat_template,
        trust_remote_code=args.trust_remote_code,
        moment=recorded_moment(resume_from[1].task) if resume_from else None,
    )
    train_prompts = _tokenise(args, config, environment, tokenizer, samples)
    first = environment.messages(samples.train[0])
    for line in describe_prompt(tokenizer, first, plain_template=task.plain_template):
        say(line)
    settings = _settings(args, tokenizer, samples)
    if resume_from is not None:
        given = {**dataclasses.asdict(config), "num_train_samples": len(samples.train), **settings}
        stored = {**resume_from[1].config, **resume_from[1].task}
        for line in changed_settings(stored, given, step=resume_from[1].step):
            say(f"changed since the checkpoint, so this is not the run that was interrupted: {line}")
    if not args.no_checks:
        _check_this_machine(args, config, tokenizer, paths if resume_from else None)
    return Parts(
        tokenizer=tokenizer,
        environment=environment,
        samples=samples,
        train_prompts=train_prompts,
        settings=settings,
        resume_from=resume_from,
        served_as=args.model if args.start_server else served_as,
        is_resumable=task.make_policy is None,
    )


def _find_model(
    args: argparse.Namespace, config: GRPOConfig, paths: RunPaths, task: Task[Any]
) -> "tuple[str, tuple[Path, TrainerState] | None]":
    """The name of the model on a server, and the checkpoint that the run goes on from; `args.model` becomes its files."""
    unreachable = False
    if task.make_policy is None:
        try:
            cache_without_hub([args.model], dataset=task.hub_dataset, say=say)
        except ValueError:
            if args.resume is None:
                raise
            unreachable = True
    # torch comes with this import, and takes seconds: not before the flags are checked.
    from ludic.train.checkpoint import recover_folder

    hide_loading_bars()
    for line in recover_folder(paths.checkpoints):
        say(line)
    resume_from = find_start(args, paths)
    if resume_from is None and Path(args.model).resolve().is_relative_to(paths.checkpoints.resolve()):
        raise ValueError(
            f"--model {args.model} is a checkpoint of the run in this folder, which a new run moves aside: "
            "choose another --out-dir, or continue that run with --resume"
        )
    if task.make_policy is not None:
        task.make_policy(args, config, paths.out_dir)
    served_as: str = args.model
    if resume_from is not None:
        args.model = resumed_model(args, config, paths, resume_from, unreachable)
    elif Path(args.model).is_dir():
        args.model = os.path.abspath(args.model)  # kept in checkpoints, which may be resumed in another folder
    return served_as, resume_from


def _tokenise(
    args: argparse.Namespace,
    config: GRPOConfig,
    environment: Environment[SampleT],
    tokenizer: "PreTrainedTokenizerBase",
    samples: Samples[SampleT],
) -> list[list[int]]:
    """The token ids of every training prompt, once for the whole run.

    Finds the prompt that is too long, or has an id that the model does not know, before a server is started for it.

    Raises:
        ValueError: there is such a prompt, or none at all; one line.
    """
    if not samples.train:
        raise ValueError("there are no samples to train on")
    prompts = []
    for sample in samples.train:
        messages = environment.messages(sample)
        prompts.append(encode_prompt(tokenizer, messages))
        if len(prompts[-1]) > config.max_prompt_len:
            raise ValueError(
                f"a prompt is {len(prompts[-1])} tokens, more than --max-seq-len {config.max_seq_len} allows "
                f"with one token for an answer: {messages[-1]['content'][:60]!r}..."
            )
    evaluated = [encode_prompt(tokenizer, environment.messages(sample)) for sample in samples.evaluation]
    _check_token_ids(args, tokenizer, [*prompts, *evaluated])
    return prompts


def _check_token_ids(
    args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[int]]
) -> None:
    for finding in check_token_ids(args, tokenizer, set().union(*prompts)):
        if finding.status == "failed":  # not left out by --no-checks: the server would die of it
            raise ValueError(f"{finding.name}: {finding.found}; {finding.fix}")
        if finding.status == "warning":
            say(str(finding))


def _settings(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", samples: Samples[Any]) -> dict[str, Any]:
    return {
        **samples.settings,
        "num_eval_samples": len(samples.evaluation),
        "chat_template": chat_template_fingerprint(tokenizer),
        **rendering(tokenizer),
        "engine": args.engine,
        "seed_requests": args.seed_requests,
    }


def _check_this_machine(
    args: argparse.Namespace, config: GRPOConfig, tokenizer: "PreTrainedTokenizerBase", resumed: RunPaths | None
) -> None:
    """The quick checks of `python -m ludic.doctor`: a warning is said, a failure ends the run before it costs anything.

    Raises:
        ValueError: a check failed.
    """
    from ludic.train.checkpoint import list_checkpoints

    there = len(list_checkpoints(resumed.checkpoints)) if resumed else 0
    for finding in quick_checks(args, config, tokenizer, num_checkpoints=there):
        if finding.status == "failed":
            raise ValueError(f"{finding.name}: {finding.found}; {finding.fix} (--no-checks goes on all the same)")
        if finding.status == "warning":
            say(str(finding))
