"""All of a run that needs no engine: found, loaded and checked before anything is spent."""

import argparse
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ludic.cli import hide_loading_bars, say, server_urls
from ludic.config import GRPOConfig, RunPaths
from ludic.doctor.dry_run import check_token_ids, model_shape
from ludic.doctor.findings import Finding, run_checks
from ludic.doctor.machine import quick_checks
from ludic.doctor.memory import GIB, choose_share, given_share, shares_gpu
from ludic.run.ranks import check_architecture, launched_ranks
from ludic.run.resume import find_start, resumed_model
from ludic.run.task import Samples, Task
from ludic.survival.changed_settings import changed_settings
from ludic.task.environment import Environment, several_turns
from ludic.task.hub import cache_without_hub
from ludic.task.pretrained import load_full_config
from ludic.task.prompts import chat_template_fingerprint, encode_prompts, load_tokenizer, recorded_moment, rendering
from ludic.task.template_checks import describe_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ludic.train.checkpoint import TrainerState

SampleT = TypeVar("SampleT")


class Parts(NamedTuple, Generic[SampleT]):
    """What a run is made of, beside its model and its engine."""

    args: argparse.Namespace
    """`model` has the files, whatever a server calls it."""
    config: GRPOConfig
    paths: RunPaths
    tokenizer: "PreTrainedTokenizerBase"
    environment: Environment[SampleT]
    samples: Samples[SampleT]
    train_prompts: list[list[int]]
    """The token ids of each training sample's prompt: [P]."""
    settings: dict[str, Any]
    """What makes this run the one that it is, beside its configuration: compared when it is resumed."""
    resume_from: "tuple[Path, TrainerState] | None"
    served_as: str
    """The model's name on the server; its files where the run starts the engine itself."""
    is_resumable: bool

    @property
    def state(self) -> "TrainerState | None":
        """Of the checkpoint that the run goes on from."""
        return self.resume_from[1] if self.resume_from else None


def prepare(args: argparse.Namespace, config: GRPOConfig, paths: RunPaths, task: Task[SampleT]) -> Parts[SampleT]:
    """Find, load and check all that needs no engine. `args.model` becomes the model's files.

    Raises:
        ValueError: something is missing, or does not fit; one line.
    """
    served_as, resume_from = _find_model(args, config, paths, task)
    say(f"loading {args.model}")
    # An adapter or quantised weights end here.
    check_architecture(args.model, load_full_config(args.model, trust_remote_code=args.trust_remote_code))
    if config.lora_rank:
        from ludic.train.lora import require_peft, target_names

        require_peft()
        target_names(model_shape(args.model, args.trust_remote_code)[1], config.lora_target)
    samples, environment = task.load_samples(args), task.environment
    tokenizer = load_tokenizer(
        args.model,
        args.chat_template,
        trust_remote_code=args.trust_remote_code,
        moment=recorded_moment(resume_from[1].task) if resume_from else None,
    )
    train_prompts = _tokenise(args, config, environment, tokenizer, samples)
    first = environment.messages(samples.train[0])
    several = several_turns(environment) is not None
    for line in describe_prompt(tokenizer, first, plain_template=task.plain_template, several_turns=several):
        say(line)
    settings = {
        **samples.settings,
        "num_eval_samples": len(samples.evaluation),
        "chat_template": chat_template_fingerprint(tokenizer),
        **rendering(tokenizer),
        "engine": args.engine,
        "concurrency": args.concurrency,
        **({"servers": len(server_urls(args))} if args.engine == "vllm" else {}),
        "seed_requests": args.seed_requests,
    }
    if resume_from:
        given = {**dataclasses.asdict(config), "num_train_samples": len(samples.train), **settings}
        stored = {**resume_from[1].config, **resume_from[1].task}
        for line in changed_settings(stored, given, step=resume_from[1].step):
            say(f"changed since the checkpoint, so this is not the run that was interrupted: {line}")
    if not args.no_checks:
        from ludic.train.checkpoint import list_checkpoints

        there = len(list_checkpoints(paths.checkpoints)) if resume_from else 0
        checks = quick_checks(args, config, lambda: tokenizer, num_checkpoints=there)
        if (ranks := launched_ranks()) > 1:  # that check adds up what one process needs
            say(f"{ranks} ranks: whether the memory is enough for them is not estimated")
            checks = [(name, check) for name, check in checks if name != "memory"]
        _heed(run_checks(checks), way_out=" (--no-checks goes on all the same)")
    _split_gpu(args, config)
    return Parts(
        args=args,
        config=config,
        paths=paths,
        tokenizer=tokenizer,
        environment=environment,
        samples=samples,
        train_prompts=train_prompts,
        settings=settings,
        resume_from=resume_from,
        served_as=args.model if args.start_server or args.engine == "local" else served_as,
        is_resumable=task.make_policy is None,
    )


def _split_gpu(args: argparse.Namespace, config: GRPOConfig) -> None:
    """Decide `args.server_memory_share` where server and trainer share a GPU and the flags leave it open.

    Raises:
        ValueError: two flags say it, or both sides do not fit; one line.
    """
    given = given_share(args)
    if not shares_gpu(args):
        return
    import torch

    free, total = torch.cuda.mem_get_info()
    share = choose_share(args, config, free=free, total=total) if given is None else given
    if given is None:
        args.server_memory_share = share
    say(
        f"one GPU for both sides: the server takes {share:g} of it ({share * total / GIB:.1f} GiB), training has the other "
        f"{max(0.0, free - share * total) / GIB:.1f} GiB; --server-memory-share sets it"
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
    for line in [] if args.forecast else recover_folder(paths.checkpoints):  # a forecast touches no run's files
        say(line)
    resume_from = find_start(args, paths)
    if resume_from is not None:
        from ludic.train.lora import check_checkpoint

        check_checkpoint(resume_from[0], config)
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
    chats = [environment.messages(sample) for sample in samples.train]
    prompts = encode_prompts(tokenizer, chats)
    for messages, prompt in zip(chats, prompts, strict=True):
        if len(prompt) > config.max_prompt_len:
            raise ValueError(
                f"a prompt is {len(prompt)} tokens, more than --max-seq-len {config.max_seq_len} allows "
                f"with one token for an answer: {messages[-1]['content'][:60]!r}..."
            )
    evaluated = encode_prompts(tokenizer, [environment.messages(sample) for sample in samples.evaluation])
    finding = check_token_ids(args, tokenizer, set().union(*prompts, *evaluated))
    _heed([finding])  # --no-checks does not leave this out: a server would die of an id that its model does not know
    return prompts


def _heed(findings: Iterable[Finding], *, way_out: str = "") -> None:
    """Say each warning; the first failure ends the run before it costs anything.

    Raises:
        ValueError: a check failed.
    """
    for finding in findings:
        if finding.status == "failed":
            raise ValueError(f"{finding.name}: {finding.found}; {finding.fix}{way_out}")
        if finding.status == "warning":
            say(str(finding))
