"""Train a model on GSM8K with GRPO: read the flags, build the parts, run the trainer, say what came of it.

    python examples/gsm8k/train_gsm8k.py --demo                      no GPU, no server, nothing downloaded
    python -m ludic.inference.vllm_server --model MODEL              in one process (GPU 0), and in another (GPU 1)
    python examples/gsm8k/train_gsm8k.py --model MODEL --micro-token-budget 16384 --max-seq-len 1024

`examples/gsm8k/README.md` is the walk-through.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from rich.console import Console

from environments.gsm8k import DEFAULT_SYSTEM_PROMPT, GSM8K, HUB_ID, GSM8KSample, load
from ludic.cli import (
    add_engine_arguments,
    check_engine_arguments,
    expand_home,
    hide_loading_bars,
    prepare_out_dir,
    run_script,
)
from ludic.commands import given_command
from ludic.config import GRPOConfig, RunPaths, add_arguments, from_arguments
from ludic.doctor import check_token_ids, quick_checks
from ludic.run import open_engine, require_server
from ludic.storage.identity import identity
from ludic.storage.inert import InertFormatter
from ludic.storage.jsonl import drop_steps_after, read_jsonl
from ludic.storage.run_lock import RunLock
from ludic.survival.changed_settings import changed_settings
from ludic.survival.resumed_model import find_resumed_model, keep_model
from ludic.survival.signals import at_once
from ludic.task.hub import cache_without_hub
from ludic.task.pretrained import load_full_config, load_model, stored_dtype
from ludic.task.prompts import (
    chat_template_fingerprint,
    encode_prompt,
    load_tokenizer,
    recorded_moment,
    render,
    rendering,
)
from ludic.task.template_checks import describe_prompt
from ludic.telemetry.loggers import make_logger, parse_logger_names
from ludic.telemetry.progress import StatusLine
from ludic.telemetry.report import comparison_table, evaluation_rows, reward_curve_text, save_reward_curve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ludic.train.checkpoint import TrainerState
    from ludic.train.trainer import GRPOTrainer, TrainingSummary

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def build_parser() -> argparse.ArgumentParser:
    """Every flag, in groups."""
    parser = argparse.ArgumentParser(
        prog="train_gsm8k.py",
        description="Train a model on GSM8K with GRPO, against a vLLM server that runs in another process.",
    )
    task = parser.add_argument_group("task")
    task.add_argument("--demo", action="store_true",
                      help="a small policy and problems of our own, on the CPU, in about two minutes")  # fmt: skip
    task.add_argument("--model", default=DEFAULT_MODEL, help=f"hub name or folder (default: {DEFAULT_MODEL})")
    task.add_argument("--dataset", default=None, metavar="PATH",
                      help="folder of train and test, or one file: JSONL (.gz), parquet or CSV (default: the hub)")  # fmt: skip
    task.add_argument(
        "--eval-dataset", default=None, metavar="PATH", help="problems to evaluate on, when not in --dataset"
    )
    task.add_argument("--limit", type=int, default=None, help="train on the first N problems only (default: all)")
    task.add_argument("--system-prompt", default=DEFAULT_SYSTEM_PROMPT, help="default: %(default)s")
    add_engine_arguments(parser)
    add_arguments(parser)
    files = parser.add_argument_group("files and log")
    files.add_argument("--out-dir", default=".", help="folder for everything that the run writes (default: here)")
    files.add_argument("--logger", default="rich",
                       help="comma-separated: rich, print, jsonl, wandb; or none (default: rich)")  # fmt: skip
    files.add_argument("--resume", nargs="?", const="latest", default=None, metavar="CHECKPOINT",
                       help="continue from the last checkpoint in --out-dir, or from the one given")  # fmt: skip
    files.add_argument(
        "--no-checks", action="store_true", help="leave out the quick checks of `python -m ludic.doctor`"
    )
    files.add_argument("--verbose", action="store_true", help="also log each weight sync with its proof")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the demo's own under those that were given.

    Raises:
        ValueError: a flag contradicts --demo.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.demo:
        for flag in ("model", "dataset", "eval_dataset", "engine", "start_server", "resume"):
            if getattr(args, flag) != parser.get_default(flag):
                raise ValueError(
                    f"--demo brings its own policy and problems: it contradicts --{flag.replace('_', '-')}"
                )
        from demo import DEMO_FLAGS

        given = sys.argv[1:] if argv is None else argv
        args = parser.parse_args([*itertools.chain.from_iterable(DEMO_FLAGS.items()), *given])
    return expand_home(args)


async def main() -> int:
    started = time.perf_counter()
    args = parse_arguments()
    handler = logging.StreamHandler()
    handler.setFormatter(InertFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, handlers=[handler])
    parse_logger_names(args.logger)
    check_engine_arguments(args)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {args.limit}")
    config = from_arguments(args)
    require_server(args)
    paths = RunPaths(out_dir=prepare_out_dir(args.out_dir))
    with RunLock(paths.out_dir, identity(paths.out_dir)):  # until the end: two runs would write the same files
        with at_once():
            parts = _prepare(args, config, paths)
        await _run(args, config, paths, parts, started)
    return 0


class _Parts(NamedTuple):
    """What a run is made of, beside its model and its engine."""

    tokenizer: "PreTrainedTokenizerBase"
    environment: GSM8K
    train_samples: list[GSM8KSample]
    eval_samples: list[GSM8KSample]
    task: dict[str, Any]
    resume_from: "tuple[Path, TrainerState] | None"
    served_as: str
    """The model's name on the server."""


