"""Seconds of an update of 256 rollouts: ludic, TRL's two trainers, and the bare generation of as many rollouts.

    python benchmarks/update.py --dataset DIR --out OUT          about 7 minutes on two GPUs; --table writes the table again

One policy, one set of problems, one reward (a checksum, so that everybody trains on every sequence), one machine, one run.
The servers of ludic and of TRL come up at the same time on GPU 0 and only one of them has work at a time; the trainers are
processes on GPU 1, one after the other. `--phases` chooses parts. A part that fails or is too slow costs its own row only.
An update is timed from the end of the one before, by the wall clock of its own process; the first ones are left out.
"""

import argparse
import asyncio
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.generation import PromptSource, generate
from benchmarks.harness import (
    Record,
    add_server_argument,
    check_common_arguments,
    common_parser,
    machine,
    markdown_table,
    mean,
    median,
    open_engine,
    records_of,
    say,
    write_report,
)
from benchmarks.processes import (
    PartError,
    ensure_policy,
    gpus_for,
    ludic_server,
    run_and_write,
    run_part,
    serving,
    trl_server,
    vllm_settings,
)
from ludic.cli import hide_loading_bars
from ludic.rollout.errors import EngineError
from ludic.task.prompts import load_tokenizer

PHASES = {
    "generation": "bare generation, no log-probs",
    "ludic": "ludic, strictly on-policy",
    "ludic_1": "ludic, --max-staleness 1",
    "trl": "TRL GRPOTrainer, vLLM server mode",
    "trl_async": "TRL AsyncGRPOTrainer",
}
"""What can be run, in this order, and its name in the table."""
BARE_WITH_LOGPROBS = "bare generation, with log-probs"
BASE = "trl"
GPU_SHARE = 0.4


def build_parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__, name="update")
    add_server_argument(parser)
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=12, help="of each trainer (default: 12)")
    parser.add_argument("--slow-updates", type=int, default=9, help="of TRL's asynchronous trainer (default: 9)")
    parser.add_argument("--skip", type=int, default=3, help="first updates that are left out (default: 3)")
    parser.add_argument("--rollouts", type=int, default=256, help="of an update (default: 256)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a prompt; TRL's are 8 (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a completion (default: 512)")
    parser.add_argument("--max-seq-len", type=int, default=1024, help="prompt and completion (default: 1024)")
    parser.add_argument("--deadline", type=float, default=150.0, help="seconds that a part may take (default: 150)")
    parser.add_argument("--kv-cache-gib", type=float, default=24.0, help="of each server (default: 24)")
    parser.add_argument("--ludic-args", default="", help="more flags of ludic's trainer, in one string")
    parser.add_argument(
        "--trl-args", default="--dtype bfloat16 --batch-size 64", help="of peers/trl_grpo.py (default: %(default)s)"
    )
    parser.add_argument(
        "--trl-async-args", default="--dtype bfloat16", help="of peers/trl_async.py (default: %(default)s)"
    )
    return parser


# -- the parts -------------------------------------------------------------------------------------------------------------


def chosen_phases(args: argparse.Namespace) -> list[str]:
    """Raises ValueError of a phase that does not exist."""
    names = [name for name in args.phases.split(",") if name]
    for name in names:
        if name not in PHASES:
            raise ValueError(f"--phases {name} does not exist: choose among {', '.join(PHASES)}")
    return [name for name in PHASES if name in names]


