"""The server's guard: whose server it is, which start of it, and how much may be sent to it.

First the middleware by hand, with a clock of its own; then, marked `vllm`, in front of vLLM's own routes, and on a socket.
"""

import asyncio
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from ludic.inference import vllm_server
from ludic.inference.server import server_guard
from ludic.inference.server.generate_route import MAX_BODY_BYTES, request_path
from ludic.inference.server.server_guard import (
    GENERATION_PATHS,
    HARMLESS_PATHS,
    LOOKUP_PATHS,
    MAX_OTHER_BODY_BYTES,
    MAX_TRAINER_BODY_BYTES,
    ServerGuard,
)
from ludic.inference.server.trainer_lease import MAX_LOST, Holder, NotHolderError, TrainerLease
from ludic.inference.wire import LEASE_HEADER, LEASE_S, PATH, PROTOCOL, TRAINER_PATH
from ludic.storage.identity import Identity, describe

if TYPE_CHECKING:
    from ludic.inference.client.server_process import ServerProcess

ANN: Identity = {
    "host": "node-3",
    "pid": 812,
    "pid_started": 99.5,
    "user": "ann",
    "out_dir": "runs/a",
    "since": "12:00",
}
BEN: Identity = {"host": "node-4", "pid": 90, "pid_started": 3.0, "user": "ben", "out_dir": "runs/b", "since": "13:00"}
CEM: Identity = {"host": "node-5", "pid": 91}

