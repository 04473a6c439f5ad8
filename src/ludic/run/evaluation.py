"""One evaluation as the flags describe it: prepare, open the engine, generate and score, print the table.

`--out` gets one record a problem as it is finished; beside it lie what the records were made with, the first prompt and the
figures. Records of other weights, problems or settings are never mixed, and none are lost without `--overwrite`. What is
raised is a user's mistake in one line, as `ludic.cli.run_script` says it.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from ludic.cli import expand_home, hide_loading_bars, prepare_out_dir, say, server_urls, total_concurrency
from ludic.commands import given_command
from ludic.config_file import check_parser, write_config
from ludic.flags import check_evaluation_arguments
from ludic.inference.wire import NEUTRAL_SAMPLING
from ludic.report.runs import default_page
from ludic.rollout.errors import EngineError, ServerMismatchError
from ludic.rollout.problems import (
    Problem,
    ProblemRecord,
    TooFewProblemsError,
    match_records,
    prepare_problems,
    read_records,
    rules_of,
)
from ludic.run.engine import name_engines, open_engine, require_server
from ludic.run.report_page import page_at_an_early_end, write_page
from ludic.run.task import Task
from ludic.storage.jsonl import JsonlWriter
from ludic.storage.keys import read_api_key
from ludic.survival.changed_settings import shown_apart
from ludic.survival.signals import at_once
from ludic.task.environment import several_turns
from ludic.task.hub import cache_without_hub
from ludic.task.pretrained import load_config, load_full_config
from ludic.task.prompts import chat_template_fingerprint, load_tokenizer, recorded_moment, render, rendering, stop_ids
from ludic.task.template_checks import describe_prompt
from ludic.telemetry.progress import EvaluationDisplay
from ludic.telemetry.report import evaluation_table
from ludic.types import SamplingParams

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from ludic.inference.client.weights_in_use import WeightsInUse
    from ludic.rollout.engine import InferenceEngine
    from ludic.rollout.evaluation import EvaluationResult


class Evaluation(NamedTuple):
    """What was found, and of which weights."""

    result: "EvaluationResult"
    weights: "WeightsInUse"
    longest_prompt: int
    """Tokens."""


class _Parts(NamedTuple):
    """What an evaluation is made of, beside its engine."""

    tokenizer: "PreTrainedTokenizerBase"
    samples: Sequence[Any]
    problems: list[Problem]
    """The samples, encoded."""
    settings: dict[str, Any]
    """What the records depend on, as far as it is known without the engine."""
    earlier: dict[str, Any] | None
    """The settings of the records that are there and are to be finished."""
    done: list[ProblemRecord]


async def evaluate_from_flags(
    args: argparse.Namespace, task: Task[Any], *, also_replaced: Sequence[Path] = ()
) -> Evaluation:
    """Evaluate on `task` as the flags of `add_evaluation_arguments` and `--model` say, with all the files and the table.

    `--overwrite` drops the records in `also_replaced` together with those of `--out`.

    Raises:
        ValueError: a flag, the model, the data or the records that are there are not what they have to be; one line.
        EngineError: the server is not there, or not the right one.
    """
    check_parser(args)
    expand_home(args)
    check_evaluation_arguments(args)
    sampling = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed
    )
    require_server(args)
    await asyncio.to_thread(name_engines, args)
    out_dir = prepare_out_dir(args.out_dir)
    out = out_dir / args.out
    with at_once():
        parts = _prepare(args, task, out)
    longest_prompt = max(len(problem.prompt_token_ids) for problem in parts.problems)
    async with (
        contextlib.AsyncExitStack() as after_the_engine,
        open_engine(
            argparse.Namespace(**{**vars(args), "seed_requests": True}),  # of those requests whose sampling has a seed
            parts.tokenizer,
            files=args.tokenizer or args.model,
            out_dir=out_dir,
            max_seq_len=args.max_seq_len or longest_prompt + args.max_tokens,
            say=say,
            stop_ids=parts.settings["stop_token_ids"] if task.stops else (),
        ) as engine,
    ):
        weights = await asyncio.to_thread(weights_in_use, args)
        settings = parts.settings | {"weights": weights.fingerprint, "seeded": _seeded(args, weights)}
        if parts.earlier is not None:
            check_same_settings(parts.earlier, settings)
        say(f"weights: {weights.description}")
        if not settings["seeded"]:
            sampling = dataclasses.replace(sampling, seed=None)
        if args.overwrite:  # not before there is an engine to make new ones
            for path in (out, *also_replaced):
                _drop_records(path)
        after_the_engine.enter_context(page_at_an_early_end(out, default_page(out)))
        result = await _evaluate(args, task, out, parts, settings, engine, sampling)
        weights_after = await asyncio.to_thread(_weights_at_the_end, args, weights)
    summary = result.to_summary(model=args.model, settings=settings) | {"weights": dataclasses.asdict(weights)}
    if weights_after != weights:
        summary["weights_at_the_end"] = dataclasses.asdict(weights_after)
        say(f"THE WEIGHTS CHANGED while they were scored: at the end they were {weights_after.description}")
    write_json(_beside(out, "summary"), summary)
    write_page(out, default_page(out))
    _report(args, task, out, result, weights)
    return Evaluation(result=result, weights=weights, longest_prompt=longest_prompt)


def _prepare(args: argparse.Namespace, task: Task[Any], out: Path) -> _Parts:
    """All that needs no engine: found, loaded and checked before anything is spent."""
    files = args.tokenizer or args.model
    earlier = earlier_settings(args, out)
    cache_without_hub([files], dataset=task.hub_dataset, say=say)
    hide_loading_bars()
    config = model_config(args)
    given = task.load_samples(args)
    samples = given.evaluation[: args.limit]
    moment = recorded_moment(earlier) if earlier else None
    tokenizer = load_tokenizer(
        files,
        args.chat_template,
        trust_remote_code=args.trust_remote_code,
        moment=moment,
        plain_text=task.plain_text,
    )
    settings = _settings(args, config, tokenizer, given.settings)
    settings["stop_token_ids"] = sorted({*settings["stop_token_ids"], *stop_ids(tokenizer, task.stops)})
    if earlier is not None:
        check_same_settings(earlier, settings)
    done = [] if earlier is None else read_records(out)
    problems = prepare_problems(task.environment, samples, tokenizer, max_seq_len=args.max_seq_len)
    try:
        match_records(done, problems, args.samples, rules_of(task.environment))
    except TooFewProblemsError as error:
        finish = resume_command("--limit", str(error.num_recorded))
        raise ValueError(f"{error}: use another --out, or finish those with `{finish}`") from error
    several = several_turns(task.environment) is not None
    first = problems[0].messages
    for line in describe_prompt(tokenizer, first, plain_template=task.plain_template, several_turns=several):
        say(line)
    return _Parts(tokenizer, samples, problems, settings, earlier, done)


def model_config(args: argparse.Namespace) -> "PretrainedConfig":
    """The configuration of `--tokenizer`, else of `--model`.

    Raises:
        ValueError: there is none, or the engine cannot generate with such a model; one line.
    """
    load = load_full_config if args.engine == "local" else load_config  # vLLM serves quantised weights too
    return load(args.tokenizer or args.model, trust_remote_code=args.trust_remote_code)


def earlier_settings(args: argparse.Namespace, out: Path) -> dict[str, Any] | None:
    """What the records in `out` were made with, where `--resume-eval` finishes them; None where none are to be kept.

    Raises:
        ValueError: `out` cannot be written, or the records in it can be neither finished nor replaced; one line.
    """
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")
    if out.exists() and not os.access(out, os.W_OK):
        raise ValueError(f"--out {out} cannot be written: its permissions forbid it")
    if args.overwrite or not out.exists() or out.stat().st_size == 0:
        return None
    if not args.resume_eval:
        raise ValueError(f"{out} is there already: finish it with --resume-eval, or replace it with --overwrite")
    path = _beside(out, "settings")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, so what the records were made with is not known: --overwrite") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): --overwrite") from None
    return settings


def _settings(
    args: argparse.Namespace, config: Any, tokenizer: "PreTrainedTokenizerBase", of_task: Mapping[str, Any]
) -> dict[str, Any]:
    from ludic.inference.client.vllm_client import stop_token_ids  # brings torch

    return {
        "model": _absolute(args.model),
        "tokenizer": _absolute(args.tokenizer) if args.tokenizer else None,
        **of_task,
        "chat_template": chat_template_fingerprint(tokenizer),
        **rendering(tokenizer),
        **{name: getattr(args, name) for name in ("engine", "samples", "temperature", "top_p")},
        **NEUTRAL_SAMPLING,
        "stop_token_ids": stop_token_ids(args.tokenizer or args.model, tokenizer, config),
        **{name: getattr(args, name) for name in ("max_tokens", "max_seq_len", "seed")},
    }


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def check_same_settings(before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Records of another model or other sampling must not be mixed with new ones."""
    unknown = {"rendered_chat", "rendered_ids"} - before.keys()  # earlier versions did not record them
    changed = [
        "{} {}, now {}".format(key, *shown_apart(before.get(key, "not recorded"), settings[key]))
        for key in settings
        if before.get(key) != settings[key] and key not in unknown
    ]
    if changed:
        raise ValueError(f"the records were made with other settings: {'; '.join(changed)}; use another --out")


