"""Losses on rollouts that are not the policy's own: loss x ratio x staleness or mini-batches, final accuracy over the seeds.

    OMP_NUM_THREADS=1 python benchmarks/off_policy.py --out OUT        about 100 minutes on one CPU core, without a GPU

The demo's policy and problems. For each seed a policy is warm-started once, and every arm trains a copy of it on the same
prompts in the same order with the same number of rollouts. What differs is the loss, the policy that its ratio is to
(`--ratio-to`), and why the data are not the policy's own: rollouts 1 or 4 updates old, or 4 optimizer steps an update. The
in-process engine serves calls in their order, so stale rollouts have just that age from then on, the worst of a server.

Every other setting is the trainer's default, so stale rollouts are corrected (`--tis-cap 2`) where the ratio is to the
update's start, and by the ratio itself where it is to the sampler. With three seeds the spread is wide: arms whose ranges
overlap were not told apart. An interrupted run goes on where it stopped; `--minutes` ends it between two runs.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Record, Records, machine, markdown_table, numbers, run_or_table, say, write_report
from benchmarks.learning import parts, runs_of, settings_of, shown, train
from ludic.config import LOSS_NAMES

sys.path.insert(0, str(ROOT / "examples" / "gsm8k"))  # no package: the demo's script is run from its folder
from demo import NUM_TEST_PROBLEMS, NUM_THREADS, NUM_TRAIN_PROBLEMS, NUM_WARM_START_PROBLEMS, build_demo

CASES: dict[str, tuple[str, dict[str, float | str]]] = {
    "fresh": ("on-policy", {}),
    "stale1": ("staleness 1", {"max_staleness": 1}),
    "stale4": ("staleness 4", {"max_staleness": 4}),
    "mini4": ("4 mini-batches", {"mini_batches": 4}),
}
"""Each case's name in the table and its settings."""
RATIOS = ("update", "sampler")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder for policies, records and table")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="N,N", help="at least 2 (default: 0,1,2)")
    parser.add_argument("--losses", default=",".join(LOSS_NAMES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=50, help="of each run (default: 50, as in the demo)")
    parser.add_argument("--rollouts", type=int, default=256, help="of an update (default: 256)")
    parser.add_argument("--train-problems", type=int, default=NUM_TRAIN_PROBLEMS, help="default: %(default)s")
    parser.add_argument("--test-problems", type=int, default=NUM_TEST_PROBLEMS, help="default: %(default)s")
    parser.add_argument(
        "--warm-start", type=int, default=NUM_WARM_START_PROBLEMS, help="solutions (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="begin no run after so many; 0: no limit (default: 0)"
    )
    parser.add_argument("--table", action="store_true", help="only write the table of the records that OUT holds")
    return parser


def arms(losses: Sequence[str], cases: Sequence[str]) -> dict[str, dict[str, float | str]]:
    """The settings of each run by its name. On-policy data have one ratio: the sampler is the policy.

    Raises:
        ValueError: a loss or a case is unknown.

    Example:
        >>> arms(["gspo"], ["stale1"])["gspo stale1 sampler"]
        {'loss': 'gspo', 'ratio_to': 'sampler', 'max_staleness': 1}
    """
    for given, known, flag in ((losses, LOSS_NAMES, "--losses"), (cases, tuple(CASES), "--cases")):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{flag} {unknown[0]} is not one of {', '.join(known)}")
    return {
        f"{loss} {case} {ratio}": {"loss": loss, "ratio_to": ratio, **CASES[case][1]}
        for case in cases
        for loss in losses
        for ratio in (RATIOS if case != "fresh" else RATIOS[:1])
    }


def run_all(args: argparse.Namespace, records: Records) -> None:
    """Every arm and seed that the records do not hold yet, all seeds of an arm before the next, within the minutes."""
    import torch

    torch.set_num_threads(NUM_THREADS)
    settings, started = settings_of(args), time.perf_counter()
    done = {(run["arm"], run["seed"]) for run in runs_of(records, settings)}
    records.add("machine", **machine())
    sizes = {"num_train": args.train_problems, "num_test": args.test_problems, "num_warm_start": args.warm_start}
    built: set[int] = set()
    for arm, changed in arms(args.losses.split(","), args.cases.split(",")).items():
        for seed in args.seeds:
            if (arm, seed) in done:
                continue
            if args.minutes and time.perf_counter() - started > 60 * args.minutes:
                say(f"--minutes {args.minutes:g} are over: {arm} with seed {seed} and what follows are not run")
                return
            folder = args.out / f"off_policy_seed_{seed}"
            if seed not in built:
                say(f"seed {seed}: warm start of the policy that its runs share")
                build_demo(folder, seed=seed, **sizes)
                built.add(seed)
            run = asyncio.run(train(args, folder, seed=seed, arm=arm.replace(" ", "_"), settings=changed))
            records.add("run", settings=settings, **{**run, "arm": arm})
            say(f"seed {seed}, {arm}: {shown(run['accuracy_after'])} after {run['seconds']:.0f} s")


def table_row(arm: str, runs: Sequence[Record], base: Sequence[Record]) -> list[Any]:
    """One line: loss, ratio and case; over the seeds mean and range of the final accuracy and of its difference from that of
    `base` with the same seed, in points, since policies of different seeds differ by more than arms; and the last reward."""
    loss, case, ratio = arm.split(" ")
    after = [run["accuracy_after"] for run in runs]
    differences = [100 * (run["accuracy_after"] - of["accuracy_after"]) for run, of in zip(runs, base, strict=True)]
    low, mean, high = min(differences), statistics.fmean(differences), max(differences)
    return [
        CASES[case][0],
        loss,
        ratio if case != "fresh" else "either",
        shown(statistics.fmean(after)),
        f"{shown(min(after))} to {shown(max(after))}",
        "" if runs is base else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
        shown(statistics.fmean(parts(run["reward"])[-1] for run in runs)),
        statistics.fmean(x for run in runs for x in run["staleness"]),
    ]


def write_table(args: argparse.Namespace, records: Records) -> None:
    """`off_policy.md`, of the arms that all seeds were run of; the others are named.

    Raises:
        ValueError: there is no such arm.
    """
    found = {(run["arm"], run["seed"]): run for run in runs_of(records, settings_of(args))}
    names = list(arms(args.losses.split(","), args.cases.split(",")))
    whole = [arm for arm in names if all((arm, seed) in found for seed in args.seeds)]
    if not whole:
        raise ValueError("no arm was run with all seeds: leave --table out, or give more --minutes")
    before = " / ".join(shown(found[whole[0], seed]["accuracy_before"]) for seed in args.seeds)
    size = (
        f"{args.updates} updates of {args.rollouts} rollouts, seeds {', '.join(map(str, args.seeds))}; greedy accuracy on "
        f"{args.test_problems} held-out problems, {before} before."
    )
    of_arm = {arm: [found[arm, seed] for seed in args.seeds] for arm in whole}
    loss, case, ratio = whole[0].split(" ")
    header = [
        *("data", "loss", "ratio to", "accuracy after, mean", "lowest to highest"),
        *(f"against {loss}, {ratio}, {CASES[case][0]}", "reward, last tenth", "staleness"),
    ]
    rows = [table_row(arm, runs, of_arm[whole[0]]) for arm, runs in of_arm.items()]
    missing = [f"Not run with all seeds: {', '.join(arm for arm in names if arm not in whole)}."]
    write_report(
        args.out / "off_policy.md",
        "Losses on data that are not the policy's own",
        records.last()["machine"],
        [size, markdown_table(header, rows), *(missing if len(whole) < len(names) else [])],
    )


def main() -> None:
    args = build_parser().parse_args()
    try:
        arms(args.losses.split(","), args.cases.split(","))
        if len(set(args.seeds)) < 2:
            raise ValueError(f"--seeds needs at least 2 different numbers for a spread, not {len(set(args.seeds))}")
        run_or_table("off_policy", args, run_all, write_table)
    except ValueError as error:
        raise SystemExit(f"off_policy.py: {error}") from error


if __name__ == "__main__":
    main()
