"""How the seconds of an update grow with rollouts, completion length and concurrency, and whether anything grows with steps.

    python benchmarks/growth.py --dataset DIR --out OUT [--shape 0.5b|1.5b|7b]

One policy with random weights that never stops, so a completion has as many tokens as is asked for; one server on GPU 0 and
one trainer on GPU 1 for all points, so compiling is paid once. A slope of 1 is linear growth (least squares in logarithms);
below it, what is fixed is spread over more work. The first update of each point is left out.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from benchmarks.harness import (
    Record,
    check_common_arguments,
    common_parser,
    emit,
    machine,
    markdown_table,
    median,
    numbers,
    open_engine,
    records_of,
    say,
    slope,
    without_stop,
    write_report,
)
from benchmarks.ludic_updates import build_trainer, load_policy, probe_of
from benchmarks.parts import run_part
from benchmarks.processes import (
    PartError,
    ensure_policy,
    gpus_for,
    ludic_server,
    required,
    run_and_write,
    serving,
    vllm_settings,
)
from environments.gsm8k import load
from ludic.cli import hide_loading_bars
from ludic.config import GRPOConfig, add_arguments, from_arguments
from ludic.rollout.engine import InferenceEngine, Policy, WeightSyncReport
from ludic.task.prompts import load_tokenizer
from ludic.types import Completion, SamplingParams

ROOM = 512
"""Tokens that a prompt may have: the longest of GSM8K's has about 300."""
ROLLOUTS = [64, 128, 256, 512, 1024, 2048]
LENGTHS = [128, 256, 512, 1024, 2048, 4096]
CONCURRENCIES = [8, 16, 32, 64, 128, 256, 512, 1024]
GPU_SHARE = 0.85
TITLES = {"rollouts": "rollouts an update", "length": "tokens of a completion", "concurrency": "completions in flight"}


def build_parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__, name="growth")
    for name, points in (("rollouts", ROLLOUTS), ("lengths", LENGTHS), ("concurrencies", CONCURRENCIES)):
        shown = f"(default: {points[0]} to {points[-1]})"
        parser.add_argument(f"--{name}", type=numbers, default=points, metavar="N,N", help=shown)
    parser.add_argument("--updates", type=int, default=3, help="of each point, after one (default: 3)")
    parser.add_argument("--steps", type=int, default=200, help="updates of the long run; 0: none (default: 200)")
    parser.add_argument("--early", type=int, default=10, help="the update that its end is compared with (default: 10)")
    parser.add_argument("--small", default="64,8,128", metavar="ROLLOUTS,GROUP,TOKENS",
                        help="where the other two do not vary (default: %(default)s)")  # fmt: skip
    parser.add_argument("--deadline", type=float, default=500.0, help="seconds that it may all take (default: 500)")
    parser.add_argument("--ludic-args", default="", help="more flags of ludic's trainer, in one string")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--url", default=None, help=argparse.SUPPRESS)
    return parser


# -- the trainer's half ----------------------------------------------------------------------------------------------------


class LimitedEngine:
    """Another engine with at most so many requests in flight: the concurrency, over the completions of a request."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self.limit(2048)

    def limit(self, requests: int) -> None:
        self._free = asyncio.Semaphore(requests)

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    @property
    def overlaps_training(self) -> bool:
        return self._engine.overlaps_training

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        async with self._free:
            return await self._engine.generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        return await self._engine.update_weights(policy)

    def counts(self) -> dict[str, float]:
        return self._engine.counts()

    async def aclose(self) -> None:
        await self._engine.aclose()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting to be measured."""

    kind: str
    x: int
    rollouts: int
    group_size: int
    tokens: int
    concurrency: int
    updates: int


