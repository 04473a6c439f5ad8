"""Seconds of an update of 256 rollouts: ludic, TRL's two trainers, and the bare generation of as many rollouts.

    python benchmarks/update.py --dataset DIR --out OUT          about 8 minutes on two GPUs; --table writes the table again

One policy, one set of problems, one reward (a checksum, so that everybody trains on every sequence), one machine, one run.
The rows take turns, `--turns` times, since a host is faster in one minute than in the next. Each trainer is a process on GPU 1
that pauses with its weights in place, and has a server of its own on GPU 0, where only one has work at a time; bare generation
has that of the first trainer of ludic. Given one with `--server`, ludic's trainers come one after the other.

`--phases` chooses rows. One that fails, or needs more than `--deadline` seconds of its own, costs its own row only. An update is
timed from the end of the one before, by the wall clock of its own process; the first ones and the first after a pause are left
out. A trainer that generates ahead pauses with the rollouts of its next update ready, so its pipeline is full before and after.
TRL's asynchronous one is frozen where it stands, with its worker.
"""

import argparse
import asyncio
import contextlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.generation import PromptSource, generate
from benchmarks.harness import (
    Record,
    add_server_argument,
    check_common_arguments,
    common_parser,
    host_speed,
    machine,
    markdown_table,
    mean,
    median,
    open_engine,
    records_of,
    say,
    write_report,
)
from benchmarks.parts import Part, in_turns, pauses_after
from benchmarks.processes import (
    ensure_policy,
    gpus_for,
    ludic_server,
    run_and_write,
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
GPU_SHARE = 0.8
"""Of the memory of the GPU that serves, for all servers together; vLLM asks for its part when it starts."""


def build_parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__, name="update")
    add_server_argument(parser)
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=12, help="of each trainer (default: 12)")
    parser.add_argument("--slow-updates", type=int, default=10, help="of TRL's asynchronous trainer (default: 10)")
    parser.add_argument("--turns", type=int, default=3, help="of each row (default: 3)")
    parser.add_argument("--skip", type=int, default=2, help="first updates that are left out (default: 2)")
    parser.add_argument("--rollouts", type=int, default=256, help="of an update (default: 256)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of a prompt; TRL's are 8 (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a completion (default: 512)")
    parser.add_argument("--max-seq-len", type=int, default=1024, help="prompt and completion (default: 1024)")
    parser.add_argument(
        "--deadline", type=float, default=150.0, help="seconds of its own that a row may take (default: 150)"
    )
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


def updates_of(args: argparse.Namespace, phase: str) -> int:
    return int(args.slow_updates if phase == "trl_async" else args.updates)


def server_of(phase: str, phases: Sequence[str]) -> str:
    """The server of a row has its name; bare generation has that of a trainer."""
    if phase == "generation":
        return next((name for name in phases if name.startswith("ludic")), "ludic")
    return phase


def measure_all(args: argparse.Namespace) -> None:
    """Make the policy, start the servers, let the rows take turns, and record each after every turn."""
    check_common_arguments(args)
    phases = chosen_phases(args)
    pauses = {name: pauses_after(updates_of(args, name), turns=args.turns, skip=args.skip) for name in phases}
    records = records_of(args)
    records.add("machine", **machine())
    hide_loading_bars()
    serving_gpu, training_gpu = gpus_for(args.device)
    policy = ensure_policy(args, gpu=training_gpu)
    names = {phase: server_of(phase, phases) for phase in phases}
    running = {name: args.server for name in ("ludic", "ludic_1") if args.server}
    needed = sorted(set(names.values()) - running.keys()) if args.engine == "vllm" else []
    share = min(0.4, GPU_SHARE / max(1, len(needed)))
    settings = vllm_settings(
        device=args.device, max_model_len=args.max_seq_len, gpu_share=share, kv_cache_gib=args.kv_cache_gib
    )
    make = {"trl": trl_server, "trl_async": trl_server}
    specs = [make.get(name, ludic_server)(policy, settings, gpu=serving_gpu, name=name) for name in needed]
    with serving(specs, log_dir=args.out) as started, contextlib.ExitStack() as stack:
        rows, lanes = dict[str, Part | BareGeneration](), dict[str, list[str]]()
        for phase in phases:
            url = (running | started).get(names[phase])
            if url is None and (args.engine == "vllm" or phase.startswith("trl")):
                say(f"{phase} is left out: its server did not come up")
                records.add(phase, rows=[], problem="its server did not come up")
                continue
            if phase == "generation":
                rows[phase] = BareGeneration(args, policy, url, pauses[phase])
            else:
                part = trainer_row(args, phase, policy, url, pauses[phase], gpu=training_gpu)
                rows[phase] = stack.enter_context(part)
            lane = phase if url is None or phase == "generation" else url  # a server has one trainer at a time
            lanes.setdefault(lane, []).append(phase)
        take_turns(args, rows, lanes)


