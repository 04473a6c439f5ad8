"""The flags of every training and of every evaluation, beside those of their task."""

import argparse

from ludic.cli import add_engine_arguments, check_engine_arguments
from ludic.config import add_arguments


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """All that `train_from_flags` reads but `--model`, which stands with the flags of the task; `parser` is a `RunParser`."""
    add_engine_arguments(parser)
    add_arguments(parser)
    files = parser.add_argument_group("files and log")
    files.add_argument(
        "--out-dir", default=".", metavar="DIR", help="folder for everything that the run writes (default: here)"
    )
    files.add_argument("--logger", default="rich",
                       help="comma-separated: rich, print, jsonl, tensorboard, wandb; or none (default: rich)")  # fmt: skip
    files.add_argument("--wandb-artifacts", action="store_true",
                       help="with --logger wandb, upload the report page and the last checkpoint's model at the end")  # fmt: skip
    files.add_argument("--resume", nargs="?", const="latest", default=None, metavar="CHECKPOINT",
                       help="continue from the last checkpoint in --out-dir, or from the one given")  # fmt: skip
    files.add_argument(
        "--no-checks", action="store_true", help="leave out the quick checks of `python -m ludic.doctor`"
    )
    files.add_argument("--verbose", action="store_true", help="also log each weight sync with its proof")
    files.add_argument("--forecast", action="store_true",
                       help="train nothing: say from 64 rollouts what the run would learn from and cost")  # fmt: skip


def add_evaluation_arguments(parser: argparse.ArgumentParser, *, out: str) -> None:
    """All that `evaluate_from_flags` reads but `--model`, which stands with the flags of the task; `out` is a file name.

    `parser` is a `RunParser`."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--tokenizer", metavar="FOLDER",
                       help="folder or hub name of tokenizer and config, where --model is only a server's name")  # fmt: skip
    group.add_argument("--checkpoints", action="extend", nargs="+", metavar="PATH",
                       help="in place of --model: models, or the --out-dir of a run, each evaluated and compared")  # fmt: skip
    group.add_argument("--limit", type=int, metavar="N", help="only the first N problems (default: all)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    group.add_argument("--top-p", type=float, default=1.0, help="nucleus; 1 is the whole distribution (default: 1)")
    group.add_argument("--max-tokens", type=int, default=512, help="limit of a completion (default: 512)")
    group.add_argument(
        "--max-seq-len", type=int, metavar="N", help="limit of prompt and completion (default: what the longest needs)"
    )
    group.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="K",
        help="completions a problem, for pass@k and maj@k up to K (default: 1)",
    )
    group.add_argument("--seed", type=int, default=0,
                       help="at a temperature above 0 each request gets a seed made from it (default: 0)")  # fmt: skip
    group.add_argument("--no-seed-requests", action="store_true",
                       help="send no seeds at a temperature above 0: quicker, and not repeatable")  # fmt: skip
    add_engine_arguments(parser, trains=False)
    group = parser.add_argument_group("output")
    group.add_argument("--out", default=out, metavar="FILE", help=f"the records (default: {out})")
    group.add_argument("--out-dir", default=".", metavar="DIR", help="folder of everything written (default: this one)")
    group.add_argument("--resume-eval", action="store_true", help="finish an --out that an earlier run left unfinished")
    group.add_argument("--overwrite", action="store_true", help="replace an --out that is there")


def check_evaluation_arguments(args: argparse.Namespace) -> None:
    """Refuse bad and contradictory flags of an evaluation before anything is loaded.

    Raises:
        ValueError: one line with the flag and its value.
    """
    check_engine_arguments(args)
    if len(args.server or ()) > 1:
        raise ValueError(f"an evaluation generates with one server, not with {len(args.server)}: give one --server")
    for flag in ("samples", "limit", "max_seq_len"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, not {value}")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(
            f"--samples {args.samples} at --temperature 0 would be {args.samples} times the same greedy answer: "
            "raise --temperature (0.8, say) or leave --samples at 1"
        )
    if args.seed_requests and args.no_seed_requests:
        raise ValueError("--seed-requests contradicts --no-seed-requests")
    if args.checkpoints and args.engine == "vllm" and not args.start_server:
        raise ValueError(
            "--checkpoints loads one after another, and a server that runs keeps the weights that it has: add --start-server, "
            "which starts one for each, or --engine local"
        )
    if args.resume_eval and args.overwrite:
        raise ValueError("--resume-eval keeps the records that are there, --overwrite drops them: choose one")
