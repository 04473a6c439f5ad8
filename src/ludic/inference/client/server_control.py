"""Blocking calls to a vLLM server's control routes: health of the conversation, weights, digests, the probe's log-probs.

Generation goes through `vllm_client`; this is what must be said one thing at a time, mostly from the sync's own thread.
"""

import copy
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from ludic.inference.client.tls import TLSAdapter, causes, tls_context, tls_failure
from ludic.inference.weights.background import BackgroundCall
from ludic.inference.wire import ADAPTER_PATH, LEASE_HEADER, NEUTRAL_SAMPLING, TRAINER_PATH
from ludic.rollout.errors import (
    EngineError,
    RouteMissingError,
    ServerInUseError,
    ServerLostError,
    ServerMismatchError,
    ServerRestartedError,
    ServerUnauthorizedError,
    ServerUnreachableError,
)
from ludic.storage.inert import inert

TRANSFER_TIMEOUT_S = 300.0
"""For the calls that move or prove a whole set of weights; the sync around them has a deadline of its own."""
GRACE_S = 1.0
"""What a whole reply may take longer than the longest silence within it."""
REFUSALS: dict[int, type[EngineError]] = {
    401: ServerUnauthorizedError, 403: ServerUnauthorizedError, 404: RouteMissingError, 405: RouteMissingError,
    409: ServerInUseError, 410: ServerRestartedError,
}  # fmt: skip
"""By status, what an answer means; of any other from 400 to 499 it is an `EngineError`."""
WANTS_KEY = "it wants an API key; set LUDIC_API_KEY, or pass --api-key-file"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldDigests:
    """What one worker holds of the tensors that were agreed on, in their order, 16 hex digits each; "" where it cannot say."""

    in_memory: Sequence[str]
    packed: Sequence[str]
    """Of what packed layers multiply with, in the form that `digest.canonical` gives a tensor; a tied weight has both."""
    flushes: bool = False
    """`flush` of that form"""
    inexact: str = ""
    """A packed layer that cannot be read back exactly, "" for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IpcAnswer:
    """What the server's workers say of a transfer over CUDA IPC."""

    problem: str
    """Why it was not taken whole, "" where it was."""
    touched: bool
    """Whether weights may have been replaced."""
    workers: Sequence[HeldDigests]
    """What each holds afterwards; of a problem none."""


