"""Every plug pulled, many times: the table of what is promised, with the count of injections and what came of each.

    python benchmarks/survival.py --model POLICY --dataset DIR --out OUT [--rows trainer,disk] [--scale 0.1]

POLICY is a small policy that trains in milliseconds (`make_policy.py --shape tiny`), DIR has train.jsonl and test.jsonl. The
rows that need nothing but this machine are made here. Two need a real server each and are programs of their own, whose lines
`--add FILE` puts into the table: `benchmarks.faults.server_lost` (any vLLM) and `benchmarks.faults.nccl` (two GPUs).
Everything is written to OUT/survival.jsonl as it comes, one injection a line, and OUT/survival.md at the end.
"""

import argparse
import collections
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.faults.outcome import Injection
from benchmarks.harness import machine, markdown_table, say

COUNTS = {
    "trainer": 60,
    "signals": 24,
    "environment": 40,
    "disk": 420,
    "weights": 1_000,
    "wire": 1_000,
    "grader": 500,
    "numbers": 160,
    "trainers": 2_000,
}
"""Injections of each row at --scale 1."""


def inject(row: str, count: int, args: argparse.Namespace) -> list[Injection]:
    """One row's injections; each module is imported when its turn comes."""
    folder, seed = args.out / row, args.seed
    folder.mkdir(parents=True, exist_ok=True)
    if row == "trainer":
        from benchmarks.faults import trainer_killed

        on_policy, ahead = count - count // 3, count // 3
        common = {"policy": args.model, "problems": args.dataset}
        return [
            *trainer_killed.inject(on_policy, seed=seed, folder=folder / "on_policy", **common),
            *trainer_killed.inject(
                ahead, seed=seed + 1, folder=folder / "ahead", max_staleness=1, save_every=2, **common
            ),
        ]
    if row == "signals":
        from benchmarks.faults import signals

        return signals.inject(count, seed=seed, folder=folder, policy=args.model, problems=args.dataset)
    if row == "environment":
        from benchmarks.faults import environment

        return environment.inject(count, seed=seed, folder=folder, policy=args.model, problems=args.dataset)
    if row == "numbers":
        from benchmarks.faults import numbers

        return numbers.inject(count, seed=seed, folder=folder, policy=args.model)
    from benchmarks.faults import disk, grader, trainers, weights, wire

    rows: dict[str, Callable[[], list[Injection]]] = {
        "disk": lambda: disk.inject(count, seed=seed, folder=folder),
        "weights": lambda: weights.inject(count, seed=seed, folder=folder),
        "grader": lambda: grader.inject(count, seed=seed, folder=folder),
        "trainers": lambda: trainers.inject(count, seed=seed, folder=folder),
        "wire": lambda: [
            *wire.inject(count // 2, seed=seed, folder=folder),
            *wire.inject(count // 2, seed=seed + 1, folder=folder, own_route=False),
        ],
    }
    return rows[row]()


def table(injections: Iterable[Injection]) -> str:
    """One line a row and outcome: how often, and how long the slowest and the median took."""
    groups: dict[tuple[str, str, bool], list[Injection]] = collections.defaultdict(list)
    for one in injections:
        groups[one.row, one.outcome, one.ok].append(one)
    lines = []
    for (row, outcome, kept), members in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        seconds = [one.seconds for one in members if one.seconds is not None]
        timing = f"{statistics.median(seconds):.3g} / {max(seconds):.3g}" if seconds else ""
        kinds = len({one.fault for one in members})
        lines.append([row, len(members), kinds, outcome[:200], "yes" if kept else "NO", timing])
    headers = ["promise", "injections", "kinds of fault", "outcome", "kept", "seconds, median / most"]
    return markdown_table(headers, lines)


def totals(injections: Sequence[Injection]) -> str:
    """One line a row: injections, and how many kept the promise."""
    rows: dict[str, list[bool]] = collections.defaultdict(list)
    for one in injections:
        rows[one.row].append(one.ok)
    return markdown_table(
        ["promise", "injections", "kept"], [[row, len(kept), sum(kept)] for row, kept in rows.items()]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small policy")
    parser.add_argument("--dataset", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, default=Path("bench_out/survival"))
    parser.add_argument("--rows", default=",".join(COUNTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="times the counts, at least 1 each")
    parser.add_argument(
        "--add", type=Path, action="append", default=[], metavar="FILE", help="JSON lines of injections"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.model, args.dataset, args.out = (path.resolve() for path in (args.model, args.dataset, args.out))
    rows = [row for row in args.rows.split(",") if row]
    if unknown := set(rows) - COUNTS.keys():
        parser.error(f"--rows {', '.join(sorted(unknown))}: choose among {', '.join(COUNTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    injections = [
        Injection(**json.loads(line))
        for path in args.add
        for line in path.read_text().splitlines()
        if line.startswith("{")
    ]
    with (args.out / "survival.jsonl").open("a") as record:
        for row in rows:
            count, started = max(1, round(COUNTS[row] * args.scale)), time.monotonic()
            found = inject(row, count, args)
            injections += found
            record.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in found)
            record.flush()
            say(
                f"{row}: {sum(one.ok for one in found)} of {len(found)} as promised, {time.monotonic() - started:.0f} s"
            )
    text = f"{json.dumps(machine())}\n\n{totals(injections)}\n\n{table(injections)}\n"
    (args.out / "survival.md").write_text(text)
    sys.stdout.write(text)
    return 0 if all(one.ok for one in injections) else 1


if __name__ == "__main__":
    sys.exit(main())
