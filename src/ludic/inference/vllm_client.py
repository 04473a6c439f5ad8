"""The client of a vLLM server: token ids in, token ids and log-probs out, over one connection pool.

It speaks ludic's own route (`generate_route`), and `/v1/completions` with token-id prompts where a server is plain vLLM.
All completions of a prompt are one request, so that the server computes the prompt once. `connect` compares the server
with what the run needs before anything is generated: each way in which they can differ is an error of its own.

Left out: streaming, several servers. Recovery from a server that was restarted belongs to the trainer.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import aiohttp
import torch

from ludic.inference import generate_wire
from ludic.inference.engine import WeightSyncReport
from ludic.inference.errors import (
    EngineError,
    ServerMismatchError,
    ServerUnauthorizedError,
    ServerUnreachableError,
)
from ludic.inference.generate_wire import Generated, GenerateRequest
from ludic.inference.server_control import ServerControl, error_text
from ludic.inference.weight_sync import WeightSync
from ludic.prompts import encode_prompt
from ludic.types import ChatMessage, Completion, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
"""For the TCP connection alone: bursts of hundreds of requests need longer than the usual 5 s."""
GENERATION_TIMEOUT_S = 120.0
GENERATION_TIMEOUT_PER_TOKEN_S = 0.5
"""A request may take 120 s, for waiting in the server's queue, and half a second for each token that it may generate."""
MAX_ATTEMPTS = 6
MAX_TIMEOUTS = 2
"""Of those, how many may end without an answer: what has waited so long twice will not come."""
KEEP_ALIVE_S = 4.0
"""vLLM closes a connection that was idle for 5 s; a request sent at that moment would fail, so the client is first."""
PAUSED_LOOKS = 5
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

_PROBE_CHAT: list[ChatMessage] = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "What is 12 + 7?  Überraschung: \\boxed{19} <|x|>"},
]
_PROBE_TEXT = "Tom has 3 boxes of 12 eggs. He sells 5, so 3 * 12 - 5 = 31 are left: \\boxed{31}. Überraschung!"