def _prepare(args: argparse.Namespace, config: GRPOConfig, paths: RunPaths) -> _Parts:
    """Find, load and check all that needs no engine. Afterwards `args.model` has the files, whatever a server calls it."""
    unreachable = False
    if not args.demo:
        try:
            cache_without_hub([args.model], dataset=None if args.dataset else HUB_ID, say=_say)
        except ValueError:
            if args.resume is None:
                raise
            unreachable = True
    # torch comes with this import, and takes seconds: not before the flags are checked.
    from ludic.train.checkpoint import recover_folder

    hide_loading_bars()
    for line in recover_folder(paths.checkpoints):
        _say(line)
    resume_from = _find_checkpoint(args, paths)
    if resume_from is None and Path(args.model).resolve().is_relative_to(paths.checkpoints.resolve()):
        raise ValueError(
            f"--model {args.model} is a checkpoint of the run in this folder, which a new run moves aside: "
            "choose another --out-dir, or continue that run with --resume"
        )
    if args.demo:
        _build_demo(args, paths, config)
    served_as = args.model
    if resume_from is not None:
        args.model = _resumed_model(args, config, paths, resume_from, unreachable)
    elif Path(args.model).is_dir():
        args.model = os.path.abspath(args.model)  # kept in checkpoints, which may be resumed in another folder

    _say(f"loading {args.model}")
    load_full_config(args.model, trust_remote_code=args.trust_remote_code)  # an adapter or quantised weights end here
    train_samples = load("train", dataset=args.dataset, limit=args.limit, say=lambda line: _say(f"train: {line}"))
    eval_samples = _load_eval_samples(args, config)
    tokenizer = load_tokenizer(
        args.model,
        args.chat_template,
        trust_remote_code=args.trust_remote_code,
        moment=recorded_moment(resume_from[1].task) if resume_from else None,
    )
    environment = GSM8K(system_prompt=args.system_prompt)
    _check_prompts(args, environment, tokenizer, config, train_samples, eval_samples)
    chatml = Path(os.path.relpath(Path(__file__).with_name("chatml.jinja")))
    for line in describe_prompt(tokenizer, environment.messages(train_samples[0]), plain_template=chatml):
        _say(line)
    task = _task(args, tokenizer, eval_samples)
    if resume_from is not None:
        given = {**dataclasses.asdict(config), "num_train_samples": len(train_samples), **task}
        stored = {**resume_from[1].config, **resume_from[1].task}
        for line in changed_settings(stored, given, step=resume_from[1].step):
            _say(f"changed since the checkpoint, so this is not the run that was interrupted: {line}")

    if not args.no_checks:
        _check_this_machine(args, config, tokenizer)
    return _Parts(
        tokenizer=tokenizer,
        environment=environment,
        train_samples=train_samples,
        eval_samples=eval_samples,
        task=task,
        resume_from=resume_from,
        served_as=args.model if args.start_server else served_as,
    )