class ServerControl:
    """Blocking calls to a vLLM server's control routes, each with a deadline and the server's own text in its error.

    It has the four methods of vLLM's `VLLMWeightSyncClient` protocol, so vLLM's trainer-side engine drives it directly.

    Raises:
        ServerUnreachableError: nothing answers.
        ServerMismatchError: its certificate is not trusted, or it does not speak TLS.
        ServerLostError: no answer in time.
        ServerRestartedError: it was started again since it gave out `token`, or another server answers in its place.
        ServerInUseError: another trainer has the lease of the server.
        RouteMissingError: 404 or 405.
        ServerUnauthorizedError: 401 or 403.
        EngineError: any other refusal, with the server's text.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self.token: str | None = None
        """What the server gave to know its caller and its own start by (`wire.LEASE_HEADER`); None before, and of plain vLLM."""
        self.refusal: EngineError | None = None
        """Why the server last refused to take part in a transfer, for the thread that watches one which waits in NCCL for
        a server that has already said no."""
        self._given_up = threading.Event()
        # One session, whose connections stay open between calls; each thread that calls at the same time gets its own.
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy variable must not stand between the trainer and its own server
        self._session.mount("http://", HTTPAdapter(pool_maxsize=4))
        if self.base_url.startswith("https://"):
            self._session.mount("https://", TLSAdapter(tls_context(), pool_maxsize=4))
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    @property
    def has_lease(self) -> bool:
        return self.token is not None and "-" in self.token

    def branch(self) -> "ServerControl":
        """Another one with the same connections, whose caller can be cut off by itself: one conversation."""
        other = copy.copy(self)
        other.refusal, other._given_up = None, threading.Event()
        return other

    def give_up(self) -> None:
        """Refuse all further calls: a thread that was left behind must never speak to the server again."""
        self._given_up.set()

    def check_wanted(self) -> None:
        """Raise ServerLostError after `give_up`."""
        if self._given_up.is_set():
            raise ServerLostError("the weight sync that this belongs to was given up")

    def close(self) -> None:
        """Close idle connections; a later call opens new ones."""
        self._session.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        json_body: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Call one route and return its decoded JSON (None for an empty answer)."""
        self.check_wanted()
        where, token = f"{path} on {self.base_url}", self.token
        deadline_s = self.timeout_s if timeout_s is None else timeout_s
        request: dict[str, Any] = {
            "method": method,
            "url": f"{self.base_url}{path}",
            "json": json_body,
            "params": params,
        }
        request |= {"headers": {LEASE_HEADER: token}, "timeout": (min(10.0, deadline_s), deadline_s)}
        try:
            # In the background: a reply that comes a byte at a time would never be late by the deadline between two bytes.
            response = BackgroundCall(lambda: self._send(request)).result(deadline_s + GRACE_S)
        except (requests.Timeout, TimeoutError) as error:
            raise ServerLostError(f"{where} did not answer within {deadline_s:g} s") from error
        except requests.ConnectionError as error:
            if problem := tls_failure(error):
                raise ServerMismatchError(f"{self.base_url} cannot be used: {problem}") from error
            raise ServerUnreachableError(
                f"nothing answers at {self.base_url} ({path}): {error.__class__.__name__}"
            ) from error
        except requests.RequestException as error:
            raise ServerLostError(f"{where} gave a broken reply: {error.__class__.__name__}") from error
        status = response.status_code
        if status in (401, 403):
            raise ServerUnauthorizedError(f"the server at {self.base_url} refused {path}: {WANTS_KEY}")
        if response.headers.get(LEASE_HEADER) != token and (response.ok or status in (404, 405)):
            raise ServerRestartedError(
                f"{where} was answered without the token that it was asked with: another server was started there since, or a "
                f"proxy drops the header {LEASE_HEADER}"
            )
        if not response.ok:
            raise REFUSALS.get(status, EngineError)(f"{where} answered {status}: {error_text(response.text)}")
        try:
            return response.json() if response.content else None
        except requests.JSONDecodeError as error:
            raise ServerLostError(
                f"{where} answered what is not JSON, so it is no vLLM server, or the reply was cut off: "
                f"{error_text(response.text, 80)}"
            ) from error

    def _send(self, request: dict[str, Any]) -> requests.Response:
        """Send once, and once more where a kept connection turned out to be closed before any answer.

        A server closes connections that were idle for some seconds, and all of them when it restarts; it has then not read
        the request. If the request itself hit the dead connection, there would be no second attempt.
        """
        try:
            return self._session.request(**request)
        except requests.ConnectionError as error:
            # http.client.RemoteDisconnected is a ConnectionResetError.
            if not any(isinstance(cause, ConnectionResetError | BrokenPipeError) for cause in causes(error)):
                raise
            return self._session.request(**request)

    def ask(self, method: str, path: str, *names: str, **options: Any) -> dict[str, Any]:
        """`request`, whose answer must be an object with these names.

        Raises:
            ServerLostError: it is anything else, so the address is not served by a working ludic server.
        """
        answer = self.request(method, path, **options)
        if not isinstance(answer, dict) or not answer.keys() >= set(names):
            raise ServerLostError(
                f"{path} on {self.base_url} answered without {', '.join(names)}: no vLLM server does that"
            )
        return answer

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._take_part("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        try:
            self.request("POST", "/start_weight_update")
        except EngineError as error:
            if "already" not in str(error):
                raise
            # A trainer that was killed in the middle of a sync left its update open: end that one, then start ours.
            self.finish_weight_update()
            self.request("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._take_part("/update_weights", {"update_info": update_info})

    def _take_part(self, path: str, body: dict[str, Any]) -> None:
        """A call during which the trainer is already in the collective operation that it asks the server to join."""
        try:
            self.request("POST", path, json_body=body, timeout_s=TRANSFER_TIMEOUT_S)
        except EngineError as error:
            self.refusal = error
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = None if weight_version is None else {"weight_version": weight_version}
        self.request("POST", "/finish_weight_update", json_body=body, timeout_s=TRANSFER_TIMEOUT_S)

    def open_adapter(self, rank: int, dtype: str, shapes: dict[str, list[int]]) -> str:
        """Let the server make room for an adapter of tensors with these names; why it cannot serve it, "" where it can."""
        specs = {"rank": rank, "dtype": dtype, "shapes": shapes}
        answer = self.ask("POST", ADAPTER_PATH, "problem", json_body=specs, timeout_s=TRANSFER_TIMEOUT_S)
        return str(answer["problem"])

    def update_adapter(self, update_info: dict[str, Any]) -> None:
        """As `update_weights` for a new version of the trainer's adapter, in one call; the session of an update is not needed."""
        try:
            problems = self._ask_workers("ludic_receive_adapter", json.dumps(update_info), timeout_s=TRANSFER_TIMEOUT_S)
            if problem := next((one for one in problems if one), ""):
                raise EngineError(f"the server did not take the adapter: {problem}")
        except EngineError as error:
            self.refusal = error
            raise

    def end_open_update(self) -> None:
        """Finish an update that a trainer left open, if there is one, so that the model's parameters are all in place again."""
        try:
            self.finish_weight_update()
        except EngineError as error:
            if "without a matching" not in str(error):
                raise

    def pause(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """Hold all generation from the next step on; it goes on at `resume`, and requests that come meanwhile wait.

        Nothing is dropped from the prefix cache: its blocks are keyed by each request's `cache_salt`. With `drain`,
        running requests end first and the caches are cleared.
        """
        params = {"mode": "wait", "clear_cache": "true"} if drain else {"mode": "keep", "clear_cache": "false"}
        self.request("POST", "/pause", params=params, timeout_s=timeout_s)

    def resume(self, *, timeout_s: float | None = None) -> None:
        self.request("POST", "/resume", timeout_s=timeout_s)

    def is_paused(self) -> bool:
        return bool(self.request("GET", "/is_paused")["is_paused"])

    def _ask_workers(self, method: str, *args: str, timeout_s: float | None = None) -> list[Any]:
        """What `LudicWorkerExtension` answers, one answer a worker."""
        call = {"method": method, "args": list(args)}
        answers: list[Any] = self.request("POST", "/collective_rpc", json_body=call, timeout_s=timeout_s)["results"]
        return answers

    def server_info(self) -> dict[str, Any]:
        """What the server's first worker says of itself: dtype, device, transfer_backend, logprobs_mode, vllm_version."""
        info: dict[str, Any] = self._ask_workers("ludic_server_info")[0]
        return info

    def expect_weights(self, wanted: dict[str, dict[str, Any]]) -> list[str]:
        """Agree on what `held_digests` compares; why each worker's model cannot be written in place, "" where it can.

        `wanted` is {name: {"dtype": "bfloat16", "shape": [...]}}.
        """
        workers = self._ask_workers("ludic_expect_weights", json.dumps(wanted), timeout_s=TRANSFER_TIMEOUT_S)
        return [worker["in_place_problem"] for worker in workers]

    def held_digests(self) -> list[HeldDigests]:
        """What each worker's model holds of the agreed tensors."""
        return [_held(worker) for worker in self._ask_workers("ludic_held_digests", timeout_s=TRANSFER_TIMEOUT_S)]

    def ipc_problem(self, request: str) -> str:
        """Why a worker does not see the trainer's memory on its GPU, "" where all do; `request` is `vllm_ipc.Request`'s JSON."""
        problems = self._ask_workers("ludic_ipc_problem", request, timeout_s=TRANSFER_TIMEOUT_S)
        return next(filter(None, problems), "")

    def receive_over_ipc(self, request: str) -> IpcAnswer:
        """Let the workers copy all weights from that memory; returns when they have, or have given up."""
        workers = self._ask_workers("ludic_receive_over_ipc", request, timeout_s=TRANSFER_TIMEOUT_S)
        problem = next(filter(None, (worker["problem"] for worker in workers)), "")
        held = [] if problem else [_held(worker) for worker in workers]
        return IpcAnswer(problem=problem, touched=any(worker["touched"] for worker in workers), workers=held)

    def weights_digest(self) -> str:
        """16 hex digits that differ where the weights differ that the server computes with, as it holds them."""
        workers: list[str] = self._ask_workers("ludic_weights_digest")
        return workers[0] if len(workers) == 1 else hashlib.sha256("".join(workers).encode()).hexdigest()[:16]

    def note_weights(self, policy_version: int, *, adapter: bool = False) -> None:
        """Tell the server that it provably holds these weights of this trainer, for those who ask it whose they are.

        With `adapter` they are those of its start with the trainer's adapter.
        """
        body = {"policy_version": policy_version} | ({"adapter": True} if adapter else {})
        self.request("PUT", TRAINER_PATH, json_body=body)

    def prompt_logprobs(self, model: str, token_ids: list[int], *, cache_salt: str) -> list[float]:
        """The server's log-probability of each prompt token after the first, in nats: [len(token_ids) - 1].

        A new `cache_salt` keeps it from what the prefix cache holds of older weights.
        """
        answer = self.request(
            "POST",
            "/v1/completions",
            json_body={
                "model": model,
                "prompt": token_ids,
                "max_tokens": 1,
                "temperature": 1.0,
                "top_p": 1.0,
                **NEUTRAL_SAMPLING,
                "prompt_logprobs": 0,
                "cache_salt": cache_salt,
                "add_special_tokens": False,
            },
            timeout_s=TRANSFER_TIMEOUT_S,  # with rollouts in flight it waits for its turn among them
        )
        entries = answer["choices"][0]["prompt_logprobs"]
        return [entry[str(token_id)]["logprob"] for entry, token_id in zip(entries[1:], token_ids[1:], strict=True)]


def _held(worker: dict[str, Any]) -> HeldDigests:
    return HeldDigests(
        in_memory=_sixteens(worker["digests"]),
        packed=_sixteens(worker["packed"]),
        flushes=worker["flushes"],
        inexact=worker["inexact"],
    )


def _sixteens(digests: str) -> list[str]:
    """The digests of a string of 16 characters each; sixteen dashes stand for none."""
    parts = [digests[first : first + 16] for first in range(0, len(digests), 16)]
    return ["" if part == "-" * 16 else part for part in parts]


def error_text(body: str, limit: int = 600) -> str:
    """The message in an error answer of vLLM or FastAPI, on one line; the body itself where it has another form."""
    try:
        decoded = json.loads(body)
    except ValueError:
        decoded = None
    if isinstance(decoded, dict):
        inner = decoded.get("error", decoded.get("detail", decoded.get("message", decoded)))
        body = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    flat = " ".join(body.split())
    return inert(flat, limit)
