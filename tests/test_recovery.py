"""The engine that gets its server back, against a stand-in server on a real socket that dies, sleeps, and comes back."""

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from aiohttp import web
from transformers import PreTrainedTokenizerFast

from ludic.inference.client import handshake, vllm_client
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.rollout.engine import PolicyWeights, WeightSyncReport
from ludic.rollout.errors import EngineError, ServerInUseError, ServerLostError, ServerRestartedError, WeightSyncError
from ludic.storage.identity import identity
from ludic.survival import recovery
from ludic.survival.recovery import RecoveringEngine
from ludic.types import Completion, SamplingParams
from tests.fake_vllm import MODEL, FakeServer, serving
from tests.vllm_helpers import make_tiny_tokenizer

Result = TypeVar("Result")
PROMPT = [3, 40, 41, 42, 4]
WEIGHTS = torch.nn.Linear(1, 1)


class Syncs:
    """Stands in for `WeightSync`: the syncs that were made, each with the start of the server that got them."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.done: list[tuple[str | None, int]] = []
        self.failures = 0
        """So many syncs to come fail."""
        self.hold: threading.Event | None = None
        self.aborted: list[str] = []
        self.num_running = 0

    def __call__(self, control: ServerControl, **settings: Any) -> "Syncs":
        return self

    def sync(self, model: torch.nn.Module, policy_version: int) -> WeightSyncReport:
        self.num_running += 1
        try:
            return self._sync(model, policy_version)
        finally:
            self.num_running -= 1

    def _sync(self, model: torch.nn.Module, policy_version: int) -> WeightSyncReport:
        assert model is WEIGHTS
        if self.hold is not None:
            self.hold.wait(30)
        if self.aborted and self.hold is not None:
            self.hold = None
            raise WeightSyncError(self.aborted[-1])
        if self.failures:
            self.failures -= 1
            raise WeightSyncError("the digests differ")
        self.done.append((self.server.start, policy_version))
        return WeightSyncReport(policy_version=policy_version, num_tensors=1, num_bytes=4, seconds=0.0, proof="digests")

    def abort(self, reason: str) -> None:
        self.aborted.append(reason)
        if self.hold is not None:
            self.hold.set()

    def close(self) -> None: ...


class OwnServer:
    """Stands in for `ServerProcess`: a restart gives the fake a new start."""

    def __init__(self, server: FakeServer) -> None:
        self.server, self.reasons, self.is_running, self.log_path = server, list[str](), True, Path("server.log")
        self.base_url = server.base_url

    def ending(self, wait_s: float = 0.0) -> str | None:
        return (
            None if self.is_running else "the vLLM server was ended by SIGHUP; it said: bye (its whole log: server.log)"
        )

    def restart(self, reason: str) -> None:
        self.reasons.append(reason)
        self.server.start = f"{len(self.reasons):032x}"
        self.server.faults.clear()
        self.is_running = True


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


@pytest.fixture
async def server(tokenizer: PreTrainedTokenizerFast) -> AsyncIterator[FakeServer]:
    async with serving(FakeServer(tokenizer=tokenizer)) as running:
        yield running


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "LOOK_S", 0.01)
    monkeypatch.setattr(vllm_client, "MAX_ATTEMPTS", 2)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)


@pytest.fixture
def syncs(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Syncs:
    stand_in = Syncs(server)
    monkeypatch.setattr(vllm_client, "WeightSync", stand_in)
    return stand_in


@pytest.fixture
async def opened() -> AsyncIterator[contextlib.AsyncExitStack]:
    async with contextlib.AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def connect(
    server: FakeServer, tokenizer: PreTrainedTokenizerFast, syncs: Syncs, opened: contextlib.AsyncExitStack
) -> Callable[..., Any]:
    """Opens engines on the server, their weights at version 1."""

    async def make(**settings: Any) -> tuple[RecoveringEngine, list[str]]:
        said: list[str] = []
        client = VLLMEngine(server.base_url, model=MODEL)
        engine = RecoveringEngine(client, say=said.append, **settings)
        opened.push_async_callback(engine.aclose)
        await engine.connect(tokenizer)
        await engine.enable_weight_sync(PROMPT)
        await engine.update_weights(PolicyWeights(WEIGHTS, 1))
        return engine, said

    return make


async def one(engine: RecoveringEngine) -> Completion:
    (completion,) = await engine.generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4))
    return completion


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_what_a_server_that_was_started_again_generates_is_not_returned_before_it_has_the_weights(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, said = await connect()
    server.start = "2" * 32
    completion = await one(engine)
    assert completion.policy_version == 1
    assert syncs.done == [("b007" * 8, 1), ("2" * 32, 1)]
    assert len(server.requests) == 1, "with the weights that it was started with it generated nothing"
    assert engine.counts()["server_recoveries"] == 1 and engine.counts()["discarded_completions"] == 1
    assert any("started again" in line for line in said) and any(
        "back, with the weights of version 1" in line for line in said
    )


async def test_a_server_that_came_back_without_leases_is_not_trained_on_before_it_has_the_weights(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, _ = await connect()
    server.start = None  # as plain vLLM, which answers whatever the token
    assert (await one(engine)).policy_version == 1
    assert syncs.done == [("b007" * 8, 1), (None, 1)] and engine.counts()["discarded_completions"] == 1


async def test_a_run_keeps_its_lease_over_a_failed_sync_and_gets_a_new_one_of_a_new_start(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, _ = await connect()
    syncs.failures = 1
    await engine.update_weights(PolicyWeights(WEIGHTS, 2))
    await one(engine)
    server.start = "2" * 32
    await one(engine)
    assert server.tokens == ["b007" * 8 + "-1", "2" * 32 + "-1"]


async def test_a_sync_never_reaches_a_server_that_was_started_again(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, _ = await connect()
    control = engine._engine.control.branch()
    server.start = "2" * 32
    for ask in (control.pause, lambda: control.note_weights(2)):
        with pytest.raises(ServerRestartedError, match="started again"):
            await asyncio.to_thread(ask)
    assert not server.paused


async def test_the_watch_notices_a_server_that_was_started_again_while_nothing_is_generated(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "WATCH_S", 0.02)
    engine, said = await connect()
    server.start = "2" * 32
    await until(lambda: said)
    server.requests.clear()
    await one(engine)
    assert len(server.requests) == 1, "no request went to it before it had the weights"
    assert syncs.done[-1] == ("2" * 32, 1)


async def test_the_watch_notices_a_server_with_leases_in_the_place_of_one_without(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "WATCH_S", 0.02)
    server.start = None
    engine, said = await connect()
    await one(engine)
    server.start = "2" * 32
    await until(lambda: said)
    await one(engine)
    assert server.tokens == [None, "2" * 32 + "-1"] and syncs.done[-1] == ("2" * 32, 1)


async def test_every_group_in_flight_is_generated_again_and_none_twice(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, _ = await connect()
    server.hold = asyncio.Event()
    groups = [asyncio.create_task(one(engine)) for _ in range(20)]
    await until(lambda: len(server.requests) == 20)
    server.start = "2" * 32
    server.hold.set()
    completions = await asyncio.gather(*groups)
    assert [completion.policy_version for completion in completions] == [1] * 20
    assert len(server.requests) == 40 and len(syncs.done) == 2
    assert engine.counts()["server_recoveries"] == 1 and engine.counts()["discarded_completions"] == 20


async def test_a_server_of_our_own_is_started_again(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    own = OwnServer(server)
    engine, said = await connect(server=own)
    server.faults += [web.Response(status=500, text="engine is dead") for _ in range(2)]
    assert (await one(engine)).policy_version == 1
    assert len(own.reasons) == 1 and "engine is dead" in own.reasons[0]
    assert syncs.done[-1] == (f"{1:032x}", 1)
    assert any("starting the server again" in line for line in said)


async def test_a_server_of_somebody_else_is_waited_for_with_the_command_that_starts_it(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, opened: contextlib.AsyncExitStack
) -> None:
    fake = FakeServer(tokenizer=tokenizer)
    syncs = Syncs(fake)
    monkeypatch.setattr(vllm_client, "WeightSync", syncs)
    monkeypatch.setattr(recovery, "COUNTDOWN_S", 0.05)
    said: list[str] = []
    runner = web.AppRunner(fake.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    client = VLLMEngine(f"http://127.0.0.1:{port}", model=MODEL)
    engine = RecoveringEngine(client, say=said.append)
    opened.push_async_callback(engine.aclose)
    await engine.connect(tokenizer)
    await engine.enable_weight_sync(PROMPT)
    await engine.update_weights(PolicyWeights(WEIGHTS, 1))
    await runner.cleanup()

    waiting = asyncio.create_task(one(engine))
    await until(lambda: sum("waiting" in line for line in said) >= 2)
    assert f"python -m ludic.inference.vllm_server --model {MODEL} --port {port}" in said[-1]
    fake.start = "2" * 32
    again = web.AppRunner(fake.app(), access_log=None)
    await again.setup()
    await web.TCPSite(again, "127.0.0.1", port, reuse_address=True).start()
    try:
        assert (await waiting).policy_version == 1
        assert syncs.done == [("b007" * 8, 1), ("2" * 32, 1)]
        await engine.aclose()
    finally:
        await again.cleanup()


async def test_a_server_that_does_not_come_back_ends_the_run_with_what_to_do(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(FakeServer(tokenizer=tokenizer)) as fake:
        monkeypatch.setattr(vllm_client, "WeightSync", Syncs(fake))
        client = VLLMEngine(fake.base_url, model=MODEL)
        engine = RecoveringEngine(client, wait_s=0.2, say=lambda line: None)
        await engine.connect(tokenizer)
        await engine.enable_weight_sync(PROMPT)
        await engine.update_weights(PolicyWeights(WEIGHTS, 1))
    with pytest.raises(EngineError, match=r"did not come back within --server-wait 0\.2 s.*vllm_server.*--resume"):
        await one(engine)
    with pytest.raises(EngineError, match="did not come back"):
        await engine.update_weights(PolicyWeights(WEIGHTS, 2))
    await engine.aclose()


async def test_a_sync_that_failed_is_made_again_and_what_was_in_flight_is_not_trained_on(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, _ = await connect()
    server.hold = asyncio.Event()
    in_flight = asyncio.create_task(one(engine))
    await until(lambda: server.requests)
    syncs.failures = 2
    report = await engine.update_weights(PolicyWeights(WEIGHTS, 2))
    server.hold.set()
    assert report.policy_version == 2
    assert (await in_flight).policy_version == 2, "half replaced weights may have sampled the first answer"
    assert engine.counts()["server_recoveries"] == 2 and engine.counts()["discarded_completions"] == 1


async def test_a_sync_that_always_fails_ends_the_run_with_its_reason(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, _ = await connect()
    syncs.failures = 1000
    with pytest.raises(EngineError, match=r"lost 6 times without a weight sync in between: the digests differ"):
        await engine.update_weights(PolicyWeights(WEIGHTS, 2))


async def test_the_first_sync_of_a_run_is_tried_twice_only(
    tokenizer: PreTrainedTokenizerFast, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    syncs.failures = 2
    with pytest.raises(EngineError, match="lost 2 times"):
        await connect()
    assert syncs.failures == 0


async def test_a_request_that_loses_the_server_each_time_ends_the_run(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, _ = await connect()
    server.faults = [web.Response(status=500, text=f"poison {number}") for number in range(10)]
    with pytest.raises(ServerLostError, match=r"a request lost the server 5 times, the last time: .*poison 9"):
        await one(engine)
    assert len(syncs.done) == 5, "the weights are sent again before each attempt"


async def test_a_silent_server_is_lost_and_a_sync_that_waits_for_it_is_ended(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "WATCH_S", 0.02)
    monkeypatch.setattr(recovery, "SILENT_S", 0.1)
    engine, said = await connect()
    syncs.hold = threading.Event()

    keep = handshake.keep

    def silent(control: ServerControl) -> None:
        if not syncs.aborted:
            raise ServerLostError("no answer within 15 s")
        keep(control)

    monkeypatch.setattr(handshake, "keep", silent)
    syncing = asyncio.create_task(engine.update_weights(PolicyWeights(WEIGHTS, 2)))
    await until(lambda: syncs.aborted)
    assert "no answer within 15 s" in syncs.aborted[0]
    assert (await syncing).policy_version == 2 and said


async def test_a_server_that_another_trainer_has_taken_ends_the_run_with_its_name(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, _ = await connect()
    control = ServerControl(server.base_url)
    other = {"host": "node-9", "pid": 77, "pid_started": 1.0, "user": "eve", "out_dir": "/x", "since": "now"}
    await asyncio.to_thread(handshake.claim, control, other, takes_over=1)
    with pytest.raises(ServerInUseError, match=r"eve@node-9.*77"):
        await one(engine)


class Owner:
    """A `Policy` whose owner is in the middle of an update while `changing` is held."""

    def __init__(self) -> None:
        self.version = 1
        self.changing = asyncio.Lock()

    async def read(self, reader: Callable[[torch.nn.Module, int], Result]) -> Result:
        async with self.changing:
            return await asyncio.to_thread(reader, WEIGHTS, self.version)


async def test_a_server_that_came_back_is_sent_the_weights_between_two_updates_with_the_version_of_that_moment(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, said = await connect()
    owner = Owner()
    await engine.update_weights(owner)
    async with owner.changing:
        server.start = "2" * 32
        waiting = asyncio.create_task(one(engine))
        await until(lambda: said)
        await asyncio.sleep(0.2)
        assert len(syncs.done) == 2, "the model may be half way through a step"
        owner.version = 2
    assert (await waiting).policy_version == 2
    assert syncs.done[2:] == [("2" * 32, 2)]


async def test_the_trainer_waits_with_its_sync_while_that_of_a_recovery_is_under_way(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = await connect()
    monkeypatch.setattr(syncs, "abort", lambda reason: None)  # none is under way at the loss
    syncs.hold = threading.Event()
    server.start = "2" * 32
    waiting = asyncio.create_task(one(engine))
    await until(lambda: syncs.num_running == 1)
    update = asyncio.create_task(engine.update_weights(PolicyWeights(WEIGHTS, 2)))
    await asyncio.sleep(0.2)
    assert syncs.num_running == 1 and len(syncs.done) == 1
    syncs.hold.set()
    assert (await update).policy_version == 2 and (await waiting).policy_version in (1, 2)
    assert syncs.done[1:] == [("2" * 32, 1), ("2" * 32, 2)]


async def test_a_server_that_others_changed_while_our_lease_had_run_out_is_not_trained_on(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "WATCH_S", 0.02)
    keep, may_keep = handshake.keep, threading.Event()

    def late(control: ServerControl) -> None:  # a trainer that was stopped meanwhile, say
        may_keep.wait(30)
        keep(control)

    monkeypatch.setattr(handshake, "keep", late)
    engine, said = await connect()
    stranger = ServerControl(server.base_url)
    with pytest.raises(ServerInUseError):
        await asyncio.to_thread(stranger.pause)
    server.clock_ahead_s += 1000.0
    await asyncio.to_thread(stranger.pause)
    may_keep.set()
    await until(lambda: said)
    with pytest.raises(ServerInUseError, match="lost the server"):
        await one(engine)


async def test_the_next_trainer_need_not_wait_for_one_that_has_ended(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, _ = await connect()
    with pytest.raises(ServerInUseError, match="process"):
        await connect()
    await engine.aclose()
    await connect()


async def test_the_lease_of_a_trainer_that_is_dead_is_taken_over_at_once(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    dead = {**identity(Path()), "pid": ended.pid}
    await asyncio.to_thread(handshake.claim, ServerControl(server.base_url), dead)
    engine, said = await connect()
    assert said == ["the trainer that had the lease of the server is dead; taking the server over"]
    await one(engine)
    assert server.tokens == ["b007" * 8 + "-2"]


async def test_a_caller_that_is_cancelled_takes_its_request_with_it(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any]
) -> None:
    engine, _ = await connect()
    server.hold = asyncio.Event()
    task = asyncio.create_task(one(engine))
    await until(lambda: server.in_flight == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not engine._in_flight and engine.counts()["server_recoveries"] == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_what_ends_while_a_sync_is_under_way_is_returned_only_if_that_is_proven(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any], fails: bool
) -> None:
    engine, _ = await connect()
    server.hold, syncs.hold = asyncio.Event(), threading.Event()
    in_flight = asyncio.create_task(one(engine))
    await until(lambda: server.requests)
    syncing = asyncio.create_task(engine.update_weights(PolicyWeights(WEIGHTS, 2)))
    server.hold.set()
    await until(lambda: not server.in_flight)
    await asyncio.sleep(0.1)
    assert not in_flight.done(), "the server may have computed its end with weights that nobody has proven"
    syncs.failures = int(fails)
    syncs.hold.set()
    assert (await syncing).policy_version == 2
    assert (await in_flight).policy_version == (2 if fails else 1)
    assert engine.counts()["discarded_completions"] == int(fails)


async def test_a_server_that_is_half_dead_is_another_attempt_and_not_the_end(
    server: FakeServer, syncs: Syncs, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OwnServer(server)
    engine, _ = await connect(server=own)
    check, answers = handshake.weight_sync_info, [EngineError("/is_paused answered 500: EngineCore died")]

    def half_dead(*args: Any) -> dict[str, Any]:
        if answers:
            raise answers.pop()
        return check(*args)

    monkeypatch.setattr(handshake, "weight_sync_info", half_dead)
    syncs.failures = 1
    assert (await engine.update_weights(PolicyWeights(WEIGHTS, 2))).policy_version == 2
    assert len(own.reasons) == 1, "left running after the refused sync, started again after the dead engine"


async def test_an_answer_that_no_vllm_server_gives_is_a_lost_server_and_no_bug(server: FakeServer) -> None:
    control = ServerControl(server.base_url)
    with pytest.raises(ServerLostError, match="answered without renewed"):
        await asyncio.to_thread(control.ask, "GET", "/ludic/v1/trainer", "renewed")