# What vLLM 0.26 to 0.33 serve that is not a question.
CONTROL_PATHS = (
    "/pause", "/resume", "/abort_requests", "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine",
    "/start_weight_update", "/start_draft_weight_update", "/update_weights", "/finish_weight_update",
    "/update_weight_version", "/weight_checker", "/collective_rpc", "/sleep", "/wake_up", "/release_kv_cache_memory",
    "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/scale_elastic_ep", "/is_scaling_elastic_ep",
    "/fault_tolerance/apply", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/stop_profile",
    "/inference/v1/abort_requests", "/v1/responses/r-1/cancel", "/invocations", "/adapters", "/a-route-of-next-year",
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- the lease --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lease(clock: Clock) -> TrainerLease:
    """Lease 1 is Ann's."""
    lease = TrainerLease(clock)
    assert lease.claim(ANN).lease == 1
    return lease


def test_a_second_trainer_is_refused_with_who_the_first_one_is(lease: TrainerLease, clock: Clock) -> None:
    clock.now += 7
    with pytest.raises(NotHolderError) as refusal:
        lease.claim(BEN)
    told = "belongs to the trainer ann@node-3, process 812, since 12:00, writing runs/a (last seen 7 s ago)"
    assert told in str(refusal.value)
    assert refusal.value.holder == Holder(lease=1, identity=ANN, seen=1000.0)


def test_a_lease_ends_a_minute_after_it_was_last_kept_and_not_before(lease: TrainerLease, clock: Clock) -> None:
    for _ in range(5):
        clock.now += LEASE_S - 0.001
        lease.keep(1)
    clock.now += LEASE_S - 0.001
    with pytest.raises(NotHolderError):
        lease.claim(BEN)
    clock.now += 0.001
    assert lease.holder() is None
    assert lease.claim(BEN).lease == 2


def test_a_claim_that_is_made_again_keeps_the_lease_as_its_answer_may_have_been_lost(
    lease: TrainerLease, clock: Clock
) -> None:
    clock.now += LEASE_S - 1
    assert lease.claim(ANN).lease == 1
    clock.now += LEASE_S - 1
    assert lease.holder() is not None


def test_a_dead_trainer_is_taken_over_at_once_and_only_by_its_own_lease(lease: TrainerLease) -> None:
    with pytest.raises(NotHolderError):
        lease.claim(BEN, takes_over=2)
    assert lease.claim(BEN, takes_over=1).lease == 2
    with pytest.raises(NotHolderError, match="ben@node-4"):
        lease.claim(CEM, takes_over=1)


def test_a_trainer_that_was_replaced_never_gets_the_server_back(lease: TrainerLease, clock: Clock) -> None:
    clock.now += LEASE_S
    lease.claim(BEN)
    lease.release(2)
    for ask in (lease.keep, lease.release):
        with pytest.raises(NotHolderError, match="lost the server to the trainer ben@node-4, process 90"):
            ask(1)
    assert lease.claim(CEM).lease == 3


def test_a_trainer_that_is_late_still_has_its_server_where_nobody_changed_it(lease: TrainerLease, clock: Clock) -> None:
    clock.now += 3600
    assert lease.keep(1).identity == ANN
    with pytest.raises(NotHolderError):
        lease.claim(BEN)


@pytest.mark.parametrize("by", [None, BEN])
def test_a_trainer_that_is_late_learns_that_somebody_changed_its_server(
    lease: TrainerLease, clock: Clock, by: Identity | None
) -> None:
    clock.now += LEASE_S
    if by is None:
        lease.change()
    else:
        lease.claim(by)
    told = "a client without a lease" if by is None else "the trainer ben@node-4"
    with pytest.raises(NotHolderError, match=f"this trainer lost the server to {told}"):
        lease.keep(1)


def test_who_never_claimed_a_server_that_is_free_may_use_it_and_gets_no_lease_by_that(clock: Clock) -> None:
    lease = TrainerLease(clock)
    lease.change()
    assert lease.holder() is None
    lease.claim(ANN)
    with pytest.raises(NotHolderError):
        lease.change()


def test_a_server_that_was_given_back_is_free_at_once(lease: TrainerLease) -> None:
    lease.release(1)
    assert lease.holder() is None and lease.claim(BEN).lease == 2
    for ended in (1, 3):
        with pytest.raises(NotHolderError, match="this lease was given back, or lost long ago"):
            lease.keep(ended)


def test_the_trainers_that_are_remembered_do_not_grow_without_end(clock: Clock) -> None:
    lease = TrainerLease(clock)
    for number in range(2 * MAX_LOST):
        lease.claim({"pid": number})
        clock.now += LEASE_S
    assert len(lease._lost) == MAX_LOST
    with pytest.raises(NotHolderError, match="lost long ago"):
        lease.keep(1)


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lease = TrainerLease()
    lease.claim(ANN)
    now = time.time()
    for jump in (86400.0, -86400.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        holder = lease.holder()
        assert holder is not None and 0 <= lease.seconds_since_seen(holder) < LEASE_S


@given(
    st.dictionaries(
        st.sampled_from(sorted(ANN)), st.one_of(st.none(), st.text(max_size=300), st.integers(), st.floats())
    )
)
def test_whatever_a_trainer_says_of_itself_is_told_on_one_line_that_no_terminal_obeys(identity: dict[str, Any]) -> None:
    name = describe(identity)
    assert name.isprintable() and len(name) < 5 * 2200


# --- the middleware ---------------------------------------------------------------------------------------------------


class Server:
    """The guard before an application that answers 200 to everything, and what came of a request."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.guard = ServerGuard(self.app, clock=clock or Clock())
        self.reached: list[tuple[str, bytes]] = []
        self.before_answer: asyncio.Event | None = None
        self.is_in_app = asyncio.Event()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b"" if scope["type"] == "websocket" else (await receive())["body"]
        self.reached.append((scope["path"], body))
        self.is_in_app.set()
        if self.before_answer is not None:
            await self.before_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-of-the-app", b"1")]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
        messages: Sequence[dict[str, Any]] | None = None,
        root: str = "",
        kind: str = "http",
    ) -> SimpleNamespace:
        sent: list[Any] = []
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        left = list(messages or [{"type": "http.request", "body": raw}])

        async def receive() -> dict[str, Any]:
            if not left:
                await asyncio.Event().wait()
            return left.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        sent_token = [] if token is None else [(LEASE_HEADER.encode(), token.encode())]
        scope = {"type": kind, "method": method, "path": path, "headers": [*headers, *sent_token], "root_path": root}
        await self.guard(scope, receive, send)
        if not sent:
            return SimpleNamespace(status=0, left=len(left))
        if kind == "websocket":
            return SimpleNamespace(status=sent[0].get("code", sent[0].get("status")), reason=sent[0].get("reason"))
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        return SimpleNamespace(
            status=sent[0]["status"],
            headers=sent[0]["headers"],
            answer=json.loads(sent[1]["body"]),
            left=len(left),
        )

    async def claim(self, identity: Any, **more: Any) -> SimpleNamespace:
        return await self.ask("POST", TRAINER_PATH, {"identity": identity, **more})

    async def lease_to(self, identity: Identity, **more: Any) -> str:
        """The token of a new lease."""
        return str((await self.claim(identity, **more)).answer["token"])


@pytest.fixture
def server(clock: Clock) -> Server:
    return Server(clock)


async def test_every_reply_repeats_the_token_of_its_request_and_a_start_knows_no_token_of_another(
    server: Server,
) -> None:
    first = await server.lease_to(ANN)
    asks: list[tuple[str, str, object]] = [
        ("GET", "/health", None),
        ("POST", "/v1/completions", {}),
        ("POST", "/pause", None),
        ("GET", TRAINER_PATH, None),
    ]
    for token in (first, server.guard.start):
        for method, path, body in asks:
            answer = await server.ask(method, path, body, token=token)
            is_refused = path == "/pause" and token != first
            assert answer.status == (409 if is_refused else 200)
            assert is_refused or answer.headers.count((LEASE_HEADER.encode(), token.encode())) == 1
    assert (b"x-of-the-app", b"1") in (await server.ask("GET", "/health", token=first)).headers
    assert not any(name == LEASE_HEADER.encode() for name, _ in (await server.ask("GET", "/health")).headers)
    again = Server()
    for token in (first, server.guard.start):
        for method, path, body in (*asks, ("DELETE", TRAINER_PATH, None), ("POST", TRAINER_PATH, {"identity": ANN})):
            refused = await again.ask(method, path, body, token=token)
            assert refused.status == 410 and "was started again" in refused.answer["error"]["message"]
    assert again.reached == [] and again.guard.lease.holder() is None


async def test_the_trainers_route_speaks_as_its_contract_says(server: Server, clock: Clock) -> None:
    start = server.guard.start
    state = {"protocol": PROTOCOL, "token": start, "lease_s": 60.0}
    assert (await server.ask("GET", TRAINER_PATH)).answer == state | {"holder": None, "weights": None}
    leased = state | {"token": f"{start}-1"}
    assert (await server.claim(ANN, takes_over=None)).answer == leased
    assert (await server.ask("POST", TRAINER_PATH, {"identity": ANN}, token=f"{start}-1")).answer == leased
    clock.now += 2
    holder = {"lease": 1, "identity": ANN, "seconds_since_seen": 2.0}
    assert (await server.ask("GET", TRAINER_PATH)).answer == state | {"holder": holder, "weights": None}
    refused = await server.claim(BEN)
    assert (refused.status, refused.answer["holder"], refused.answer["error"]["code"]) == (409, holder, 409)
    assert "ann@node-3, process 812" in refused.answer["error"]["message"]
    kept = await server.ask("GET", TRAINER_PATH, token=f"{start}-1")
    assert kept.answer == leased | {"holder": holder | {"seconds_since_seen": 0.0}, "weights": None}
    assert (await server.claim(BEN, takes_over=1)).answer == state | {"token": f"{start}-2"}
    for method in ("GET", "POST", "PUT", "DELETE"):
        lost = await server.ask(method, TRAINER_PATH, {"identity": ANN}, token=f"{start}-1")
        assert (lost.status, lost.answer["holder"]["lease"]) == (409, 2)
    assert (await server.ask("DELETE", TRAINER_PATH)).status == 409
    assert (await server.ask("DELETE", TRAINER_PATH, token=f"{start}-2")).answer == state
    assert (await server.ask("GET", TRAINER_PATH)).answer == state | {"holder": None, "weights": None}
    assert (await server.ask("PATCH", TRAINER_PATH)).status == 405
    assert server.reached == []


async def weights(server: Server) -> Any:
    return (await server.ask("GET", TRAINER_PATH)).answer["weights"]


async def test_the_server_says_whose_weights_it_holds_also_when_their_trainer_has_left(server: Server) -> None:
    first = await server.lease_to(ANN)
    for path in ("/pause", "/init_weight_transfer_engine", "/resume"):
        await server.ask("POST", path, {}, token=first)
    await server.ask("POST", "/collective_rpc", {"method": "ludic_held_digests"}, token=first)
    assert await weights(server) is None  # those that it was started with
    for path in ("/start_weight_update", "/update_weights", "/finish_weight_update"):
        await server.ask("POST", path, {}, token=first)
        assert await weights(server) == {"proven": False, "identity": ANN}
    assert (await server.ask("PUT", TRAINER_PATH, {"policy_version": 37}, token=first)).status == 200
    said = await weights(server)
    assert (said["proven"], said["policy_version"], said["identity"]) == (True, 37, ANN)
    assert said["since"].endswith(" UTC")
    await server.ask("DELETE", TRAINER_PATH, token=first)
    await server.ask("POST", PATH, {})
    assert await weights(server) == said
    second = await server.lease_to(BEN)
    assert await weights(server) == said  # a claim changes nothing yet
    await server.ask("POST", "/update_weights", {}, token=second)
    assert await weights(server) == {"proven": False, "identity": BEN}


async def test_an_adapter_is_one_also_while_it_is_replaced(server: Server) -> None:
    first = await server.lease_to(ANN)
    await server.ask("PUT", TRAINER_PATH, {"policy_version": 1, "adapter": True}, token=first)
    assert (await weights(server))["adapter"] is True
    await server.ask("POST", "/collective_rpc", {"method": "ludic_receive_adapter"}, token=first)
    assert await weights(server) == {"proven": False, "identity": ANN, "adapter": True}


@pytest.mark.parametrize("path", ["/sleep", "/v1/load_lora_adapter", "/collective_rpc", "/a-route-of-next-year"])
async def test_after_a_request_that_may_have_changed_them_the_weights_are_not_known(server: Server, path: str) -> None:
    first = await server.lease_to(ANN)
    await server.ask("PUT", TRAINER_PATH, {"policy_version": 1}, token=first)
    await server.ask("DELETE", TRAINER_PATH, token=first)
    await server.ask("POST", path, {"method": "reload_weights"})
    assert await weights(server) == {"proven": False, "identity": {}}


async def test_nobody_else_says_whose_the_weights_are(server: Server) -> None:
    first = await server.lease_to(ANN)
    await server.ask("PUT", TRAINER_PATH, {"policy_version": 5}, token=first)
    said = await weights(server)
    for token in (None, server.guard.start):
        refused = await server.ask("PUT", TRAINER_PATH, {"policy_version": 6}, token=token)
        assert (refused.status, refused.answer["holder"]["identity"]) == (409, ANN)
    for version in (-1, 1.0, True, "1", None, 2**53):
        refused = await server.ask("PUT", TRAINER_PATH, {"policy_version": version}, token=first)
        assert (refused.status, "policy_version must be" in refused.answer["error"]["message"]) == (400, True)
    assert await weights(server) == said


@pytest.mark.parametrize("path", CONTROL_PATHS)
async def test_while_a_trainer_has_the_server_nobody_else_controls_it(server: Server, path: str) -> None:
    assert (await server.ask("POST", path, {})).status == 200
    lost = await server.lease_to(BEN)
    first = await server.lease_to(ANN, takes_over=1)
    for method in ("POST", "PUT", "DELETE", "PATCH", "WHATEVER"):
        for token in (None, server.guard.start, lost):
            refused = await server.ask(method, path, {"method": "ludic_begin"}, token=token)
            assert (refused.status, refused.answer["holder"]["identity"]) == (409, ANN)
    assert len(server.reached) == 1
    assert (await server.ask("POST", path, {}, token=first)).status == 200


SPELLINGS = (
    "//pause", "/pause/", "/./pause", "/tokenize/../pause", "/v1/completions/../../pause", "/PAUSE", "/tokenize/",
    "//tokenize", "/tokenize%2f..%2fpause", "/pause;x", "/pause\x00", "pause", "", "/", "/tokenize?", "/tokenize#",
)  # fmt: skip


@pytest.mark.parametrize("path", SPELLINGS)
async def test_no_other_spelling_of_a_path_is_a_way_round_the_guard(server: Server, path: str) -> None:
    await server.claim(ANN)
    assert (await server.ask("POST", path, {})).status == 409
    assert (await server.ask("POST", "/prefix" + path, {}, root="/prefix")).status == 409


@pytest.mark.parametrize(
    ("root", "path", "status"),
    [
        ("/p", "/p/tokenize", 200),
        ("/p", "/tokenize", 200),  # as the router has it
        ("/p", "/ptokenize", 409),
        ("/p", "/p/p/tokenize", 409),
        ("/p/", "/p/tokenize", 409),
        ("/tok", "/tokenize", 200),
        ("/tokenize", "/tokenize/pause", 409),
        ("/tokenize", "/tokenize", 409),
    ],
)
async def test_a_prefix_is_cut_off_as_the_router_does_it(server: Server, root: str, path: str, status: int) -> None:
    await server.claim(ANN)
    assert (await server.ask("POST", path, {}, root=root)).status == status


async def test_an_evaluation_generates_and_asks_while_a_trainer_has_the_server(server: Server) -> None:
    await server.claim(ANN)
    for path in sorted(HARMLESS_PATHS):
        assert (await server.ask("POST", path, {})).status == 200
    assert (await server.ask("POST", "/collective_rpc", {"method": "ludic_server_info", "args": []})).status == 200
    for body in (b"", b"[", b"[" * 100_000, b"[1]", b'"ludic_server_info"', b'{"method": ["ludic_server_info"]}',
                 b'{"method": "ludic_server_info", "method": "x"}'):  # fmt: skip
        assert (await server.ask("POST", "/collective_rpc", body)).status == 409
    for path in (*CONTROL_PATHS, "/is_paused", "/health"):
        assert (await server.ask("GET", path)).status == 200


@pytest.mark.parametrize("path", sorted(GENERATION_PATHS))
async def test_a_trainer_that_has_lost_the_server_generates_nothing_on_it(server: Server, path: str) -> None:
    lost = await server.lease_to(BEN)
    first = await server.lease_to(ANN, takes_over=1)
    refused = await server.ask("POST", path, {}, token=lost)
    assert refused.status == 409 and "ann@node-3" in refused.answer["error"]["message"]
    assert (await server.ask("POST", path, {}, token=first)).status == 200
    assert len(server.reached) == 1


async def test_a_second_trainer_may_look_before_it_claims_and_keeps_no_lease_by_it(
    server: Server, clock: Clock
) -> None:
    await server.claim(ANN)
    for _ in range(4):
        clock.now += LEASE_S / 3
        for path in sorted(LOOKUP_PATHS):
            assert (await server.ask("POST", path, {}, token=server.guard.start)).status == 200
    assert (await server.claim(BEN)).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", TRAINER_PATH), ("POST", "/tokenize"), ("POST", PATH), ("POST", "/pause")],
)
async def test_every_request_of_the_holder_keeps_its_lease(
    server: Server, clock: Clock, method: str, path: str
) -> None:
    first = await server.lease_to(ANN)
    for _ in range(4):
        clock.now += LEASE_S - 1
        assert (await server.ask(method, path, {}, token=first)).status == 200
    assert (await server.claim(BEN)).status == 409


@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/update_weights"])
async def test_what_a_trainer_asked_for_before_it_lost_the_server_does_not_reach_it_as_its_own(
    server: Server, clock: Clock, path: str
) -> None:
    first = await server.lease_to(ANN)
    server.before_answer = asyncio.Event()
    running = asyncio.create_task(server.ask("POST", path, {}, token=first))
    await server.is_in_app.wait()
    clock.now += LEASE_S
    assert (await server.claim(BEN)).status == 200
    server.before_answer.set()
    late = await running
    assert late.status == 409 and "lost the server to the trainer ben@node-4" in late.answer["error"]["message"]


async def test_a_long_generation_keeps_the_lease_when_it_ends(server: Server, clock: Clock) -> None:
    first = await server.lease_to(ANN)
    server.before_answer = asyncio.Event()
    running = asyncio.create_task(server.ask("POST", PATH, {}, token=first))
    await server.is_in_app.wait()
    clock.now += 10 * LEASE_S
    server.before_answer.set()
    assert (await running).status == 200
    assert (await server.claim(BEN)).status == 409


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"[" * 16_000, "not JSON"),
        ([1], "must be an object"),
        ({"identity": {}, "more": 1}, "must be an object with fields of"),
        ({"takes_over": 1}, "identity must be an object"),
        ({"identity": {f"f{i}": 1 for i in range(17)}}, "identity must be an object of at most 16"),
        ({"identity": {"host": ["a"]}}, r"identity\.host must be a string"),
        ({"identity": {"pid": True}}, r"identity\.pid must be a string"),
        (b'{"identity": {"pid": Infinity}}', r"identity\.pid must be a string"),
        ({"identity": {}, "takes_over": "1"}, "takes_over must be the number of a lease"),
        ({"identity": {}, "takes_over": True}, "takes_over must be the number of a lease"),
    ],
    ids=str,
)
async def test_a_claim_that_makes_no_sense_is_refused_with_its_reason(server: Server, body: object, said: str) -> None:
    refused = await server.ask("POST", TRAINER_PATH, body)
    assert refused.status == 400
    with pytest.raises(RuntimeError, match=said):
        raise RuntimeError(refused.answer["error"]["message"])
    assert server.guard.lease.holder() is None


async def test_a_token_is_given_once_and_is_one_that_a_server_may_have_given(server: Server) -> None:
    twice = [(name, server.guard.start.encode()) for name in (LEASE_HEADER.encode(), LEASE_HEADER.upper().encode())]
    assert (await server.ask("POST", PATH, {}, headers=twice)).status == 400
    start = server.guard.start
    for token in (
        "",
        "F1" * 16,
        "f1" * 15,
        "é" * 32,
        f"{start} ",
        f"{start}-",
        f"{start}-0",
        f"{start}-01",
        f"{start}-x",
    ):
        assert (await server.ask("POST", PATH, {}, token=token)).status == 400
    assert server.reached == []


async def test_a_web_page_never_changes_the_server(server: Server) -> None:
    page = [(b"origin", b"http://evil.example")]
    for path in (*CONTROL_PATHS, TRAINER_PATH):
        assert (await server.ask("POST", path, {}, headers=page)).status == 403
    assert (await server.ask("POST", "/v1/completions", {}, headers=page)).status == 200
    assert (await server.ask("GET", "/v1/models", headers=page)).status == 200
    assert (await server.ask("GET", "/control", kind="websocket", headers=page)).status == 1008


async def test_a_websocket_passes_where_it_cannot_change_the_server(server: Server) -> None:
    assert (await server.ask("GET", "/anything", kind="websocket")).status == 200
    await server.claim(ANN)
    closed = await server.ask("GET", "/anything", kind="websocket")
    assert closed.status == 1008 and "ann@node-3" in closed.reason
    assert (await server.ask("GET", "/v1/realtime", kind="websocket")).status == 200


async def test_what_is_neither_a_request_nor_a_websocket_passes(server: Server) -> None:
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    await ServerGuard(app)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert passed == ["lifespan"]


# --- bodies -----------------------------------------------------------------------------------------------------------


def in_pieces(size: int, pieces: int) -> list[dict[str, Any]]:
    each = [{"type": "http.request", "body": b"x" * (size // pieces), "more_body": True} for _ in range(pieces)]
    return [*each, {"type": "http.request", "body": b"x" * (size % pieces)}]


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        (PATH, MAX_BODY_BYTES),
        (TRAINER_PATH, MAX_TRAINER_BODY_BYTES),
        ("/v1/completions", MAX_OTHER_BODY_BYTES),
        ("/collective_rpc", MAX_OTHER_BODY_BYTES),
        ("/nowhere", MAX_OTHER_BODY_BYTES),
    ],
)
async def test_every_route_has_a_limit_in_bytes_that_came_whatever_was_announced(
    server: Server, path: str, limit: int
) -> None:
    announced = [(b"content-length", b"5")]
    fits = await server.ask("POST", path, headers=announced, messages=in_pieces(limit, 7))
    assert fits.status == (400 if path == TRAINER_PATH else 200)
    if path != TRAINER_PATH:
        assert server.reached == [(path, b"x" * limit)], "the route gets it whole"
    server.reached.clear()
    refused = await server.ask("POST", path, headers=announced, messages=in_pieces(2 * limit, 16))
    assert (refused.status, server.reached) == (413, [])
    assert f"larger than {limit} bytes" in refused.answer["error"]["message"]
    assert refused.left >= 7, "what comes after the limit is not read"
    assert (b"connection", b"close") in refused.headers


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
async def test_a_body_that_does_not_come_to_its_end_is_not_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(server_guard, "BODY_DEADLINE_S", 0.01)
    begun: list[dict[str, Any]] = [{"type": "http.request", "body": b"{", "more_body": True}]
    refused = await server.ask(method, "/v1/completions", messages=begun)
    assert (refused.status, server.reached) == (408, [])
    assert (b"connection", b"close") in refused.headers


async def test_a_body_that_drips_byte_by_byte_has_the_same_deadline(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_guard, "BODY_DEADLINE_S", 0.05)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/pause", "headers": []}
    await server.guard(scope, receive, send)
    assert sent[0]["status"] == 408


async def test_a_caller_that_leaves_within_its_body_gets_nothing_and_costs_nothing(server: Server) -> None:
    begun: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]
    assert (await server.ask("POST", PATH, messages=begun)).status == 0
    assert server.reached == []


async def test_the_route_hears_when_its_caller_leaves_later() -> None:
    heard: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])

    messages: list[dict[str, Any]] = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    await ServerGuard(app)(scope, receive, None)  # type: ignore[arg-type]
    assert heard == ["http.request", "http.disconnect"]


@settings(max_examples=200, deadline=None)
@given(
    method=st.sampled_from(["POST", "PUT", "DELETE", "PATCH"]),
    root=st.sampled_from(["", "/", "/p", "/p/", "/tokenize", "p"]),
    path=st.one_of(
        st.text(max_size=30),
        st.builds(
            "".join, st.lists(st.sampled_from(["/", "p", "tokenize", "pause", "v1", "completions", "..", "%2f"]))
        ),
    ),
)
async def test_whatever_reaches_a_route_unnamed_is_a_harmless_one(method: str, root: str, path: str) -> None:
    server = Server()
    await server.claim(ANN)
    answer = await server.ask(method, path, {}, root=root)
    below = request_path({"path": path, "root_path": root})
    assert answer.status in (200, 409, 400, 405)
    if server.reached:
        assert below in HARMLESS_PATHS and path in (below, root + below)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
CLAIM = st.fixed_dictionaries(
    {},
    optional={
        "identity": st.dictionaries(st.sampled_from(sorted(ANN)) | st.text(max_size=50), JSON, max_size=18) | JSON,
        "takes_over": st.sampled_from([1, 2]) | JSON,
    },
)


@settings(max_examples=150, deadline=None)
@given(
    body=st.binary(max_size=60)
    | CLAIM.map(lambda one: json.dumps(one).encode())
    | JSON.map(lambda one: json.dumps(one).encode()),
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT", ""]),
    path=st.sampled_from([TRAINER_PATH, "/collective_rpc", "/pause", PATH]),
    token=st.binary(max_size=20) | st.sampled_from([b"5e" * 16, b"f1" * 16, b"f1" * 16 + b"-1", b"f1" * 16 + b"-2"]),
)
async def test_whatever_is_sent_to_the_guard_is_answered(body: bytes, method: str, path: str, token: bytes) -> None:
    server = Server()
    server.guard.start = "f1" * 16
    await server.claim(ANN)
    answer = await server.ask(method, path, body, headers=[(LEASE_HEADER.encode(), token)])
    assert answer.status in (200, 400, 405, 409, 410)
    told = server.guard.lease.holder()
    assert told is None or (told.lease in (1, 2) and describe(told.identity).isprintable())


# --- before vLLM's own routes, without an engine ----------------------------------------------------------------------


@pytest.fixture
def vllm_app(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The application of vLLM as the server makes it, middlewares and all, with a key."""
    args = vllm_server.parse_arguments([])  # first: the variable changes what vLLM imports for good as its defaults
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv(vllm_server.KEY_HASHES_VARIABLE, json.dumps([vllm_server._fingerprint(b"the-key").hex()]))
    try:
        from vllm.entrypoints.launchers.app import build_app
    except ModuleNotFoundError:  # 0.26
        from vllm.entrypoints.openai.api_server import build_app
    return build_app(args, ("generate",))


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_every_route_of_vllm_that_may_change_the_server_is_refused_while_a_trainer_has_it(vllm_app: Any) -> None:
    from fastapi.testclient import TestClient

    client = TestClient(vllm_app, raise_server_exceptions=False, follow_redirects=False)
    key = {"Authorization": "Bearer the-key"}
    assert client.post(TRAINER_PATH, json={"identity": ANN}).status_code == 401
    claimed = client.post(TRAINER_PATH, json={"identity": ANN}, headers=key)
    assert claimed.status_code == 200
    routes = {
        (method, route.path)
        for route in vllm_app.routes
        for method in getattr(route, "methods", None) or ()
        if method not in ("GET", "HEAD", "OPTIONS")
    }
    controls = {path for _, path in routes} - HARMLESS_PATHS
    assert {"/pause", "/resume", "/update_weights", "/collective_rpc", "/sleep", "/abort_requests"} <= controls
    assert {"/tokenize", "/v1/completions", "/v1/chat/completions"} <= {path for _, path in routes}
    for method, path in sorted(routes):
        if path in controls:
            for spelling in (path, path + "/", "/" + path, path.replace("a", "%61"), path + "?mode=wait"):
                assert client.request(method, spelling, json={}, headers=key).status_code == 409, (method, spelling)
                assert client.request(method, spelling, json={}).status_code == 401
    # What has no engine behind it fails in vLLM, which shows that it was let through.
    for path in ("/tokenize", "/v1/completions"):
        assert client.post(path, json={"model": "m", "prompt": "x"}, headers=key).status_code == 500
    mine = key | {LEASE_HEADER: claimed.json()["token"]}
    for path in ("/pause", "/update_weights"):
        assert client.post(path, json={"update_info": {}}, headers=mine).status_code == 500


# --- on a socket ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_a_socket(host: str) -> Iterator[int]:
    """The key's check and the guard, as uvicorn serves them, before an application that answers 200; the port."""
    uvicorn = importlib.import_module("uvicorn")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    guarded = vllm_server.RequireApiKey(ServerGuard(app))
    with socket.socket() as sock:
        sock.bind((host, 0))
        config = uvicorn.Config(guarded, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=10)


def exchange(port: int, head: str, *, drip: float | None = None) -> bytes:
    """What comes back over a plain connection, to its end, for a POST whose body never ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"POST /pause HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
        answer = b""
        with contextlib.suppress(ConnectionError):  # it is closed while there is more to come
            while drip is not None:
                connection.sendall(b"1\r\nx\r\n" if drip else b"20000\r\n" + b"x" * 0x20000 + b"\r\n")
                time.sleep(drip)
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    answer += connection.recv(65536)
                    break
                connection.settimeout(20)
        connection.settimeout(20)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                answer += part
    return answer


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_a_body_without_an_end_is_answered_and_its_connection_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_guard, "BODY_DEADLINE_S", 0.3)
    monkeypatch.setenv(vllm_server.KEY_HASHES_VARIABLE, "[]")
    with on_a_socket("127.0.0.1") as port:
        assert b" 408 " in exchange(port, "Content-Length: 100\r\n").splitlines()[0]
        assert b" 408 " in exchange(port, "Transfer-Encoding: chunked\r\n", drip=0.02).splitlines()[0]
        monkeypatch.setattr(server_guard, "BODY_DEADLINE_S", 60.0)
        assert b" 413 " in exchange(port, "Transfer-Encoding: chunked\r\n", drip=0.0).splitlines()[0]
        assert requests.post(f"http://127.0.0.1:{port}/pause", timeout=20).status_code == 200


SIBLING = """
import http.client, json, sys
found = {}
for where in sys.argv[1:]:
    host, port, key = where.split(",")
    connection = http.client.HTTPConnection(host, int(port), timeout=3)
    try:
        connection.request("POST", "/pause", headers={"Authorization": "Bearer " + key} if key else {})
        found[where] = connection.getresponse().status
    except OSError as error:
        found[where] = type(error).__name__
print(json.dumps(found))
"""


@pytest.fixture
def neighbour() -> Iterator[tuple[str, list[str]]]:
    """Another network namespace, wired to this one: this machine's address as seen from there, and how to run there."""
    name, ours, theirs = f"ludic-{os.getpid()}", f"lu{os.getpid() % 10**7}a", f"lu{os.getpid() % 10**7}b"
    steps = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", ours, "type", "veth", "peer", "name", theirs],
        ["ip", "link", "set", theirs, "netns", name],
        ["ip", "addr", "add", "198.18.77.1/30", "dev", ours],
        ["ip", "link", "set", ours, "up"],
        ["ip", "-n", name, "addr", "add", "198.18.77.2/30", "dev", theirs],
        ["ip", "-n", name, "link", "set", theirs, "up"],
        ["ip", "-n", name, "link", "set", "lo", "up"],
    ]
    try:
        for step in steps:
            try:
                done = subprocess.run(step, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("there is no `ip` here to make a network namespace with")
            if done.returncode:
                pytest.skip(f"no network namespace can be made here: {done.stderr.strip() or ' '.join(step)}")
        yield "198.18.77.1", ["ip", "netns", "exec", name, sys.executable, "-c", SIBLING]
    finally:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["ip", "link", "del", ours], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_from_another_network_namespace_a_loopback_server_is_out_of_reach_and_an_open_one_wants_its_key(
    neighbour: tuple[str, list[str]], digit_server: "tuple[ServerProcess, Path]", monkeypatch: pytest.MonkeyPatch
) -> None:
    address, run = neighbour
    loopback = digit_server[0].base_url.rpartition(":")[2]
    monkeypatch.setenv(vllm_server.KEY_HASHES_VARIABLE, json.dumps([vllm_server._fingerprint(b"the-key").hex()]))
    with on_a_socket("0.0.0.0") as port:
        expected = {
            f"{address},{port},": 401,
            f"{address},{port},another-key": 401,
            f"{address},{port},the-key": 200,
            f"{address},{loopback},": "ConnectionRefusedError",
            f"127.0.0.1,{loopback},": "ConnectionRefusedError",  # it has a loopback of its own
        }
        found = subprocess.run([*run, *expected], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(found.stdout) == expected
    health = requests.get(f"{digit_server[0].base_url}/health", timeout=20)
    assert health.status_code == 200, "or what was refused proves nothing"


# --- two trainers at the real server ----------------------------------------------------------------------------------

TRAINER = """
import json, os, sys, time, urllib.error, urllib.request
base, token = sys.argv[1], None
def ask(path, body):
    global token
    headers = {"Content-Type": "application/json"} | ({"x-ludic-lease": token} if token else {})
    request = urllib.request.Request(base + path, json.dumps(body).encode(), headers)
    try:
        answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).read()
        token = token or json.loads(answer)["token"]
        return "200"
    except urllib.error.HTTPError as error:
        return str(error.code) + " " + json.load(error)["error"]["message"]
identity = {"host": "here", "pid": os.getpid(), "user": "ann"}
while True:
    print(ask("/ludic/v1/trainer", {"identity": identity}), flush=True)
    print(ask("/reset_prefix_cache", {}), flush=True)
    print(ask("/v1/completions", {"model": sys.stdin.readline().strip(), "prompt": [40], "max_tokens": 1}), flush=True)
"""


@pytest.mark.vllm
@pytest.mark.timeout(240)
def test_a_stopped_trainer_that_wakes_up_after_another_took_the_real_server_is_refused_by_name(
    digit_server: "tuple[ServerProcess, Path]",
) -> None:
    server, model = digit_server

    def post(path: str, body: object, *, token: str | None) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False
            headers = {} if token is None else {LEASE_HEADER: token}
            return session.post(f"{server.base_url}{path}", json=body, headers=headers, timeout=120)

    completion, second = {"model": str(model), "prompt": [40], "max_tokens": 1}, None
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAINER), server.base_url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as first:  # fmt: skip
        assert first.stdin is not None and first.stdout is not None
        try:
            first.stdin.write(f"{model}\n{model}\n")
            first.stdin.flush()
            assert [first.stdout.readline() for _ in range(3)] == ["200\n"] * 3
            assert [first.stdout.readline() for _ in range(3)] == ["200\n"] * 3
            refused = post(TRAINER_PATH, {"identity": BEN}, token=None)
            holder = refused.json()["holder"]
            assert refused.status_code == 409 and holder["identity"]["pid"] == first.pid
            for path in ("/pause", "/update_weights"):
                assert post(path, completion, token=None).status_code == 409
            assert post("/v1/completions", completion, token=None).status_code == 200

            first.send_signal(signal.SIGSTOP)
            claimed = post(TRAINER_PATH, {"identity": BEN, "takes_over": holder["lease"]}, token=None)
            assert claimed.status_code == 200
            second = claimed.json()["token"]
            assert post("/reset_prefix_cache", {}, token=second).status_code == 200
            assert post("/v1/completions", completion, token=second).status_code == 200
            first.send_signal(signal.SIGCONT)
            first.stdin.write(f"{model}\n{model}\n")
            first.stdin.flush()
            rest = [first.stdout.readline() for _ in range(6)]
            told = "409 this trainer lost the server to the trainer ben@node-4, process 90"
            awake = [line for line in rest if line != "200\n"]
            assert len(awake) >= 4 and all(line.startswith(told) for line in awake), rest
        finally:
            first.kill()
            with requests.Session() as session:
                session.delete(f"{server.base_url}{TRAINER_PATH}", headers={LEASE_HEADER: second}, timeout=60)


@pytest.mark.vllm
def test_the_real_server_stops_reading_a_body_that_is_too_large(digit_server: "tuple[ServerProcess, Path]") -> None:
    port = int(digit_server[0].base_url.rpartition(":")[2])
    assert b" 413 " in exchange(port, "Transfer-Encoding: chunked\r\n", drip=0.0).splitlines()[0]
