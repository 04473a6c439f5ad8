"""The command line of `python -m ludic.doctor`."""

import argparse
import sys
from collections.abc import Sequence

from ludic.cli import add_engine_arguments, check_engine_arguments, expand_home, hide_loading_bars
from ludic.config import DEFAULT_MODEL, add_arguments, from_arguments
from ludic.doctor.findings import run_checks
from ludic.doctor.machine import ask_hub_once, local_checks
from ludic.storage.inert import inert
from ludic.task.pretrained import UnusableModelError


def build_parser() -> argparse.ArgumentParser:
    """The flags of the training script that matter here."""
    parser = argparse.ArgumentParser(
        prog="python -m ludic.doctor",
        description="Says in under a minute what would keep a training run with these flags from working.",
    )
    task = parser.add_argument_group("task")
    task.add_argument("--model", default=DEFAULT_MODEL, help="hub name or folder (default: %(default)s)")
    task.add_argument(
        "--dataset", default=None, metavar="PATH", help="folder or file of problems (default: the hub's GSM8K)"
    )
    task.add_argument("--out-dir", default=".", help="where the run would write (default: here)")
    add_engine_arguments(parser)
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks; 0 if none failed, else 1. 2 for flags that make no sense, such as an adapter or a quantised --model."""
    args = expand_home(build_parser().parse_args(argv))
    try:
        check_engine_arguments(args)
        config = from_arguments(args)
        from ludic.doctor.server import server_checks  # brings an HTTP client: --help and wrong flags answer without it

        checks = local_checks(args, config) + (server_checks(args, config) if args.engine == "vllm" else [])
    except ValueError as error:
        return _refused(error)
    ask_hub_once(args)
    hide_loading_bars()
    counts = {"ok": 0, "warning": 0, "failed": 0}
    try:
        for finding in run_checks(checks):
            counts[finding.status] += 1
            sys.stdout.write(f"{finding}\n")
            sys.stdout.flush()
    except UnusableModelError as error:
        return _refused(error)
    sys.stdout.write(", ".join(f"{count} {status}" for status, count in counts.items()) + "\n")
    return 1 if counts["failed"] else 0


def _refused(error: Exception) -> int:
    sys.stderr.write(f"python -m ludic.doctor: error: {inert(str(error))}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