def measure_all(args: argparse.Namespace) -> None:
    """Make the policy, start the servers, and record each part as soon as it is done."""
    check_common_arguments(args)
    phases = chosen_phases(args)
    records = records_of(args)
    records.add("machine", **machine())
    hide_loading_bars()
    serving_gpu, training_gpu = gpus_for(args.device)
    policy = ensure_policy(args, gpu=training_gpu)
    settings = vllm_settings(
        device=args.device, max_model_len=args.max_seq_len, gpu_share=GPU_SHARE, kv_cache_gib=args.kv_cache_gib
    )
    makers = {"ludic": ludic_server, "trl": trl_server} if args.engine == "vllm" else {}
    running = {"ludic": args.server} if args.server else {}
    needed = {server_of(phase) for phase in phases} - running.keys()
    specs = [make(policy, settings, gpu=serving_gpu) for name, make in makers.items() if name in needed]
    with serving(specs, log_dir=args.out) as started:
        servers = running | started
        for phase in phases:
            url = servers.get(server_of(phase))
            if url is None and (args.engine == "vllm" or server_of(phase) == "trl"):
                say(f"{phase} is left out: its server did not come up")
                records.add(phase, rows=[], problem="its server did not come up")
                continue
            try:
                run_phase(args, phase, policy, url, gpu=training_gpu)
            except (PartError, EngineError, TimeoutError) as error:  # the others are still worth their time
                say(f"{phase} failed: {error}")
                records.add(phase, rows=[], problem=str(error) or "it took too long")


def server_of(phase: str) -> str:
    return "trl" if phase.startswith("trl") else "ludic"


def run_phase(args: argparse.Namespace, phase: str, policy: Path, url: str | None, *, gpu: int | None) -> None:
    """One part, from its start to its record."""
    records = records_of(args)
    say(f"{phase} begins")
    if phase == "generation":
        rows = asyncio.run(asyncio.wait_for(bare_generation(args, policy, url), args.deadline))
        records.add(phase, rows=rows)
        return
    command = (
        trl_command(args, phase, policy, url or "")
        if phase.startswith("trl")
        else ludic_command(args, phase, policy, url)
    )

    def progress(record: Record) -> None:
        if "step" in record:
            say(f"{phase}: update {record['step']} took {record['seconds']:.2f} s")

    rows = run_part(command, log_path=args.out / f"{phase}.log", deadline_s=args.deadline, gpu=gpu, on_record=progress)
    problem = next((str(row[key]) for row in rows for key in ("reason", "cut_off") if key in row), None)
    records.add(phase, rows=[row for row in rows if "step" in row], command=command, problem=problem)


async def bare_generation(args: argparse.Namespace, policy: Path, url: str | None) -> list[Record]:
    """The rollouts of as many updates, and nothing else: by turns without and with log-probs, each time new prompts."""
    from ludic.inference.client.vllm_client import stop_token_ids

    source, rows = PromptSource(policy, args.dataset), []
    stops = stop_token_ids(str(policy), load_tokenizer(policy))
    groups = args.rollouts // args.group_size
    async with open_engine(policy, url, stops=stops) as engine:
        for step in range(1, args.updates + 1):
            for logprobs in (False, True):
                figures = await generate(
                    engine, source.take(groups), n=args.group_size, max_tokens=args.max_tokens, logprobs=logprobs
                )
                rows.append({"step": step, "logprobs": logprobs, **figures})
    return rows


def ludic_command(args: argparse.Namespace, phase: str, policy: Path, url: str | None) -> list[str]:
    flags: dict[str, object] = {
        "model": policy, "dataset": args.dataset, "limit": args.updates * args.rollouts // args.group_size,
        "train-steps": args.updates, "rollouts-per-update": args.rollouts, "group-size": args.group_size,
        "max-seq-len": args.max_seq_len, "max-completion-len": args.max_tokens, "eval-limit": 0, "save-every": 0,
        "concurrency": 2 * args.rollouts,  # where generation runs ahead, the next update's rollouts are in flight too
    }  # fmt: skip
    if phase == "ludic_1":
        flags["max-staleness"] = 1
    if url is None:
        flags["engine"] = "local"
    else:
        flags["port"] = url.rpartition(":")[2]
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "benchmarks.ludic_updates", *given, *shlex.split(args.ludic_args)]


def trl_command(args: argparse.Namespace, phase: str, policy: Path, url: str | None) -> list[str]:
    module = "benchmarks.peers.trl_grpo" if phase == "trl" else "benchmarks.peers.trl_async"
    flags: dict[str, object] = {
        "model": policy, "dataset": args.dataset, "server": url,
        "updates": args.updates if phase == "trl" else args.slow_updates, "rollouts": args.rollouts,
        "max-tokens": args.max_tokens, "max-seconds": args.deadline, "work-dir": args.out / phase,
    }  # fmt: skip
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    more = shlex.split(args.trl_args if phase == "trl" else args.trl_async_args)
    return [sys.executable, "-m", module, *given, *(["--cpu"] if args.device == "cpu" else []), *more]


