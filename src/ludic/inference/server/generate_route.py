"""`POST /ludic/v1/generate`: token ids in, token ids and the sampled tokens' log-probs out, straight from vLLM's engine.

An ASGI middleware in front of vLLM's own routes, without what `/v1/completions` adds and a trainer throws away: texts, one
object per token, defaults from files. Engine, scheduler and sampler are the same, and so are the tokens. The formats are in
`wire`; an error is JSON as vLLM writes it:

    {"error": {"message": "...", "type": "BadRequestError", "param": null, "code": 400}}

A caller that leaves takes its generation with it. A request whose model is the name of an adapter that the server has is
answered with that adapter. Left out: streaming, vLLM's per-request headers. Authentication is the business of
`vllm_server.RequireApiKey`, which must be outside. Nothing here imports vLLM before a request does.
"""

import array
import asyncio
import http.client
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import Any

from ludic.inference.wire import (
    PATH,
    PROTOCOL,
    RECORDED_PREFIX,
    Generated,
    GenerateRequest,
    RequestRefusedError,
    decode_request,
    encode_reply,
)

logger = logging.getLogger(f"vllm.{__name__}")  # a child of vLLM's logger: the server has no other handler

WORKER_EXTENSION = "ludic.inference.worker.vllm_worker.LudicWorkerExtension"
MAX_BODY_BYTES = 16 * 2**20
"""A million token ids need about half of it."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class GenerateRoute:
    """ASGI middleware that answers `GET` and `POST` of `PATH`, and passes everything else on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._recorder = _Recorder()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or request_path(scope) != PATH:
            await self._app(scope, receive, send)
        elif scope["method"] == "GET":
            await respond(send, 200, json.dumps({"protocol": PROTOCOL}).encode())
        elif scope["method"] != "POST":
            await respond(send, 405, error_body(405, f"{PATH} takes GET and POST, not {scope['method']}"))
        else:
            try:
                reply = await _serve(scope, receive, self._recorder)
            except RequestRefusedError as error:
                await respond(send, error.status, error_body(error.status, str(error)))
            else:
                if reply is not None:
                    await respond(send, 200, reply)


def request_path(scope: Scope) -> str:
    """The path below the prefix under which a proxy has mounted the server, as vLLM's router sees it.

    The server has decoded percent signs. The prefix is cut off where it ends at a slash, and once; the router knows no
    other spelling of a path, and neither must who decides what may reach it.
    """
    path, prefix = str(scope["path"]), str(scope.get("root_path") or "")
    below = path[len(prefix) :] if path.startswith(prefix) else path
    return below if below[:1] in ("", "/") else path


def error_body(status: int, message: str) -> bytes:
    """An error as vLLM writes it."""
    kind = http.client.responses.get(status, "Unknown").replace(" ", "").removesuffix("Error") + "Error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


async def respond(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Answer with JSON."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _serve(scope: Scope, receive: Receive, recorder: "_Recorder") -> bytes | None:
    """The reply to a POST; None if the caller left before it was there.

    Raises:
        RequestRefusedError: the request was wrong, or the engine failed.
    """
    content_type = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
    if content_type != b"application/json":
        # As vLLM's own routes: a web page may post other types to this machine without asking.
        raise RequestRefusedError("the request's Content-Type must be application/json", status=415)
    body = await _read_body(receive)
    if body is None:
        return None
    request = decode_request(body)
    state = scope["app"].state
    if request.model not in (state.args.served_model_name or [state.args.model]) and _adapter(state, request) is None:
        raise RequestRefusedError(f"the model {request.model!r:.200} is not served here", status=404)
    context = state.engine_client.model_config.max_model_len
    if len(request.prompt_token_ids) + request.max_tokens > context:
        raise RequestRefusedError(
            f"the prompt of {len(request.prompt_token_ids)} tokens and max_tokens {request.max_tokens} are more than the "
            f"model's context of {context} tokens: shorten one of them, or start the server with a longer --max-model-len"
        )
    completions = await _unless_caller_leaves(receive, _generate(state, request, recorder))
    return None if completions is None else encode_reply(completions, request)


async def _read_body(receive: Receive) -> bytes | None:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise RequestRefusedError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413)
        if not message.get("more_body", False):
            return bytes(body)


