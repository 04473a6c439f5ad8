"""The command line of `python -m ludic.doctor`."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ludic.cli import add_engine_arguments, check_engine_arguments, expand_home, hide_loading_bars, say
from ludic.commands import left_out
from ludic.config import DEFAULT_MODEL, add_arguments, from_arguments
from ludic.config_file import RunParser
from ludic.doctor.findings import Finding, ok, run_checks, warning
from ludic.doctor.machine import ask_hub_once, local_checks
from ludic.storage.inert import inert

GSM8K_SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "gsm8k" / "train_gsm8k.py"


def build_parser() -> RunParser:
    """The flags of the training script that matter here."""
    parser = RunParser(
        passes_over=True,
        prog="python -m ludic.doctor",
        description="Says in under a minute what would keep a training run with these flags from working.",
    )
    task = parser.add_argument_group("task")
    task.add_argument("--model", default=DEFAULT_MODEL, help="hub name or folder (default: %(default)s)")
    task.add_argument(
        "--dataset", default=None, metavar="PATH", help="folder or file of problems (default: the hub's GSM8K)"
    )
    task.add_argument("--out-dir", default=".", metavar="DIR", help="where the run would write (default: here)")
    task.add_argument("--forecast", nargs="?", const=str(GSM8K_SCRIPT), default=None, metavar="SCRIPT",
                       help="if no check fails, the forecast of this training script (GSM8K's, if none is named)")  # fmt: skip
    add_engine_arguments(parser)
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks; 0 if none failed, else 1. 2 for flags that make no sense, such as an adapter or a quantised --model.

    With --forecast and no failure this process becomes the training script's, and does not return.
    """
    given = sys.argv[1:] if argv is None else argv
    counts = {"ok": 0, "warning": 0, "failed": 0}
    try:
        args = expand_home(build_parser().parse_args(given))
        check_engine_arguments(args)
        if args.forecast is not None and not Path(args.forecast).expanduser().is_file():
            raise ValueError(f"--forecast {args.forecast} is no file: name the script that trains")
        config = from_arguments(args)
        from ludic.doctor.server import server_checks  # brings an HTTP client: --help and wrong flags answer without it

        checks = local_checks(args, config) + (server_checks(args, config) if args.engine == "vllm" else [])
        if args.passed_over:
            checks.insert(0, ("config", lambda: check_config(args)))
        ask_hub_once(args)
        hide_loading_bars()
        for finding in run_checks(checks):
            counts[finding.status] += 1
            say(str(finding))
    except ValueError as error:  # of a check, it is an UnusableModelError
        sys.stderr.write(f"python -m ludic.doctor: error: {inert(str(error))}\n")
        return 2
    say(", ".join(f"{count} {status}" for status, count in counts.items()))
    if args.forecast is not None and not counts["failed"]:
        _become(Path(args.forecast).expanduser(), left_out(given, ["--forecast"]))
    return 1 if counts["failed"] else 0


def check_config(args: argparse.Namespace) -> Finding:
    """Keys of --config that no training has by itself: the task's own flags, or typos, which only its script can tell."""
    settings = [name for values in args.resolved.values() for name in values]
    near = {
        key: difflib.get_close_matches(key.replace("-", "_"), settings, n=1, cutoff=0.85) for key in args.passed_over
    }
    found = f"{args.config} has keys that only the training script can check: {', '.join(args.passed_over)}"
    typos = ", ".join(f"{names[0]} for {key}" for key, names in near.items() if names)
    return warning("config", found, f"did you mean {typos}?") if typos else ok("config", found)


def _become(script: Path, flags: Sequence[str]) -> None:
    """The doctor has no task of its own, and the script has: it takes the doctor's flags, and need not check again."""
    os.execv(sys.executable, [sys.executable, str(script), *flags, "--forecast", "--no-checks"])


if __name__ == "__main__":
    sys.exit(main())