def take_turns(
    args: argparse.Namespace, rows: "Mapping[str, Part | BareGeneration]", lanes: Mapping[str, Sequence[str]]
) -> None:
    """Record each row after every turn, and the host's speed before every round."""
    records, hosts = records_of(args), list[Record]()

    def turn(phase: str) -> bool:
        say(f"{phase} takes a turn")
        more = rows[phase].turn()
        records.add(phase, **record_of(rows[phase], updates=updates_of(args, phase)))
        return more

    def look_at_the_host() -> None:
        hosts.append(host_speed())
        records.add("host", rows=hosts)

    in_turns(lanes.values(), turn, between=look_at_the_host)


def record_of(row: "Part | BareGeneration", *, updates: int) -> Record:
    """What is known of a row after a turn."""
    rows = [record for record in row.records if "step" in record]
    problem = next((str(record["reason"]) for record in row.records if "reason" in record), row.problem)
    if problem:
        say(f"a row ended early: {problem}")
    return {"rows": rows, "updates": updates, "command": list(row.command), "problem": problem or None}


def trainer_row(
    args: argparse.Namespace, phase: str, policy: Path, url: str | None, pauses: Sequence[int], *, gpu: int | None
) -> Part:
    """A trainer that takes turns."""
    if phase.startswith("trl"):
        command = trl_command(args, phase, policy, url or "", pauses)
    else:
        command = ludic_command(args, phase, policy, url, pauses)

    def progress(record: Record) -> None:
        if "step" in record:
            say(f"{phase}: update {record['step']} took {record['seconds']:.2f} s")

    log_path = args.out / f"{phase}.log"
    return Part(command, log_path=log_path, deadline_s=args.deadline, gpu=gpu, on_record=progress)


class BareGeneration:
    """The rollouts of as many updates and nothing else, each time new prompts, first without and then with log-probs.

    It takes turns as a `Part` does. There is nothing to compile, so one round warms up, whatever `--skip` is.
    """

    command: Sequence[str] = ()

    def __init__(self, args: argparse.Namespace, policy: Path, url: str | None, pauses: Sequence[int]) -> None:
        from ludic.inference.client.vllm_client import stop_token_ids

        self.records, self.problem = list[Record](), ""
        self._args, self._policy, self._url, self._pauses = args, policy, url, pauses
        self._source = PromptSource(policy, args.dataset)
        self._stops = stop_token_ids(str(policy), load_tokenizer(policy))
        self._step, self._left_s = max(1, args.skip), float(args.deadline)

    def turn(self) -> bool:
        started = time.monotonic()
        try:
            asyncio.run(asyncio.wait_for(self._until_pause(), self._left_s))
        except TimeoutError:
            self.problem = f"was not done after {self._args.deadline:.0f} s"
        except EngineError as error:  # the other rows are still worth their time
            self.problem = str(error)
        self._left_s -= time.monotonic() - started
        return not self.problem and self._step <= self._args.updates

    async def _until_pause(self) -> None:
        args, mark = self._args, {"resumed": True} if self.records else {}
        groups = args.rollouts // args.group_size
        async with open_engine(self._policy, self._url, stops=self._stops) as engine:
            while self._step <= args.updates:
                for logprobs in (False, True):
                    prompts = self._source.take(groups)
                    figures = await generate(
                        engine, prompts, n=args.group_size, max_tokens=args.max_tokens, logprobs=logprobs
                    )
                    self.records.append({"step": self._step, "logprobs": logprobs, **figures, **mark})
                mark = {}
                self._step += 1
                if self._step - 1 in self._pauses:
                    return


