"""Many rollouts at once through ludic's client: is any lost or doubled, does memory or do file descriptors grow, does the
event loop keep up?

    python -m benchmarks.load --repeats 3
    python -m benchmarks.load --gil-share 0.5
    python -m benchmarks.load --rollouts 2000 --server http://127.0.0.1:8000 --model PATH

Without `--server` the other side is `wire_server` in a process of its own, which computes nothing; its CPU time against the
client's says which of the two was waited for. `--gil-share` adds a thread that keeps the interpreter busy for that share of
the time, as a learner in the same process does between its calls into torch.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks import wire_server
from ludic.rollout.groups import GroupStream, Prompt
from ludic.types import ChatMessage, ParseResult, RolloutGroup, SamplingParams, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ludic.inference.client.vllm_client import VLLMEngine

UPDATE_ROLLOUTS = 1024
AHEAD = 3
"""Updates that are submitted before the first of them is taken: enough that `--concurrency` is always in flight."""
SAMPLE_S = 0.02
TICK_S = 0.005
GIL_SLICE_S = 0.02
MAX_GROWTH_MIB = 1.0
"""Of memory in a thousand rollouts, once the first third is over: what is less is noise of the allocator."""
ROLLOUTS_FOR_GROWTH = 5_000
"""In a shorter run one arena of the allocator makes a slope above `MAX_GROWTH_MIB`; it is printed and not judged."""


class ByteTokenizer:
    """Decodes what `wire_server` draws; all that `GroupStream` asks of a tokenizer."""

    def decode(self, token_ids: list[int], **_: object) -> str:
        return array.array("H", token_ids).tobytes().decode("utf-16-le")  # fast: it stands for a tokenizer in Rust


class Lookup:
    """An environment without questions: the reward is a function of the text."""

    def messages(self, sample: int, /) -> list[ChatMessage]:
        return [{"role": "user", "content": str(sample)}]

    def target(self, sample: int, /) -> str:
        return str(sample)

    async def score(self, sample: int, text: str, /) -> Score:
        return Score(reward=len(text) % 2, correct=False, parse=ParseResult(answer=str(len(text))))


class ListWriter:
    """Keeps the records."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []

    def write(self, record: Mapping[str, Any], /) -> None:
        self.records.append(record)


class TallyWriter:
    """Counts how often each rollout was recorded, and keeps nothing else."""

    def __init__(self, num_rollouts: int, group_size: int) -> None:
        self.times = array.array("i", bytes(4 * num_rollouts))
        self._group_size = group_size

    def write(self, record: Mapping[str, Any], /) -> None:
        self.times[int(record["group"]) * self._group_size + int(record["rollout"])] += 1


class Sampler:
    """Memory and file descriptors of this process, every 20 ms in a thread, and at the start."""

    def __init__(self) -> None:
        self.rss_bytes = [rss_bytes()]
        self.num_fds = [num_fds()]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.rss_bytes.append(rss_bytes())
            self.num_fds.append(num_fds())


def rss_bytes(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a run under load showed."""

    num_rollouts: int
    num_lost: int
    num_doubled: int
    num_wrong: int
    """Completions that are not those which the server drew for this prompt and member; 0 where it cannot be told."""
    num_retries: int
    seconds: float
    client_cpu_s: float
    server_cpu_s: float | None
    """Of the fake; None for a server that this benchmark did not start."""
    rss_start_mib: float
    rss_end_mib: float
    rss_slope_mib: float
    """A thousand rollouts, over the last two thirds of the run."""
    fds_start: int
    fds_most: int
    fds_end: int
    lag_ms: tuple[float, float, float]
    """How late the event loop was for a timer of 5 ms: median, 99th percentile, most."""
    loop_cpu_ms: tuple[float, float, float]
    """How long its thread computed from one tick of that timer to the next: the part of the lateness that is its own."""

    @property
    def ok(self) -> bool:
        grows = self.num_rollouts >= ROLLOUTS_FOR_GROWTH and self.rss_slope_mib >= MAX_GROWTH_MIB
        return not (self.num_lost or self.num_doubled or self.num_wrong or grows)


@dataclass(slots=True)
class _Lag:
    """How late a timer of the event loop is, again and again."""

    late_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    async def watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, before = loop.time() + TICK_S, time.thread_time()
            await asyncio.sleep(TICK_S)
            self.late_s.append(loop.time() - due)
            self.cpu_s.append(time.thread_time() - before)


def _quantiles_ms(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, 99th percentile, most; in milliseconds."""
    ordered = sorted(seconds)
    median, late, latest = (1e3 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99, 1.0))
    return median, late, latest