async def _run(args: argparse.Namespace, config: GRPOConfig, paths: RunPaths, parts: _Parts, started: float) -> None:
    with at_once():
        from transformers import set_seed

        from ludic.train.checkpoint import checkpoint_step, list_checkpoints
        from ludic.train.trainer import GRPOTrainer

        set_seed(config.seed % 2**32)  # nothing of ours draws from these generators; an environment of your own may
    tokenizer, environment, resume_from = parts.tokenizer, parts.environment, parts.resume_from
    first = environment.messages(parts.train_samples[0])
    model = resume_from[1].model if resume_from else args.model
    probe = encode_prompt(tokenizer, first)[:64]
    engine_args = args if args.engine == "local" else argparse.Namespace(**{**vars(args), "model": parts.served_as})
    async with open_engine(
        engine_args,
        tokenizer,
        files=args.model,
        out_dir=paths.out_dir,
        max_seq_len=config.max_seq_len,
        say=_say,
        probe=probe,
        fp32_head=config.fp32_head,
    ) as engine:
        device = _training_device(args)
        # What takes long is done aside: the event loop tells the server meanwhile that this trainer lives.
        thread = None if args.engine == "local" else device
        policy, dtype = await _aside(
            thread, load_policy, str(resume_from[0]) if resume_from else args.model, device, args, bool(resume_from)
        )
        reference = (await _aside(thread, load_policy, args.model, device, args))[0] if config.kl_coef > 0 else None
        if resume_from is None:
            # Not before there is a run that takes the place of the earlier one.
            _set_aside(
                paths,
                [paths.prompt, paths.metrics, paths.rollouts, paths.summary, paths.curve, paths.checkpoints],
            )
        else:
            for path in (paths.metrics, paths.rollouts):  # what came after the checkpoint is made again
                await _aside(thread, drop_steps_after, path, resume_from[1].step)
            later = [
                path
                for path in list_checkpoints(paths.checkpoints)
                if (step := checkpoint_step(path)) is not None and step > resume_from[1].step
            ]
            _set_aside(paths, later)
        paths.prompt.write_text(json.dumps({"messages": first, "text": render(tokenizer, first)}, indent=2) + "\n")
        metric_logger = make_logger(
            args.logger,
            metrics_path=paths.metrics,
            run_name=f"GRPO {Path(model).name}",
            config={**dataclasses.asdict(config), "model": model, "dataset": args.dataset or "openai/gsm8k"},
            total_steps=config.train_steps,
            run_id=resume_from[1].wandb_run_id if resume_from else None,
            started_from=resume_from[1].step if resume_from else 0,
        )
        with contextlib.closing(metric_logger):
            trainer = await _aside(
                thread,
                GRPOTrainer,
                config=config,
                model=policy,
                model_name=args.model,
                tokenizer=tokenizer,
                engine=engine,
                environment=environment,
                train_samples=parts.train_samples,
                eval_samples=parts.eval_samples,
                metric_logger=metric_logger,
                paths=paths,
                eval_concurrency=args.concurrency,
                model_dtype=dtype,
                reference_model=reference,
                resume_from=resume_from,
                task=parts.task,
                wandb_run_id=metric_logger.run_id,
            )
            async with contextlib.aclosing(environment):
                with _resume_explained(args, trainer):
                    summary = await trainer.run()
    _finish(args, config, paths, summary, time.perf_counter() - started, resume_from[1] if resume_from else None)


@contextlib.contextmanager
def _resume_explained(args: argparse.Namespace, trainer: "GRPOTrainer[GSM8KSample]") -> Iterator[None]:
    """When the run ends before its time, say how to continue it."""
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished and trainer.last_checkpoint is not None and not args.demo:  # a demo makes its model anew
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


def _task(
    args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", eval_samples: list[GSM8KSample]
) -> dict[str, Any]:
    """What makes this run the one that it is, beside its configuration: compared when it is resumed."""
    return {
        "dataset": args.dataset or "openai/gsm8k",
        "eval_dataset": args.eval_dataset,
        "num_eval_samples": len(eval_samples),
        "limit": args.limit,
        "system_prompt": args.system_prompt,
        "chat_template": chat_template_fingerprint(tokenizer),
        **rendering(tokenizer),
        "engine": args.engine,
        "seed_requests": args.seed_requests,
    }