def ludic_command(
    args: argparse.Namespace, phase: str, policy: Path, url: str | None, pauses: Sequence[int] = ()
) -> list[str]:
    flags: dict[str, object] = {
        "model": policy, "dataset": args.dataset, "limit": args.updates * args.rollouts // args.group_size,
        "train-steps": args.updates, "rollouts-per-update": args.rollouts, "group-size": args.group_size,
        "max-seq-len": args.max_seq_len, "max-completion-len": args.max_tokens, "eval-limit": 0, "save-every": 0,
        "concurrency": 2 * args.rollouts,  # where generation runs ahead, the next update's rollouts are in flight too
    }  # fmt: skip
    if phase == "ludic_1":
        flags["max-staleness"] = 1
    if pauses:
        flags["pause-after"] = ",".join(map(str, pauses))
    if url is None:
        flags["engine"] = "local"
    else:
        flags["port"] = url.rpartition(":")[2]
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "benchmarks.ludic_updates", *given, *shlex.split(args.ludic_args)]


def trl_command(
    args: argparse.Namespace, phase: str, policy: Path, url: str | None, pauses: Sequence[int] = ()
) -> list[str]:
    module = "benchmarks.peers.trl_grpo" if phase == "trl" else "benchmarks.peers.trl_async"
    flags: dict[str, object] = {
        "model": policy, "dataset": args.dataset, "server": url,
        "updates": updates_of(args, phase), "rollouts": args.rollouts, "max-tokens": args.max_tokens,
        "max-seconds": args.deadline * len(PHASES),  # with its pauses: the deadline of its turns is kept from outside
        "work-dir": args.out / phase, "pause-after": ",".join(map(str, pauses)),
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
    finished = {name: finished_updates(records["generation" if name == "logprobs" else name]) for name in rows}
    sections = [seconds_table(rows, names, finished), parts_table(records, rows, names)]
    if "host" in records:
        sections.append(host_table(records["host"]["rows"]))
    sections.append(
        f"Means over the updates after the first {args.skip} and after the first of each further turn, seconds by the wall "
        "clock: where generation runs ahead, short and long updates alternate, and a median would be neither. `first update` "
        "is from the start of the process, with the server up. The parts are each trainer's own words for its time; where "
        "generation runs beside training they do not add up. TRL's asynchronous updates are scaled to the same number of "
        "completions."
    )
    problems = [
        f"{PHASES[name]}, {finished_updates(records[name])} updates: {records[name]['problem']}."
        for name in PHASES
        if records.get(name, {}).get("problem")
    ]
    write_report(
        args.out / "update.md", f"An update of {args.rollouts} rollouts", records["machine"], [*sections, *problems]
    )


def rows_after(rows: Sequence[Record], skip: int) -> list[Record]:
    """The updates that count: not the first ones, nor one that a pause was in."""
    return [row for row in rows if row["step"] > skip and not row.get("resumed")]


def finished_updates(record: Record) -> str:
    """How many updates a row finished, of how many."""
    last = max((row["step"] for row in record["rows"]), default=0)
    return f"{last} of {record['updates']}" if "updates" in record else str(last)


def seconds_of(row: Record) -> float:
    """Of an update; of as many completions as the others have where a trainer's updates differ in size."""
    return float(row["seconds_per_rollouts"] if "seconds_per_rollouts" in row else row["seconds"])


def seconds_table(rows: Mapping[str, Sequence[Record]], names: Mapping[str, str], finished: Mapping[str, str]) -> str:
    trl, bare = (mean([seconds_of(row) for row in rows.get(name, [])]) for name in (BASE, "generation"))
    lines = []
    for name, chosen in rows.items():
        seconds, tokens = [seconds_of(row) for row in chosen], [row["completion_tokens"] for row in chosen]
        average = mean(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}" if seconds else None
        figures = [trl / average, average / bare, mean(tokens), len(seconds)]
        lines.append([names[name], average, median(seconds), spread, *figures, finished[name]])
    headers = [
        "",
        "seconds",
        "median",
        "least to most",
        "times as fast as TRL",
        "of bare generation",
        "tokens",
        "updates",
        "finished",
    ]
    return markdown_table(headers, lines)


def host_table(rows: Sequence[Record]) -> str:
    """The host's speed before each round of turns, as `harness.host_speed` has it."""
    lines = [[f"before turn {turn}", row["loop_s"], row["copy_s"]] for turn, row in enumerate(rows, 1)]
    return markdown_table(["the host", "Python loop s", "copy s"], lines)


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
