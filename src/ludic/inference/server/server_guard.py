"""Guards ludic's vLLM server: it names each start, leases the server to one trainer at a time, and limits bodies.

`ServerGuard` is an ASGI middleware in front of all routes, and behind the check of the API key. It does three things.

Boot: each response has the header `x-ludic-boot`, an id of this start of the server. A server that was started again holds
the weights that it was started with, and a client sees that by the first reply.

Lease: a trainer replaces the server's weights, so a server has one trainer. `POST /ludic/v1/trainer` claims it, and claims
it anew to keep it; every request that names its trainer in `x-ludic-trainer` keeps it too. It ends `LEASE_S` seconds after
it was last kept, by a monotonic clock. While it lives, what could change the server is refused to everybody else:
every method but GET, HEAD and OPTIONS on every route that is not known to be harmless (`HARMLESS_PATHS`), so that a route
that a new version of vLLM adds is refused too. A request without the header (an evaluation) may generate. A request that
names a trainer that has not got the server neither changes it nor generates, and that is asked at its end as well as at its
beginning: a trainer that slept through its lease must not go on unnoticed, and one that another has replaced never gets
this server back.

    POST   {"trainer": "<hex>", "identity": {"host": ..., "pid": ..., ...}, "takes_over": "<hex>" or null}
           200 {"boot": "<hex>", "lease_s": 60.0, "renewed": false}: false where the server was not this trainer's before
           409 {"error": {"message": ..., ...}, "holder": {"trainer", "identity", "seconds_since_seen"} or null,
                "lost": true where this trainer held the server and lost it for good}
    DELETE {"trainer": "<hex>"}; 200 or 409, as above
    PUT    {"trainer": "<hex>", "policy_version": 37}, at the end of a sync that was proven; 200 or 409, as above
    GET    {"boot": ..., "lease_s": 60.0, "holder": {...} or null, "weights": {...} or null}

Weights: `GET` also says whose weights the server computes with, while their trainer is there and when it has left: null for
those that the server was started with, else {"proven": true, "policy_version", "identity", "since"}. From the first request
that may change them until the next `PUT` it is {"proven": false, "identity"}, for they may be half replaced.

Bodies: read here to their end, before any route sees a byte, up to a limit in bytes received and in seconds. What a web
page sends to this machine (it says so in `Origin`) never changes the server.

Left out: who may speak to the server at all (`vllm_server.RequireApiKey`), and slow headers, which never reach an ASGI
application. A trainer that names itself falsely is not kept out: the lease guards against mistakes, the key against people.
"""

import asyncio
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from ludic.inference.server.generate_route import (
    MAX_BODY_BYTES,
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    error_body,
    request_path,
    respond,
)
from ludic.inference.server.trainer_lease import IDENTITY_FIELDS, Holder, NotHolderError, TrainerLease
from ludic.inference.wire import BOOT_HEADER, LEASE_S, TRAINER_HEADER, TRAINER_PATH
from ludic.inference.wire import PATH as GENERATE_PATH
from ludic.storage.identity import Identity, describe

logger = logging.getLogger(f"vllm.{__name__}")  # a child of vLLM's logger: the server has no other handler

BOOT_VARIABLE = "LUDIC_SERVER_BOOT"

BODY_DEADLINE_S = 60.0
"""A body must be there this long after its headers."""
MAX_OTHER_BODY_BYTES = 8 * 2**20
"""Of every route but ludic's generation (`MAX_BODY_BYTES`, 16 MiB) and the trainer's: a prompt of a million token ids, as
JSON numbers, fits."""
MAX_TRAINER_BODY_BYTES = 16 * 2**10
MAX_IDENTITY_FIELDS = 16
TRAINER_FIELDS = frozenset({"trainer", "identity", "takes_over", "policy_version"})

GENERATION_PATHS = frozenset(
    {
        GENERATE_PATH, "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses",
        "/v1/messages", "/inference/v1/generate",
    }
)  # fmt: skip
LOOKUP_PATHS = frozenset(
    {
        "/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/chat/completions/render",
        "/v1/completions/render", "/v1/embeddings", "/ping",
    }
)  # fmt: skip
HARMLESS_PATHS = GENERATION_PATHS | LOOKUP_PATHS
"""Routes that anyone may post to while a trainer holds the server: none of them changes the next answer."""
RPC_PATH = "/collective_rpc"
HARMLESS_RPC_METHODS = frozenset({"ludic_server_info", "ludic_weights_digest"})
KEEPS_WEIGHTS_PATHS = frozenset({"/pause", "/resume", "/init_weight_transfer_engine", "/reset_prefix_cache"})
KEEPS_WEIGHTS_METHODS = frozenset({"ludic_expect_weights", "ludic_held_digests", "ludic_weight_digests"})
"""What only a trainer may ask, and what leaves the weights as they are; of anything else that is not known."""
HARMLESS_SOCKETS = frozenset({"/v1/realtime"})

