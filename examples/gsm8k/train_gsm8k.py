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
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from rich.console import Console

from environments.gsm8k import DEFAULT_SYSTEM_PROMPT, GSM8K, GSM8KSample, load
from ludic.cli import (
    add_engine_arguments,
    check_engine_arguments,
    hide_loading_bars,
    prepare_out_dir,
    run_script,
)
from ludic.doctor import quick_checks
from ludic.engines import open_engine
from ludic.pretrained import load_config, load_model
from ludic.prompts import chat_template_fingerprint, encode_prompt, load_tokenizer
from ludic.telemetry.formatting import InertFormatter
from ludic.telemetry.jsonl import drop_steps_after, read_jsonl
from ludic.telemetry.loggers import make_logger, parse_logger_names
from ludic.telemetry.report import ComparisonRow, comparison_table, reward_curve_text, save_reward_curve
from ludic.training.checkpoint import (
    TrainerState,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    read_state,
    recover_folder,
    verify_checkpoint,
)
from ludic.training.config import GRPOConfig, RunPaths, add_arguments, from_arguments
from ludic.training.resume import changed_settings
from ludic.training.run_lock import RunLock, identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ludic.training.trainer import TrainingSummary

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
                      help="folder of train.jsonl and test.jsonl, or a JSONL file (default: openai/gsm8k, hub)")  # fmt: skip
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
    return args


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
    paths = RunPaths(out_dir=prepare_out_dir(args.out_dir))
    with RunLock(paths.out_dir, identity(paths.out_dir)):  # until the end: two runs would write the same files
        await _run(args, config, paths, started)
    return 0


async def _run(args: argparse.Namespace, config: GRPOConfig, paths: RunPaths, started: float) -> None:
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

    _say(f"loading {args.model}")
    tokenizer = load_tokenizer(args.model, args.chat_template, trust_remote_code=args.trust_remote_code)
    train_samples = load("train", dataset=args.dataset, limit=args.limit)
    eval_samples = _load_eval_samples(args, config)
    environment = GSM8K(system_prompt=args.system_prompt)
    _check_prompts(environment, tokenizer, config, train_samples)
    task = _task(args, tokenizer, eval_samples)
    if resume_from is not None:
        given = {**dataclasses.asdict(config), "num_train_samples": len(train_samples), **task}
        stored = {**resume_from[1].config, **resume_from[1].task}
        for line in changed_settings(stored, given, step=resume_from[1].step):
            _say(f"changed since the checkpoint, so this is not the run that was interrupted: {line}")

    if not args.no_checks:
        _check_this_machine(args, config)

    from ludic.training.trainer import GRPOTrainer

    _seed_generators(config.seed)
    async with open_engine(
        args,
        tokenizer,
        out_dir=paths.out_dir,
        max_seq_len=config.max_seq_len,
        say=_say,
        trains=True,
        fp32_head=config.fp32_head,
    ) as engine:
        # What takes long is done aside: the event loop tells the server meanwhile that this trainer lives.
        device = _training_device(args)
        policy, dtype = await _aside(
            device, load_policy, str(resume_from[0]) if resume_from else args.model, device, args
        )
        if hasattr(engine, "enable_weight_sync"):
            probe = encode_prompt(tokenizer, environment.messages(train_samples[0]))[:64]
            await engine.enable_weight_sync(probe)
        reference = (await _aside(device, load_policy, args.model, device, args))[0] if config.kl_coef > 0 else None
        if resume_from is None:
            # Not before there is a run that takes the place of the earlier one.
            _set_aside(paths, [paths.metrics, paths.rollouts, paths.summary, paths.curve, paths.checkpoints])
        else:
            for path in (paths.metrics, paths.rollouts):  # what came after the checkpoint is made again
                await _aside(device, drop_steps_after, path, resume_from[1].step)
            later = [
                path
                for path in list_checkpoints(paths.checkpoints)
                if (step := checkpoint_step(path)) is not None and step > resume_from[1].step
            ]
            _set_aside(paths, later)
        metric_logger = make_logger(
            args.logger,
            metrics_path=paths.metrics,
            run_name=f"GRPO {Path(args.model).name}",
            config={**dataclasses.asdict(config), "model": args.model, "dataset": args.dataset or "openai/gsm8k"},
            total_steps=config.train_steps,
            run_id=resume_from[1].wandb_run_id if resume_from else None,
            started_from=resume_from[1].step if resume_from else 0,
        )
        with contextlib.closing(metric_logger):
            trainer = await _aside(
                device,
                GRPOTrainer,
                config=config,
                model=policy,
                model_name=args.model,
                tokenizer=tokenizer,
                engine=engine,
                environment=environment,
                train_samples=train_samples,
                eval_samples=eval_samples,
                metric_logger=metric_logger,
                paths=paths,
                eval_concurrency=args.concurrency,
                model_dtype=dtype,
                reference_model=reference,
                resume_from=resume_from,
                task=task,
                wandb_run_id=metric_logger.run_id,
            )
            if resume_from is not None and paths.metrics.exists():
                trainer.alarms.replay(read_jsonl(paths.metrics))
            try:
                summary = await trainer.run()
            finally:
                await environment.aclose()
    _finish(args, config, paths, summary, time.perf_counter() - started)


