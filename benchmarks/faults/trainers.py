"""Two or more trainers, and clients that are none, at one server: the row "two trainers on one server".

    python -m benchmarks.faults.trainers --count 2000

`ServerGuard` stands before an application that knows whose weights it holds, and its clock is moved by hand, so that an hour
of sleep costs nothing. Each injection is one of the `KINDS`, at random instants, and is followed by the same questions: may
exactly one trainer use the server, was every other one told who that is, and did no trainer ever get a completion of another
one's weights for its own? The last is asked of every completion of every injection.

Left out: processes, sockets and vLLM, which tests/test_server_guard.py has, a few times, since they take seconds.
"""

import argparse
import asyncio
import collections
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.faults.outcome import Injection
from ludic.inference.server.server_guard import ServerGuard
from ludic.inference.wire import LEASE_HEADER, LEASE_S, PATH, TRAINER_PATH

ROW = "two trainers on one server"
CONTROL = ("/pause", "/resume", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
           "/finish_weight_update", "/collective_rpc", "/sleep", "/wake_up", "/reset_prefix_cache")  # fmt: skip
GENERATION = (PATH, "/v1/completions")


class PromiseBroken(AssertionError):
    """What went wrong, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    status: int
    body: dict[str, Any]

    @property
    def message(self) -> str:
        return str(self.body.get("error", {}).get("message", ""))


class World:
    """A guarded server, whose answers say whose weights they come from, and a clock."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = rng.uniform(0, 1e6)
        self.guard = ServerGuard(self._app, clock=lambda: self.now)
        self.weights = "base"
        self.running = asyncio.Event()
        self.hold: asyncio.Event | None = None
        """Generation ends when it is set."""

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        path = scope["path"]
        answer: dict[str, Any] = {}
        if path in GENERATION:
            before = self.weights
            self.running.set()
            if self.hold is not None:
                await self.hold.wait()
            answer = {"weights": [before, self.weights]}
        elif path in CONTROL:
            named = [value.decode() for name, value in scope["headers"] if name == LEASE_HEADER.encode()]
            self.weights = named[0] if named else "somebody's"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, by: str | None) -> Reply:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(body or {}).encode()}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [] if by is None else [(LEASE_HEADER.encode(), by.encode())]
        await self.guard({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
        return Reply(status=sent[0]["status"], body=json.loads(sent[1]["body"]))

    def pass_time(self, low: float, high: float) -> None:
        self.now += self.rng.uniform(low, high)


class Trainer:
    """One that does what a run does: claim, push its weights, generate, keep the lease."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.token: str | None = None
        self.identity = {
            "host": f"node-{name}",
            "pid": world.rng.randrange(1, 2**22),
            "user": name,
            "out_dir": f"runs/{name}",
        }
        self.pushed = False

    @property
    def lease(self) -> int:
        """The number of its lease."""
        assert self.token is not None
        return int(self.token.partition("-")[2])

    async def claim(self, *, takes_over: int | None = None) -> Reply:
        reply = await self.world.ask(
            "POST", TRAINER_PATH, {"identity": self.identity, "takes_over": takes_over}, by=self.token
        )
        if reply.status == 200:
            self.token = reply.body["token"]
        return reply

    async def release(self) -> Reply:
        return await self.world.ask("DELETE", TRAINER_PATH, by=self.token)

    async def control(self, path: str | None = None) -> Reply:
        return await self.world.ask("POST", path or self.world.rng.choice(CONTROL), by=self.token)

    async def push(self) -> Reply:
        self.pushed = True
        return await self.control("/update_weights")

    async def generate(self) -> Reply:
        """Raises PromiseBroken where the completion is accepted and comes from other weights than this trainer's."""
        reply = await self.world.ask("POST", self.world.rng.choice(GENERATION), by=self.token)
        if reply.status == 200 and self.pushed and set(reply.body["weights"]) != {self.token}:
            raise PromiseBroken("a trainer got a completion of another one's weights for its own")
        return reply

    async def start(self, *, takes_over: int | None = None) -> None:
        _expect("a free server was refused", (await self.claim(takes_over=takes_over)).status == 200)
        _expect("the holder could not push its weights", (await self.push()).status == 200)
        _expect("the holder could not generate", (await self.generate()).status == 200)

    async def work(self) -> None:
        """Some requests, each within the lease of the one before."""
        for _ in range(self.world.rng.randrange(1, 6)):
            self.world.pass_time(0.0, LEASE_S - 1e-3)
            reply = await self.world.rng.choice((self.claim, self.push, self.generate))()
            _expect("the holder was refused", reply.status == 200)


def _expect(broken: str, kept: bool) -> None:
    if not kept:
        raise PromiseBroken(broken)


async def _is_shut_out(stranger: Trainer, holder: Trainer) -> str:
    """Whatever the stranger asks, it is refused with who the holder is; and the holder goes on."""
    asks: list[Callable[[], Awaitable[Reply]]] = [stranger.claim, stranger.control]
    if stranger.token is not None:  # without one it may generate, as an evaluation; a run does not before its claim
        asks.append(stranger.generate)
    stranger.world.rng.shuffle(asks)
    for ask in asks:
        reply = await ask()
        _expect("a second trainer was let in", reply.status == 409)
        named = f"{holder.identity['user']}@{holder.identity['host']}, process {holder.identity['pid']}"
        _expect("the refusal does not say who has the server", named in reply.message)
    await holder.work()
    return "refused, with the first one's identity"


# --- the faults -------------------------------------------------------------------------------------------------------


async def second_arrives(world: World) -> str:
    """A second trainer at a server whose trainer lives."""
    first, second = Trainer(world, "ann"), Trainer(world, "ben")
    await first.start()
    await first.work()
    world.pass_time(0.0, LEASE_S - 1e-3)
    return await _is_shut_out(second, first)


async def both_at_once(world: World) -> str:
    """Several trainers claim a free server in the same instant."""
    trainers = [Trainer(world, name) for name in ("ann", "ben", "cem", "dee")[: world.rng.randrange(2, 5)]]
    replies = await asyncio.gather(*(trainer.claim() for trainer in trainers))
    winners = [trainer for trainer, reply in zip(trainers, replies, strict=True) if reply.status == 200]
    _expect("more than one trainer got the server, or none", len(winners) == 1)
    await winners[0].start()
    for trainer in trainers:
        if trainer is not winners[0]:
            await _is_shut_out(trainer, winners[0])
    return "one has it, the others are refused with its identity"


async def first_sleeps(world: World) -> str:
    """The first trainer is stopped for longer than its lease, a second takes the server, the first one wakes up."""
    first, second = Trainer(world, "ann"), Trainer(world, "ben")
    await first.start()
    world.pass_time(LEASE_S, 100 * LEASE_S)
    await second.start()
    await second.work()
    await _is_shut_out(first, second)
    if world.rng.random() < 0.5:  # nor when the second has gone
        await second.release()
    else:
        world.pass_time(LEASE_S, 100 * LEASE_S)
    for ask in (first.claim, first.control, first.generate):
        reply = await ask()
        _expect("a trainer that lost its server got it back", reply.status == 409)
        _expect("it was not told to whom", "ben@node-ben" in reply.message)
    return "the one that slept is refused by name, for good"


async def first_sleeps_mid_generation(world: World) -> str:
    """As above, with completions of the first one still being generated when the second pushes its weights."""
    first, second = Trainer(world, "ann"), Trainer(world, "ben")
    await first.start()
    world.hold = asyncio.Event()
    world.running.clear()
    late = [asyncio.create_task(first.generate()) for _ in range(world.rng.randrange(1, 5))]
    await world.running.wait()
    held, world.hold = world.hold, None
    world.pass_time(LEASE_S, 10 * LEASE_S)
    await second.start()
    held.set()
    for reply in await asyncio.gather(*late):
        _expect("a completion of half another one's weights was delivered", reply.status == 409)
    await second.work()
    return "its completions are refused at their end"


async def first_is_late(world: World) -> str:
    """The first trainer is stopped for longer than its lease, and nobody came."""
    first, second = Trainer(world, "ann"), Trainer(world, "ben")
    await first.start()
    world.pass_time(LEASE_S, 100 * LEASE_S)
    _expect("a trainer lost a server that nobody wanted", (await first.generate()).status == 200)
    return await _is_shut_out(second, first)


async def first_is_dead(world: World) -> str:
    """The first trainer was killed; its successor names it and need not wait, and nobody else gets in that way."""
    first, second, third = Trainer(world, "ann"), Trainer(world, "ben"), Trainer(world, "cem")
    await first.start()
    world.pass_time(0.0, LEASE_S - 1e-3)
    wrong = await third.claim(takes_over=first.lease + world.rng.choice((-1, 1)))
    _expect("a trainer took the server over from one that did not have it", wrong.status == 409)
    await second.start(takes_over=first.lease)
    late = await third.claim(takes_over=first.lease)
    _expect("the server was taken over a second time", late.status == 409)
    await _is_shut_out(first, second)
    return "taken over at once, by the one that names it"


async def unleased_control(world: World) -> str:
    """A script without a lease pauses or changes the server of a trainer."""
    first = Trainer(world, "ann")
    await first.start()
    world.pass_time(0.0, LEASE_S - 1e-3)
    reply = await world.ask(world.rng.choice(("POST", "PUT", "DELETE")), world.rng.choice(CONTROL), by=None)
    _expect(
        "a client without a lease changed the server of a trainer",
        reply.status == 409 and "ann@node-ann" in reply.message,
    )
    await first.work()
    return "refused, with the first one's identity"


async def unleased_control_while_asleep(world: World) -> str:
    """The same after the trainer was silent for longer than its lease: it must not go on as if nothing had been."""
    first = Trainer(world, "ann")
    await first.start()
    world.pass_time(LEASE_S, 100 * LEASE_S)
    reply = await world.ask("POST", world.rng.choice(CONTROL), by=None)
    _expect("a free server was refused", reply.status == 200)
    for ask in (first.generate, first.control, first.claim):
        told = await ask()
        _expect("a trainer went on with weights that somebody changed", told.status == 409)
        _expect("it was not told why", "a client without a lease" in told.message)
    return "the trainer is told that its server was changed"


async def clock_jumps(world: World) -> str:
    """The wall clock of the server's machine jumps, while the lease lives, by the clock that the server has."""
    world.guard = ServerGuard(world._app)
    first, second = Trainer(world, "ann"), Trainer(world, "ben")
    await first.start()
    jumped = time.time() + world.rng.choice((-1, 1)) * 10 ** world.rng.uniform(0, 9)
    with mock.patch.object(time, "time", lambda: jumped):
        return await _is_shut_out(second, first)


async def evaluation(world: World) -> str:
    """An evaluation, which has no lease, beside the trainer: it may generate, and disturbs nothing."""
    first = Trainer(world, "ann")
    await first.start()
    for path in (*GENERATION, "/tokenize"):
        _expect("an evaluation was refused", (await world.ask("POST", path, by=None)).status == 200)
    await first.work()
    return "both are served"


async def server_restarts(world: World) -> str:
    """The server is started again, and perhaps another trainer comes first: the trainer must not take it for the one it had."""
    first, second = Trainer(world, "ann"), Trainer(world, "ben")
    await first.start()
    world.guard, world.weights = ServerGuard(world._app, clock=lambda: world.now), "base"
    if world.rng.random() < 0.5:
        await second.start()
    for ask in (first.generate, first.control, first.release, first.claim):
        reply = await ask()
        _expect("a trainer went on with a server that was started again", reply.status == 410)
        _expect("it was not told that it was started again", "started again" in reply.message)
    first.token = None
    if second.token is not None:
        return await _is_shut_out(first, second)
    await first.start()
    return "the trainer is told, and claims it anew"


async def claim_unanswered(world: World) -> str:
    """The answer to a claim is lost on its way: the trainer must not be kept out of the server by its own lease."""
    first, second = Trainer(world, "ann"), Trainer(world, "ben")
    _expect("a free server was refused", (await first.claim()).status == 200)
    first.token = None
    world.pass_time(0.0, LEASE_S - 1e-3)
    await first.start()
    return await _is_shut_out(second, first)


KINDS: dict[str, Callable[[World], Awaitable[str]]] = {
    "a second trainer arrives": second_arrives,
    "several claim at once": both_at_once,
    "the first sleeps through its lease, a second comes": first_sleeps,
    "the same, with completions on their way": first_sleeps_mid_generation,
    "the first sleeps through its lease, nobody comes": first_is_late,
    "the first was killed, its successor comes": first_is_dead,
    "a client without a lease controls the server": unleased_control,
    "the same, while the first sleeps": unleased_control_while_asleep,
    "the wall clock jumps": clock_jumps,
    "an evaluation beside the trainer": evaluation,
    "the server is started again": server_restarts,
    "the answer to a claim is lost": claim_unanswered,
}


def inject(count: int, *, seed: int, folder: Path | None = None) -> list[Injection]:
    """`count` injections, the kinds in turn. Nothing is written to `folder`."""
    return asyncio.run(_inject(count, random.Random(seed)))


async def _inject(count: int, rng: random.Random) -> list[Injection]:
    injections = []
    for number in range(count):
        fault, kind = list(KINDS.items())[number % len(KINDS)]
        try:
            outcome, ok = await kind(World(rng)), True
        except PromiseBroken as error:
            outcome, ok = str(error), False
        injections.append(Injection(row=ROW, fault=fault, outcome=outcome, ok=ok))
    return injections


def main() -> int:
    parser = argparse.ArgumentParser(description="two trainers on one server, many times")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    injections = inject(args.count, seed=args.seed)
    for (fault, outcome, ok), count in collections.Counter(
        (one.fault, one.outcome, one.ok) for one in injections
    ).items():
        sys.stdout.write(f"{count:6d}  {'ok' if ok else 'BROKEN':6}  {fault}: {outcome}\n")
    broken = sum(not one.ok for one in injections)
    sys.stdout.write(f"{len(injections)} injections, {broken} broken promises, {time.monotonic() - started:.1f} s\n")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
