"""The client of a vLLM server, over a real socket, against a stand-in that speaks ludic's route and vLLM's JSON.

What uses the fixture `server` runs twice: against ludic's server, and against plain vLLM without ludic's route.
"""

import asyncio
import copy
import dataclasses
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web
from transformers import PreTrainedTokenizerFast

from ludic.inference.client import vllm_client
from ludic.inference.client.handshake import start_command
from ludic.inference.client.vllm_client import VLLMEngine, stop_token_ids
from ludic.inference.client.weighted_semaphore import WeightedSemaphore
from ludic.inference.server import server_guard
from ludic.inference.wire import PATH, Generated
from ludic.rollout.engine import PolicyWeights, WeightSyncReport
from ludic.rollout.errors import (
    EngineError,
    ServerMismatchError,
    ServerRestartedError,
    ServerUnauthorizedError,
    ServerUnreachableError,
    WeightSyncError,
)
from ludic.task.pretrained import load_config
from ludic.types import Completion, SamplingParams
from tests.fake_vllm import MODEL, FakeServer, error_body, serving
from tests.vllm_helpers import make_tiny_tokenizer

PROMPT = [3, 40, 41, 42, 4]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


@pytest.fixture(params=[True, False], ids=["ludic", "plain"])
async def server(tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest) -> AsyncIterator[FakeServer]:
    start = "b007" * 8 if request.param else None
    async with serving(FakeServer(tokenizer=tokenizer, generate_route=request.param, start=start)) as running:
        yield running


