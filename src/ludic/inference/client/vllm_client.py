"""The client of a vLLM server: token ids in, token ids and log-probs out, over one connection pool.

It speaks ludic's own route (`generate_route`), and `/v1/completions` with token-id prompts where a server is plain vLLM.
All completions of a prompt are one request, so that the server computes the prompt once. `connect` compares the server
with what the run needs before anything is generated (`handshake`). From then on every answer must come from that start of
the server, which its token shows (`wire.LEASE_HEADER`): one that was started again has other weights.

Left out: streaming, several servers. Getting a lost server back is the business of `recovery`.
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import torch

from ludic.inference.client import handshake
from ludic.inference.client.server_control import REFUSALS, WANTS_KEY, ServerControl, error_text
from ludic.inference.client.tls import tls_context
from ludic.inference.client.weighted_semaphore import WeightedSemaphore
from ludic.inference.weights.weight_sync import WeightSync
from ludic.inference.wire import (
    ADAPTER_NAME,
    COMPLETIONS_ROUTE,
    LEASE_HEADER,
    OWN_ROUTE,
    BadReplyError,
    Generated,
    GenerateRequest,
)
from ludic.rollout.engine import Policy, WeightSyncReport
from ludic.rollout.errors import (
    EngineError,
    ServerLostError,
    ServerMismatchError,
    ServerUnreachableError,
    WeightSyncError,
)
from ludic.task.pretrained import load_config
from ludic.types import Completion, SamplingParams

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
"""For the TCP connection alone: bursts of hundreds of requests need longer than the usual 5 s."""
GENERATION_TIMEOUT_S = 120.0
GENERATION_TIMEOUT_PER_TOKEN_S = 0.5
"""A request may take 120 s, for waiting in the server's queue, and half a second for each token that it may generate."""
MAX_ATTEMPTS = 6
MAX_TIMEOUTS = 2
"""Of those, how many may end without an answer: what has waited so long twice will not come."""
BACKOFF_S = 0.5
"""Half of what the second attempt waits for; each further one waits twice as long, less up to half of it by chance."""
MAX_BACKOFF_S = 8.0
MAX_RETRY_AFTER_S = 60.0
"""What a server may ask for at most."""
MAX_ERROR_BYTES = 2**20
"""Of a reply that is an error."""
WARN_EVERY_S = 5.0
SYNC_GRACE_S = 2.5
"""What a weight sync may still take once the run is interrupted, and again what tearing it down may take."""
TRANSIENT_STATUS = frozenset({408, 425, 429})
"""Statuses from 400 to 499 that may change on another attempt. Other 4xx blame the request; 5xx are always tried again."""


