"""A stand-in for ludic's vLLM server, or a plain one: the same routes and the same JSON on a real socket, and a model that
just counts.

It answers as vLLM 0.32 does, errors included, and knows nothing of models. `faults` are answers that replace the next
completions, in order, so that a test can say how the wire breaks.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from transformers import PreTrainedTokenizerFast

from ludic.inference.server.server_guard import ServerGuard
from ludic.inference.wire import (
    ENGINES_PATH,
    LEASE_HEADER,
    PATH,
    PROTOCOL,
    Generated,
    GenerateRequest,
    decode_request,
    encode_reply,
)

MODEL = "tiny"


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as vLLM writes it."""
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


@dataclass(kw_only=True)
class FakeServer:
    """What it serves and what it has seen; a test changes the first and reads the second."""

    tokenizer: PreTrainedTokenizerFast
    model: str = MODEL
    max_model_len: int = 512
    api_key: str | None = None
    rl_routes: bool = True
    generate_route: bool = True
    """Without both of these, and with `start` None, it is plain vLLM."""
    start: str | None = "b007" * 8
    """In each token. Another one is a server that was started again: nobody has its lease. None: no tokens, no route for
    trainers and nothing refused."""
    clock_ahead_s: float = 0.0
    """How far the clock of the trainers' lease has been put forward."""
    server_info: dict[str, Any] = field(
        default_factory=lambda: {
            "dtype": "float32",
            "transfer_backend": "ludic_shm",
            "logprobs_mode": "processed_logprobs",
        }
    )
    weights_digest: str = "0123456789abcdef"
    """What the worker makes of the weights that it holds."""
    faults: list[web.StreamResponse | str] = field(default_factory=list)
    engine_ports: list[int] | None = None
    """What the first of several engines says; None of the only one, [] while others load."""
    hold: asyncio.Event | None = None
    """Completions wait for it, if it is there."""

    base_url: str = ""
    paused: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of all completion requests, on either route."""
    paths: list[str] = field(default_factory=list)
    """Where each of them went."""
    tokens: list[str | None] = field(default_factory=list)
    """The token that each of them had."""
    in_flight: int = 0
    most_in_flight: int = 0
    """Completions, not requests."""
    _guard: ServerGuard | None = None

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._check_key, self._pass_guard])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._completions)
        if self.engine_ports is not None:
            app.router.add_get(ENGINES_PATH, self._engines)
        if self.generate_route:
            app.router.add_get(PATH, self._protocol)
            app.router.add_post(PATH, self._completions)
        if self.rl_routes:
            app.router.add_get("/is_paused", self._is_paused)
            app.router.add_post("/collective_rpc", self._collective_rpc)
            app.router.add_post("/pause", self._pause)
            app.router.add_post("/resume", self._resume)
        return app

    @web.middleware
    async def _pass_guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Through the guard of the real server, which answers in the handler's place where it refuses."""
        if self.start is None:
            answer: web.StreamResponse = await handler(request)
            return answer
        start = self.start
        if self._guard is None or self._guard.start != start:
            self._guard = ServerGuard(self._behind_guard, clock=lambda: time.monotonic() + self.clock_ahead_s)
            self._guard.start = self.start
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": await request.read()}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
        scope: dict[str, Any] = {"type": "http", "method": request.method, "path": request.path, "headers": headers}
        scope |= {"call": lambda: handler(request)}
        await self._guard(scope, receive, send)
        if self.start != start:  # it was started again meanwhile, which cuts its connections
            assert request.transport is not None
            request.transport.close()
        repeated = {
            name.decode(): value.decode() for name, value in sent[0]["headers"] if name == LEASE_HEADER.encode()
        }
        if "answer" in scope and sent[0]["status"] == scope["answer"].status:
            if not scope["answer"].prepared:
                scope["answer"].headers.update(repeated)
            if isinstance(scope["answer"], web.HTTPException):
                raise scope["answer"]
            return scope["answer"]  # type: ignore[no-any-return]
        body = sent[1]["body"]
        return web.Response(status=sent[0]["status"], body=body, headers=repeated, content_type="application/json")

    async def _behind_guard(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            scope["answer"] = await scope["call"]()
        except web.HTTPException as error:
            scope["answer"] = error
        await send({"type": "http.response.start", "status": scope["answer"].status, "headers": []})

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            answer: web.StreamResponse = await handler(request)
        except web.HTTPNotFound:
            return web.json_response({"detail": "Not Found"}, status=404)
        return answer

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _engines(self, request: web.Request) -> web.Response:
        if not self.engine_ports:
            return web.json_response(error_body(503, "1 of 2 engines still load"), status=503)
        return web.json_response({"ports": self.engine_ports})

    async def _models(self, request: web.Request) -> web.Response:
        entry = {"id": self.model, "object": "model", "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [entry]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body:
            if self.tokenizer.chat_template is None:
                return web.json_response(error_body(400, "the model has no chat template"), status=400)
            tokens = self.tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=body["add_generation_prompt"], return_dict=False
            )
        else:
            tokens = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return web.json_response({"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens})

    async def _is_paused(self, request: web.Request) -> web.Response:
        return web.json_response({"is_paused": self.paused})

    async def _pause(self, request: web.Request) -> web.Response:
        self.paused = True
        return web.json_response({"status": "paused"})

    async def _resume(self, request: web.Request) -> web.Response:
        self.paused = False
        return web.json_response({"status": "resumed"})

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["method"] == "ludic_weights_digest" and self.server_info:
            return web.json_response({"results": [self.weights_digest]})
        if body["method"] != "ludic_server_info" or not self.server_info:
            return web.json_response(error_body(500, f"no method {body['method']}"), status=500)
        return web.json_response({"results": [self.server_info]})

    async def _protocol(self, request: web.Request) -> web.Response:
        return web.json_response({"protocol": PROTOCOL})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        """Both routes that generate."""
        body = await request.json()
        self.requests.append(body)
        self.paths.append(request.path)
        self.tokens.append(request.headers.get(LEASE_HEADER))
        self.in_flight += body["n"]
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await (asyncio.sleep(0) if self.hold is None else self.hold.wait())
            if self.faults:
                fault = self.faults.pop(0)
                return await self._cut_off(request) if isinstance(fault, str) else fault
            if request.path == PATH:
                decode_request(await request.read())  # or it would have been refused
                return web.Response(body=self.reply(body), content_type="application/json")
            return web.json_response(self.answer(body))
        finally:
            self.in_flight -= body["n"]

    async def _cut_off(self, request: web.Request) -> web.StreamResponse:
        """Announce more bytes than come."""
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "5000"})
        await response.prepare(request)
        await response.write(b'{"choices": [')
        assert request.transport is not None
        request.transport.close()
        return response

    def completions(self, body: dict[str, Any]) -> list[Generated]:
        """Member i of a request with seed s answers with the tokens [s + i, s + i, ..., 1] (modulo 200), 1 to stop."""
        length = min(4, body["max_tokens"])
        stops = length == 4
        wants_logprobs = body.get("logprobs") is not None and body["logprobs"] is not False  # 0 of vLLM means yes
        return [
            Generated(
                token_ids=[((body.get("seed") or 0) + member) % 200] * (length - 1) + [1 if stops else 9],
                logprobs=[-0.25 * (place + 1) for place in range(length)] if wants_logprobs else None,
                finish_reason="stop" if stops else "length",
            )
            for member in range(body["n"])
        ]

    def reply(self, body: dict[str, Any]) -> bytes:
        """What ludic's route answers."""
        return encode_reply(self.completions(body), GenerateRequest(**body))

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """What /v1/completions answers."""
        choices = [
            {
                "index": member,
                "text": "",
                "logprobs": None if one.logprobs is None else {"token_logprobs": one.logprobs},
                "finish_reason": one.finish_reason,
                "token_ids": one.token_ids if body.get("return_token_ids") else None,
                "prompt_token_ids": body["prompt"],
            }
            for member, one in enumerate(self.completions(body))
        ]
        name = f"cmpl-{body['request_id']}"
        return {"id": name, "object": "text_completion", "model": self.model, "choices": choices[::-1]}


@contextlib.asynccontextmanager
async def serving(server: FakeServer) -> AsyncIterator[FakeServer]:
    """Run it on a free port of this machine."""
    runner = web.AppRunner(server.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.base_url = f"http://{host}:{port}"
    try:
        yield server
    finally:
        if server.hold is not None:
            server.hold.set()
        await runner.cleanup()