_TRAINER_ID = re.compile(r"[0-9a-f]{8,64}")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

Kind = Literal["lookup", "generation", "control"]


def new_boot() -> str:
    """An id of one start of a server: 32 hex digits."""
    return secrets.token_hex(16)


class RefusedError(Exception):
    """An answer other than the one that was asked for."""

    def __init__(self, status: int, message: str, more: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.more = more or {}
        """Fields of the answer beside the error."""


class ServerGuard:
    """ASGI middleware: the boot header, the trainer's lease and the limits of bodies, as the module says."""

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self.boot = os.environ.get(BOOT_VARIABLE) or new_boot()
        self.lease = TrainerLease(clock)
        self._weights: dict[str, Any] | None = None
        """The owner of the weights, as `GET` reports it; None for the weights that the server was started with."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(send, self.boot)
        path = request_path(scope)
        try:
            trainer = _trainer_of(scope)
            body = await _whole_body(receive, _limit(path))
            if body is None:
                return  # the caller left
            kind = _kind(scope["method"], path, body)
            if kind == "control" and any(name.lower() == b"origin" for name, _ in scope["headers"]):
                raise RefusedError(403, f"{path} changes the server, which a web page must not")
            if path == TRAINER_PATH:
                await answer.json(200, self._trainer_route(scope["method"], body))
                return
            self._admit(kind, trainer)
            if kind == "control" and not _keeps_weights(path, body):
                self._weights = {"proven": False, "identity": self._identity_of(trainer)}
            if trainer is not None and kind != "lookup":
                answer.check = lambda: self._admit("generation", trainer)  # once more, at the end
        except RefusedError as error:
            await answer.refuse(error)
            return
        await self._pass_on(scope, _replayed(body, receive), answer)

    async def _pass_on(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        try:
            await self._app(scope, receive, answer)
        except Exception as error:
            # Starlette answers to it outside of every middleware, and so without the header: the same answer, from here.
            handler = scope["app"].exception_handlers.get(Exception)
            if handler is not None and not answer.started:
                from fastapi import Request

                response = await handler(Request(scope), error)
                await response(scope, receive, answer)
            raise

    def _admit(self, kind: Kind, trainer: str | None) -> None:
        """Refuse what this caller may not ask, and keep the lease of the one who has it."""
        holder = self.lease.holder()
        holds = holder is not None and holder.trainer == trainer
        try:
            if trainer is not None and (holds or kind != "lookup"):
                self.lease.keep(trainer, changes=kind == "control")
            elif trainer is None and kind == "control":
                self.lease.change_unnamed()
        except NotHolderError as error:
            raise self._conflict(error) from error

    def _trainer_route(self, method: str, body: bytes) -> dict[str, Any]:
        state: dict[str, Any] = {"boot": self.boot, "lease_s": LEASE_S}
        if method in ("GET", "HEAD"):
            return state | {"holder": self._described(self.lease.holder()), "weights": self._weights}
        if method not in ("POST", "PUT", "DELETE"):
            raise RefusedError(405, f"{TRAINER_PATH} takes GET, POST, PUT and DELETE, not {method}")
        fields = _decoded(body)
        trainer = _checked_id("trainer", fields.get("trainer"))
        try:
            if method == "PUT":
                version = _checked_version(fields.get("policy_version"))
                self.lease.keep(trainer, changes=True)
                self._weights = {"proven": True, "policy_version": version, "identity": self._identity_of(trainer)}
                self._weights["since"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                return state
            if method == "DELETE":
                self.lease.release(trainer)
                return state
            takes_over = fields.get("takes_over")
            renewed = self.lease.claim(
                trainer,
                _checked_identity(fields.get("identity")),
                takes_over=None if takes_over is None else _checked_id("takes_over", takes_over),
            )
        except NotHolderError as error:
            raise self._conflict(error) from error
        holder = self.lease.holder()
        if not renewed and holder is not None:
            logger.info("the server now belongs to the trainer %s (%s)", trainer, describe(holder.identity))
        return state | {"renewed": renewed}

    def _identity_of(self, trainer: str | None) -> Identity:
        """What this trainer has said of itself; nothing of one that did not claim the server."""
        holder = self.lease.holder()
        return dict(holder.identity) if holder is not None and holder.trainer == trainer else {}

    def _conflict(self, error: NotHolderError) -> RefusedError:
        return RefusedError(409, str(error), {"holder": self._described(error.holder), "lost": error.lost})

    def _described(self, holder: Holder | None) -> dict[str, Any] | None:
        if holder is None:
            return None
        seconds = round(self.lease.seconds_since_seen(holder), 3)
        return {"trainer": holder.trainer, "identity": dict(holder.identity), "seconds_since_seen": seconds}

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As a request that names no trainer; its messages are limited by uvicorn, to 16 MiB."""
        path = request_path(scope)
        try:
            if path not in HARMLESS_SOCKETS:
                if any(name.lower() == b"origin" for name, _ in scope["headers"]):
                    raise RefusedError(403, f"{path} is not for web pages")
                self._admit("control", None)
                self._weights = {"proven": False, "identity": {}}
        except RefusedError as error:
            await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:120]})
            return
        await self._app(scope, receive, send)


