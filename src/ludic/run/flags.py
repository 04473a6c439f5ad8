"""The flags of every training script, beside those of its task: engine, settings of the run, files and log."""

import argparse

from ludic.cli import add_engine_arguments
from ludic.config import add_arguments


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """All that `train_from_flags` reads but `--model`, which stands with the flags of the task."""
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