def points_of(args: argparse.Namespace) -> list[Point]:
    """All that is measured: what varies by kind, everything else small.

    Concurrencies are compared on the same rollouts, as many as the highest allows, of a quarter of the tokens.
    """
    rollouts, group, tokens = numbers(args.small)
    updates = args.updates + 1
    small = Point(kind="", x=0, rollouts=rollouts, group_size=group, tokens=tokens, concurrency=2048, updates=updates)
    points = [dataclasses.replace(small, kind="rollouts", x=x, rollouts=x) for x in args.rollouts]
    points += [dataclasses.replace(small, kind="length", x=x, tokens=x) for x in args.lengths]
    most = max(args.concurrencies, default=0)
    for x in args.concurrencies:
        # With few in flight an update takes long, and one is enough.
        changed = {"kind": "concurrency", "x": x, "concurrency": x, "rollouts": most, "tokens": max(1, tokens // 4)}
        points.append(dataclasses.replace(small, **changed, updates=2 if x < most // 8 else updates))
    if args.steps:
        points.append(dataclasses.replace(small, kind="steps", x=args.steps, updates=args.steps))
    return points


async def measure_points(args: argparse.Namespace, url: str | None) -> AsyncGenerator[Record]:
    """Every point with one trainer: its settings are replaced between runs, its weights, state and version go on."""
    import torch

    policy, points, rows = args.policy, points_of(args), list[Record]()
    tokenizer = load_tokenizer(policy)
    samples = load("train", dataset=args.dataset)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = from_arguments(parser.parse_args(["--eval-limit", "0", "--save-every", "0", *shlex.split(args.ludic_args)]))
    with tempfile.TemporaryDirectory() as folder:
        async with open_engine(policy, url, probe=probe_of(tokenizer, samples[0])) as inner:
            engine = LimitedEngine(inner)
            trainer = build_trainer(
                settings_of(points[0], given, done=0),
                policy=load_policy(str(policy), torch.device("cuda" if torch.cuda.is_available() else "cpu")),
                model_name=str(policy),
                tokenizer=tokenizer,
                engine=engine,
                samples=samples,
                emit=rows.append,
                out_dir=Path(folder),
            )
            for point in points:
                config = settings_of(point, given, done=trainer.state.step)
                trainer.config = trainer.learner.config = trainer.prompts.config = config
                engine.limit(max(1, point.concurrency // point.group_size))
                rows.clear()
                await trainer.run()
                yield {"kind": point.kind, "x": point.x, "rows": list(rows)}


def settings_of(point: Point, given: GRPOConfig, *, done: int) -> GRPOConfig:
    longest = point.tokens + ROOM
    return dataclasses.replace(
        given,
        rollouts_per_update=point.rollouts,
        group_size=point.group_size,
        max_completion_len=point.tokens,
        max_seq_len=longest,
        micro_token_budget=max(given.micro_token_budget or 0, longest),
        train_steps=done + point.updates,
    )


# -- the parts and the table -----------------------------------------------------------------------------------------------


def measure_all(args: argparse.Namespace) -> None:
    """Start the server, run the worker beside it, and record each point as it is done."""
    check_common_arguments(args)
    records = records_of(args)
    records.add("machine", **machine(), shape=args.shape)
    hide_loading_bars()
    serving_gpu, training_gpu = gpus_for(args.device)
    args.policy, _ = without_stop(ensure_policy(args, random=True, gpu=training_gpu), args.out / "policy_without_stop")

    def record(point: Record) -> None:
        if "kind" in point:
            say(
                f"{point['kind']} {point['x']}: {median([row['seconds'] for row in point['rows'][1:]]):.2f} s an update"
            )
            records.add(f"{point['kind']} {point['x']}", **{name: point[name] for name in ("kind", "x", "rows")})

    if args.engine == "local":
        asyncio.run(measure_here(args, None, record))
        return
    longest = max([*args.lengths, numbers(args.small)[2]]) + ROOM
    settings = vllm_settings(device=args.device, max_model_len=longest, gpu_share=GPU_SHARE)
    with serving([ludic_server(args.policy, settings, gpu=serving_gpu)], log_dir=args.out) as servers:
        again = [*args.argv, "--worker", "--policy", str(args.policy), "--url", required(servers, "ludic")]
        rows = run_part(
            [sys.executable, "-m", "benchmarks.growth", *again],
            log_path=args.out / "growth.log",
            deadline_s=args.deadline,
            gpu=training_gpu,
            on_record=record,
        )
    if "cut_off" in rows[-1]:
        raise PartError(f"the trainer {rows[-1]['cut_off']}, so points are missing")


async def measure_here(args: argparse.Namespace, url: str | None, take: Callable[[Record], None]) -> None:
    async with contextlib.aclosing(measure_points(args, url)) as points:
        async for point in points:
            take(point)


def write_table(args: argparse.Namespace) -> None:
    """OUT/growth.md from the records."""
    records = records_of(args).last()
    on = records.pop("machine")
    sections = []
    for kind, title in TITLES.items():
        points = [record for record in records.values() if record["kind"] == kind]
        if points:
            sections.append(growth_table(points, title))
    sections += [steps_table(record["rows"], args.early) for record in records.values() if record["kind"] == "steps"]
    write_report(args.out / "growth.md", f"Growth, shape {on['shape']}", on, sections)


def growth_table(points: Sequence[Record], title: str) -> str:
    lines, xs, seconds = [], [], []
    for point in points:
        rows = point["rows"][1:]
        xs.append(point["x"])
        seconds.append(median([row["seconds"] for row in rows]))
        tokens = median([row["completion_tokens"] for row in rows])
        train = median([row["parts"].get("train_s", 0.0) for row in rows])
        peak = max(row["peak_gib"] for row in rows)
        lines.append([point["x"], seconds[-1], train, tokens, tokens / seconds[-1], peak or None])
    lines.append(["slope", slope(xs, seconds), None, None, None, None])
    return markdown_table([title, "seconds", "of it train", "completion tokens", "tokens/s", "peak GiB"], lines)


def steps_table(rows: Sequence[Record], early: int) -> str:
    """Medians over up to 10 updates that end at the early one, and at the last one."""
    lines = []
    for last in (min(early, len(rows)), len(rows)):
        near = rows[max(1, last - 10) : last]
        names = ("seconds", "peak_gib", "rss_gib", "open_fds")
        lines.append([f"update {last}", *(median([row[name] for row in near]) for name in names)])
    return markdown_table(["", "seconds", "peak GPU GiB", "process GiB", "open files"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.worker:
        hide_loading_bars()
        asyncio.run(measure_here(args, args.url, emit))
        return 0
    return run_and_write(args, lambda: measure_all(args), write_table)


if __name__ == "__main__":
    sys.exit(main())