class VLLMEngine:
    """`InferenceEngine` over a server started by `python -m ludic.inference.vllm_server`.

    Without `connect` it treats the server as plain vLLM.

    Args:
        base_url: for example `http://127.0.0.1:8000`, or `https://gpu.example.org/vllm` of a proxy in front of the server.
        model: the name under which the server serves the model.
        concurrency: completions (not requests) in flight at once. What the server cannot run at once waits in its queue,
            next to the engine; so rather too many than too few, e.g. twice the rollouts of an update where generation
            runs ahead of training.
        stop_token_ids: ids that end a completion beside the model's own end-of-sequence token.
        seed_requests: send `sampling.seed`. vLLM then samples row by row, which costs time, and its results still depend
            on what else is in the batch; without, the server draws from its own generator.
        vocab_size: rows of the model's embedding; a reply with another token id is refused. None: not checked.
        longrope_switch: of the model that trains, see `handshake.check_context`; None: not compared.
        fp32_head: whether the model that trains keeps logits in fp32, compared with the server; None: not compared.
        adapter_rank: above 0, a sync sends an adapter of this rank in the place of a whole model.
    """

    overlaps_training: bool = True

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        api_key: str | None = None,
        concurrency: int = 1024,
        stop_token_ids: Sequence[int] = (),
        seed_requests: bool = False,
        vocab_size: int | None = None,
        longrope_switch: int | None = None,
        fp32_head: bool | None = None,
        adapter_rank: int = 0,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.num_retries = 0
        """Requests that were sent again after a transient failure."""
        self.num_bad_replies = 0
        """Replies among those failures that were damaged, or answered another request."""
        self._concurrency = concurrency
        self._stop_token_ids = list(stop_token_ids)
        self._seed_requests = seed_requests
        self._vocab_size = vocab_size
        self._longrope_switch = longrope_switch
        self._fp32_head = fp32_head
        self._adapter_rank = adapter_rank
        self._sampled_model = model
        """The name that rollouts are asked for by: that of the adapter once the server has one."""
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.control = ServerControl(base_url, api_key=api_key)
        self._session: aiohttp.ClientSession | None = None
        self._in_flight = WeightedSemaphore(concurrency)
        self._policy_version = 0
        self._has_generate_route = False
        self._warn_at = 0.0
        self._run = uuid.uuid4().hex
        self._num_syncs = 0
        self._sync: WeightSync | None = None
        self._given_up: WeightSync | None = None
        """That of a server that was lost: what still waits to begin a sync with it must not."""

    @property
    def policy_version(self) -> int:
        return self._policy_version

    # -- before anything is generated ------------------------------------------------------------------------------

    async def connect(
        self, tokenizer: "PreTrainedTokenizerBase", *, max_seq_len: int | None = None, will_sync: bool = False
    ) -> None:
        """Check that this server is the one that the run needs, and find out which route it generates by, and, unless the
        caller `will_sync` before it generates, which update's weights it holds.

        Raises:
            ServerUnreachableError: nothing listens there; names the command that starts a server.
            ServerUnauthorizedError: it wants an API key.
            ServerMismatchError: it serves another model, cuts the context shorter than `max_seq_len`, or has another
                tokenizer, chat template or protocol; or it is paused, and no sync will set that right.
        """
        await asyncio.to_thread(self._connect, tokenizer, max_seq_len, will_sync)

    def _connect(self, tokenizer: "PreTrainedTokenizerBase", max_seq_len: int | None, will_sync: bool) -> None:
        control = self.control
        try:
            state = handshake.server_state(control)
        except ServerUnreachableError as error:
            raise handshake.nothing_listens(self.base_url, self.model) from error
        served = handshake.served_model(control, self.model)
        if max_seq_len is not None:
            handshake.check_context(served, max_seq_len, self._longrope_switch)
        handshake.check_tokenizer(control, self.model, tokenizer)
        handshake.check_chat_template(control, self.model, tokenizer)
        self._has_generate_route = handshake.has_generate_route(control)
        if will_sync:
            return
        self._policy_version = state.policy_version
        self._sampled_model = ADAPTER_NAME if state.has_adapter else self.model
        if handshake.stays_paused(control):
            raise ServerMismatchError(
                f"the server at {self.base_url} is paused, as a trainer that was killed in a sync leaves it, and its weights "
                f"may be half replaced: restart it with `{handshake.start_command(self.base_url, self.model)}`"
            )

    async def enable_weight_sync(self, probe_token_ids: list[int], *, deadline_s: float = 300.0) -> None:
        """Find out how this server takes weights, so that `update_weights` can be called.

        Raises:
            ServerMismatchError: the server has no RL routes, or its settings would make training wrong.
        """
        info = await asyncio.to_thread(handshake.weight_sync_info, self.control, self.model)
        if self._fp32_head is not None:
            handshake.check_head_dtype(info, self._fp32_head)
        handshake.check_adapters(self.control, info, self._adapter_rank)
        if self._sync is not None:
            await asyncio.to_thread(self._sync.close)  # NCCL may take seconds to let go of a server that is gone
        self._given_up = None
        self._sync = WeightSync(
            self.control,
            transport=info["transfer_backend"],
            served_model=self.model,
            dtype=getattr(torch, info["dtype"]),
            probe_token_ids=probe_token_ids,
            deadline_s=deadline_s,
            fp32_head=self._fp32_head is True,
            server_gpu=str(info.get("device_uuid", "")) if info.get("tp_size", 1) == 1 else "",
            adapter_rank=self._adapter_rank,
        )

    # -- generation ------------------------------------------------------------------------------------------------

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        """Draw completions of one prompt, all in one request unless they are more than `concurrency`.

        Raises:
            EngineError: the server refused the request; its own text is in the message.
            ServerLostError: it does not answer, goes on failing, or was started again since `connect`.
        """
        completions: list[Completion] = []
        while len(completions) < num_completions:
            offset = len(completions)
            count = min(num_completions - offset, self._concurrency)
            async with self._in_flight.hold(count):
                completions += await self._request(list(prompt_token_ids), count, sampling, offset)
        return completions

    async def _request(self, prompt: list[int], count: int, sampling: SamplingParams, offset: int) -> list[Completion]:
        seed = sampling.seed if self._seed_requests else None
        request = GenerateRequest(
            model=self._sampled_model,
            prompt_token_ids=prompt,
            n=count,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=self._stop_token_ids,
            logprobs=sampling.logprobs,
            seed=None if seed is None else seed + offset,  # vLLM seeds member i of a request with seed + i
            cache_salt=None,
            request_id="",
        )
        failures: list[Exception] = []
        while len(failures) < MAX_ATTEMPTS and sum(isinstance(one, TimeoutError) for one in failures) < MAX_TIMEOUTS:
            if failures:
                await self._before_another(failures, request)
            # The weights may be replaced while this attempt runs: it is stamped with those that it starts with. Prefix-cache
            # blocks are shared only under the same salt, which names them. Their version alone would not do: the server may
            # hold blocks of an earlier run, whose version had the same number.
            version, salt = self._policy_version, f"{self._run}-{self._num_syncs}"
            try:
                group = await self._post(dataclasses.replace(request, cache_salt=salt, request_id=uuid.uuid4().hex))
            except (TimeoutError, _TransientError, BadReplyError, aiohttp.ClientError) as error:
                self.num_bad_replies += isinstance(error, BadReplyError)
                failures.append(error)
            else:
                return [
                    Completion(
                        token_ids=one.token_ids,
                        logprobs=one.logprobs,
                        finish_reason="stop" if one.finish_reason == "stop" else "length",
                        policy_version=version,
                    )
                    for one in group
                ]
        raise self._lost(failures, request)

    async def _before_another(self, failures: list[Exception], request: GenerateRequest) -> None:
        """Wait, and say that a request is sent again: not for each of a thousand that fail alike at once."""
        self.num_retries += 1
        if (now := time.monotonic()) >= self._warn_at:
            self._warn_at = now + WARN_EVERY_S
            said = "a request to %s failed (%s) and is sent again; %d were so far"
            logger.warning(said, self.base_url, _words(failures[-1], request), self.num_retries)
        backoff_s = min(BACKOFF_S * 2 ** len(failures), MAX_BACKOFF_S) * random.uniform(0.5, 1.0)
        wanted_s = failures[-1].wait_s if isinstance(failures[-1], _TransientError) else 0.0
        await asyncio.sleep(max(backoff_s, wanted_s))

    def _lost(self, failures: list[Exception], request: GenerateRequest) -> ServerLostError:
        """The error of a request whose every attempt has failed."""
        first, last = failures[0], failures[-1]
        if type(last) is not aiohttp.ClientConnectorError:
            return ServerLostError(f"{len(failures)} attempts failed, the last with {_words(last, request)}")
        if type(first) is aiohttp.ClientConnectorError:
            happened = f"does not answer ({_words(last, request)})"
        else:
            happened = f"stopped answering in the middle of a request ({_words(first, request)}), and now nothing listens there"
        command = handshake.start_command(self.base_url, self.model)
        return ServerUnreachableError(
            f"the server at {self.base_url} {happened}: its log says why; `{command}` starts it again"
        )

    async def _post(self, request: GenerateRequest) -> list[Generated]:
        """One attempt.

        Raises:
            BadReplyError, _TransientError, aiohttp.ClientError, TimeoutError: another attempt may succeed.
            EngineError: it would not.
        """
        route = OWN_ROUTE if self._has_generate_route else COMPLETIONS_ROUTE
        token = self.control.token
        headers = {"Content-Type": "application/json"} | ({} if token is None else {LEASE_HEADER: token})
        # No redirects: they would carry prompts and the key to wherever a reply says.
        async with self._http().post(
            f"{self.base_url}{route.path}",  # whole, since the address may have a path of its own
            data=route.encode(request),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=_deadline_s(request), sock_connect=CONNECT_TIMEOUT_S),
            allow_redirects=False,
        ) as response:
            status = response.status
            if status == 200:
                if response.headers.get(LEASE_HEADER) != token:  # it comes from elsewhere, or a proxy drops the header
                    raise BadReplyError(f"it does not repeat the request's {LEASE_HEADER}")
                body = await _read(response, route.max_reply_bytes(request))
                return route.decode(body, request, vocab_size=self._vocab_size)
            text = (await _read(response, MAX_ERROR_BYTES)).decode(errors="replace")
        failure = f"{status}: {error_text(text)}"
        if status in TRANSIENT_STATUS or not 400 <= status < 500:
            raise _TransientError(failure, wait_s=_retry_after_s(response.headers.get("Retry-After", "")))
        why = f"a request: {WANTS_KEY}" if status in (401, 403) else f"a request with {failure}"
        raise REFUSALS.get(status, EngineError)(f"the server refused {why}")

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            # The semaphore is the limit. A connection carries one request: what else comes on it, say a second reply, is dropped
            # with it, where a kept connection would take it for the reply to the next request.
            tls = tls_context() if self.base_url.startswith("https://") else True
            connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=tls)
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers={"Accept-Encoding": "identity", **self._headers},
                auto_decompress=False,  # a small reply must not become a large one
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._session

    # -- weights ---------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, float]:
        """`request_retries`, and `bad_replies` among their reasons, so far."""
        return {"request_retries": self.num_retries, "bad_replies": self.num_bad_replies}

    def abort_sync(self, reason: str) -> None:
        """End a weight sync that still waits for a server that is known to be lost."""
        if self._sync is not None:
            self._given_up = self._sync
            self._sync.abort(reason)

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        """Send the weights, prove them, and count from then on with their version.

        Completions that are being generated go on with the new weights, and keep the version that they started with.

        Raises:
            WeightSyncError: the sync did not take, for whatever reason; the old version must be assumed gone.
        """
        if self._sync is None:
            raise EngineError("weight sync was not set up: call enable_weight_sync first")
        try:
            report = await self._to_its_end(self._sync, policy)
        finally:
            self._num_syncs += 1  # a sync that failed may have replaced weights too
        self._policy_version = report.policy_version
        self._sampled_model = ADAPTER_NAME if self._adapter_rank else self.model
        return report

    async def _to_its_end(self, sync: WeightSync, policy: Policy) -> WeightSyncReport:
        """Run the sync. A cancellation leaves it some seconds: one that is broken off leaves a paused server."""
        syncing = asyncio.ensure_future(
            policy.read(lambda model, version: self._send(sync, cast("PreTrainedModel", model), version))
        )
        try:
            return await asyncio.shield(syncing)
        except asyncio.CancelledError:
            if not syncing.cancelled():
                await asyncio.wait([syncing], timeout=SYNC_GRACE_S)
                if not syncing.done():
                    sync.abort("the run was interrupted")
                    await asyncio.wait([syncing], timeout=SYNC_GRACE_S)
                if syncing.done():
                    syncing.exception()  # retrieved, so that asyncio does not report it
            raise

    def _send(self, sync: WeightSync, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport:
        if sync is self._given_up or sync is not self._sync:  # while this waited for its turn on the policy's thread
            raise WeightSyncError(f"weight sync {policy_version} was given up before it began: the server was lost")
        return sync.sync(model, policy_version)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._sync is not None:
            sync, self._sync = self._sync, None
            await asyncio.to_thread(sync.close)


class _TransientError(Exception):
    """The server answered with a status that may be another one at the next attempt."""

    def __init__(self, message: str, *, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def _words(failure: Exception, request: GenerateRequest) -> str:
    if isinstance(failure, TimeoutError):
        return f"no answer within {_deadline_s(request):.0f} s"
    if isinstance(failure, BadReplyError):
        return f"a bad reply: {failure}"
    return str(failure) if isinstance(failure, _TransientError) else f"{type(failure).__name__}: {failure}"


def _retry_after_s(value: str) -> float:
    """The seconds for which the server asks to be left alone; 0 for a date, or what cannot be read."""
    return min(float(value), MAX_RETRY_AFTER_S) if value.isascii() and value.isdecimal() else 0.0


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, which may have at most `limit` bytes."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise BadReplyError(f"a reply of more than {limit} bytes, which is more than it can have")
    return bytes(body)


def _deadline_s(request: GenerateRequest) -> float:
    return GENERATION_TIMEOUT_S + GENERATION_TIMEOUT_PER_TOKEN_S * request.max_tokens


def stop_token_ids(
    model: str, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig | None" = None
) -> list[int]:
    """Every id that ends a turn: the tokenizer's, the model's, and its generation config's (which vLLM adds by itself, too)."""
    from transformers import GenerationConfig

    sources: list[Any] = [tokenizer, load_config(model) if config is None else config]
    with contextlib.suppress(OSError):  # a model without generation_config.json
        sources.append(GenerationConfig.from_pretrained(model))
    ids: set[int] = set()
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return sorted(ids)