class VLLMEngine:
    """`InferenceEngine` over a server started by `python -m ludic.inference.vllm_server`.

    Without `connect` it treats the server as plain vLLM.

    Args:
        base_url: for example `http://127.0.0.1:8000`.
        model: the name under which the server serves the model.
        concurrency: completions (not requests) in flight at once. What the server cannot run at once waits in its queue,
            next to the engine; so rather too many than too few, e.g. twice the rollouts of an update where generation
            runs ahead of training.
        stop_token_ids: ids that end a completion beside the model's own end-of-sequence token.
        seed_requests: send `sampling.seed`. vLLM then samples row by row, which costs time, and its results still depend
            on what else is in the batch; without, the server draws from its own generator.
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
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.num_retries = 0
        """Requests that were sent again after a transient failure."""
        self._concurrency = concurrency
        self._stop_token_ids = list(stop_token_ids)
        self._seed_requests = seed_requests
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._control = ServerControl(base_url, api_key=api_key)
        self._session: aiohttp.ClientSession | None = None
        self._in_flight = _WeightedSemaphore(concurrency)
        self._policy_version = 0
        self._has_generate_route = False
        self._run = uuid.uuid4().hex
        self._num_syncs = 0
        self._sync: WeightSync | None = None

    @property
    def policy_version(self) -> int:
        return self._policy_version

    # -- before anything is generated ------------------------------------------------------------------------------

    async def connect(
        self, tokenizer: "PreTrainedTokenizerBase", *, max_seq_len: int | None = None, may_be_paused: bool = False
    ) -> None:
        """Check that this server is the one that the run needs, and find out which route it generates by.

        Raises:
            ServerUnreachableError: nothing listens there; names the command that starts a server.
            ServerUnauthorizedError: it wants an API key.
            ServerMismatchError: it serves another model, cuts the context shorter than `max_seq_len`, or has another
                tokenizer or chat template; or it is paused, and not `may_be_paused`.
        """
        served = await self._served_model()
        context = served.get("max_model_len")
        if max_seq_len is not None and context is not None and context < max_seq_len:
            raise ServerMismatchError(
                f"the server's context is {context} tokens, shorter than --max-seq-len {max_seq_len}: "
                f"restart it with --max-model-len {max_seq_len} or lower --max-seq-len"
            )
        await self._check_tokenizer(tokenizer)
        self._has_generate_route = await self._find_generate_route()
        if not may_be_paused and await self._is_paused():
            raise ServerMismatchError(
                f"the server at {self.base_url} is paused, as a trainer that was killed in a sync leaves it, and its weights "
                f"may be half replaced: restart it with `{self._start_command()}`"
            )

    async def _find_generate_route(self) -> bool:
        try:
            answer = await asyncio.to_thread(self._control.request, "GET", generate_wire.PATH, timeout_s=15.0)
        except (ServerUnreachableError, ServerUnauthorizedError):
            raise
        except EngineError:  # plain vLLM: 404
            return False
        return bool(answer == {"protocol": generate_wire.PROTOCOL})

    async def _is_paused(self) -> bool:
        """Whether the server stays paused for longer than the sync of a running trainer takes."""
        for attempt in range(PAUSED_LOOKS):
            if attempt:
                await asyncio.sleep(1.0)
            try:
                answer = await asyncio.to_thread(self._control.request, "GET", "/is_paused")
            except (ServerUnreachableError, ServerUnauthorizedError):
                raise
            except EngineError:  # a server without RL routes cannot be paused
                return False
            if not answer["is_paused"]:
                return False
        return True

    async def enable_weight_sync(self, probe_token_ids: list[int], *, deadline_s: float = 300.0) -> None:
        """Find out how this server takes weights, so that `update_weights` can be called.

        Raises:
            ServerMismatchError: the server has no RL routes, or its settings would make training wrong.
        """
        try:
            await asyncio.to_thread(self._control.request, "GET", "/is_paused")
        except EngineError as error:
            if isinstance(error, ServerUnreachableError | ServerUnauthorizedError):
                raise
            raise ServerMismatchError(
                f"the server at {self.base_url} has no RL routes, so it cannot take new weights: start it with "
                f"`{self._start_command()}` instead of plain vLLM"
            ) from error
        try:
            info = await asyncio.to_thread(self._control.server_info)
        except (ServerUnreachableError, ServerUnauthorizedError):
            raise
        except EngineError as error:
            raise ServerMismatchError(
                f"the server at {self.base_url} runs vLLM without ludic's worker extension, which proves weight syncs: "
                f"start it with `{self._start_command()}`"
            ) from error
        logprobs_mode = info.get("logprobs_mode", "processed_logprobs")
        if logprobs_mode != "processed_logprobs":
            raise ServerMismatchError(
                f"the server returns {logprobs_mode}: training needs the log-probs of the distribution that was sampled "
                "from; start it with --logprobs-mode processed_logprobs (the default of ludic.inference.vllm_server)"
            )
        if not info.get("transfer_backend"):
            raise ServerMismatchError(
                f"the server at {self.base_url} was started without weight transfer: start it with `{self._start_command()}`"
            )
        self._sync = WeightSync(
            self._control,
            transport=info["transfer_backend"],
            served_model=self.model,
            dtype=getattr(torch, info["dtype"]),
            probe_token_ids=probe_token_ids,
            deadline_s=deadline_s,
        )

    async def _served_model(self) -> dict[str, Any]:
        try:
            answer = await asyncio.to_thread(self._control.request, "GET", "/v1/models", timeout_s=15.0)
        except ServerUnreachableError as error:
            raise ServerUnreachableError(
                f"nothing listens at {self.base_url}: start the server with `{self._start_command()}`, "
                "or pass --start-server"
            ) from error
        models: list[dict[str, Any]] = answer["data"]
        for served in models:
            if served["id"] == self.model:
                return served
        names = ", ".join(str(served["id"]) for served in models)
        raise ServerMismatchError(
            f"the server at {self.base_url} serves {names}, not {self.model}: restart it with --model {self.model}, "
            f"or train the model that it serves"
        )

    async def _check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Compare how both sides tokenise a text and a chat; the probe holds digits, markup and a non-ASCII word."""
        request = {"model": self.model, "prompt": _PROBE_TEXT, "add_special_tokens": False}
        theirs = (await asyncio.to_thread(self._control.request, "POST", "/tokenize", json_body=request))["tokens"]
        ours = tokenizer.encode(_PROBE_TEXT, add_special_tokens=False)
        if theirs != ours:
            raise ServerMismatchError(
                f"the server's tokenizer is not the trainer's (a test sentence gives {len(theirs)} tokens there, "
                f"{len(ours)} here, and the ids differ): serve and train the same model folder"
            )
        if tokenizer.chat_template is None:
            return
        request = {"model": self.model, "messages": _PROBE_CHAT, "add_generation_prompt": True}
        try:
            answer = await asyncio.to_thread(self._control.request, "POST", "/tokenize", json_body=request)
        except ServerUnreachableError:
            raise
        except EngineError:
            logger.warning(
                "the server's chat template could not be compared with the trainer's; prompts are tokenised here"
            )
            return
        if answer["tokens"] != encode_prompt(tokenizer, _PROBE_CHAT):
            raise ServerMismatchError(
                "the server's chat template is not the trainer's (a test chat gives other token ids): "
                "serve and train the same model folder, or give both the same --chat-template"
            )

    def _start_command(self) -> str:
        _, _, address = self.base_url.partition("://")
        host, _, port = address.rpartition(":")
        where = (f" --host {host}" if host not in ("127.0.0.1", "localhost") else "") + (
            f" --port {port}" if port != "8000" else ""
        )
        return f"python -m ludic.inference.vllm_server --model {self.model}{where}"

    # -- generation ------------------------------------------------------------------------------------------------

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        """Draw completions of one prompt, all in one request unless they are more than `concurrency`.

        Raises:
            EngineError: the server refused the request; its own text is in the message.
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
            model=self.model,
            prompt_token_ids=prompt,
            n=count,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=self._stop_token_ids,
            logprobs=sampling.logprobs,
            seed=None if seed is None else seed + offset,  # vLLM seeds member i of a request with seed + i
            cache_salt=None,
        )
        generated, version = await self._post_with_retries(request)
        if len(generated) != count:
            raise EngineError(f"asked for {count} completions, the server returned {len(generated)}")
        return [_completion(one, sampling, version) for one in generated]

    @property
    def _cache_salt(self) -> str:
        """Names the weights that the server holds now: prefix-cache blocks are shared only under the same name.

        The version alone would not do: the server may hold blocks of an earlier run, whose version had the same number.
        """
        return f"{self._run}-{self._num_syncs}"

    async def _post_with_retries(self, request: GenerateRequest) -> tuple[list[Generated], int]:
        """The server's answer, and the policy version at which the request that it answers was sent."""
        timeout = aiohttp.ClientTimeout(
            total=GENERATION_TIMEOUT_S + GENERATION_TIMEOUT_PER_TOKEN_S * request.max_tokens,
            sock_connect=CONNECT_TIMEOUT_S,
        )
        path, encode, decode = _GENERATE_ROUTE if self._has_generate_route else _COMPLETIONS_ROUTE
        failure, num_timeouts = "", 0
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                self.num_retries += 1
                logger.warning(
                    "request to %s failed (%s); attempt %d of %d", self.base_url, failure, attempt + 1, MAX_ATTEMPTS
                )
                await asyncio.sleep(min(0.5 * 2**attempt, 8.0) * random.uniform(0.5, 1.0))
            # The weights may be replaced while this attempt runs: it is stamped with those that it starts with.
            version = self._policy_version
            body = encode(dataclasses.replace(request, cache_salt=self._cache_salt))
            try:
                async with self._http().post(path, data=body, headers=_JSON, timeout=timeout) as response:
                    if response.status == 200:
                        return decode(await response.read()), version
                    failure = f"{response.status}: {error_text(await response.text())}"
                    if response.status in (401, 403):
                        raise ServerUnauthorizedError(
                            f"the server at {self.base_url} wants an API key: pass --api-key or set LUDIC_API_KEY"
                        )
                    if response.status not in TRANSIENT_STATUS:
                        raise EngineError(f"the server refused a request with {failure}")
            except TimeoutError:
                failure, num_timeouts = f"no answer within {timeout.total:.0f} s", num_timeouts + 1
                if num_timeouts == MAX_TIMEOUTS:
                    break
            except (aiohttp.ClientError, json.JSONDecodeError, UnicodeDecodeError) as error:
                failure = f"{type(error).__name__}: {error}"
        if failure.startswith("ClientConnectorError"):
            raise ServerUnreachableError(
                f"nothing listens at {self.base_url} any more ({failure}): start the server again with `{self._start_command()}`"
            )
        raise EngineError(f"{attempt + 1} attempts failed, the last with {failure}")

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)  # the semaphore is the limit
            self._session = aiohttp.ClientSession(
                self.base_url, connector=connector, headers=self._headers, trust_env=False
            )
        return self._session

    # -- weights ---------------------------------------------------------------------------------------------------

    async def update_weights(self, model: torch.nn.Module, *, policy_version: int) -> WeightSyncReport:
        """Send the weights, prove them, and count from then on with `policy_version`.

        Completions that are being generated go on with the new weights, and keep the version that they started with.

        Raises:
            WeightSyncError: the sync did not take, for whatever reason; the old version must be assumed gone.
        """
        if self._sync is None:
            raise EngineError("weight sync was not set up: call enable_weight_sync first")
        policy: PreTrainedModel = model  # type: ignore[assignment]
        try:
            report = await asyncio.to_thread(self._sync.sync, policy, policy_version)
        finally:
            self._num_syncs += 1  # a sync that failed may have replaced weights too
        self._policy_version = policy_version
        return report

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._sync is not None:
            self._sync.close()
            self._sync = None