class _Answer:
    """Sends one answer, with the boot header. `check` may turn it into a refusal before its first byte."""

    def __init__(self, send: Send, boot: str) -> None:
        self._send = send
        self._header = (BOOT_HEADER.encode(), boot.encode())
        self._refused = False
        self.started = False
        self.check: Callable[[], None] | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.check is not None:
                try:
                    self.check()
                except RefusedError as error:
                    await self.refuse(error)
                    self._refused = True
            self.started = True
            message = {**message, "headers": [*message.get("headers", ()), self._header]}
        if not self._refused:
            await self._send(message)

    async def json(self, status: int, answer: Mapping[str, Any], *, close: bool = False) -> None:
        headers = [self._header] + ([(b"connection", b"close")] if close else [])
        await respond(self._send, status, json.dumps(answer).encode(), headers)

    async def refuse(self, error: RefusedError) -> None:
        # Where the body was not read to its end, the connection cannot be used again.
        answer = json.loads(error_body(error.status, str(error))) | error.more
        await self.json(error.status, answer, close=error.status in (408, 413))


def _kind(method: str, path: str, body: bytes) -> Kind:
    if method in _SAFE_METHODS or path in LOOKUP_PATHS or (path == RPC_PATH and _asks_worker(body)):
        return "lookup"
    return "generation" if path in GENERATION_PATHS else "control"


def _asks_worker(body: bytes) -> bool:
    """Whether a call of the workers is one that only asks."""
    return _rpc_method(body) in HARMLESS_RPC_METHODS


def _keeps_weights(path: str, body: bytes) -> bool:
    return path in KEEPS_WEIGHTS_PATHS or (path == RPC_PATH and _rpc_method(body) in KEEPS_WEIGHTS_METHODS)


def _rpc_method(body: bytes) -> str:
    """The method that a call of the workers names; "" for a call that vLLM will refuse."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    method = call.get("method") if isinstance(call, dict) else None
    return method if isinstance(method, str) else ""


def _limit(path: str) -> int:
    return {GENERATE_PATH: MAX_BODY_BYTES, TRAINER_PATH: MAX_TRAINER_BODY_BYTES}.get(path, MAX_OTHER_BODY_BYTES)


async def _whole_body(receive: Receive, limit: int) -> bytes | None:
    """The request's body; None if the caller left before its end."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > limit:
                    raise RefusedError(413, f"the body is larger than {limit} bytes")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise RefusedError(408, f"the body was not there {BODY_DEADLINE_S:g} s after its headers") from error


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` for the application: the body once more, and then what comes after it, which is the caller's leaving."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def _trainer_of(scope: Scope) -> str | None:
    given = [value for name, value in scope["headers"] if name.lower() == TRAINER_HEADER.encode()]
    if len(given) > 1:
        raise RefusedError(400, f"the header {TRAINER_HEADER} was given {len(given)} times")
    return _checked_id(TRAINER_HEADER, given[0].decode("latin-1")) if given else None


def _checked_id(name: str, value: object) -> str:
    if not isinstance(value, str) or not _TRAINER_ID.fullmatch(value):
        raise RefusedError(400, f"{name} must be 8 to 64 hex digits, not {value!r:.80}")
    return value


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict) or not fields.keys() <= TRAINER_FIELDS:
        raise RefusedError(400, f"the body must be an object with fields of {', '.join(sorted(TRAINER_FIELDS))}")
    return fields


def _checked_version(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise RefusedError(400, f"policy_version must be a whole number from 0, not {value!r:.80}")
    return value


def _checked_identity(value: object) -> Identity:
    """Who a trainer says it is: words and numbers for people to read, which nothing here acts on."""
    if not isinstance(value, dict) or len(value) > MAX_IDENTITY_FIELDS:
        names = ", ".join(IDENTITY_FIELDS)
        raise RefusedError(400, f"identity must be an object of at most {MAX_IDENTITY_FIELDS} fields, such as {names}")
    for name, one in value.items():
        is_number = type(one) is int or (type(one) is float and math.isfinite(one))
        if not (one is None or is_number or isinstance(one, str)):
            raise RefusedError(400, f"identity.{name:.40} must be a string, a number or null, not {one!r:.80}")
    return value