# -- the table -------------------------------------------------------------------------------------------------------------


def write_table(args: argparse.Namespace) -> None:
    """OUT/update.md from the records."""
    records = records_of(args).last()
    measured = {name: words for name, words in PHASES.items() if records.get(name, {}).get("rows")}
    rows = {name: rows_after(records[name]["rows"], args.skip) for name in measured}
    if "generation" in rows:
        both = rows.pop("generation")
        rows = {
            "generation": [r for r in both if not r["logprobs"]],
            "logprobs": [r for r in both if r["logprobs"]],
            **rows,
        }
    names = {**measured, "logprobs": BARE_WITH_LOGPROBS}
    sections = [seconds_table(rows, names), parts_table(records, rows, names)]
    sections.append(
        f"Means over the updates after the first {args.skip}, seconds by the wall clock: where generation runs ahead, short and "
        "long updates alternate, and a median would be neither. `first update` is from the start of the process, with the "
        "server up. The parts are each trainer's own words for its time; where generation runs beside training they do not "
        "add up. TRL's asynchronous updates are scaled to the same number of completions."
    )
    problems = [
        f"{PHASES[name]}: {records[name]['problem']}." for name in PHASES if records.get(name, {}).get("problem")
    ]
    write_report(
        args.out / "update.md", f"An update of {args.rollouts} rollouts", records["machine"], [*sections, *problems]
    )


def rows_after(rows: Sequence[Record], skip: int) -> list[Record]:
    return [row for row in rows if row["step"] > skip]


def seconds_of(row: Record) -> float:
    """Of an update; of as many completions as the others have where a trainer's updates differ in size."""
    return float(row["seconds_per_rollouts"] if "seconds_per_rollouts" in row else row["seconds"])


def seconds_table(rows: Mapping[str, Sequence[Record]], names: Mapping[str, str]) -> str:
    trl, bare = (mean([seconds_of(row) for row in rows.get(name, [])]) for name in (BASE, "generation"))
    lines = []
    for name, chosen in rows.items():
        seconds, tokens = [seconds_of(row) for row in chosen], [row["completion_tokens"] for row in chosen]
        average = mean(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}" if seconds else None
        ratios = [trl / average, average / bare]
        lines.append([names[name], average, median(seconds), spread, *ratios, mean(tokens), len(seconds)])
    headers = [
        "",
        "seconds",
        "median",
        "least to most",
        "times as fast as TRL",
        "of bare generation",
        "tokens",
        "updates",
    ]
    return markdown_table(headers, lines)


WAITING = ("wait_s", "rollout_wait_s", "generation_s")
"""What the time that a trainer waits for rollouts is called, the truest first."""


def parts_table(records: Mapping[str, Record], rows: Mapping[str, Sequence[Record]], names: Mapping[str, str]) -> str:
    lines = []
    for name in ("ludic", "ludic_1", "trl", "trl_async"):
        if name not in rows:
            continue
        parts = [{**row, **row.get("parts", {})} for row in rows[name]]
        waiting = next((key for key in WAITING if parts and key in parts[0]), "")
        known = [
            mean([row[key] for row in parts if row.get(key) is not None]) for key in (waiting, "train_s", "sync_s")
        ]
        rest = mean([row["seconds"] for row in parts]) - sum(known)
        peak = max(
            (row.get("peak_gib") or row.get("peak_gpu_gib") or 0.0 for row in records[name]["rows"]), default=0.0
        )
        lines.append([names[name], *known, rest, peak or None, records[name]["rows"][0]["at_s"]])
    return markdown_table(["", "waits for rollouts", "train", "sync", "rest", "peak GiB", "first update s"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run_and_write(args, lambda: measure_all(args), write_table)


if __name__ == "__main__":
    sys.exit(main())
