"""A proxy between the client and the server that breaks replies on purpose, on real sockets and at a chosen byte.

It reads a request whole, asks the server for the reply, and hands both to a fault, which may write any bytes to the client in
any order and at any pace, or none. Which attempt of which prompt meets which fault is planned beforehand, so that what
became of a fault is known to the prompt. Left out: TLS, requests without Content-Length, replies in chunks from the server.
"""

import asyncio
import collections
import contextlib
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Headers = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the server answered."""

    status: int
    headers: Headers
    """Without Content-Length, Connection and Transfer-Encoding, which belong to one connection."""
    body: bytes


@dataclass(slots=True, kw_only=True)
class Call:
    """One request on its way, as a fault sees it."""

    proxy: "FaultProxy"
    head: bytes
    body: bytes
    fields: dict[str, Any]
    """The request's JSON."""
    attempt: int
    """1 for the first time that this prompt was asked for."""
    writer: asyncio.StreamWriter
    reply: Reply | None = None
    """The server's, once `forward` was called."""

    @property
    def prompt(self) -> tuple[int, ...]:
        return prompt_of(self.fields)

    async def forward(self) -> Reply:
        self.reply = await self.proxy.ask(self.head, self.body)
        return self.reply

    async def send(self, data: bytes) -> bool:
        """Whether the client still took it."""
        self.writer.write(data)
        try:
            await self.writer.drain()
        except ConnectionError:
            return False
        return not self.writer.is_closing()

    def reset(self) -> None:
        """End the connection with RST instead of FIN, as a crashed machine or a firewall does."""
        sock: socket.socket | None = self.writer.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def hang(self) -> None:
        """Say nothing more until the client leaves."""
        while not self.writer.is_closing() and not self.proxy.at_eof(self.writer):
            await asyncio.sleep(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way in which the wire breaks."""

    name: str
    apply: Callable[[Call], Awaitable[None]]
    """Writes what the client gets; the connection is closed afterwards."""
    times_out: bool = False
    """Whether the client must wait for its own deadline to get rid of it."""
    is_harmless: bool = False
    """Whether the client may take the reply at once: it is odd, and whole and right."""


@dataclass(slots=True)
class FaultProxy:
    """Listens on a free port; `plan` says which faults the attempts of a prompt meet, the rest goes through untouched."""

    upstream_host: str
    upstream_port: int
    rng: random.Random = field(default_factory=random.Random)
    plan: dict[tuple[int, ...], list[Fault]] = field(default_factory=dict)
    """The faults of a prompt's first attempts, in order."""
    delivered: dict[tuple[int, ...], list[tuple[str, bytes]]] = field(default_factory=dict)
    """By prompt: request id and body of each reply that went through untouched."""
    attempts: collections.Counter[tuple[int, ...]] = field(default_factory=collections.Counter)
    num_cookies: int = 0
    """Requests with a Cookie header: the client must never send one."""
    kept: dict[tuple[int, ...], Reply] = field(default_factory=dict)
    """Replies that were held back, for the fault that gives them to a later attempt."""
    swapping: tuple[Reply, asyncio.Future[Reply]] | None = None
    """A reply whose request waits for another one to change replies with."""
    trap_url: str = ""
    """Where redirects point."""
    num_trapped: int = 0
    """Connections that came there: there must be none."""
    base_url: str = ""
    _readers: dict[asyncio.StreamWriter, asyncio.StreamReader] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _port: int = 0
    _listener: socket.socket | None = None

    async def ask(self, head: bytes, body: bytes) -> Reply:
        """The server's reply to these bytes, over a connection of its own."""
        reader, writer = await asyncio.open_connection(self.upstream_host, self.upstream_port, limit=2**26)
        try:
            writer.write(head + body)
            await writer.drain()
            status, headers = _parse_head(await reader.readuntil(b"\r\n\r\n"))
            length = int(dict((name.lower(), value) for name, value in headers).get("content-length", "0"))
            answer = await reader.readexactly(length)
        finally:
            writer.close()
        own = ("content-length", "connection", "transfer-encoding")
        return Reply(
            status=int(status.split()[1]),
            headers=[(name, value) for name, value in headers if name.lower() not in own],
            body=answer,
        )

    def at_eof(self, writer: asyncio.StreamWriter) -> bool:
        return self._readers[writer].at_eof()

    def listen(self) -> None:
        """On the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=4096)
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self._port}"
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def deafen(self) -> None:
        """Stop listening: whoever connects is refused. An asyncio.Server cannot, while connections are being accepted."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def refuse_connections(self, seconds: float) -> None:
        """Stop listening for a while."""
        if self._listener is not None:  # or another fault has it so
            self.deafen()
            await asyncio.sleep(seconds)
            self.listen()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):  # it has left again
            connection, _ = listener.accept()
            task = asyncio.create_task(self._adopt(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _adopt(self, connection: socket.socket) -> None:
        await self._serve(*await asyncio.open_connection(sock=connection, limit=2**26))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._readers[writer] = reader
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                _, headers = _parse_head(head)
                lowered = {name.lower(): value for name, value in headers}
                self.num_cookies += "cookie" in lowered
                body = await reader.readexactly(int(lowered.get("content-length", "0")))
                if not await self._answer(head, body, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has left, or the server has
        finally:
            del self._readers[writer]
            writer.close()

    async def _answer(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection may carry another request."""
        fields: dict[str, Any] = json.loads(body) if body else {}
        if "request_id" not in fields:  # no generation
            reply = await self.ask(head, body)
            writer.write(http(reply.body, status=reply.status, headers=reply.headers))
            return True
        prompt = prompt_of(fields)
        self.attempts[prompt] += 1
        call = Call(proxy=self, head=head, body=body, fields=fields, attempt=self.attempts[prompt], writer=writer)
        faults = self.plan.get(prompt, [])
        if call.attempt <= len(faults):
            await faults[call.attempt - 1].apply(call)
            return False
        reply = await call.forward()
        self.note_delivery(call, reply)
        return await call.send(http(reply.body, status=reply.status, headers=reply.headers))

    def note_delivery(self, call: Call, reply: Reply) -> None:
        self.delivered.setdefault(call.prompt, []).append((str(call.fields["request_id"]), reply.body))


@contextlib.asynccontextmanager
async def fault_proxy(upstream_url: str, *, rng: random.Random) -> AsyncIterator[FaultProxy]:
    """A proxy in front of `upstream_url` (`http://host:port`), and the trap that redirects point to."""
    host, _, port = upstream_url.removeprefix("http://").rpartition(":")
    proxy = FaultProxy(host, int(port), rng)

    async def trapped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.num_trapped += 1
        writer.close()

    trap = await asyncio.start_server(trapped, "127.0.0.1", 0)
    proxy.trap_url = f"http://127.0.0.1:{trap.sockets[0].getsockname()[1]}/stolen"
    proxy.listen()
    try:
        yield proxy
    finally:
        trap.close()
        proxy.deafen()
        for task in proxy._tasks:
            task.cancel()
        await asyncio.gather(*proxy._tasks, return_exceptions=True)


def prompt_of(fields: dict[str, Any]) -> tuple[int, ...]:
    """The prompt of a request's JSON, on either route."""
    return tuple(fields["prompt_token_ids"] if "prompt_token_ids" in fields else fields["prompt"])


def http(
    body: bytes,
    *,
    status: int = 200,
    headers: Sequence[tuple[str, str]] = (("Content-Type", "application/json"),),
    length: str | None = "",
) -> bytes:
    """A reply's bytes; `length` "" is the right Content-Length, None is no such header."""
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers)]
    if length is not None:
        lines.append(f"Content-Length: {length or len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def _parse_head(head: bytes) -> tuple[str, Headers]:
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    pairs = [line.partition(":") for line in lines]
    return first, [(name.strip(), value.strip()) for name, _, value in pairs]
