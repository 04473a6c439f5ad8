"""Several servers as one engine, against stand-in servers on real sockets that die, sleep, and come back."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from aiohttp import web
from transformers import PreTrainedTokenizerFast

from ludic.inference.client import vllm_client
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.rollout.engine import PolicyWeights, WeightSyncReport
from ludic.rollout.errors import EngineError, WeightSyncError
from ludic.survival import recovery
from ludic.survival.recovery import RecoveringEngine
from ludic.survival.several_servers import SeveralServers
from ludic.types import Completion, SamplingParams
from tests.fake_vllm import MODEL, FakeServer, error_body, serving
from tests.vllm_helpers import make_tiny_tokenizer

PROMPT = [3, 40, 41, 42, 4]
WEIGHTS = torch.nn.Linear(1, 1)


class Sync:
    """Stands in for `WeightSync`: notes which server got which version."""

    log: list[tuple[str, int]] = []  # noqa: RUF012  # set anew by each test
    failing: set[str] = set()  # noqa: RUF012
    hold: threading.Event | None = None
    aborted: list[str] = []  # noqa: RUF012

    def __init__(self, control: ServerControl, **settings: Any) -> None:
        self.url, self.hangs = control.base_url, False

    def sync(self, model: torch.nn.Module, policy_version: int) -> WeightSyncReport:
        if self.hold is not None:
            self.hangs = True
            self.hold.wait(60)
            raise WeightSyncError("the sync was given up")
        if self.url in self.failing:
            raise WeightSyncError("the digests differ")
        self.log.append((self.url, policy_version))
        gap = 0.25 * len(self.log)
        return WeightSyncReport(
            policy_version=policy_version, num_tensors=1, num_bytes=4, seconds=gap, proof="digests", logprob_gap=gap,
            phases_s={"send": gap},
        )  # fmt: skip

    def abort(self, reason: str) -> None:
        if self.hold is not None and self.hangs:
            self.aborted.append(self.url)
            self.hold.set()

    def close(self) -> None: ...


@dataclass
class Fleet:
    servers: list[FakeServer]
    engine: SeveralServers
    recovering: list[RecoveringEngine]
    said: list[str] = field(default_factory=list)
    syncs: list[tuple[str, int]] = field(default_factory=list)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


@pytest.fixture
async def fleet(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    """Three servers with the weights of version 1."""
    monkeypatch.setattr(recovery, "LOOK_S", 0.01)
    monkeypatch.setattr(vllm_client, "MAX_ATTEMPTS", 2)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    monkeypatch.setattr(vllm_client, "WeightSync", Sync)
    monkeypatch.setattr(Sync, "log", [])
    monkeypatch.setattr(Sync, "failing", set())
    monkeypatch.setattr(Sync, "aborted", [])
    monkeypatch.setattr(Sync, "hold", None)
    monkeypatch.setattr(vllm_client, "SYNC_GRACE_S", 0.05)
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(serving(FakeServer(tokenizer=tokenizer))) for _ in range(3)]
        said: list[str] = []
        engines = []
        for server in servers:
            engine = RecoveringEngine(VLLMEngine(server.base_url, model=MODEL), say=said.append, wait_s=0.3)
            await engine.connect(tokenizer)
            await engine.enable_weight_sync(PROMPT)
            engines.append(engine)
        several = await stack.enter_async_context(contextlib.aclosing(SeveralServers(engines, say=said.append)))
        await several.update_weights(PolicyWeights(WEIGHTS, 1))
        yield Fleet(servers, several, engines, said, Sync.log)


async def group(fleet: Fleet, size: int = 4) -> list[Completion]:
    return await fleet.engine.generate(PROMPT, num_completions=size, sampling=SamplingParams(max_tokens=4))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def asked(fleet: Fleet) -> list[int]:
    return [len(server.requests) for server in fleet.servers]


async def test_whole_groups_go_to_the_server_with_the_fewest_completions_in_flight(fleet: Fleet) -> None:
    for server in fleet.servers:
        server.hold = asyncio.Event()
    groups = []
    for size in (6, 2, 3, 1, 1, 4):
        groups.append(asyncio.create_task(group(fleet, size)))
        await until(lambda: sum(asked(fleet)) == len(groups))
    in_flight = [sum(request["n"] for request in server.requests) for server in fleet.servers]
    assert in_flight == [6, 4, 7], "6; 2, 1 and 1; 3 and 4"
    for server in fleet.servers:
        assert server.hold is not None
        server.hold.set()
    assert [len(one) for one in await asyncio.gather(*groups)] == [6, 2, 3, 1, 1, 4]
    assert not any(fleet.engine._load.values())


async def test_every_server_gets_the_weights_and_the_report_has_every_proof(fleet: Fleet) -> None:
    report = await fleet.engine.update_weights(PolicyWeights(WEIGHTS, 2))
    urls = [server.base_url for server in fleet.servers]
    assert sorted(fleet.syncs[3:]) == sorted((url, 2) for url in urls)
    assert all(f"{url}: digests" in report.proof for url in urls)
    assert report.num_bytes == 12 and report.logprob_gap == 1.5
    assert report.phases_s == {"send": 1.5}, "the longest"
    assert fleet.engine.policy_version == report.policy_version == 2
    assert [one.policy_version for one in await group(fleet)] == [2] * 4


async def test_what_a_lost_server_had_is_generated_by_the_others_at_once_and_it_joins_again_with_the_newest_weights(
    fleet: Fleet,
) -> None:
    for server in fleet.servers:
        server.hold = asyncio.Event()
    groups = [asyncio.create_task(group(fleet)) for _ in range(6)]
    await until(lambda: asked(fleet) == [2, 2, 2])
    lost = fleet.servers[1]
    fleet.recovering[1]._wait_s = 30.0
    lost.faults = ["drop"] * 1000
    lost.start = "2" * 32
    for server in fleet.servers:
        assert server.hold is not None
        server.hold.set()
        server.hold = None
    await asyncio.gather(*groups)
    assert asked(fleet)[0] + asked(fleet)[2] == 6
    assert fleet.engine.counts()["server_recoveries"] == 1 and fleet.engine.counts()["discarded_completions"] == 8
    lost.faults = []
    await fleet.engine.update_weights(PolicyWeights(WEIGHTS, 2))
    await until(lambda: fleet.recovering[1].is_ready and fleet.recovering[1].policy_version == 2)
    lost.requests.clear()
    await asyncio.gather(*(group(fleet) for _ in range(3)))
    assert len(lost.requests) == 1


async def test_a_sync_waits_for_no_server_that_is_lost(fleet: Fleet) -> None:
    fleet.recovering[0]._wait_s = 30.0
    Sync.failing.add(fleet.servers[0].base_url)
    report = await asyncio.wait_for(fleet.engine.update_weights(PolicyWeights(WEIGHTS, 2)), 20)
    assert report.policy_version == 2 and report.num_bytes == 8
    assert [one.policy_version for one in await group(fleet)] == [2] * 4
    assert not fleet.servers[0].requests, "it does not hold the weights"
    Sync.failing.clear()
    await until(lambda: fleet.recovering[0].policy_version == 2)
    await asyncio.gather(*(group(fleet) for _ in range(3)))
    assert fleet.servers[0].requests


async def test_a_run_goes_on_without_a_server_that_does_not_come_back_and_ends_with_the_last(fleet: Fleet) -> None:
    for number, (server, engine) in enumerate(zip(fleet.servers, fleet.recovering, strict=True), 1):
        server.faults = ["drop"] * 10_000
        engine._answers = lambda: False  # type: ignore[method-assign]  # and its port does not listen either
        if number < 3:
            await group(fleet)
            await until(lambda failed=engine: failed.failure is not None)  # type: ignore[misc]
            await group(fleet)
            assert any(f"{server.base_url} is given up, {3 - number} of 3 go on" in one for one in fleet.said)
    with pytest.raises(EngineError, match=r"none of 3 servers is left.*did not come back"):
        await group(fleet)
    with pytest.raises(EngineError, match="none of 3 servers is left"):
        await fleet.engine.update_weights(PolicyWeights(WEIGHTS, 2))


async def test_a_request_that_is_refused_is_not_sent_to_the_others(fleet: Fleet) -> None:
    for server in fleet.servers:
        server.faults = [web.json_response(error_body(400, "no such prompt"), status=400)]
    with pytest.raises(EngineError, match="no such prompt"):
        await group(fleet)
    assert sum(asked(fleet)) == 1 and not any(fleet.engine._load.values())


@pytest.mark.parametrize("by", ["the sync", "a request"])
async def test_the_end_of_a_run_ends_the_syncs_so_that_its_checkpoint_does_not_wait_for_a_server_that_hangs(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(Sync, "hold", threading.Event())
    if by == "a request":  # which all servers have lost, and wait for their weights
        for server in fleet.servers:
            server.start = "2" * 32
    running: asyncio.Task[object] = asyncio.create_task(
        fleet.engine.update_weights(PolicyWeights(WEIGHTS, 2)) if by == "the sync" else group(fleet)
    )
    syncs = fleet.engine._syncs
    await until(lambda: len(syncs) == 3 and not any(task.done() for task in syncs.values()))
    await asyncio.sleep(0.3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 20)
    assert all(task.done() for task in syncs.values()) and Sync.aborted