@pytest.fixture
async def open_client(server: FakeServer) -> AsyncIterator[Callable[..., VLLMEngine]]:
    """Makes clients of the server that send seeds, and closes them."""
    opened: list[VLLMEngine] = []

    def make(**options: Any) -> VLLMEngine:
        settings: dict[str, Any] = {"model": MODEL, "seed_requests": True} | options
        client = VLLMEngine(server.base_url, **settings)
        client._has_generate_route = server.generate_route  # as connect() finds out
        opened.append(client)
        return client

    yield make
    for client in opened:
        await client.aclose()
        await client.aclose()


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Retries at once; the calls that chose the waiting time."""
    calls: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        calls.append((low, high))
        return 0.0

    monkeypatch.setattr(random, "uniform", uniform)
    return calls


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- token ids in, token ids out --------------------------------------------------------------------------------------


async def test_the_prompts_ids_go_out_as_they_are_and_the_completions_ids_come_back_as_they_are(
    server: FakeServer, open_client: Callable[..., VLLMEngine]
) -> None:
    client = open_client(stop_token_ids=[1, 77])
    sampling = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=16, seed=50)
    completions = await client.generate(PROMPT, num_completions=3, sampling=sampling)
    (request,) = server.requests
    common = {
        "model": MODEL, "n": 3, "max_tokens": 16, "temperature": 0.7, "top_p": 0.9, "stop_token_ids": [1, 77],
        "seed": 50, "cache_salt": request["cache_salt"], "request_id": request["request_id"],
    }  # fmt: skip
    ours = {"prompt_token_ids": PROMPT, "logprobs": True}
    plain = {"prompt": PROMPT, "logprobs": 0, "return_token_ids": True, "add_special_tokens": False}
    # What plain vLLM would take from the model's generation_config.json.
    plain |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert request == common | (ours if server.generate_route else plain)
    assert [completion.token_ids for completion in completions] == [[50, 50, 50, 1], [51, 51, 51, 1], [52, 52, 52, 1]]
    assert all(completion.logprobs == [-0.25, -0.5, -0.75, -1.0] for completion in completions)
    assert all(completion.finish_reason == "stop" and completion.policy_version == 0 for completion in completions)


async def test_a_truncated_completion_has_no_stop_token(open_client: Callable[..., VLLMEngine]) -> None:
    (completion,) = await open_client().generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=2))
    assert completion.finish_reason == "length" and completion.token_ids == [0, 9]


async def test_a_seed_is_sent_only_when_it_was_asked_for_since_it_slows_the_server_down(
    server: FakeServer, open_client: Callable[..., VLLMEngine]
) -> None:
    for seed_requests in (False, True):
        await open_client(seed_requests=seed_requests).generate(
            PROMPT, num_completions=2, sampling=SamplingParams(max_tokens=4, seed=5)
        )
    assert [request.get("seed") for request in server.requests] == [None, 5]


async def test_log_probs_are_asked_for_request_by_request(
    server: FakeServer, open_client: Callable[..., VLLMEngine]
) -> None:
    client = open_client()
    for wanted in (False, True):
        sampling = SamplingParams(max_tokens=4, logprobs=wanted)
        (completion,) = await client.generate(PROMPT, num_completions=1, sampling=sampling)
        assert completion.logprobs == ([-0.25, -0.5, -0.75, -1.0] if wanted else None)
    assert [request.get("logprobs") for request in server.requests] == (
        [False, True] if server.generate_route else [None, 0]
    )


async def test_connecting_finds_out_which_route_the_server_has(
    server: FakeServer, tokenizer: PreTrainedTokenizerFast
) -> None:
    client = VLLMEngine(server.base_url, model=MODEL)
    await client.connect(tokenizer)
    await client.generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4))
    await client.aclose()
    assert server.paths == [PATH if server.generate_route else "/v1/completions"]


async def test_an_evaluation_uses_nothing_of_a_server_that_was_started_again(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    async with serving(FakeServer(tokenizer=tokenizer)) as server:
        client = VLLMEngine(server.base_url, model=MODEL)
        await client.connect(tokenizer)
        await generated(client)
        server.start = "2" * 32
        with pytest.raises(ServerRestartedError, match="started again"):
            await generated(client)
        await client.aclose()
    assert server.tokens == ["b007" * 8]


async def test_a_server_of_another_protocol_is_an_error_with_both_numbers(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_guard, "PROTOCOL", 2)
    async with serving(FakeServer(tokenizer=tokenizer)) as server:
        client = VLLMEngine(server.base_url, model=MODEL)
        with pytest.raises(ServerMismatchError, match=r"speaks protocol 2 of ludic, and this side 3: start both from"):
            await client.connect(tokenizer)
        await client.aclose()


async def test_a_group_above_the_concurrency_is_asked_for_in_parts_with_the_seeds_that_one_request_would_have_used(
    server: FakeServer, open_client: Callable[..., VLLMEngine]
) -> None:
    sampling = SamplingParams(max_tokens=4, seed=10)
    whole = await open_client().generate(PROMPT, num_completions=8, sampling=sampling)
    in_parts = await open_client(concurrency=3).generate(PROMPT, num_completions=8, sampling=sampling)
    assert in_parts == whole
    assert [(request["n"], request["seed"]) for request in server.requests] == [(8, 10), (3, 10), (3, 13), (2, 16)]


async def test_the_concurrency_counts_completions_and_not_requests(
    server: FakeServer, open_client: Callable[..., VLLMEngine]
) -> None:
    client = open_client(concurrency=10)
    sampling = SamplingParams(max_tokens=4)
    await asyncio.gather(*(client.generate(PROMPT, num_completions=4, sampling=sampling) for _ in range(12)))
    assert len(server.requests) == 12 and server.most_in_flight == 8  # a third group of 4 would make 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda group: group[:1], "asked for 2 completions, the server returned 1"),
        (lambda group: [group[0], dataclasses.replace(group[1], finish_reason="abort")], "'abort'"),
        (lambda group: [group[0], dataclasses.replace(group[1], logprobs=[-1.0] * 3)], "4 tokens but 3 log-probs"),
    ],
)
async def test_an_answer_that_is_not_what_was_asked_for_is_an_error(
    server: FakeServer,
    open_client: Callable[..., VLLMEngine],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[Generated]], list[Generated]],
    said: str,
    no_backoff: list[tuple[float, float]],
) -> None:
    asked = server.completions({"n": 2, "max_tokens": 4, "logprobs": True})
    monkeypatch.setattr(server, "completions", lambda body: change(asked))
    with pytest.raises(EngineError, match=said):
        await open_client().generate(PROMPT, num_completions=2, sampling=SamplingParams(max_tokens=4))


async def test_log_probs_that_the_server_lost_are_unknown_and_no_error(
    server: FakeServer, open_client: Callable[..., VLLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = server.completions({"n": 2, "max_tokens": 4, "logprobs": True})
    lost = [asked[0], dataclasses.replace(asked[1], logprobs=None)]
    monkeypatch.setattr(server, "completions", lambda body: lost)
    completions = await open_client().generate([1, 2], num_completions=2, sampling=SamplingParams(max_tokens=4))
    assert [completion.logprobs is None for completion in completions] == [False, True]


async def test_a_completion_comes_back_as_the_server_drew_it_however_long_it_is(
    server: FakeServer, open_client: Callable[..., VLLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    group = [
        Generated(
            token_ids=torch.randint(0, 2**31 - 1, (length,), generator=generator).tolist(),
            logprobs=torch.randn(length, generator=generator).abs().mul(-1e3).tolist(),  # float32, as vLLM has them
            finish_reason="length" if length == 4096 else "stop",
        )
        for length in (1, 2, 4096)
    ]
    monkeypatch.setattr(server, "completions", lambda body: group)
    completions = await open_client().generate(PROMPT, num_completions=3, sampling=SamplingParams(max_tokens=4096))
    assert [completion.token_ids for completion in completions] == [one.token_ids for one in group]
    assert [completion.logprobs for completion in completions] == [one.logprobs for one in group]


# --- weights that change ----------------------------------------------------------------------------------------------


class FakeSync:
    """A weight sync that takes until it is told, and fails if it is told so."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def sync(self, model: torch.nn.Module, policy_version: int) -> WeightSyncReport:
        if self.error is not None:
            raise self.error
        return WeightSyncReport(policy_version=policy_version, num_tensors=1, num_bytes=4, seconds=0.0, proof="none")

    def close(self) -> None: ...


