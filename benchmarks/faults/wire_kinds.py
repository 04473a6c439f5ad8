"""The ways in which the wire breaks, one `Fault` each: connections, statuses, framing, content, time, mix-ups.

`KINDS` names them all; each writes to the client what a broken server, a proxy or an attacker in between could write.
"""

import array
import asyncio
import base64
import copy
import functools
import gzip
import json
import math
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.faults.proxy import Call, Fault, Reply, http
from ludic.inference.wire import LEASE_HEADER

Damage = Callable[[dict[str, Any]], None]
"""Changes a reply's JSON in place; `Group` makes it the same on both routes."""

REFUSED_S = 0.05
"""How long nothing listens."""
SWAP_S = 0.3
"""How long a reply waits for another one to change places with."""
BLOCK = b" " * 2**16


# --- the connection ---------------------------------------------------------------------------------------------------


async def _refused(call: Call) -> None:
    call.reset()
    await call.proxy.refuse_connections(REFUSED_S)


async def _reset_before_forwarding(call: Call) -> None:
    call.reset()


async def _reset_after_forwarding(call: Call) -> None:
    await call.forward()
    call.reset()


def _cut(where: Callable[[bytes, Call], int], *, reset: bool) -> Callable[[Call], Awaitable[None]]:
    """Write the reply up to a byte, and end the connection there."""

    async def apply(call: Call) -> None:
        reply = await call.forward()
        whole = http(reply.body, status=reply.status, headers=reply.headers)
        await call.send(whole[: where(whole, call)])
        if reset:
            await asyncio.sleep(0.01)  # or the reset overtakes what was written
            call.reset()

    return apply


def _in_headers(whole: bytes, call: Call) -> int:
    return call.proxy.rng.randrange(1, whole.index(b"\r\n\r\n") + 3)


def _in_body(whole: bytes, call: Call) -> int:
    return call.proxy.rng.randrange(whole.index(b"\r\n\r\n") + 4, len(whole) - 1)


# --- statuses ---------------------------------------------------------------------------------------------------------


def _status(status: int, *headers: tuple[str, str], body: bytes = b"no") -> Callable[[Call], Awaitable[None]]:
    async def apply(call: Call) -> None:
        where = [(name, value.replace("TRAP", call.proxy.trap_url)) for name, value in headers]
        await call.send(http(body, status=status, headers=where))

    return apply


# --- framing: the body is right, or half of it, and what says how long it is is wrong -----------------------------------


def _framed(
    *, length: Callable[[bytes], str | None], body: Callable[[bytes], bytes] = lambda body: body, headers: str = "",
) -> Callable[[Call], Awaitable[None]]:  # fmt: skip
    async def apply(call: Call) -> None:
        reply = await call.forward()
        extra = [("Content-Length", headers)] if headers else []
        await call.send(http(body(reply.body), headers=[*reply.headers, *extra], length=length(reply.body)))

    return apply


