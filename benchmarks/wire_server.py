"""A server that speaks the wire of a generation and computes nothing: for load and for faults.

    python -m benchmarks.wire_server --port 0

Each completion follows from the prompt, the request's id and the member alone (`drawn`), so that whoever has a completion can
say to which request it belongs. It is a bare asyncio protocol, to be faster than any client; it checks nothing.
Left out: all routes but the two that generate and the question for the protocol.
"""

import argparse
import array
import asyncio
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any, cast

from ludic.inference.wire import (
    COMPLETIONS_PATH,
    LEASE_HEADER,
    PATH,
    PROTOCOL,
    Generated,
    GenerateRequest,
    encode_reply,
)

FIRST_BYTE = 5
"""Token ids are bytes from here on, as in the tokenizer of the tiny test models: completions decode to some text."""
STOP = 1
VOCAB_SIZE = FIRST_BYTE + 256
TOKEN = "0123456789abcdef0123456789abcdef"
"""Of its one start, and of callers without a lease. It refuses every other, as a server that was started again does."""


def drawn(prompt: Sequence[int], request_id: str, member: int, max_tokens: int) -> Generated:
    """The completion of one member: 1 to `max_tokens` tokens, and log-probs that are whole 64ths."""
    seed = array.array("q", prompt).tobytes() + f"{request_id}/{member}".encode()
    count = 1 + int.from_bytes(hashlib.blake2b(seed, digest_size=4).digest(), "little") % max_tokens
    raw = hashlib.shake_128(seed).digest(count)
    token_ids = [FIRST_BYTE + byte for byte in raw]
    stops = count < max_tokens
    if stops:
        token_ids[-1] = STOP
    return Generated(
        token_ids=token_ids, logprobs=[byte / -64 for byte in raw], finish_reason="stop" if stops else "length"
    )


def answer(path: bytes, body: bytes, *, by_prompt: bool = False) -> bytes:
    """The body of a reply."""
    if path == PATH.encode() and not body:
        return json.dumps({"protocol": PROTOCOL}).encode()
    fields: dict[str, Any] = json.loads(body)
    prompt = fields["prompt" if path == COMPLETIONS_PATH.encode() else "prompt_token_ids"]
    name = "" if by_prompt else fields["request_id"]
    group = [drawn(prompt, name, member, fields["max_tokens"]) for member in range(fields["n"])]
    if "prompt" not in fields:
        return encode_reply(group, GenerateRequest(**fields))
    choices = [
        {
            "index": member,
            "text": "",
            "logprobs": None if fields.get("logprobs") is None else {"token_logprobs": one.logprobs},
            "finish_reason": one.finish_reason,
            "token_ids": one.token_ids,
            "prompt_token_ids": prompt,
        }
        for member, one in enumerate(group)
    ]
    return json.dumps({"id": f"cmpl-{fields['request_id']}", "choices": choices}).encode()


class WireProtocol(asyncio.Protocol):
    """One connection."""

    def __init__(self, think_s: float, by_prompt: bool) -> None:
        self._think_s, self._by_prompt = think_s, by_prompt
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end])
            _, found, rest = head.lower().partition(b"content-length:")
            length = int(rest.partition(b"\r\n")[0]) if found else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            reply = self._reply(head, body)
            asyncio.get_running_loop().call_later(
                self._think_s, self._write, reply, b"connection: close" in head.lower()
            )

    def _reply(self, head: bytes, body: bytes) -> bytes:
        _, found, rest = head.lower().partition(LEASE_HEADER.encode() + b": ")
        token = rest.partition(b"\r\n")[0]
        if found and token != TOKEN.encode():
            return b"HTTP/1.1 410 Gone\r\nContent-Length: 28\r\n\r\nthe server was started again"
        content = answer(head.split(b" ", 2)[1], body, by_prompt=self._by_prompt)
        repeated = b"%b: %b\r\n" % (LEASE_HEADER.encode(), token) if found else b""
        return (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
            % (repeated, len(content))
        ) + content

    def _write(self, reply: bytes, then_close: bool) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(reply)
            if then_close:
                self._transport.close()


async def start(port: int = 0, *, think_s: float = 0.0, by_prompt: bool = False) -> tuple[asyncio.Server, str]:
    """The server in this process, and its address."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: WireProtocol(think_s, by_prompt), "127.0.0.1", port, backlog=4096)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def main(port: int, think_s: float, by_prompt: bool) -> None:
    server, url = await start(port, think_s=think_s, by_prompt=by_prompt)
    sys.stdout.write(url + "\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0: a free one, which is printed (default: 0)")
    parser.add_argument("--think-s", type=float, default=0.0, help="seconds before each reply (default: 0)")
    parser.add_argument("--by-prompt", action="store_true", help="the request's id does not change the completions")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.port, arguments.think_s, arguments.by_prompt))