async def load(
    engine: VLLMEngine,
    prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    group_size: int,
    max_tokens: int,
    server_pid: int | None = None,
    gil_share: float = 0.0,
) -> LoadReport:
    """Generate a group of each prompt, update by update, and watch. With a `server_pid` the completions are compared."""
    total = len(prompts) * group_size
    writer, lag, wrong, marks = TallyWriter(total, group_size), _Lag(), 0, []
    stream = GroupStream(engine, Lookup(), group_size=group_size, tokenizer=tokenizer, record=writer.write)
    sampling = SamplingParams(max_tokens=max_tokens)
    tasks = [
        Prompt(group_id=number, sample=number, token_ids=prompt, sampling=sampling)
        for number, prompt in enumerate(prompts)
    ]
    size = max(1, UPDATE_ROLLOUTS // group_size)
    updates = [tasks[first : first + size] for first in range(0, len(tasks), size)]
    with Sampler() as sampler, busy_interpreter(gil_share):
        watch = asyncio.create_task(lag.watch())
        server_before = 0.0 if server_pid is None else cpu_s(server_pid)
        started, client_before, done = time.perf_counter(), time.process_time(), 0
        for step, update in enumerate(updates[:AHEAD]):
            stream.submit(step, update)
        for step in range(len(updates)):
            async for ready in stream.groups(step):
                done += sum(len(group.rollouts) for group in ready)
                marks.append((done, rss_bytes()))
                if server_pid is not None:
                    wrong += sum(_num_wrong(group, prompts, max_tokens) for group in ready)
            stream.timings(step)
            if step + AHEAD < len(updates):
                stream.submit(step + AHEAD, updates[step + AHEAD])
        seconds, client_cpu_s = time.perf_counter() - started, time.process_time() - client_before
        server_cpu_s = None if server_pid is None else cpu_s(server_pid) - server_before
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    await engine.aclose()
    await asyncio.sleep(0.1)  # transports close in the next turns of the loop
    return LoadReport(
        num_rollouts=total,
        num_lost=sum(times == 0 for times in writer.times),
        num_doubled=sum(times > 1 for times in writer.times),
        num_wrong=wrong,
        num_retries=engine.num_retries,
        seconds=seconds,
        client_cpu_s=client_cpu_s,
        server_cpu_s=server_cpu_s,
        rss_start_mib=sampler.rss_bytes[0] / 2**20,
        rss_end_mib=sampler.rss_bytes[-1] / 2**20,
        rss_slope_mib=slope([mark for mark in marks if mark[0] > total / 3]) * 1000 / 2**20,
        fds_start=sampler.num_fds[0],
        fds_most=max(sampler.num_fds),
        fds_end=num_fds(),
        lag_ms=_quantiles_ms(lag.late_s),
        loop_cpu_ms=_quantiles_ms(lag.cpu_s),
    )


def _num_wrong(group: RolloutGroup, prompts: Sequence[list[int]], max_tokens: int) -> int:
    drawn = [wire_server.drawn(prompts[group.group_id], "", place, max_tokens) for place in range(len(group.rollouts))]
    return sum(
        rollout.completion.token_ids != one.token_ids or rollout.completion.logprobs != one.logprobs
        for rollout, one in zip(group.rollouts, drawn, strict=True)
    )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line with the least squares."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


@contextlib.contextmanager
def busy_interpreter(share: float) -> Iterator[None]:
    """A thread that computes in Python for `share` of the time, in slices of 20 ms."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(GIL_SLICE_S * (1 - share)):
            until = time.perf_counter() + GIL_SLICE_S * share
            while time.perf_counter() < until:
                sum(range(1000))

    thread = threading.Thread(target=work, daemon=True)
    if share:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if share:
            thread.join()


@contextlib.contextmanager
def fake_process(think_s: float = 0.0) -> Iterator[tuple[str, int]]:
    """Address and process id of a `wire_server` whose completions follow from prompt and member alone."""
    command = [sys.executable, "-m", "benchmarks.wire_server", "--by-prompt", "--think-s", str(think_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.terminate()


async def load_fake(
    *, rollouts: int, concurrency: int, group_size: int, max_tokens: int, think_s: float = 0.0, gil_share: float = 0.0
) -> LoadReport:
    """`rollouts` from a fake in a process of its own."""
    from ludic.inference.client.vllm_client import VLLMEngine

    with fake_process(think_s) as (url, pid):
        engine = VLLMEngine(url, model="fake", concurrency=concurrency, vocab_size=wire_server.VOCAB_SIZE)
        engine._has_generate_route = True  # the fake has no other routes to find it out by
        prompts = [[5 + number % 251, 5 + number // 251, 4] for number in range(-(-rollouts // group_size))]
        return await load(
            engine,
            prompts,
            cast("PreTrainedTokenizerBase", ByteTokenizer()),
            group_size=group_size,
            max_tokens=max_tokens,
            server_pid=pid,
            gil_share=gil_share,
        )


async def load_real(
    url: str, model: str, *, rollouts: int, concurrency: int, group_size: int, max_tokens: int, gil_share: float = 0.0
) -> LoadReport:
    """`rollouts` from a real server of ludic that serves the folder `model`."""
    from ludic.inference.client.vllm_client import VLLMEngine
    from ludic.task.prompts import encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(model)
    engine = VLLMEngine(url, model=model, concurrency=concurrency)
    await engine.connect(tokenizer)
    prompts = [
        encode_prompt(tokenizer, [{"role": "user", "content": f"Question {number}: which digit?"}])
        for number in range(-(-rollouts // group_size))
    ]
    return await load(engine, prompts, tokenizer, group_size=group_size, max_tokens=max_tokens, gil_share=gil_share)


def row(report: LoadReport) -> str:
    server = "" if report.server_cpu_s is None else f"{report.server_cpu_s / report.seconds:.2f}"
    median, late, latest = report.lag_ms
    return (
        f"| {report.num_rollouts} | {report.num_lost} / {report.num_doubled} / {report.num_wrong} | {report.num_retries} "
        f"| {report.seconds:.1f} | {report.num_rollouts / report.seconds:.0f} "
        f"| {report.client_cpu_s / report.seconds:.2f} | {server} "
        f"| {report.rss_start_mib:.0f} to {report.rss_end_mib:.0f} | {report.rss_slope_mib:+.2f} "
        f"| {report.fds_start} / {report.fds_most} / {report.fds_end} "
        f"| {median:.1f} / {late:.1f} / {latest:.1f} | {' / '.join(f'{one:.1f}' for one in report.loop_cpu_ms)} "
        f"| {'yes' if report.ok else 'NO'} |"
    )


HEAD = """\
| rollouts | lost / doubled / wrong | sent again | s | a second | client busy | server busy | RSS MiB | MiB a 1000 rollouts \
| fds start / most / end | loop late p50 / p99 / max, ms | of that computing, ms | ok |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


async def _reports(arguments: argparse.Namespace) -> AsyncIterator[LoadReport]:
    common = {
        name: getattr(arguments, name) for name in ("rollouts", "concurrency", "group_size", "max_tokens", "gil_share")
    }
    for _ in range(arguments.repeats):
        if arguments.server:
            yield await load_real(arguments.server, arguments.model, **common)
        else:
            yield await load_fake(think_s=arguments.think_s, **common)


async def _run(arguments: argparse.Namespace) -> bool:
    sys.stdout.write(HEAD + "\n")
    good = True
    async for report in _reports(arguments):
        sys.stdout.write(row(report) + "\n")
        sys.stdout.flush()
        good = good and report.ok
    return good


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rollouts", type=int, default=10_000, help="(default: 10000)")
    parser.add_argument("--concurrency", type=int, default=1024, help="completions in flight (default: 1024)")
    parser.add_argument("--group-size", type=int, default=8, help="(default: 8)")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of a completion (default: 256)")
    parser.add_argument("--think-s", type=float, default=0.0, help="the fake's pause before each reply (default: 0)")
    parser.add_argument(
        "--gil-share", type=float, default=0.0, help="of the time that a thread computes in Python (default: 0)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs in this process (default: 1)")
    parser.add_argument("--server", help="a real server of ludic instead of the fake")
    parser.add_argument("--model", help="the model that it serves")
    arguments = parser.parse_args(argv)
    if bool(arguments.server) != bool(arguments.model):
        parser.error("--server and --model belong together")
    return 0 if asyncio.run(_run(arguments)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