def _training_device(args: argparse.Namespace) -> Any:
    """The GPU that trains: not the one that a server started by us has, where there are two."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    shared = args.start_server and not args.server_gpu and torch.cuda.device_count() > 1
    device = torch.device("cuda", 1 if shared else 0)
    torch.cuda.set_device(device)
    return device


def _find_checkpoint(args: argparse.Namespace, paths: RunPaths) -> "tuple[Path, TrainerState] | None":
    """The checkpoint that --resume means, with its state.

    Raises:
        ValueError: there is none.
    """
    if args.resume is None:
        return None
    from ludic.train.checkpoint import find_checkpoint, read_state, verify_checkpoint

    if args.resume == "latest":
        newest = find_checkpoint(paths.checkpoints)
        for line in newest.passed_over:
            _say(f"passed over: {line}")
        found = newest.path
    else:
        found = Path(args.resume)
        verify_checkpoint(found)
    if found is None:
        raise ValueError(f"--resume: there is no checkpoint in {paths.checkpoints}; leave the flag out to start a run")
    state = read_state(found)
    _say(f"continuing from {found} (update {state.step})")
    return found, state


def _resumed_model(
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
    if config.kl_coef > 0:
        raise ValueError(
            f"--kl-coef {config.kl_coef} compares with the model that the run began with, {state.model}, which is not there "
            "and in no checkpoint: put it back there, or pass --kl-coef 0"
        )
    _say(f"the run began with {state.model}, which is not read: configuration and tokenizer are those of {files}")
    if args.start_server and os.path.samefile(files, checkpoint):
        return str(keep_model(checkpoint, paths.out_dir / "resumed_model"))
    return files


def _load_eval_samples(args: argparse.Namespace, config: GRPOConfig) -> list[GSM8KSample]:
    if not config.eval_limit:
        return []
    source = args.eval_dataset or args.dataset
    if args.eval_dataset is None and source is not None and not Path(source).is_dir():
        _say(f"no evaluation: {source} is a single file; name other problems with --eval-dataset")
        return []
    return load("test", dataset=source, limit=config.eval_limit, say=lambda line: _say(f"evaluation: {line}"))


def _check_prompts(
    args: argparse.Namespace,
    environment: GSM8K,
    tokenizer: "PreTrainedTokenizerBase",
    config: GRPOConfig,
    train_samples: list[GSM8KSample],
    eval_samples: list[GSM8KSample],
) -> None:
    """Find the prompt that is too long, or has an id that the model does not know, before a server is started for it."""
    token_ids: set[int] = set()
    for number, sample in enumerate([*train_samples, *eval_samples]):
        prompt = encode_prompt(tokenizer, environment.messages(sample))
        token_ids.update(prompt)
        if number < len(train_samples) and len(prompt) > config.max_prompt_len:
            raise ValueError(
                f"a prompt is {len(prompt)} tokens, more than --max-seq-len {config.max_seq_len} allows "
                f"with one token for an answer: {sample.question[:60]!r}..."
            )
    for finding in check_token_ids(args, tokenizer, token_ids):
        if finding.status == "failed":  # not left out by --no-checks: the server would die of it
            raise ValueError(f"{finding.name}: {finding.found}; {finding.fix}")
        if finding.status == "warning":
            _say(str(finding))


def _check_this_machine(args: argparse.Namespace, config: GRPOConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """The quick checks of `python -m ludic.doctor`: a warning is said, a failure ends the run before it costs anything.

    Raises:
        ValueError: a check failed.
    """
    for finding in quick_checks(args, config, tokenizer):
        if finding.status == "failed":
            raise ValueError(f"{finding.name}: {finding.found}; {finding.fix} (--no-checks goes on all the same)")
        if finding.status == "warning":
            _say(str(finding))


def _set_aside(paths: RunPaths, old: list[Path]) -> None:
    """Move what an earlier run left in this folder out of the way: nothing is lost, and nothing is mixed."""
    old = [path for path in old if path.exists()]
    if not old:
        return
    parent = paths.out_dir / "earlier_runs"
    parent.mkdir(exist_ok=True)
    # A name of its own even for two runs within one second.
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=parent))
    for path in old:
        shutil.move(path, folder / path.name)
    _say(f"an earlier run's files were moved to {folder}")


def _build_demo(args: argparse.Namespace, paths: RunPaths, config: GRPOConfig) -> None:
    """Make the demo's policy and problems, and point the flags at them."""
    _say("demo: no GPU, no server, no network. Making word problems in GSM8K's format and a small policy of our own,")
    _say("warm-started by imitating worked solutions (supervised, before GRPO begins) ...")
    import torch
    from demo import NUM_THREADS, build_demo

    torch.set_num_threads(NUM_THREADS)
    folder = paths.out_dir / "gsm8k_demo"
    with StatusLine(_say) as status:
        status.show("warm start: drawing problems and making a tokenizer")
        demo = build_demo(folder, seed=config.seed, on_progress=status.show)
    args.model, args.dataset = str(demo.model_dir), str(folder)
    _say(
        f"the warm start took {demo.warm_start_s:.0f} s on {demo.num_warm_start:,} solutions: a policy of "
        f"{demo.num_parameters:,} parameters. From here on it is GRPO on {demo.num_train:,} other problems."
    )