@pytest.fixture
def syncing_client(open_client: Callable[..., VLLMEngine]) -> VLLMEngine:
    client = open_client()
    client._sync = FakeSync()  # type: ignore[assignment]
    return client


async def generated(client: VLLMEngine) -> Completion:
    (completion,) = await client.generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4))
    return completion


@pytest.mark.parametrize("hangs", [False, True])
async def test_an_interrupted_sync_is_let_to_its_end_and_one_that_hangs_is_torn_down(
    syncing_client: VLLMEngine, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    monkeypatch.setattr(vllm_client, "SYNC_GRACE_S", 0.2 if hangs else 20.0)
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    aborted: list[str] = []

    def sync(model: torch.nn.Module, policy_version: int) -> WeightSyncReport:
        started.set()
        go_on.wait(20)
        ended.set()
        raise WeightSyncError("broken off")

    def abort(reason: str) -> None:
        aborted.append(reason)
        go_on.set()

    monkeypatch.setattr(syncing_client._sync, "sync", sync)
    monkeypatch.setattr(syncing_client._sync, "abort", abort, raising=False)
    task = asyncio.create_task(syncing_client.update_weights(PolicyWeights(torch.nn.Linear(1, 1), 1)))
    await asyncio.to_thread(started.wait, 20)
    task.cancel()
    if not hangs:
        asyncio.get_running_loop().call_later(0.1, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set() and aborted == (["the run was interrupted"] if hangs else [])


async def test_a_completion_has_the_version_at_which_its_request_started(
    server: FakeServer, syncing_client: VLLMEngine
) -> None:
    server.hold = asyncio.Event()
    in_flight = asyncio.create_task(generated(syncing_client))
    while not server.requests:
        await asyncio.sleep(0.01)
    await syncing_client.update_weights(PolicyWeights(torch.nn.Linear(1, 1), 3))
    later = asyncio.create_task(generated(syncing_client))
    while len(server.requests) < 2:
        await asyncio.sleep(0.01)
    server.hold.set()
    assert ((await in_flight).policy_version, (await later).policy_version) == (0, 3)
    assert syncing_client.overlaps_training


async def test_a_request_that_is_sent_again_after_a_sync_has_the_new_version(
    server: FakeServer, syncing_client: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = [web.json_response(error_body(503, "overloaded"), status=503)]
    original = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if len(server.requests) == 1 and syncing_client.num_retries:  # the pause before the second attempt
            await syncing_client.update_weights(PolicyWeights(torch.nn.Linear(1, 1), 1))
        await original(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert (await generated(syncing_client)).policy_version == 1
    first, second = (request["cache_salt"] for request in server.requests)
    assert first != second


async def test_requests_share_cached_prefixes_only_while_the_weights_are_the_same(
    server: FakeServer, syncing_client: VLLMEngine, open_client: Callable[..., VLLMEngine]
) -> None:
    async def salt(client: VLLMEngine) -> str:
        await generated(client)
        return str(server.requests[-1]["cache_salt"])

    salts = [await salt(syncing_client)]
    assert await salt(syncing_client) == salts[0]
    await syncing_client.update_weights(PolicyWeights(torch.nn.Linear(1, 1), 1))
    salts.append(await salt(syncing_client))
    await syncing_client.update_weights(PolicyWeights(torch.nn.Linear(1, 1), 1))  # the same number, other weights
    salts.append(await salt(syncing_client))
    syncing_client._sync.error = WeightSyncError("refused")  # type: ignore[union-attr]
    with pytest.raises(WeightSyncError):
        await syncing_client.update_weights(PolicyWeights(torch.nn.Linear(1, 1), 2))
    salts.append(await salt(syncing_client))  # who knows which weights the server has now
    salts.append(await salt(open_client()))  # another run, whose version 0 is another policy
    assert len(set(salts)) == 5 and all(salts)


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def html_error() -> web.StreamResponse:
    return web.Response(text="<html>upstream is away</html>", content_type="text/html")


def truncated_json() -> web.StreamResponse:
    return web.Response(text='{"choices": [{"index": 0', content_type="application/json")


@pytest.mark.parametrize(
    "fault",
    [
        lambda: web.json_response(error_body(503, "overloaded"), status=503),
        lambda: web.json_response(error_body(429, "too many"), status=429),
        lambda: web.Response(status=502, text="bad gateway"),
        truncated_json,
        html_error,
        lambda: "cut off",
    ],
    ids=["503", "429", "502", "truncated JSON", "HTML", "fewer bytes than announced"],
)
async def test_what_is_transient_is_tried_again_and_counted(
    server: FakeServer,
    open_client: Callable[..., VLLMEngine],
    no_backoff: list[tuple[float, float]],
    fault: Callable[[], web.StreamResponse | str],
) -> None:
    server.faults = [fault(), fault()]
    client = open_client()
    (completion,) = await client.generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4, seed=8))
    assert completion.token_ids == [8, 8, 8, 1]
    assert client.num_retries == 2 and len(server.requests) == 3 and len(no_backoff) == 2
    first, last = (dict(server.requests[number]) for number in (0, 2))
    assert first.pop("request_id") != last.pop("request_id"), "an attempt has a name of its own"
    assert first == last


async def test_after_the_last_attempt_the_servers_text_is_in_the_error(
    server: FakeServer, open_client: Callable[..., VLLMEngine], no_backoff: list[tuple[float, float]]
) -> None:
    server.faults = [
        web.json_response(error_body(503, "the engine is restarting"), status=503)
        for _ in range(vllm_client.MAX_ATTEMPTS)
    ]
    with pytest.raises(EngineError, match="6 attempts failed, the last with 503: the engine is restarting"):
        await open_client().generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4))


