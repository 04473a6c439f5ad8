"""Train a model on GSM8K with GRPO: the flags of the task, its problems, and the demo. All else is `ludic.run`.

    python examples/gsm8k/train_gsm8k.py --demo                      no GPU, no server, nothing downloaded
    python -m ludic.inference.vllm_server --model MODEL              in one process (GPU 0), and in another (GPU 1)
    python examples/gsm8k/train_gsm8k.py --model MODEL --micro-token-budget 16384 --max-seq-len 1024

`examples/gsm8k/README.md` is the walk-through.
"""

import argparse
import contextlib
import os
import shlex
from pathlib import Path

from environments.gsm8k import DEFAULT_SYSTEM_PROMPT, GSM8K, HUB_ID, NAME, GSM8KSample, load
from ludic.cli import run_script, say
from ludic.config import DEFAULT_MODEL, GRPOConfig, RunPaths, from_arguments
from ludic.config_file import RunParser
from ludic.flags import add_run_arguments
from ludic.run.task import Samples, Task
from ludic.run.training import train_from_flags
from ludic.telemetry.progress import StatusLine

DEMO_FOLDER = "gsm8k_demo"
"""In --out-dir: the demo's policy and problems."""


def build_parser() -> RunParser:
    """Every flag, in groups."""
    parser = RunParser(
        prog="train_gsm8k.py",
        description="Train a model on GSM8K with GRPO, against a vLLM server that runs in another process.",
    )
    task = parser.add_argument_group("task")
    task.add_argument("--demo", action="store_true",
                      help="a small policy and problems of our own: one to two minutes on 2 CPU cores")  # fmt: skip
    task.add_argument("--model", default=DEFAULT_MODEL, help=f"hub name or folder (default: {DEFAULT_MODEL})")
    task.add_argument("--dataset", default=None, metavar="PATH",
                      help="folder of train and test, or one file: JSONL (.gz), parquet or CSV (default: the hub)")  # fmt: skip
    task.add_argument(
        "--eval-dataset", default=None, metavar="PATH", help="problems to evaluate on, when not in --dataset"
    )
    task.add_argument("--limit", type=int, default=None, help="train on the first N problems only (default: all)")
    task.add_argument("--system-prompt", default=DEFAULT_SYSTEM_PROMPT, help="default: %(default)s")
    add_run_arguments(parser)
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the demo's own under those that were given or stand in the file.

    Raises:
        ValueError: a flag contradicts --demo, or is out of range.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.demo:
        from demo import DEMO_FLAGS

        parser.set_flag_defaults(DEMO_FLAGS)
        args = parser.parse_args(argv)
        for flag in ("model", "dataset", "eval_dataset", "engine", "start_server", "resume"):
            if getattr(args, flag) != parser.get_default(flag):
                way_out = f"; {go_on_with_demo(args)}" if flag == "resume" else ""
                raise ValueError(
                    f"--demo brings its own policy and problems: it contradicts --{flag.replace('_', '-')}{way_out}"
                )
        del args.resolved["task"]["model"]  # the default, which the demo does not train
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {args.limit}")
    return args


def go_on_with_demo(args: argparse.Namespace) -> str:
    """The flags that continue the demo of --out-dir, whose policy and problems are files by then."""
    paths, folder = RunPaths(name=NAME, out_dir=Path(args.out_dir)), Path(args.out_dir) / DEMO_FOLDER
    place = [] if args.resume == "latest" else [args.resume]
    flags = ["--config", str(paths.config), "--no-demo", "--model", str(folder / "model"), "--dataset", str(folder)]
    return f"to go on with that of --out-dir {args.out_dir}, give {shlex.join([*flags, '--resume', *place])}"


async def main() -> int:
    args = parse_arguments()
    async with contextlib.aclosing(GSM8K(system_prompt=args.system_prompt)) as environment:
        summary = await train_from_flags(args, task_of(args, environment))
    if args.forecast:
        return 0
    from next_commands import evaluation_advice

    for line in evaluation_advice(args, from_arguments(args), summary.last_checkpoint, Path(args.out_dir)):
        say(line)
    return 0


def task_of(args: argparse.Namespace, environment: GSM8K) -> Task[GSM8KSample]:
    """GSM8K as the flags ask for it."""
    return Task(
        environment=environment,
        load_samples=load_samples,
        name=NAME,
        hub_dataset=None if args.dataset else HUB_ID,
        plain_template=Path(os.path.relpath(Path(__file__).with_name("chatml.jinja"))),
        make_policy=make_demo if args.demo else None,
    )


def load_samples(args: argparse.Namespace) -> Samples[GSM8KSample]:
    """The problems that the flags name."""
    settings = {
        "dataset": args.dataset or HUB_ID,
        "eval_dataset": args.eval_dataset,
        "limit": args.limit,
        "system_prompt": args.system_prompt,
    }
    return Samples(
        train=load("train", dataset=args.dataset, limit=args.limit, say=lambda line: say(f"train: {line}")),
        evaluation=_load_eval_samples(args, from_arguments(args).eval_limit),
        settings=settings,
    )


def _load_eval_samples(args: argparse.Namespace, limit: int) -> list[GSM8KSample]:
    if not limit:
        return []
    source = args.eval_dataset or args.dataset
    if args.eval_dataset is None and source is not None and not Path(source).is_dir():
        say(f"no evaluation: {source} is a single file; name other problems with --eval-dataset")
        return []
    return load("test", dataset=source, limit=limit, say=lambda line: say(f"evaluation: {line}"))


def make_demo(args: argparse.Namespace, config: GRPOConfig, out_dir: Path) -> None:
    """Make the demo's policy and problems, and point the flags at them."""
    say("demo: no GPU, no server, no network. Making word problems in GSM8K's format and a small policy of our own,")
    say("warm-started by imitating worked solutions (supervised, before GRPO begins) ...")
    import torch
    from demo import NUM_THREADS, build_demo

    torch.set_num_threads(NUM_THREADS)
    folder = out_dir / DEMO_FOLDER
    with StatusLine(say) as status:
        status.show("warm start: drawing problems and making a tokenizer")
        demo = build_demo(folder, seed=config.seed, on_progress=status.show)
    args.model, args.dataset = str(demo.model_dir), str(folder)
    say(
        f"the warm start took {demo.warm_start_s:.0f} s on {demo.num_warm_start:,} solutions: a policy of "
        f"{demo.num_parameters:,} parameters. From here on it is GRPO on {demo.num_train:,} other problems."
    )


if __name__ == "__main__":
    run_script("train_gsm8k.py", main)
