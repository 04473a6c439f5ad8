"""The command line of `python -m ludic.report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ludic.cli import say
from ludic.completion import add_completion_argument
from ludic.report.page import MAX_ROLLOUTS, write_report
from ludic.report.runs import default_page
from ludic.storage.inert import inert
from ludic.versions import add_version_argument


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m ludic.report",
        description="Writes one HTML page of the runs: curves, seconds, every rollout, evaluations, settings. "
        "The page makes no network requests. Works while a run is in progress.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="the --out-dir of a training or an evaluation, or its JSON lines file; several are drawn together",
    )
    add_completion_argument(parser)
    add_version_argument(parser)
    page = parser.add_argument_group("page")
    page.add_argument("--out", type=Path, metavar="FILE", help="the page (default: beside the files of the first run)")
    page.add_argument("--png", action="store_true", help="also save the main curves as a PNG, beside the page")
    page.add_argument(
        "--max-rollouts",
        type=int,
        default=MAX_ROLLOUTS,
        metavar="N",
        help="completions of one training on the page; of more, those of evenly spread updates (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 0 if it is there, 2 for something to be put right, in one line."""
    args = build_parser().parse_args(argv)
    paths = [path.expanduser() for path in args.runs]
    out = args.out.expanduser() if args.out else default_page(paths[0])
    try:
        if args.max_rollouts < 1:
            raise ValueError(f"--max-rollouts must be at least 1, not {args.max_rollouts}")
        runs = write_report(paths, out, max_rollouts=args.max_rollouts)
        say(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)")
        if args.png:
            from ludic.report.picture import save_curves

            save_curves(out.with_suffix(".png"), runs)
            say(f"written: {out.with_suffix('.png')}")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"python -m ludic.report: error: {inert(str(error))}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