async def test_a_request_that_is_wrong_is_refused_at_once_with_the_servers_text(
    server: FakeServer, open_client: Callable[..., VLLMEngine]
) -> None:
    server.faults = [web.json_response(error_body(400, "max_tokens is too large: 9999"), status=400)]
    client = open_client()
    with pytest.raises(EngineError) as refusal:
        await client.generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4))
    assert str(refusal.value) == "the server refused a request with 400: max_tokens is too large: 9999"
    assert client.num_retries == 0


async def test_the_places_of_a_request_that_failed_are_free_again(
    server: FakeServer, open_client: Callable[..., VLLMEngine]
) -> None:
    server.faults = [web.json_response(error_body(400, "no"), status=400)]
    client = open_client(concurrency=2)
    with pytest.raises(EngineError):
        await client.generate(PROMPT, num_completions=2, sampling=SamplingParams(max_tokens=4))
    assert len(await client.generate(PROMPT, num_completions=2, sampling=SamplingParams(max_tokens=4))) == 2


async def test_a_server_that_went_away_is_named_with_the_command_that_starts_it(
    no_backoff: list[tuple[float, float]],
) -> None:
    port = free_port()
    client = VLLMEngine(f"http://127.0.0.1:{port}", model="my/model")
    with pytest.raises(ServerUnreachableError) as refusal:
        await client.generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4))
    await client.aclose()
    assert f"python -m ludic.inference.vllm_server --model my/model --port {port}" in str(refusal.value)