def weights_in_use(args: argparse.Namespace) -> "WeightsInUse":
    """Which weights are scored, as far as the engine says.

    Raises:
        ServerMismatchError: the server has several engines, which hold different ones.
    """
    from ludic.inference.client.server_control import ServerControl  # brings an HTTP client
    from ludic.inference.client.weights_in_use import weights_of_files, weights_of_server

    if args.engine == "local":
        return weights_of_files(args.model)
    held = {}
    for url in server_urls(args):
        with contextlib.closing(ServerControl(url, api_key=read_api_key(args.api_key_file))) as control:
            held[url] = weights_of_server(control, args.model, args.tokenizer or args.model)
    (first, weights), *others = held.items()
    for url, theirs in others:
        unknown = theirs.is_ours and not theirs.fingerprint  # in the middle of a sync
        if unknown or (theirs.fingerprint, theirs.policy_version) != (weights.fingerprint, weights.policy_version):
            raise ServerMismatchError(
                f"the engines hold different weights: {first} {weights.description}; {url} {theirs.description}. Wait for the "
                "weight sync that is under way, or restart them"
            )
    return weights


def _weights_at_the_end(args: argparse.Namespace, before: "WeightsInUse") -> "WeightsInUse":
    """The same once more. A server that is gone by now takes nothing from the records."""
    try:
        return weights_in_use(args)
    except EngineError as error:
        return dataclasses.replace(before, description=f"not known ({error})", fingerprint="")


