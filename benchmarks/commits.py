"""Seconds of an update at this commit and at another one, in turns, on one host: is a change slower than what it replaces?

    git worktree add /tmp/before COMMIT
    python benchmarks/commits.py --against /tmp/before --dataset DIR --out OUT            two GPUs

Each checkout serves with its own server and trains with its own `benchmarks/ludic_updates.py`. Both servers stay up on GPU 0,
where one that generates nothing costs nothing; the trainers take turns on GPU 1, since one server's seconds differ more from
minute to minute than most changes make them differ. Each turn is a whole run: a trainer of another commit may not know how to
pause. The weights are random, so completions have a fixed length and both sides train on as many tokens.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import (
    ROOT,
    Record,
    check_common_arguments,
    common_parser,
    machine,
    markdown_table,
    mean,
    median,
    records_of,
    say,
    write_report,
)
from benchmarks.parts import in_turns, run_part
from benchmarks.processes import (
    PartError,
    ServerSpec,
    ensure_policy,
    gpus_for,
    ludic_server,
    run_and_write,
    serving,
    vllm_settings,
)
from benchmarks.update import ludic_command, rows_after

GPU_SHARE, KV_CACHE_GIB = 0.3, 24.0


def build_parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__, name="commits")
    parser.add_argument("--against", type=Path, help="folder of the other checkout (needed unless --table)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--updates", type=int, default=14, help="of a run (default: 14)")
    parser.add_argument("--skip", type=int, default=3, help="first updates that are left out (default: 3)")
    parser.add_argument("--rollouts", type=int, default=256, help="of an update (default: 256)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a prompt (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of each completion (default: 128)")
    parser.add_argument("--max-seq-len", type=int, default=1024, help="prompt and completion (default: 1024)")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds that a run may take (default: 120)")
    parser.add_argument("--ludic-args", default="", help="more flags of both trainers, in one string")
    return parser


def environment_of(checkout: Path) -> dict[str, str]:
    """What makes a child import this checkout's code, wherever it is started."""
    path = [str(checkout / "src"), str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


def measure_all(args: argparse.Namespace) -> None:
    """Start both servers, let the trainers take turns, and record each run as soon as it is done."""
    check_common_arguments(args)
    if args.against is None or not (args.against / "benchmarks" / "ludic_updates.py").is_file():
        raise ValueError(f"--against {args.against} is no checkout of ludic: it has no benchmarks/ludic_updates.py")
    records = records_of(args)
    records.add("machine", **machine())
    serving_gpu, training_gpu = gpus_for(args.device)
    policy = ensure_policy(args, random=True, gpu=training_gpu)
    environments = {"this": environment_of(ROOT), "other": environment_of(args.against.resolve())}
    settings = vllm_settings(
        device=args.device, max_model_len=args.max_seq_len, gpu_share=GPU_SHARE, kv_cache_gib=KV_CACHE_GIB
    )
    specs = []
    for side, environment in environments.items():
        server = ludic_server(policy, settings, gpu=serving_gpu, name=side)
        specs.append(ServerSpec(name=side, command=server.command, gpu=serving_gpu, env={**server.env, **environment}))
    with serving(specs if args.engine == "vllm" else [], log_dir=args.out) as servers:

        def run(turn: tuple[str, int]) -> bool:
            side, number = turn
            name = f"{side} {number}"
            if args.engine == "vllm" and side not in servers:
                records.add(name, rows=[], problem="its server did not come up")
                return False
            command = ludic_command(args, "ludic", policy, servers.get(side))
            log_path = args.out / f"{side}_{number}.log"
            try:
                rows = run_part(
                    command, log_path=log_path, deadline_s=args.deadline, gpu=training_gpu, env=environments[side]
                )
                problem = next((str(row["cut_off"]) for row in rows if "cut_off" in row), None)
            except PartError as error:  # the other side's rows are still worth their time
                rows, problem = [], str(error)
            records.add(name, rows=[row for row in rows if "step" in row], problem=problem)
            say(f"{name}: {len(rows)} records")
            return False

        in_turns([[(side, number) for number in range(1, args.turns + 1)] for side in environments], run)


NAMES = {"this": "this commit", "other": "the other"}
PARTS = ("wait_s", "train_s", "sync_s")


def write_table(args: argparse.Namespace) -> None:
    """OUT/commits.md from the records."""
    records = records_of(args).last()
    on = records.pop("machine")
    sides: dict[str, list[Record]] = {"this": [], "other": []}
    lines = []
    for name, record in records.items():
        side, turn = name.split()
        rows = rows_after(record["rows"], args.skip)
        sides[side] += rows
        lines.append([f"{NAMES[side]} {turn}", *figures(rows)])
    seconds = {side: median([row["seconds"] for row in rows]) for side, rows in sides.items()}
    table = markdown_table(["", "seconds", "median", "waits for rollouts", "train", "sync", "tokens", "updates"], lines)
    ratio = f"Median of this commit over median of the other, all turns: {seconds['this'] / seconds['other']:.3f}."
    problems = [f"{name}: {record['problem']}." for name, record in records.items() if record.get("problem")]
    write_report(args.out / "commits.md", "An update at two commits", on, [table, ratio, *problems])


def figures(rows: Sequence[Record]) -> list[float]:
    """Mean and median seconds of an update, the mean of each of its parts and of its tokens, and the number of updates."""
    seconds = [row["seconds"] for row in rows]
    parts = [mean([row["parts"][part] for row in rows if part in row["parts"]]) for part in PARTS]
    return [mean(seconds), median(seconds), *parts, mean([row["completion_tokens"] for row in rows]), len(rows)]


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run_and_write(args, lambda: measure_all(args), write_table)


if __name__ == "__main__":
    sys.exit(main())