async def test_a_wrong_key_is_not_retried(server: FakeServer, open_client: Callable[..., VLLMEngine]) -> None:
    server.api_key = "secret"
    client = open_client(api_key="wrong")
    with pytest.raises(ServerUnauthorizedError, match="--api-key-file"):
        await client.generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4))
    assert client.num_retries == 0
    allowed = open_client(api_key="secret")
    assert await allowed.generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4))


async def test_the_time_for_a_generation_grows_with_its_tokens_and_the_time_to_connect_does_not(
    open_client: Callable[..., VLLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[aiohttp.ClientTimeout] = []
    original = aiohttp.ClientSession.post

    def post(self: aiohttp.ClientSession, url: str, **options: Any) -> Any:
        used.append(options["timeout"])
        return original(self, url, **options)

    monkeypatch.setattr(aiohttp.ClientSession, "post", post)
    client = open_client()
    for max_tokens in (4, 4096):
        await client.generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=max_tokens))
    assert [timeout.total for timeout in used] == [122.0, 2168.0]
    assert [timeout.sock_connect for timeout in used] == [30.0, 30.0]
    assert [timeout.sock_read for timeout in used] == [None, None]


async def test_a_server_that_is_silent_for_too_long_is_a_transient_failure(
    server: FakeServer,
    open_client: Callable[..., VLLMEngine],
    no_backoff: list[tuple[float, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_client, "GENERATION_TIMEOUT_S", 0.02)
    monkeypatch.setattr(vllm_client, "GENERATION_TIMEOUT_PER_TOKEN_S", 0.0)
    monkeypatch.setattr(vllm_client, "MAX_ATTEMPTS", 2)
    server.hold = asyncio.Event()
    with pytest.raises(EngineError, match="2 attempts failed, the last with no answer within"):
        await open_client().generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4))