def load_policy(path: str, device: Any, args: argparse.Namespace) -> tuple["PreTrainedModel", Any]:
    """The model with fp32 masters on `device`, and the dtype that it came in.

    Raises:
        ValueError: there is no such model; one line.
    """
    import torch

    stored = load_config(path, trust_remote_code=args.trust_remote_code).dtype or torch.float32
    model = load_model(path, dtype=torch.float32, trust_remote_code=args.trust_remote_code)
    return torch.nn.Module.to(model, device), stored


async def _aside(
    device: Any, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """`function` on another thread, with this one's GPU."""

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


def _find_checkpoint(args: argparse.Namespace, paths: RunPaths) -> tuple[Path, TrainerState] | None:
    """The checkpoint that --resume means, with its state.

    Raises:
        ValueError: there is none, or it belongs to another model.
    """
    if args.resume is None:
        return None
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
    if state.model != args.model and not args.demo:
        raise ValueError(f"checkpoint {found} belongs to {state.model}, not to --model {args.model}")
    _say(f"continuing from {found} (update {state.step})")
    return found, state


def _load_eval_samples(args: argparse.Namespace, config: GRPOConfig) -> list[GSM8KSample]:
    if not config.eval_limit:
        return []
    source = args.eval_dataset or args.dataset
    if args.eval_dataset is None and source is not None and not Path(source).is_dir():
        _say(f"no evaluation: {source} is a single file; name other problems with --eval-dataset")
        return []
    return load("test", dataset=source, limit=config.eval_limit)


def _check_prompts(
    environment: GSM8K, tokenizer: "PreTrainedTokenizerBase", config: GRPOConfig, samples: list[GSM8KSample]
) -> None:
    """Find the prompt that is too long before a server is started for it."""
    for sample in samples:
        length = len(encode_prompt(tokenizer, environment.messages(sample)))
        if length > config.max_prompt_len:
            raise ValueError(
                f"a prompt is {length} tokens, more than --max-seq-len {config.max_seq_len} allows "
                f"with one token for an answer: {sample.question[:60]!r}..."
            )


def _seed_generators(seed: int) -> None:
    """Nothing of ours draws from the global generators, but checkpoints hold them: they begin alike in every process."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _check_this_machine(args: argparse.Namespace, config: GRPOConfig) -> None:
    """The quick checks of `python -m ludic.doctor`: a warning is said, a failure ends the run before it costs anything.

    Raises:
        ValueError: a check failed.
    """
    for finding in quick_checks(args, config):
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
    import torch
    from demo import NUM_THREADS, build_demo

    torch.set_num_threads(NUM_THREADS)
    _say("demo: no GPU, no server, no network. Making word problems in GSM8K's format and a small policy of our own,")
    _say("warm-started by imitating worked solutions (supervised, before GRPO begins) ...")
    folder = paths.out_dir / "gsm8k_demo"
    demo = build_demo(folder, seed=config.seed)
    args.model, args.dataset = str(demo.model_dir), str(folder)
    _say(
        f"the warm start took {demo.warm_start_s:.0f} s on {demo.num_warm_start:,} solutions: a policy of "
        f"{demo.num_parameters:,} parameters. From here on it is GRPO on {demo.num_train:,} other problems."
    )


def _finish(
    args: argparse.Namespace, config: GRPOConfig, paths: RunPaths, summary: "TrainingSummary", seconds: float
) -> None:
    record = {**dataclasses.asdict(summary), "wall_seconds": seconds, "model": args.model}
    paths.summary.write_text(json.dumps(record, indent=2) + "\n")
    metrics = [json.loads(line) for line in paths.metrics.read_text().splitlines() if line.strip()]
    curve = [(row["step"], row["reward_mean"]) for row in metrics if row.get("reward_mean") is not None]
    steps, rewards = [step for step, _ in curve], [reward for _, reward in curve]
    if len(curve) > 1:
        _say(reward_curve_text(steps, rewards))
        points = [(row["step"], row["eval/accuracy"]) for row in metrics if row.get("eval/accuracy") is not None]
        save_reward_curve(paths.curve, steps, rewards, evaluations=points)
    if len(summary.evaluations) > 1:
        title = f"{summary.eval_problems} held-out problems, temperature {config.eval_temperature:g}"
        Console().print(comparison_table(_comparison_rows(summary.evaluations), title=title))
    _say(
        f"{summary.updates} updates, {summary.rollouts} rollouts, {summary.completion_tokens} completion tokens "
        f"in {seconds:.0f} s"
    )
    for what, path in (
        ("checkpoint", summary.last_checkpoint),
        ("metrics", paths.metrics),
        ("rollouts", paths.rollouts),
        ("summary", paths.summary),
        ("reward curve", paths.curve if paths.curve.exists() else None),
    ):
        if path:
            _say(f"  {what + ':':<13} {path}")
    _say(f"next: {_next_command(args, config, paths, summary)}")


def _comparison_rows(evaluations: list[dict[str, Any]]) -> list[ComparisonRow]:
    before, after = evaluations[0], evaluations[-1]

    def row(name: str, key: str, kind: Literal["rate", "number"]) -> ComparisonRow:
        intervals = {f"{when}_ci95": tuple(e[f"{key}_ci95"]) for when, e in (("before", before), ("after", after))
                     if f"{key}_ci95" in e}  # fmt: skip
        return ComparisonRow(name=name, before=before[key], after=after[key], kind=kind, **intervals)

    return [
        row("accuracy", "accuracy", "rate"),
        row("strict accuracy", "strict_accuracy", "rate"),
        row("no boxed answer", "parse_err_rate", "rate"),
        row("truncated", "truncation_rate", "rate"),
        row("tokens each", "avg_completion_length", "number"),
    ]


def _next_command(args: argparse.Namespace, config: GRPOConfig, paths: RunPaths, summary: "TrainingSummary") -> str:
    """How to evaluate the last checkpoint on problems that were not trained on."""
    words = ["uv", "run", "python", "examples/gsm8k/eval_gsm8k_vllm.py", "--model", str(summary.last_checkpoint)]
    words += ["--engine", "local"] if args.engine == "local" else ["--start-server", "--port", "8001"]
    problems = args.eval_dataset or args.dataset
    if problems and Path(problems).is_dir():
        words += ["--dataset", problems]
    elif problems:
        words += ["--dataset", args.eval_dataset or "PROBLEMS"]  # never the file that was trained on
    if args.system_prompt:
        words += ["--system-prompt", args.system_prompt]
    words += ["--max-tokens", str(config.max_completion_len or 512), "--max-seq-len", str(config.max_seq_len)]
    return shlex.join([*words, "--out-dir", str(paths.out_dir), "--limit", "250"])


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_script("train_gsm8k.py", main)
