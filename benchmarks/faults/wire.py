"""Breaks the wire between the client and the server in every way of `wire_kinds`, at random places in a stream of rollouts.

    python -m benchmarks.faults.wire --count 1000
    python -m benchmarks.faults.wire --count 200 --server http://127.0.0.1:8000 --model PATH

The rollouts go through `GroupStream` and `VLLMEngine` as in training. A fault has done no harm if its prompt's group came
once and whole, with the very tokens and log-probs that the server drew for the attempt which went through untouched.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import logging
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

from benchmarks import wire_server
from benchmarks.faults import wire_kinds
from benchmarks.faults.outcome import Injection
from benchmarks.faults.proxy import Fault, FaultProxy, fault_proxy
from benchmarks.load import ByteTokenizer, ListWriter, Lookup, Sampler
from ludic.inference import wire
from ludic.inference.client import vllm_client
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.rollout.errors import ServerRestartedError
from ludic.rollout.groups import GroupStream, Prompt
from ludic.types import RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW = "the wire: resets, errors, broken and strange replies"
RESTART_ROW = "the wire: another start of the server"
GROUP_SIZE = 4
MAX_TOKENS = 24
TIMEOUT_S = 3.0
"""Of one attempt, instead of minutes."""
MAX_GROWTH_MIB = 96.0
"""Of the process's memory while replies of a gigabyte come in; most of it is the proxy's own buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireRun:
    """What came of one stream of rollouts through the proxy."""

    injections: list[Injection]
    num_rollouts: int
    num_expected: int
    num_retries: int
    """By the client's own count."""
    num_bad_replies: int
    num_unsent_retries: int
    """Of those retries, how many came for a connection that was refused, which the proxy cannot see."""
    num_cookies: int
    num_redirects_followed: int
    grown_mib: float

    @property
    def ok(self) -> bool:
        return (
            all(injection.ok for injection in self.injections)
            and self.num_rollouts == self.num_expected
            and self.num_unsent_retries >= 0
            and not self.num_cookies
            and not self.num_redirects_followed
            and self.grown_mib < MAX_GROWTH_MIB
        )


