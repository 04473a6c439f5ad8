r"""What one setting does to the demo's learning: `docs/choosing.md` has the table.

    OMP_NUM_THREADS=1 python benchmarks/choosing.py --out OUT

The demo as it is, and the demo with one setting changed, for each value in `SWEEPS`. Each seed's policy is warm-started once and
every run trains a copy of it with the same number of rollouts, so runs of a seed are compared with the demo of that seed. What is
said of a setting holds for this policy and these problems. What stays out: seconds, and settings changed two at a time.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Record, Records, machine, markdown_table, numbers, run_or_table, say, write_report
from benchmarks.learning import interval, parts, runs_of, settings_of, shown, train

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "gsm8k"))
from demo import NUM_TEST_PROBLEMS, NUM_THREADS, NUM_TRAIN_PROBLEMS, NUM_WARM_START_PROBLEMS, build_demo

SWEEPS: dict[str, tuple[float, ...]] = {
    "learning_rate": (1e-4, 2e-3),
    "group_size": (2, 32),
    "max_staleness": (4,),
    "temperature": (0.7,),
}
"""The values of each setting beside the demo's own."""
BASE = "demo"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder for policies, records and table")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="N,N", help="2 to 10 (default: 0,1,2)")
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=50, help="of each run (default: 50, as in the demo)")
    parser.add_argument("--rollouts", type=int, default=256, help="of an update (default: 256)")
    parser.add_argument("--train-problems", type=int, default=NUM_TRAIN_PROBLEMS, help="default: %(default)s")
    parser.add_argument("--test-problems", type=int, default=NUM_TEST_PROBLEMS, help="default: %(default)s")
    parser.add_argument(
        "--warm-start", type=int, default=NUM_WARM_START_PROBLEMS, help="solutions (default: %(default)s)"
    )
    parser.add_argument("--table", action="store_true", help="only write the table of the records that OUT holds")
    return parser


def arms(sweeps: Sequence[str]) -> dict[str, dict[str, float]]:
    """The settings of each run by its name, the demo first.

    Raises:
        ValueError: a sweep is not one of `SWEEPS`.
    """
    unknown = [name for name in sweeps if name not in SWEEPS]
    if unknown:
        raise ValueError(f"--sweeps {unknown[0]} is not one of {', '.join(SWEEPS)}")
    return {BASE: {}} | {f"{name} {value:g}": {name: value} for name in sweeps for value in SWEEPS[name]}


def run_all(args: argparse.Namespace, records: Records) -> None:
    """Every seed and arm that the records do not hold yet, one after the other."""
    import torch

    torch.set_num_threads(NUM_THREADS)
    settings = settings_of(args)
    done = {(run["arm"], run["seed"]) for run in runs_of(records, settings)}
    records.add("machine", **machine())
    for seed in args.seeds:
        missing = {arm: changed for arm, changed in arms(args.sweeps.split(",")).items() if (arm, seed) not in done}
        if not missing:
            continue
        demo_dir = args.out / f"choosing_seed_{seed}"
        say(f"seed {seed}: warm start of the policy that {len(missing)} runs share")
        sizes = {"num_train": args.train_problems, "num_test": args.test_problems, "num_warm_start": args.warm_start}
        build_demo(demo_dir, seed=seed, **sizes)
        for arm, changed in missing.items():
            run = asyncio.run(train(args, demo_dir, seed=seed, arm=arm.replace(" ", "_"), settings=changed))
            records.add("run", settings=settings, **{**run, "arm": arm})
            say(f"seed {seed}, {arm}: {shown(run['accuracy_after'])} after {run['seconds']:.0f} s")


def table_row(arm: str, runs: Sequence[Record], base: Sequence[Record]) -> list[Any]:
    """One line: the arm, accuracy of each seed, the paired difference from the demo with its 95% interval, and why."""
    differences = [100 * (run["accuracy_after"] - of["accuracy_after"]) for run, of in zip(runs, base, strict=True)]
    low, high = interval(differences)
    against = "" if arm == BASE else f"{statistics.fmean(differences):+.1f} ({low:+.1f} to {high:+.1f})"
    means = {name: statistics.fmean(x for run in runs for x in run[name]) for name in ("zero_variance", "truncated")}
    last = statistics.fmean(parts(run["reward"])[-1] for run in runs)
    age = statistics.fmean(x for run in runs for x in run["staleness"])
    return [
        arm,
        " / ".join(shown(run["accuracy_after"]) for run in runs),
        against,
        shown(last),
        shown(means["zero_variance"]),
        shown(means["truncated"]),
        age,
    ]


def write_table(args: argparse.Namespace, records: Records) -> None:
    """`choosing.md`, of the runs of all seeds.

    Raises:
        ValueError: a run is missing.
    """
    found = {(run["arm"], run["seed"]): run for run in runs_of(records, settings_of(args))}
    names = list(arms(args.sweeps.split(",")))
    for arm in names:
        for seed in args.seeds:
            if (arm, seed) not in found:
                raise ValueError(f"there is no run of {arm} with seed {seed}: leave --table out to make it")
    of_arm = {arm: [found[arm, seed] for seed in args.seeds] for arm in names}
    before = " / ".join(shown(run["accuracy_before"]) for run in of_arm[BASE])
    size = (
        f"{args.updates} updates of {args.rollouts} rollouts, seeds {', '.join(map(str, args.seeds))}; greedy accuracy on "
        f"{args.test_problems} held-out problems, {before} before; the difference from the demo in points, with its two-sided "
        "95% interval over the pairs of equal seeds."
    )
    header = [
        *("setting", "accuracy after", "against the demo", "reward, last tenth"),
        *("groups without variance", "cut off", "staleness"),
    ]
    rows = [table_row(arm, runs, of_arm[BASE]) for arm, runs in of_arm.items()]
    write_report(
        args.out / "choosing.md",
        "One setting at a time",
        records.last()["machine"],
        [size, markdown_table(header, rows)],
    )


def main() -> None:
    args = build_parser().parse_args()
    try:
        arms(args.sweeps.split(","))
        if len(set(args.seeds)) < 2:
            raise ValueError(f"--seeds needs at least 2 different numbers for an interval, not {len(set(args.seeds))}")
        run_or_table("choosing", args, run_all, write_table)
    except ValueError as error:
        raise SystemExit(f"choosing.py: {error}") from error


if __name__ == "__main__":
    main()