async def test_proxy_variables_do_not_stand_between_the_client_and_its_server(
    open_client: Callable[..., VLLMEngine], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client = open_client()
    await client.connect(tokenizer)
    assert await client.generate(PROMPT, num_completions=1, sampling=SamplingParams(max_tokens=4))


# --- before anything is generated -------------------------------------------------------------------------------------


async def test_the_right_server_is_accepted(
    open_client: Callable[..., VLLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    client = open_client()
    await client.connect(tokenizer, max_seq_len=512)
    await client.enable_weight_sync(PROMPT)
    assert client.policy_version == 0


async def test_nothing_listening_names_the_command_that_starts_a_server(tokenizer: PreTrainedTokenizerFast) -> None:
    number = free_port()
    client = VLLMEngine(f"http://127.0.0.1:{number}", model="my/model")
    with pytest.raises(ServerUnreachableError) as refusal:
        await client.connect(tokenizer)
    command = f"python -m ludic.inference.vllm_server --model my/model --port {number}"
    assert f"{command}`" in str(refusal.value) and "--start-server" in str(refusal.value)
    assert start_command("http://127.0.0.1:8000", "m").endswith("python -m ludic.inference.vllm_server --model m")


async def test_a_missing_key_is_an_error_of_its_own(
    server: FakeServer, open_client: Callable[..., VLLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    server.api_key = "secret"
    with pytest.raises(ServerUnauthorizedError, match="--api-key-file"):
        await open_client().connect(tokenizer)
    await open_client(api_key="secret").connect(tokenizer)


async def test_another_model_is_an_error_that_names_both(
    open_client: Callable[..., VLLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ServerMismatchError, match=f"serves {MODEL}, not other/model.*--model other/model"):
        await open_client(model="other/model").connect(tokenizer)


async def test_a_context_that_is_too_short_is_an_error_with_both_lengths(
    open_client: Callable[..., VLLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ServerMismatchError, match=r"512 tokens, shorter than --max-seq-len 513.*--max-model-len 513"):
        await open_client().connect(tokenizer, max_seq_len=513)


async def test_a_server_that_was_left_paused_is_an_error_unless_a_sync_will_set_it_right(
    server: FakeServer,
    open_client: Callable[..., VLLMEngine],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ludic.inference.client.handshake.PAUSED_LOOKS", 1)
    server.paused = True
    with pytest.raises(ServerMismatchError, match="is paused"):
        await open_client().connect(tokenizer)
    await open_client().connect(tokenizer, will_sync=True)


async def test_another_tokenizer_is_an_error(
    server: FakeServer, open_client: Callable[..., VLLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    server.tokenizer = copy.deepcopy(tokenizer)
    server.tokenizer.add_tokens(["boxes"])
    with pytest.raises(ServerMismatchError, match="tokenizer is not the trainer's"):
        await open_client().connect(tokenizer)


async def test_another_chat_template_is_an_error(
    server: FakeServer, open_client: Callable[..., VLLMEngine], tokenizer: PreTrainedTokenizerFast
) -> None:
    server.tokenizer = copy.deepcopy(tokenizer)
    server.tokenizer.chat_template = str(tokenizer.chat_template).replace("<|end|>", "<|end|>\n")
    with pytest.raises(ServerMismatchError, match=r"chat template is not the trainer's.*--chat-template"):
        await open_client().connect(tokenizer)


async def test_a_server_without_a_chat_template_is_warned_of_because_prompts_are_tokenised_by_the_trainer(
    server: FakeServer,
    open_client: Callable[..., VLLMEngine],
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.tokenizer = copy.deepcopy(tokenizer)
    server.tokenizer.chat_template = None
    await open_client().connect(tokenizer)
    assert "could not be compared" in caplog.text


async def test_plain_vllm_without_rl_routes_is_an_error_that_names_ludics_server(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    async with serving(FakeServer(tokenizer=tokenizer, rl_routes=False, generate_route=False, start=None)) as plain:
        client = VLLMEngine(plain.base_url, model=MODEL)
        await client.connect(tokenizer)  # enough to evaluate
        with pytest.raises(ServerMismatchError, match=r"no RL routes.*python -m ludic\.inference\.vllm_server"):
            await client.enable_weight_sync(PROMPT)
        await client.aclose()


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({}, "without ludic's worker extension"),
        ({"dtype": "float32", "transfer_backend": "ludic_shm", "logprobs_mode": "raw_logprobs"}, "raw_logprobs"),
        ({"dtype": "float32", "transfer_backend": ""}, "without weight transfer"),
    ],
)
async def test_a_server_whose_settings_would_make_training_wrong_is_refused(
    server: FakeServer, open_client: Callable[..., VLLMEngine], info: dict[str, Any], said: str
) -> None:
    server.server_info = info
    with pytest.raises(ServerMismatchError, match=said):
        await open_client().enable_weight_sync(PROMPT)


async def test_a_transport_that_ludic_does_not_know_is_refused(
    server: FakeServer, open_client: Callable[..., VLLMEngine]
) -> None:
    server.server_info = {**server.server_info, "transfer_backend": "carrier_pigeon"}
    with pytest.raises(ValueError, match=r"'carrier_pigeon'.*nccl, ludic_shm"):
        await open_client().enable_weight_sync(PROMPT)


async def test_something_that_is_no_vllm_server_is_an_error_in_words(tokenizer: PreTrainedTokenizerFast) -> None:
    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<html>a router's front page</html>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/v1/models", page)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = VLLMEngine(f"http://127.0.0.1:{runner.addresses[0][1]}", model=MODEL)
    try:
        with pytest.raises(EngineError, match=r"/v1/models .*not JSON.*a router's front page"):
            await client.connect(tokenizer)
    finally:
        await runner.cleanup()


async def test_weights_cannot_be_sent_before_the_sync_was_set_up(open_client: Callable[..., VLLMEngine]) -> None:
    with pytest.raises(EngineError, match="enable_weight_sync"):
        await open_client().update_weights(PolicyWeights(torch.nn.Linear(1, 1), 1))


def test_every_id_that_ends_a_turn_is_a_stop_token(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert stop_token_ids(str(tiny_model_dir), tokenizer, load_config(tiny_model_dir)) == [1]


def test_a_concurrency_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="concurrency must be at least 1, not 0"):
        VLLMEngine("http://127.0.0.1:1", model=MODEL, concurrency=0)


# --- the semaphore ----------------------------------------------------------------------------------------------------


class Queue:
    """Tasks that each hold some permits until they are let go; `entered` is who is in, in order."""

    def __init__(self, permits: int) -> None:
        self.semaphore = WeightedSemaphore(permits)
        self.entered: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def enter(self, name: str, count: int) -> None:
        async def work() -> None:
            async with self.semaphore.hold(count):
                self.entered.append(name)
                await self._leave[name].wait()

        self._leave[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(work())
        await self.settle()

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await self.settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


async def test_a_large_request_is_not_starved_by_small_ones_that_come_later() -> None:
    queue = Queue(4)
    await queue.enter("a", 3)
    await queue.enter("large", 4)
    await queue.enter("small", 1)  # would fit, but it is not its turn
    assert queue.entered == ["a"]
    await queue.leave("a")
    assert queue.entered == ["a", "large"]
    await queue.leave("large")
    assert queue.entered == ["a", "large", "small"]


async def test_several_waiters_enter_together_when_there_is_room_for_all() -> None:
    queue = Queue(4)
    await queue.enter("a", 4)
    for name in ("b", "c", "d"):
        await queue.enter(name, 2)
    await queue.leave("a")
    assert queue.entered == ["a", "b", "c"]


async def test_a_waiter_that_is_cancelled_lets_those_behind_it_in() -> None:
    queue = Queue(4)
    await queue.enter("a", 3)
    await queue.enter("large", 4)
    await queue.enter("small", 1)
    await queue.cancel("large")
    assert queue.entered == ["a", "small"]


async def test_a_holder_that_is_cancelled_gives_its_permits_back() -> None:
    queue = Queue(4)
    await queue.enter("a", 4)
    await queue.enter("b", 4)
    await queue.cancel("a")
    assert queue.entered == ["a", "b"]


async def test_a_waiter_that_is_cancelled_at_the_moment_of_its_turn_loses_no_permit() -> None:
    queue = Queue(4)
    await queue.enter("a", 4)
    await queue.enter("b", 4)
    queue._leave["a"].set()
    await asyncio.sleep(0)  # "a" has released and chosen "b", whose task has not run yet
    queue._tasks["b"].cancel()
    await queue.settle()
    assert queue.entered == ["a"]
    await queue.enter("c", 4)
    assert queue.entered == ["a", "c"]