def _seeded(args: argparse.Namespace, weights: "WeightsInUse") -> bool:
    """Whether each request gets a seed of its own: where something is drawn, unless that is not wanted."""
    if args.temperature == 0 or args.no_seed_requests:
        return False
    if weights.device == "cpu" and not args.seed_requests:
        # vLLM's CPU backend (0.32) dies of a request with a seed whose prompt does not fit into one step.
        say("requests have no seeds, which can end vLLM's CPU backend: another run draws other completions")
        return False
    return True


async def _evaluate(
    args: argparse.Namespace,
    task: Task[Any],
    out: Path,
    parts: _Parts,
    settings: Mapping[str, Any],
    engine: "InferenceEngine",
    sampling: SamplingParams,
) -> "EvaluationResult":
    """Generate, score and record what is not done yet."""
    from ludic.rollout.evaluation import evaluate  # brings torch

    first = parts.problems[0].messages
    with JsonlWriter(out) as writer, _keep_or_explain(out), EvaluationDisplay(task.heading) as display:
        write_json(_beside(out, "settings"), settings)
        write_config(Path(f"{out}.config.toml"), args.resolved, command=given_command(without=()))
        write_json(_beside(out, "prompt"), {"messages": first, "text": render(parts.tokenizer, first)})
        _drop_figures(out)
        return await evaluate(
            engine,
            task.environment,
            parts.samples,
            tokenizer=parts.tokenizer,
            sampling=sampling,
            samples_per_problem=args.samples,
            concurrency=total_concurrency(args),
            record_writer=writer,
            done=parts.done,
            on_progress=display,
            max_seq_len=args.max_seq_len,
        )


def _drop_records(out: Path) -> None:
    out.unlink(missing_ok=True)
    _drop_figures(out)


def _drop_figures(out: Path) -> None:
    """Of records that were fewer, or others."""
    for path in (_beside(out, "summary"), default_page(out)):
        path.unlink(missing_ok=True)


def _beside(out: Path, kind: str) -> Path:
    return Path(f"{out}.{kind}.json")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `path` whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


@contextlib.contextmanager
def _keep_or_explain(out: Path) -> Iterator[None]:
    """When the evaluation ends before its time, say what is kept and how to finish it."""
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished and out.stat().st_size > 0:
            name = Path(sys.argv[0]).name
            sys.stderr.write(f"{name}: what is done is kept in {out}; finish it with:\n  {resume_command()}\n")


def resume_command(*more: str) -> str:
    """The command that was given, with what finishes it."""
    return given_command(*more, "--resume-eval", without=("--overwrite", "--resume-eval"))


def _report(
    args: argparse.Namespace, task: Task[Any], out: Path, result: "EvaluationResult", weights: "WeightsInUse"
) -> None:
    """The table, what to know about it, and what was written."""
    what = weights.description if weights.from_run else Path(args.model).name
    Console().print(evaluation_table(result, title=f"{task.heading}: {what}"))
    if result.num_taken_over:
        say(f"{result.num_taken_over} problems were in {out} already; time and tokens/s are of this run alone")
    if result.truncation_rate > 0.1:
        say(f"{result.truncation_rate:.0%} of the completions were cut off: raise --max-tokens (now {args.max_tokens})")
    if result.grader_failures:
        say(f"{result.grader_failures} completions could not be graded in time and count as wrong")
    written = [path for path in (out, _beside(out, "summary"), default_page(out)) if path.exists()]
    say(f"written: {', '.join(map(str, written))}")