def inject(count: int, *, seed: int, folder: Path, own_route: bool = True) -> list[Injection]:
    """`count` faults against a fake server in this process, and one in ten as many restarts of the server.

    Args:
        folder: not used; nothing of this row touches a disk.
        own_route: ludic's own route, or `/v1/completions`.
    """
    run = asyncio.run(break_fake(count, seed=seed, own_route=own_route))
    together = Injection(
        row=ROW,
        fault="all of them together",
        outcome="no rollout lost or doubled, no cookie sent, no redirect followed, memory bounded"
        if run.ok
        else str(run),
        ok=run.ok,
    )
    restarts = [asyncio.run(restart_once(seed + number)) for number in range(max(1, count // 10))]
    return [*run.injections, together, *restarts]


async def break_fake(
    count: int, *, seed: int, own_route: bool = True, kinds: Sequence[Fault] = wire_kinds.KINDS
) -> WireRun:
    """Faults between a client and the fake server, whose every completion names its prompt and its request."""
    server, url = await wire_server.start()
    try:
        async with fault_proxy(url, rng=random.Random(seed)) as proxy, fake_client(proxy.base_url, own_route) as engine:
            if not own_route:  # plain vLLM gives no token
                kinds = [kind for kind in kinds if kind.name not in wire_kinds.NEED_TOKENS]
                engine.control.token = None
            prompts = [[5 + number % 251, 5 + number // 251, 4] for number in range(max(32, count))]
            tokenizer = cast("PreTrainedTokenizerBase", ByteTokenizer())
            return await _stream(engine, proxy, prompts, tokenizer, plan(prompts, kinds, count, seed), drawn=True)
    finally:
        server.close()


async def break_real(
    url: str, model: str, count: int, *, seed: int, kinds: Sequence[Fault] = wire_kinds.KINDS, timeout_s: float = 10.0
) -> WireRun:
    """Faults between a client and a real server of ludic that serves the folder `model`."""
    from transformers import AutoConfig

    from ludic.task.prompts import encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(model)
    vocab_size = int(AutoConfig.from_pretrained(model).vocab_size)
    async with fault_proxy(url, rng=random.Random(seed)) as proxy:
        engine = VLLMEngine(proxy.base_url, model=model, concurrency=64, vocab_size=vocab_size)
        try:
            await engine.connect(tokenizer)
            prompts = [
                encode_prompt(tokenizer, [{"role": "user", "content": f"Question {number}: which digit?"}])
                for number in range(max(16, count))
            ]
            faults = plan(prompts, kinds, count, seed)
            return await _stream(engine, proxy, prompts, tokenizer, faults, drawn=False, timeout_s=timeout_s)
        finally:
            await engine.aclose()


async def restart_once(seed: int) -> Injection:
    """In the middle of a stream, requests reach a server that was started again: nothing of it may be used."""
    server, url = await wire_server.start()
    started = time.perf_counter()
    rng = random.Random(seed)
    taken: list[RolloutGroup] = []
    outcome, ok = "the stream went on", False
    async with fault_proxy(url, rng=rng) as proxy, fake_client(proxy.base_url, own_route=True) as engine:
        prompts = [[5 + number, 4] for number in range(16)]
        struck = rng.choice(prompts)
        proxy.plan = {tuple(struck): [wire_kinds.OTHER_START] * vllm_client.MAX_ATTEMPTS}
        stream = _stream_of(engine, cast("PreTrainedTokenizerBase", ByteTokenizer()))
        stream.submit(0, _as_prompts(prompts))
        try:
            with quick_client(TIMEOUT_S):
                async for ready in stream.groups(0):
                    taken += ready
        except ServerRestartedError:
            outcome = "refused: the server was started again"
            ok = prompts.index(struck) not in [group.group_id for group in taken]
        await stream.aclose()
    server.close()
    return Injection(
        row=RESTART_ROW,
        fault=wire_kinds.OTHER_START.name,
        outcome=outcome,
        ok=ok,
        seconds=time.perf_counter() - started,
    )


def plan(
    prompts: Sequence[Sequence[int]], kinds: Sequence[Fault], count: int, seed: int
) -> dict[tuple[int, ...], list[Fault]]:
    """`count` faults, each kind as often as the others, on prompts drawn at random: two at most on one prompt's attempts,
    and one that takes the client's whole patience."""
    rng = random.Random(seed)
    wanted = [kinds[number % len(kinds)] for number in range(count)]
    rng.shuffle(wanted)
    faults: dict[tuple[int, ...], list[Fault]] = collections.defaultdict(list)
    for fault in wanted:
        while True:
            here = faults[tuple(rng.choice(prompts))]
            fits = len(here) < 2 and not (fault.times_out and any(other.times_out for other in here))
            # Taken at once, or followed by another part of itself: nothing may come after it.
            if fits and not any(other.is_harmless or other.name == wire_kinds.LATE.name for other in here):
                break
        here += [fault, wire_kinds.LATE] if fault.name == wire_kinds.LATE.name else [fault]
    return dict(faults)


async def _stream(
    engine: VLLMEngine,
    proxy: FaultProxy,
    prompts: Sequence[list[int]],
    tokenizer: "PreTrainedTokenizerBase",
    faults: dict[tuple[int, ...], list[Fault]],
    *,
    drawn: bool,
    timeout_s: float = TIMEOUT_S,
) -> WireRun:
    """Generate a group of each prompt, in updates of 16, all submitted at once; and judge what came."""
    proxy.plan = faults
    writer = ListWriter()
    stream = _stream_of(engine, tokenizer, writer)
    groups: list[RolloutGroup] = []
    with quick_client(timeout_s), Sampler() as sampler:
        updates = [_as_prompts(prompts)[first : first + 16] for first in range(0, len(prompts), 16)]
        for step, update in enumerate(updates):
            stream.submit(step, update)
        try:
            for step in range(len(updates)):
                async for ready in stream.groups(step):
                    groups += ready
        finally:
            await stream.aclose()
    by_prompt: dict[tuple[int, ...], list[RolloutGroup]] = collections.defaultdict(list)
    for group in groups:
        by_prompt[tuple(group.rollouts[0].prompt_token_ids)].append(group)
    recorded = {(record["group"], record["rollout"]) for record in writer.records}
    return WireRun(
        injections=[
            injection
            for prompt, planned in faults.items()
            for injection in _judged(planned, by_prompt[prompt], proxy, prompt, drawn=drawn)
        ],
        num_rollouts=len(recorded) if len(recorded) == len(writer.records) else -1,
        num_expected=len(prompts) * GROUP_SIZE,
        num_retries=engine.num_retries,
        num_bad_replies=engine.num_bad_replies,
        num_unsent_retries=engine.num_retries - (sum(proxy.attempts.values()) - len(prompts)),
        num_cookies=proxy.num_cookies,
        num_redirects_followed=proxy.num_trapped,
        grown_mib=(max(sampler.rss_bytes) - sampler.rss_bytes[0]) / 2**20,
    )


def _judged(
    planned: list[Fault], groups: list[RolloutGroup], proxy: FaultProxy, prompt: tuple[int, ...], *, drawn: bool
) -> Iterator[Injection]:
    right = len(groups) == 1 and _is_the_one(groups[0], proxy, prompt, drawn=drawn)
    for place, fault in enumerate(planned):
        if fault.apply is wire_kinds.LATE.apply:
            continue
        again = proxy.attempts[prompt] > place + 1
        if not right:
            outcome = f"{len(groups)} groups instead of one, or not the one that was drawn"
        elif again:
            outcome = "sent again, then right"
        else:
            outcome = "taken: whole and right"
        yield Injection(row=ROW, fault=fault.name, outcome=outcome, ok=right and (again or fault.is_harmless))


def _is_the_one(group: RolloutGroup, proxy: FaultProxy, prompt: tuple[int, ...], *, drawn: bool) -> bool:
    """Whether the group is what the server answered to the last attempt, and to no earlier one."""
    if not proxy.delivered.get(prompt) or len(group.rollouts) != GROUP_SIZE:
        return False
    request_id, body = proxy.delivered[prompt][-1]
    if drawn:
        expected = [wire_server.drawn(prompt, request_id, member, MAX_TOKENS) for member in range(GROUP_SIZE)]
        return all(
            rollout.completion.token_ids == one.token_ids and rollout.completion.logprobs == one.logprobs
            for rollout, one in zip(group.rollouts, expected, strict=True)
        )
    sent = [wire_kinds.token_ids(member) for member in wire_kinds.members(json.loads(body))]
    return [rollout.completion.token_ids for rollout in group.rollouts] == sent


def _stream_of(
    engine: VLLMEngine, tokenizer: "PreTrainedTokenizerBase", writer: ListWriter | None = None
) -> GroupStream[int]:
    record = None if writer is None else writer.write
    return GroupStream(engine, Lookup(), group_size=GROUP_SIZE, tokenizer=tokenizer, record=record)


def _as_prompts(prompts: Sequence[list[int]]) -> list[Prompt[int]]:
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    return [
        Prompt(group_id=number, sample=number, token_ids=list(prompt), sampling=sampling)
        for number, prompt in enumerate(prompts)
    ]


@contextlib.asynccontextmanager
async def fake_client(url: str, own_route: bool) -> AsyncIterator[VLLMEngine]:
    """A client of the fake server, which has no other routes to make its acquaintance by."""
    engine = VLLMEngine(url, model="fake", concurrency=64, vocab_size=wire_server.VOCAB_SIZE)
    engine._has_generate_route, engine.control.token = own_route, wire_server.TOKEN
    try:
        yield engine
    finally:
        await engine.aclose()


@contextlib.contextmanager
def quick_client(timeout_s: float) -> Iterator[None]:
    """The client's waiting times, scaled down; nothing else of it changes. Its warnings are not shown."""
    short: dict[str, Any] = {
        "GENERATION_TIMEOUT_S": timeout_s, "GENERATION_TIMEOUT_PER_TOKEN_S": 0.0, "BACKOFF_S": 0.05, "MAX_BACKOFF_S": 1.0,
    }  # fmt: skip
    logger = logging.getLogger(vllm_client.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with mock.patch.multiple(vllm_client, **short):
            yield
    finally:
        logger.setLevel(level)


def table(run: WireRun) -> str:
    """The outcomes by kind, and the counts."""
    counted = collections.Counter((one.fault, one.outcome, one.ok) for one in run.injections)
    lines = ["| fault | outcome | times | ok |", "|---|---|---|---|"]
    lines += [f"| {fault} | {outcome} | {times} | {'yes' if ok else 'NO'} |"
              for (fault, outcome, ok), times in sorted(counted.items())]  # fmt: skip
    lines.append(
        f"\n{len(run.injections)} faults; {run.num_rollouts} rollouts of {run.num_expected}; {run.num_retries} requests sent "
        f"again ({run.num_unsent_retries} of them could not connect), {run.num_bad_replies} replies refused; "
        f"{run.num_cookies} cookies sent, {run.num_redirects_followed} redirects followed; memory +{run.grown_mib:.0f} MiB; "
        f"{'ok' if run.ok else 'NOT ok'}"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="faults (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--completions-route", action="store_true", help="against plain vLLM's route")
    parser.add_argument("--server", help="a real server of ludic; without, a fake in this process")
    parser.add_argument("--model", help="the model that it serves")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="of one attempt at a real server (default: 10)")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    if arguments.server:
        if not arguments.model:
            parser.error("--server needs --model")
        work = break_real(
            arguments.server, arguments.model, arguments.count, seed=arguments.seed, timeout_s=arguments.timeout_s
        )
    else:
        work = break_fake(arguments.count, seed=arguments.seed, own_route=not arguments.completions_route)
    run = asyncio.run(work)
    restarts = [asyncio.run(restart_once(seed)) for seed in range(max(1, arguments.count // 10))]
    refused = sum(one.ok for one in restarts)
    sys.stdout.write(f"{table(run)}\nanother start of the server: {refused} of {len(restarts)} refused\n")
    sys.stdout.write(f"{time.perf_counter() - started:.0f} s, PROTOCOL {wire.PROTOCOL}\n")
    return 0 if run.ok and refused == len(restarts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