async def _unless_caller_leaves(receive: Receive, work: Coroutine[Any, Any, list[Generated]]) -> list[Generated] | None:
    """The result of `work`; None, and `work` cancelled, if the caller disconnects before."""

    async def until_left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(until_left())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


# --- vLLM: the one place that knows its Python interface, and how its versions differ --------------------------------


class _Recorder:
    """The front end's side of the worker's recorder of log-probs (`vllm_logprobs`).

    vLLM's own log-probs cost more than the tokens themselves. Where the worker can record them, they are taken from it when
    a request is done.
    """

    def __init__(self) -> None:
        self._starting: asyncio.Future[bool] | None = None
        self._abandoned: list[str] = []
        self._num_taken, self._num_unknown = 0, 0

    async def records(self, state: Any, request: GenerateRequest) -> bool:
        """Whether the worker records this request's log-probs. The first that could be recorded starts the recorder."""
        # Among the samples of a batch, vLLM replaces those of greedy requests after the log-probs were computed.
        wanted = request.logprobs and request.temperature > 0
        if not wanted or self._is_unfit() or state.args.worker_extension_cls != WORKER_EXTENSION:
            return False
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start(state.engine_client))
        return await asyncio.shield(self._starting)  # a caller that leaves must not end it for the others

    async def _start(self, engine_client: Any) -> bool:
        try:
            (problem, *_) = await engine_client.collective_rpc("ludic_record_logprobs")
        except Exception as error:  # a worker's failure reaches the front end as a bare Exception, in all versions
            problem = error
        if problem:
            logger.warning("log-probs are vLLM's own, which is slower than recording them in the worker: %s", problem)
        else:
            logger.info("log-probs are recorded in the worker, and taken from there when a request is done")
        return not problem

    async def take(self, engine_client: Any, key: str, request: GenerateRequest, group: list[Any]) -> list[Any]:
        """The log-probs of each completion of `group`, a list of floats; None where the records do not fit its tokens."""
        abandoned, self._abandoned = self._abandoned, []
        lengths = [len(completion.token_ids) for completion in group]
        arguments = (key, len(request.prompt_token_ids), lengths, abandoned)
        try:
            (taken,) = await engine_client.collective_rpc("ludic_take_logprobs", args=arguments)
        except Exception as error:  # as above; the completions themselves are whole
            logger.warning("the worker's records could not be read: %s", error)
            taken = [None] * len(group)
        logprobs = []
        for completion, entry in zip(group, taken, strict=True):
            known = entry is not None and entry[0] == array.array("i", completion.token_ids).tobytes()
            logprobs.append(array.array("f", entry[1]).tolist() if known else None)
        self._num_taken += len(group)
        unknown = logprobs.count(None)
        if unknown:
            self._num_unknown += unknown
            logger.warning(
                "the log-probs of %d completions of %d are not known: what the worker recorded is not what they consist of "
                "(%d so far%s)", unknown, len(group), self._num_unknown,
                ", so from now on they are vLLM's own" if self._is_unfit() else "",
            )  # fmt: skip
        return logprobs

    def _is_unfit(self) -> bool:
        """Whether so many records did not fit that something must be different in this version of vLLM."""
        return self._num_unknown > max(8, self._num_taken // 20)

    def abandon(self, key: str) -> None:
        """Nobody will take this request's; the next call of `take` says so."""
        self._abandoned.append(key)


async def _generate(state: Any, request: GenerateRequest, recorder: _Recorder) -> list[Generated]:
    """Draw the completions, in the order of their members."""
    recorded = await recorder.records(state, request)
    request_id = f"{RECORDED_PREFIX if recorded else 'ludic-'}{uuid.uuid4().hex}"
    try:
        own_logprobs = request.logprobs and not recorded
        group = await _draw(state, request, request_id, own_logprobs=own_logprobs)
        if recorded:
            logprobs = await recorder.take(state.engine_client, request_id, request, group)
            recorded = False
        else:
            logprobs = [_own_logprobs(completion, request) for completion in group]
    except asyncio.CancelledError:
        # generate() aborts what it has handed over; 0.26 forgets the members it was still handing over one by one.
        await state.engine_client.abort(request_id)
        raise
    except RequestRefusedError:
        raise
    except _vllm_errors() as error:
        raise RequestRefusedError(_message(error), status=_status(error)) from error
    finally:
        if recorded:  # and not taken
            recorder.abandon(request_id)
    return [
        Generated(token_ids=list(one.token_ids), logprobs=values, finish_reason=str(one.finish_reason))
        for one, values in zip(group, logprobs, strict=True)
    ]


def _adapter(state: Any, request: GenerateRequest) -> Any:
    """vLLM's adapter of the name that the request gives for its model; None where it has none, as for the model itself."""
    return state.openai_serving_models.lora_requests.get(request.model)


async def _draw(state: Any, request: GenerateRequest, request_id: str, *, own_logprobs: bool) -> list[Any]:
    """vLLM's completions of a request. Raises RequestRefusedError if it did not finish all of them."""
    from vllm.inputs import tokens_input

    prompt = tokens_input(request.prompt_token_ids, cache_salt=request.cache_salt)
    params = _sampling_params(request, own_logprobs=own_logprobs)
    # All versions yield one output in FINAL_ONLY mode, when the last of the n is finished, ordered by member.
    generation = state.engine_client.generate(prompt, params, request_id, lora_request=_adapter(state, request))
    outputs = [one async for one in generation]
    if len(outputs) != 1 or len(outputs[0].outputs) != request.n:
        raise RequestRefusedError("the engine ended the request without its completions", status=500)
    group = list(outputs[0].outputs)
    if any(completion.finish_reason == "error" for completion in group):
        # E.g. the KV cache could not be loaded; vLLM's own routes answer 500 too.
        raise RequestRefusedError("the engine failed in the middle of a completion", status=500)
    return group


def _sampling_params(request: GenerateRequest, *, own_logprobs: bool) -> Any:
    """vLLM's parameters: all that can come from a file or a default is set, or at the value that changes nothing."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        stop_token_ids=list(request.stop_token_ids),
        seed=request.seed,
        logprobs=0 if own_logprobs else None,  # 0: of the sampled token alone
        flat_logprobs=True,  # five lists per completion instead of a dict and an object per token
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # made for this one request
    )


def _own_logprobs(completion: Any, request: GenerateRequest) -> list[float] | None:
    if not request.logprobs:
        return None
    flat = completion.logprobs
    # The sampled token is the first of its position, also where the batch of another request holds more per position.
    return [flat.logprobs[start] for start in flat.start_indices]


def _vllm_errors() -> tuple[type[Exception], ...]:
    """What the engine raises of its own: ValueErrors and two errors of the engine in 0.26, a family of errors later."""
    import vllm.exceptions
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return ValueError, EngineDeadError, EngineGenerateError, getattr(vllm.exceptions, "VLLMError", ValueError)


def _status(error: Exception) -> int:
    """400 for what the caller did, 500 for what the server did; a full queue brings its own status."""
    import vllm.exceptions

    callers_fault = isinstance(error, (ValueError, getattr(vllm.exceptions, "VLLMClientError", ValueError)))
    return int(getattr(error, "http_status", None) or (400 if callers_fault else 500))


def _message(error: Exception) -> str:
    """The error's text, with its cause: EngineGenerateError has no text of its own."""
    return ": ".join(str(part) or type(part).__name__ for part in (error, error.__cause__) if part is not None)