def _finish(
    args: argparse.Namespace,
    config: GRPOConfig,
    paths: RunPaths,
    summary: "TrainingSummary",
    seconds: float,
    before: "TrainerState | None",
) -> None:
    """Write the summary and the curve, and say what came of a run that took this process `seconds` since `before`."""
    own = {
        name: getattr(summary, total) - (getattr(before, counted) if before else 0)
        for name, total, counted in (
            ("updates", "updates", "step"),
            ("rollouts", "rollouts", "rollouts"),
            ("completion_tokens", "completion_tokens", "completion_tokens"),
        )
    }
    process = {"started_from": before.step if before else 0, **own, "wall_seconds": seconds}
    model = before.model if before else args.model
    record = {**dataclasses.asdict(summary), "this_process": process, "model": model}
    paths.summary.write_text(json.dumps(record, indent=2) + "\n")
    rows: list[Any] = [row for row in read_jsonl(paths.metrics) if row.get("reward_mean") is not None]
    steps, rewards = [row["step"] for row in rows], [row["reward_mean"] for row in rows]
    if len(rows) > 1:
        _say(reward_curve_text(steps, rewards))
        points = [(one["step"], one["accuracy"]) for one in summary.compared]
        save_reward_curve(paths.curve, steps, rewards, evaluations=points)
    _compare(summary)
    total = _amounts(summary.updates, summary.rollouts, summary.completion_tokens)
    if before is None:
        _say(f"{total} in {seconds:.0f} s")
    else:
        _say(f"{_amounts(**own)} in {seconds:.0f} s, after update {before.step}")
        _say(f"the whole run: {total} in {summary.seconds:.0f} s of training")
    for what, path in (
        ("checkpoint", summary.last_checkpoint),
        ("metrics", paths.metrics),
        ("rollouts", paths.rollouts),
        ("summary", paths.summary),
        ("reward curve", paths.curve if paths.curve.exists() else None),
    ):
        if path:
            _say(f"  {what + ':':<13} {path}")
    from next_commands import evaluation_advice

    for line in evaluation_advice(args, config, summary.last_checkpoint, paths.out_dir):
        _say(line)


def _amounts(updates: int, rollouts: int, completion_tokens: int) -> str:
    return f"{updates} updates, {rollouts} rollouts, {completion_tokens} completion tokens"


def _compare(summary: "TrainingSummary") -> None:
    """The table of the first and the last evaluation that measured the same."""
    compared = summary.compared
    if len(compared) < len(summary.evaluations):
        others = len(summary.evaluations) - len(compared)
        _say(f"earlier evaluations with other problems, another prompt or other sampling, not compared: {others}")
    if len(compared) < 2:
        return
    first, last = compared[0], compared[-1]
    headings = (
        f"update {first['step']}" if first["step"] else "before",
        "after" if last["step"] == summary.updates else f"update {last['step']}",
    )
    title = f"{last['num_problems']} held-out problems"
    if settings := last.get("settings"):
        title += f", temperature {settings['temperature']:g}"
    Console().print(comparison_table(evaluation_rows(first, last), title=title, headings=headings))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_script("train_gsm8k.py", main)