def _half(body: bytes) -> bytes:
    return body[: len(body) // 2]


def _chunked(write: Callable[[bytes], bytes]) -> Callable[[Call], Awaitable[None]]:
    async def apply(call: Call) -> None:
        reply = await call.forward()
        head = http(b"", headers=[*reply.headers, ("Transfer-Encoding", "chunked")], length=None)
        await call.send(head + write(reply.body))

    return apply


def _raw(data: bytes) -> Callable[[Call], Awaitable[None]]:
    async def apply(call: Call) -> None:
        await call.send(data)

    return apply


# --- content ----------------------------------------------------------------------------------------------------------


def _body(change: Callable[[bytes], bytes], *headers: tuple[str, str]) -> Callable[[Call], Awaitable[None]]:
    async def apply(call: Call) -> None:
        reply = await call.forward()
        await call.send(http(change(reply.body), headers=[*reply.headers, *headers]))

    return apply


def _damaged(damage: Damage) -> Callable[[Call], Awaitable[None]]:
    def change(body: bytes) -> bytes:
        fields: dict[str, Any] = json.loads(body)
        damage(fields)
        return json.dumps(fields).encode()

    return _body(change)


def members(fields: dict[str, Any]) -> list[dict[str, Any]]:
    group: list[dict[str, Any]] = fields["completions" if "completions" in fields else "choices"]
    return group


def token_ids(member: dict[str, Any]) -> list[int]:
    packed = member["token_ids"]
    return list(packed) if isinstance(packed, list) else array.array("i", base64.b64decode(packed)).tolist()


def _put_ids(member: dict[str, Any], ids: list[int]) -> None:
    plain = isinstance(member["token_ids"], list)
    member["token_ids"] = ids if plain else base64.b64encode(array.array("i", ids).tobytes()).decode()


def _put_logprobs(member: dict[str, Any], change: Callable[[list[float]], list[float]]) -> None:
    held = member["logprobs"]
    if isinstance(held, dict):
        held["token_logprobs"] = change(held["token_logprobs"])
    else:
        values = array.array("f", base64.b64decode(held)).tolist()
        member["logprobs"] = base64.b64encode(array.array("f", change(values)).tobytes()).decode()


def _each(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Change the last completion: the others stay right, and must not be taken without it."""

    def damage(fields: dict[str, Any]) -> None:
        change(members(fields)[-1])

    return damage


def _all_fields(name: str, value: Any) -> Damage:
    def damage(fields: dict[str, Any]) -> None:
        fields["id" if name == "request_id" and "choices" in fields else name] = value

    return damage


def _one_too_many(fields: dict[str, Any]) -> None:
    another = copy.deepcopy(members(fields)[-1])
    if "index" in another:
        another["index"] += 1
    members(fields).append(another)


def _one_character_more(member: dict[str, Any]) -> None:
    member["token_ids"] = "A" + str(member["token_ids"])


def _shortened(member: dict[str, Any]) -> None:
    _put_ids(member, token_ids(member)[:1])
    _put_logprobs(member, lambda held: held[:1])
    member["finish_reason"] = "length"


def _remove_last(fields: dict[str, Any]) -> None:
    del members(fields)[-1]


def _null_member(fields: dict[str, Any]) -> None:
    fields["completions" if "completions" in fields else "choices"][-1] = None


def _remove_id(fields: dict[str, Any]) -> None:
    del fields["id" if "id" in fields else "request_id"]


# --- size and time ----------------------------------------------------------------------------------------------------


async def _announced_gigabyte(call: Call) -> None:
    await call.forward()
    await call.send(http(b"", length=str(2**30)))
    await _pour(call, BLOCK)


async def _announced_gigabyte_of_error(call: Call) -> None:
    await call.send(http(b"", status=503, length=str(2**30)))
    await _pour(call, BLOCK)


async def _endless(call: Call) -> None:
    await call.forward()
    await call.send(http(b"[", length=None))
    await _pour(call, BLOCK)


async def _endless_chunks(call: Call) -> None:
    await call.forward()
    await call.send(http(b"", headers=[("Transfer-Encoding", "chunked")], length=None))
    await _pour(call, b"10000\r\n" + BLOCK + b"\r\n")


async def _endless_headers(call: Call) -> None:
    await call.forward()
    await call.send(b"HTTP/1.1 200 OK\r\n")
    await _pour(call, b"".join(b"X-Filler-%d: %b\r\n" % (number, b"x" * 1000) for number in range(64)))


async def _endless_informational(call: Call) -> None:
    await call.forward()
    await _pour(call, b"HTTP/1.1 100 Continue\r\n\r\n" * 256, pause_s=0.01)


async def _pour(call: Call, block: bytes, *, pause_s: float = 0.0) -> None:
    """At most a gigabyte, as fast as the client takes it."""
    for _ in range(2**30 // len(block)):
        if call.proxy.at_eof(call.writer) or not await call.send(block):
            return
        if pause_s:
            await asyncio.sleep(pause_s)


def _slowly(part: Callable[[bytes], int]) -> Callable[[Call], Awaitable[None]]:
    """Byte by byte from some place on."""

    async def apply(call: Call) -> None:
        reply = await call.forward()
        whole = http(reply.body, headers=reply.headers)
        start = part(whole)
        await call.send(whole[:start])
        for place in range(start, len(whole)):
            if call.proxy.at_eof(call.writer) or not await call.send(whole[place : place + 1]):
                return
            await asyncio.sleep(0.1)

    return apply


async def _black_hole(call: Call) -> None:
    await call.hang()


async def _stalls_in_body(call: Call) -> None:
    reply = await call.forward()
    await call.send(http(_half(reply.body), headers=reply.headers, length=str(len(reply.body))))
    await call.hang()


# --- mix-ups ----------------------------------------------------------------------------------------------------------


async def _twice(call: Call) -> None:
    """Two replies to one request: the first is right, the second must reach nobody."""
    reply = await call.forward()
    call.proxy.note_delivery(call, reply)
    await call.send(http(reply.body, headers=reply.headers) * 2)
    await asyncio.sleep(0.05)


async def _again(call: Call) -> None:
    """The reply to an earlier attempt: this one keeps it and fails, the next one gets it (`_late`)."""
    call.proxy.kept[call.prompt] = await call.forward()
    await call.send(http(b"busy", status=503))


async def _late(call: Call) -> None:
    await call.forward()
    kept = call.proxy.kept.pop(call.prompt)
    await call.send(http(kept.body, headers=kept.headers))


async def _another_prompts(call: Call) -> None:
    """Two replies change places; without a partner for a while, one that another prompt has had already comes instead."""
    reply, proxy = await call.forward(), call.proxy
    if proxy.swapping is not None:
        theirs, partner = proxy.swapping
        proxy.swapping = None
        partner.set_result(reply)
    else:
        waiting: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        proxy.swapping = (reply, waiting)
        try:
            theirs = await asyncio.wait_for(asyncio.shield(waiting), SWAP_S)
        except TimeoutError:
            proxy.swapping = None
            bodies = [sent[0][1] for prompt, sent in proxy.delivered.items() if prompt != call.prompt]
            theirs = Reply(status=200, headers=reply.headers, body=proxy.rng.choice(bodies) if bodies else b"{}")
    await call.send(http(theirs.body, headers=theirs.headers))


def _right(*headers: tuple[str, str], before: bytes = b"", chunks: bool = False) -> Callable[[Call], Awaitable[None]]:
    """Odd, and right: may be taken at once."""

    async def apply(call: Call) -> None:
        reply = await call.forward()
        call.proxy.note_delivery(call, reply)
        if chunks:
            parts = b"".join(b"1\r\n%c\r\n" % byte for byte in reply.body)
            head = http(b"", headers=[*reply.headers, ("Transfer-Encoding", "chunked")], length=None)
            await call.send(head + parts + b"0\r\n\r\n")
        else:
            length = None if ("Connection", "close") in headers else ""
            await call.send(before + http(reply.body, headers=[*reply.headers, *headers], length=length))

    return apply


async def _without_token(call: Call) -> None:
    reply = await call.forward()
    await call.send(http(reply.body, headers=[pair for pair in reply.headers if pair[0].lower() != LEASE_HEADER]))


async def _other_token(call: Call) -> None:
    reply = await call.forward()
    headers = [(name, "f" * 32 if name.lower() == LEASE_HEADER else value) for name, value in reply.headers]
    await call.send(http(reply.body, headers=headers))


async def _without_the_requests_token(call: Call) -> None:
    """As a proxy that drops headers which it does not know."""
    lines = call.head.split(b"\r\n")
    call.head = b"\r\n".join(line for line in lines if not line.lower().startswith(LEASE_HEADER.encode()))
    reply = await call.forward()
    await call.send(http(reply.body, headers=reply.headers))


@functools.cache
def _bomb() -> bytes:
    """64 MiB of blanks as 64 KiB of gzip."""
    packer = zlib.compressobj(6, wbits=31)
    return b"".join([packer.compress(BLOCK) for _ in range(2**10)]) + packer.flush()


_INF, _NAN = math.inf, math.nan

_APPLY: dict[str, Callable[[Call], Awaitable[None]]] = {
    "connection refused": _refused,
    "reset before the server has read the request": _reset_before_forwarding,
    "reset instead of the reply": _reset_after_forwarding,
    "closed instead of the reply": _cut(lambda whole, call: 0, reset=False),
    "reset in the headers": _cut(_in_headers, reset=True),
    "closed in the headers": _cut(_in_headers, reset=False),
    "reset in mid-body": _cut(_in_body, reset=True),
    "closed in mid-body": _cut(_in_body, reset=False),
    "500": _status(500),
    "502 of a proxy, in HTML": _status(502, ("Content-Type", "text/html"), body=b"<html>\x1b[2J bad gateway</html>"),
    "503": _status(503),
    "507, which nobody expects": _status(507),
    "429 with Retry-After 0": _status(429, ("Retry-After", "0")),
    "429 with a Retry-After that is no number": _status(429, ("Retry-After", "-1e999")),
    "204 without a body": _status(204, body=b""),
    "101, another protocol": _status(101, ("Connection", "Upgrade"), ("Upgrade", "websocket"), body=b""),
    "301 to another server": _status(301, ("Location", "TRAP")),
    "302 to another server": _status(302, ("Location", "TRAP")),
    "307 to another server": _status(307, ("Location", "TRAP")),
    "308 to another server": _status(308, ("Location", "TRAP")),
    "503 with a gigabyte of text": _announced_gigabyte_of_error,
    "Content-Length right, JSON truncated": _body(_half),
    "Content-Length too long": _framed(length=lambda body: str(len(body) + 100)),
    "Content-Length too short": _framed(length=lambda body: str(len(body) // 2)),
    "Content-Length 0": _framed(length=lambda body: "0"),
    "Content-Length missing, JSON truncated": _framed(length=lambda body: None, body=_half),
    "Content-Length negative": _framed(length=lambda body: "-1"),
    "Content-Length no number": _framed(length=lambda body: "12abc"),
    "Content-Length beyond 64 bits": _framed(length=lambda body: "9" * 30),
    "Content-Length twice, and different": _framed(length=lambda body: str(len(body)), headers="7"),
    "chunks: a size that is no number": _chunked(lambda body: b"zz\r\n" + body + b"\r\n0\r\n\r\n"),
    "chunks: longer than their size": _chunked(lambda body: b"4\r\n" + body + b"\r\n0\r\n\r\n"),
    "chunks: a size beyond 64 bits": _chunked(lambda body: b"F" * 20 + b"\r\n" + body),
    "chunks: no end": _chunked(lambda body: b"%x\r\n%b\r\n" % (len(body) // 2, _half(body))),
    "no HTTP at all": _raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n"),
    "a status that is no number": _raw(b"HTTP/1.1 OK 200\r\nContent-Length: 2\r\n\r\n{}"),
    "null bytes in a header": _raw(b"HTTP/1.1 200 OK\r\nX-A: \x00\x01\r\nContent-Length: 2\r\n\r\n{}"),
    "empty body": _body(lambda body: b""),
    "HTML with status 200": _body(lambda body: b"<html>please log in</html>"),
    "bytes that are no text": _body(lambda body: b"\xff\xfe\x00\x80" * 9),
    "nested JSON without end": _body(lambda body: b"[" * 30_000),
    "a list instead of an object": _body(lambda body: b"[" + body + b"]"),
    "null instead of an object": _body(lambda body: b"null"),
    "an error with status 200": _body(lambda body: b'{"error": {"message": "out of memory", "code": 500}}'),
    "no completions": _damaged(lambda fields: members(fields).clear()),
    "one completion missing": _damaged(_remove_last),
    "one completion too many": _damaged(_one_too_many),
    "a completion that is null": _damaged(_null_member),
    "token_ids of another type": _damaged(_each(lambda member: member.update(token_ids={"0": 1}))),
    "token_ids null": _damaged(_each(lambda member: member.update(token_ids=None))),
    "token ids that are no base64": _damaged(_each(lambda member: member.update(token_ids="!!!!"))),
    "token ids with a byte too many": _damaged(_each(_one_character_more)),
    "finish_reason null": _damaged(_each(lambda member: member.update(finish_reason=None))),
    "finish_reason abort": _damaged(_each(lambda member: member.update(finish_reason="abort"))),
    "request id missing": _damaged(_remove_id),
    "request id of another type": _damaged(_all_fields("request_id", 10**400)),
    "request id of another request": _damaged(_all_fields("request_id", "0" * 32)),
    "more tokens than were asked for": _damaged(_each(lambda member: _put_ids(member, [7] * 100_000))),
    "a completion without tokens": _damaged(_each(lambda member: _put_ids(member, []))),
    "truncated, and too short for it": _damaged(_each(_shortened)),
    "token ids below 0": _damaged(_each(lambda member: _put_ids(member, [-1, *token_ids(member)[1:]]))),
    "token ids out of the vocabulary": _damaged(
        _each(lambda member: _put_ids(member, [2**31 - 1, *token_ids(member)[1:]]))
    ),
    "one log-prob missing": _damaged(_each(lambda member: _put_logprobs(member, lambda held: held[:-1]))),
    "one log-prob too many": _damaged(_each(lambda member: _put_logprobs(member, lambda held: [*held, -1.0]))),
    "a log-prob that is NaN": _damaged(_each(lambda member: _put_logprobs(member, lambda held: [_NAN, *held[1:]]))),
    "a log-prob of minus infinity": _damaged(
        _each(lambda member: _put_logprobs(member, lambda held: [-_INF, *held[1:]]))
    ),
    "a log-prob above 0": _damaged(_each(lambda member: _put_logprobs(member, lambda held: [0.5, *held[1:]]))),
    "gzip that was not asked for": _body(gzip.compress, ("Content-Encoding", "gzip")),
    "gzip bomb": _body(lambda body: _bomb(), ("Content-Encoding", "gzip")),
    "deflate bomb": _body(lambda body: _bomb()[10:-8], ("Content-Encoding", "deflate")),
    "a gigabyte, announced": _announced_gigabyte,
    "a body without end": _endless,
    "chunks without end": _endless_chunks,
    "headers without end": _endless_headers,
    "a reply to another prompt": _another_prompts,
    "the reply to an earlier attempt": _again,
    "no token": _without_token,
    "the token of another start": _other_token,
    "the request's token dropped": _without_the_requests_token,
    "100 Continue without end": _endless_informational,
    "slow-loris in the headers": _slowly(lambda whole: 1),
    "slow-loris in the body": _slowly(lambda whole: whole.index(b"\r\n\r\n") + 5),
    "black hole": _black_hole,
    "stalls in the body": _stalls_in_body,
    "two replies on one connection": _twice,
    "Set-Cookie": _right(("Set-Cookie", "session=abc; Path=/")),
    "100 Continue before the reply": _right(before=b"HTTP/1.1 100 Continue\r\n\r\n" * 3),
    "no Content-Length, closed at the end": _right(("Connection", "close")),
    "a chunk for each byte": _right(chunks=True),
}


_TIMES_OUT = frozenset({
    "slow-loris in the headers", "slow-loris in the body", "black hole", "stalls in the body", "100 Continue without end",
})  # fmt: skip
_HARMLESS = frozenset({
    "two replies on one connection", "Set-Cookie", "100 Continue before the reply", "no Content-Length, closed at the end",
    "a chunk for each byte",
})  # fmt: skip
LATE = Fault(name="the reply to an earlier attempt", apply=_late)
"""Follows `the reply to an earlier attempt`, which alone is a 503."""
KINDS = tuple(
    Fault(name=name, apply=apply, times_out=name in _TIMES_OUT, is_harmless=name in _HARMLESS)
    for name, apply in _APPLY.items()
)


NEED_TOKENS = frozenset({"no token", "the token of another start", "the request's token dropped"})
"""Kinds that plain vLLM cannot have."""


async def other_start(call: Call) -> None:
    """Another start of the server gets the request, and does not know its token."""
    token = next(line for line in call.head.split(b"\r\n") if line.lower().startswith(LEASE_HEADER.encode()))
    call.head = call.head.replace(token, LEASE_HEADER.encode() + b": " + b"f" * 32)
    reply = await call.forward()
    await call.send(http(reply.body, status=reply.status, headers=reply.headers))


OTHER_START = Fault(name="another start of the server", apply=other_start)
