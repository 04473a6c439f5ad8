"""Guards ludic's vLLM server: it leases the server to one trainer at a time, names each start of it, and limits bodies.

`ServerGuard` is an ASGI middleware in front of all routes, and behind the check of the API key.

Lease: a trainer replaces the server's weights, so a server has one trainer. `POST /ludic/v1/trainer` claims the lease and gets a
token, which names this start of the server and the lease; the trainer sends it in `x-ludic-lease`, and each such request keeps
the lease. It ends `LEASE_S` seconds after it was last kept, by a monotonic clock. While it lives, what could change the server
is refused to everybody else: every method but GET, HEAD and OPTIONS on every route that is not known to be harmless
(`HARMLESS_PATHS`), so that a route that a new version of vLLM adds is refused too. Who has no lease may generate.

Token: it is asked for at the end of a request as well as at its beginning, and repeated in the reply. A token that this start
did not give is refused with 410: a server that was started again has other weights. One whose lease was lost is refused with
409 and the name of who has it: a trainer that slept through its lease must not go on unnoticed, and never gets this start of
the server back. Who has no lease, as an evaluation, sends the token of the start alone, for the same proof.

    GET    200 {"protocol": 3, "token": "<hex>", "lease_s": 60.0, "weights": {...} or null,
                "holder": {"lease": 1, "identity", "seconds_since_seen"} or null}; the token is that of the caller
    POST   {"identity": {"host": ..., "pid": ..., ...}, "takes_over": the number of a dead trainer's lease, or null}
           200 {"protocol", "token": "<hex>-2", "lease_s"}; 409 {"error": {"message": ...}, "holder": {...} or null}
    PUT    {"policy_version": 37} under a lease, at the end of a sync that was proven; 200 or 409, as above; with
           "adapter": true the weights are those of the server's start with the trainer's adapter, and `GET` says so
    DELETE under a lease, which ends it; 200 or 409, as above

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
from ludic.inference.server.trainer_lease import Holder, NotHolderError, TrainerLease
from ludic.inference.wire import LEASE_HEADER, LEASE_S, PROTOCOL, TRAINER_PATH
from ludic.inference.wire import PATH as GENERATE_PATH
from ludic.storage.identity import Identity, describe

logger = logging.getLogger(f"vllm.{__name__}")  # a child of vLLM's logger: the server has no other handler

BODY_DEADLINE_S = 60.0
"""A body must be there this long after its headers."""
MAX_TRAINER_BODY_BYTES = 16 * 2**10
MAX_BYTES = {GENERATE_PATH: MAX_BODY_BYTES, TRAINER_PATH: MAX_TRAINER_BODY_BYTES}
MAX_OTHER_BODY_BYTES = 8 * 2**20
"""Of every other route: a prompt of a million token ids, as JSON numbers, fits."""
MAX_IDENTITY_FIELDS = 16
TRAINER_FIELDS = frozenset({"identity", "takes_over", "policy_version", "adapter"})

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
"""Routes that anyone may post to while a trainer has the server: none of them changes the next answer."""
RPC_PATH = "/collective_rpc"
HARMLESS_RPC_METHODS = frozenset({"ludic_server_info", "ludic_weights_digest"})
KEEPS_WEIGHTS_PATHS = frozenset({"/pause", "/resume", "/init_weight_transfer_engine", "/reset_prefix_cache"})
KEEPS_WEIGHTS_METHODS = frozenset({"ludic_expect_weights", "ludic_held_digests", "ludic_ipc_problem"})
"""What only a trainer may ask, and what leaves the weights as they are; of anything else that is not known."""
HARMLESS_SOCKETS = frozenset({"/v1/realtime"})

_TOKEN = re.compile(r"[0-9a-f]{32}(-[1-9][0-9]{0,8})?")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

Kind = Literal["lookup", "generation", "control"]


class RefusedError(Exception):
    """An answer other than the one that was asked for."""

    def __init__(self, status: int, message: str, holder: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.holder = holder
        """Who has the lease, beside the error of a 409."""


class ServerGuard:
    """ASGI middleware: the trainer's lease, its token and the limits of bodies, as the module says."""

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self.start = secrets.token_hex(16)
        """Names this start of the server."""
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
        path = request_path(scope)
        try:
            token = _token_of(scope)
            body = await _whole_body(receive, MAX_BYTES.get(path, MAX_OTHER_BODY_BYTES))
            if body is None:
                return  # the caller left
            lease = None if token is None else self._lease_of(token)
            kind = _kind(scope["method"], path, body)
            if kind == "control" and any(name.lower() == b"origin" for name, _ in scope["headers"]):
                raise RefusedError(403, f"{path} changes the server, which a web page must not")
            if path == TRAINER_PATH:
                answer = self._trainer_route(scope["method"], body, lease)
                await respond(send, 200, json.dumps(answer).encode(), _repeated(token))
                return
            holder = self._admit(kind, lease)
            if kind == "control" and not _keeps_weights(path, body):
                # While an adapter is replaced it is still an adapter: whoever connects meanwhile asks for it, not for the base.
                kept = {"adapter": True} if (self._weights or {}).get("adapter") else {}
                self._weights = {"proven": False, "identity": {} if holder is None else dict(holder.identity)} | kept
        except RefusedError as error:
            await _refuse(send, error)
            return
        await self._app(scope, _replayed(body, receive), self._send_if_still_held(send, token, lease))

    def _lease_of(self, token: str) -> int | None:
        """The number of the token's lease, None for the token of who has none."""
        start, _, number = token.partition("-")
        if start != self.start:
            raise RefusedError(
                410,
                "this server was started again since it gave out this token, and no longer has the weights that it had",
            )
        return int(number) if number else None

    def _admit(self, kind: Kind, lease: int | None) -> Holder | None:
        """Refuse what this caller may not ask. A lease is kept by that; its holder."""
        try:
            if lease is not None:
                return self.lease.keep(lease)
            if kind == "control":
                self.lease.change()
        except NotHolderError as error:
            raise self._conflict(error) from error
        return None

    def _send_if_still_held(self, send: Send, token: str | None, lease: int | None) -> Send:
        """`send`, which repeats the token; a lease that was lost meanwhile turns the answer into a refusal."""
        refused = False

        async def checked(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                try:
                    self._admit("generation", lease)
                except RefusedError as error:
                    refused = True
                    await _refuse(send, error)
                message = {**message, "headers": [*message.get("headers", ()), *_repeated(token)]}
            if not refused:
                await send(message)

        return checked

    def _trainer_route(self, method: str, body: bytes, lease: int | None) -> dict[str, Any]:
        if method not in ("GET", "HEAD", "POST", "PUT", "DELETE"):
            raise RefusedError(405, f"{TRAINER_PATH} takes GET, POST, PUT and DELETE, not {method}")
        holder = self._admit("lookup", lease)
        if method in ("GET", "HEAD"):
            return self._state(holder) | {"holder": self._described(self.lease.holder()), "weights": self._weights}
        if method == "POST":
            return self._state(holder or self._claim(_decoded(body)))
        if holder is None:
            living = self._described(self.lease.holder())
            raise RefusedError(409, f"{method} of {TRAINER_PATH} is for the trainer that has the lease", living)
        if method == "DELETE":
            self.lease.release(holder.lease)
            return self._state(None)
        fields = _decoded(body)
        version, adapter = fields.get("policy_version"), fields.get("adapter", False)
        if type(version) is not int or not 0 <= version < 2**53:
            raise RefusedError(400, f"policy_version must be a whole number from 0, not {version!r:.80}")
        if type(adapter) is not bool:
            raise RefusedError(400, f"adapter must be true or false, not {adapter!r:.80}")
        self._weights = {"proven": True, "policy_version": version, "identity": dict(holder.identity)}
        self._weights |= {"adapter": True} if adapter else {}
        self._weights["since"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return self._state(holder)

    def _claim(self, fields: Mapping[str, Any]) -> Holder:
        identity, takes_over = _checked_identity(fields.get("identity")), fields.get("takes_over")
        if takes_over is not None and type(takes_over) is not int:
            raise RefusedError(400, f"takes_over must be the number of a lease, or null, not {takes_over!r:.80}")
        try:
            holder = self.lease.claim(identity, takes_over=takes_over)
        except NotHolderError as error:
            raise self._conflict(error) from error
        logger.info("lease %d of the server is that of the trainer %s", holder.lease, describe(identity))
        return holder

    def _state(self, holder: Holder | None) -> dict[str, Any]:
        token = self.start if holder is None else f"{self.start}-{holder.lease}"
        return {"protocol": PROTOCOL, "token": token, "lease_s": LEASE_S}

    def _conflict(self, error: NotHolderError) -> RefusedError:
        return RefusedError(409, str(error), self._described(error.holder))

    def _described(self, holder: Holder | None) -> dict[str, Any] | None:
        if holder is None:
            return None
        seconds = round(self.lease.seconds_since_seen(holder), 3)
        return {"lease": holder.lease, "identity": dict(holder.identity), "seconds_since_seen": seconds}

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As a request under no lease; its messages are limited by uvicorn, to 16 MiB."""
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


async def _refuse(send: Send, error: RefusedError) -> None:
    answer = json.loads(error_body(error.status, str(error)))
    if error.status == 409:
        answer["holder"] = error.holder
    # Where the body was not read to its end, the connection cannot be used again.
    close = [(b"connection", b"close")] if error.status in (408, 413) else []
    await respond(send, error.status, json.dumps(answer).encode(), close)


def _repeated(token: str | None) -> list[tuple[bytes, bytes]]:
    return [] if token is None else [(LEASE_HEADER.encode(), token.encode())]


def _kind(method: str, path: str, body: bytes) -> Kind:
    if method in _SAFE_METHODS or path in LOOKUP_PATHS or _rpc_method(path, body) in HARMLESS_RPC_METHODS:
        return "lookup"
    return "generation" if path in GENERATION_PATHS else "control"


def _keeps_weights(path: str, body: bytes) -> bool:
    return path in KEEPS_WEIGHTS_PATHS or _rpc_method(path, body) in KEEPS_WEIGHTS_METHODS


def _rpc_method(path: str, body: bytes) -> str:
    """The method that a call of the workers names; "" for a call that vLLM will refuse, and for another request."""
    try:
        call = json.loads(body) if path == RPC_PATH else None
    except (ValueError, RecursionError):
        return ""
    method = call.get("method") if isinstance(call, dict) else None
    return method if isinstance(method, str) else ""


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


def _token_of(scope: Scope) -> str | None:
    given = [value for name, value in scope["headers"] if name.lower() == LEASE_HEADER.encode()]
    if not given:
        return None
    token = str(given[0], "latin-1")
    if len(given) > 1 or not _TOKEN.fullmatch(token):
        raise RefusedError(400, f"{LEASE_HEADER} must be a token that this server gave, once, not {token!r:.80}")
    return token


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict) or not fields.keys() <= TRAINER_FIELDS:
        raise RefusedError(400, f"the body must be an object with fields of {', '.join(sorted(TRAINER_FIELDS))}")
    return fields


def _checked_identity(value: object) -> Identity:
    """Who a trainer says it is: words and numbers for people to read, which nothing here acts on."""
    if not isinstance(value, dict) or len(value) > MAX_IDENTITY_FIELDS:
        raise RefusedError(
            400, f"identity must be an object of at most {MAX_IDENTITY_FIELDS} fields, such as host and pid"
        )
    for name, one in value.items():
        is_number = type(one) is int or (type(one) is float and math.isfinite(one))
        if not (one is None or is_number or isinstance(one, str)):
            raise RefusedError(400, f"identity.{name:.40} must be a string, a number or null, not {one!r:.80}")
    return value