def _completion(generated: Generated, sampling: SamplingParams, version: int) -> Completion:
    token_ids, logprobs = generated.token_ids, generated.logprobs
    if sampling.logprobs and logprobs is not None and len(logprobs) != len(token_ids):  # None: the server lost them
        raise EngineError(f"the server returned {len(token_ids)} tokens but {len(logprobs)} log-probs")
    if generated.finish_reason not in ("stop", "length"):
        raise EngineError(f"a completion ended with {generated.finish_reason!r}, which is neither stop nor length")
    return Completion(
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason="stop" if generated.finish_reason == "stop" else "length",
        policy_version=version,
    )


_JSON = {"Content-Type": "application/json"}
_GENERATE_ROUTE = (generate_wire.PATH, generate_wire.encode_request, generate_wire.decode_reply)
_COMPLETIONS_ROUTE = (
    generate_wire.COMPLETIONS_PATH,
    generate_wire.encode_completions_request,
    generate_wire.decode_completions_reply,
)


def stop_token_ids(model: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every id that ends a turn: the tokenizer's, the model's, and its generation config's (which the server ignores)."""
    from transformers import AutoConfig, GenerationConfig

    ids: set[int] = set()
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    sources: list[Any] = [AutoConfig.from_pretrained(model)]
    with contextlib.suppress(OSError):  # a model without generation_config.json
        sources.append(GenerationConfig.from_pretrained(model))
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return sorted(ids)


class _WeightedSemaphore:
    """A first-come-first-served semaphore that hands out several permits at once."""

    def __init__(self, permits: int) -> None:
        self._free = permits
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @contextlib.asynccontextmanager
    async def hold(self, count: int) -> AsyncIterator[None]:
        await self._acquire(count)
        try:
            yield
        finally:
            self._release(count)

    async def _acquire(self, count: int) -> None:
        if not self._waiting and self._free >= count:
            self._free -= count
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (count, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(count)
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(entry)
                self._wake()  # those behind it may be small enough
            raise

    def _release(self, count: int) -> None:
        self._free += count
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._free >= self._waiting[0][0]:
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= wanted
                turn.set_result(None)
