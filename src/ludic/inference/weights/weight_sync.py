"""Hands the trainer's weights to a vLLM server, and proves that they arrived.

The protocol is vLLM's own weight-transfer API: pause, start, update, finish, resume; `weight_transport` carries the bytes.
Generation is held and not drained (`mode=keep`): running requests go on with the new weights, requests that come meanwhile
wait. The prefix cache stays; its blocks are keyed by the `cache_salt` of each request, which the client renews with each sync.

A sync that did not take is an error. After every sync the digests of the tensors that the server holds are compared with
those of what was sent, in its memory and in what packed layers multiply with, as far as there is an exact way to see it. Now
and then, and wherever the memory does not show all tensors, so are the log-probs of a fixed prompt with the trainer's own.

Everything has a deadline, and the server's own words are in the error. Whatever a failed sync leaves behind, a thread in a
call that does not end included, is cut off: it can reach neither the server nor the GPU any more.

Left out: sharded trainers and servers whose weights are quantised or split (their digests come back empty, and the
log-prob proof stands alone).
"""

import contextlib
import time
from concurrent.futures import wait
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch

from ludic.inference.client.server_control import ServerControl
from ludic.inference.weights.adapter_weights import AdapterWeights, BaseWeights
from ludic.inference.weights.background import BackgroundCall
from ludic.inference.weights.digest import digest_hex
from ludic.inference.weights.ipc_transport import IpcTransport
from ludic.inference.weights.nccl_transport import BucketTransport
from ludic.inference.weights.sync_probe import gap_error, trainer_logprobs
from ludic.inference.weights.weight_transport import Sent, SharedMemoryTransport, WireWeights
from ludic.inference.wire import ADAPTER_NAME
from ludic.rollout.engine import WeightSyncReport
from ludic.rollout.errors import (
    EngineError,
    ServerInUseError,
    ServerMismatchError,
    ServerUnauthorizedError,
    WeightSyncError,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLL_S = 0.25
REFUSAL_GRACE_S = 5.0
"""How long a transfer may take to notice by itself that the server has refused it."""
LEAVE_S = 10.0
"""For a transport to leave a transfer that failed."""
SETTLE_S = 3.0
"""Timeout of the one call that pauses or resumes the server after a failed sync."""
STAYS_PAUSED = (
    "the server stays paused, because its weights may be half replaced: the next sync sets it right, or a restart"
)
IN_DOUBT = "if the server still runs, its weights may be half replaced: sync again, or restart it, before it is used"

_PASS_ON = (ServerInUseError, ServerMismatchError, ServerUnauthorizedError)
"""Errors that another attempt would not mend."""

Transport = BucketTransport | SharedMemoryTransport
TRANSPORTS: dict[str, type[Transport]] = {"ludic_nccl": BucketTransport, "ludic_shm": SharedMemoryTransport}


@dataclass(slots=True)
class _Talk:
    """One conversation with the server, from a first sync to the first one that fails; then nothing of it is used again."""

    control: ServerControl
    transport: Transport
    opened: bool = False
    found_paused: bool = False
    """Whether the server was paused when we came, as a trainer that failed leaves it: not ours to resume without a sync."""
    pausing: bool = False
    """Whether a sync of ours has asked for the pause, and not ended well."""
    base: str = ""
    """What was proven of the base below an adapter, in words."""
    probed_path: str = ""
    syncs_since_probe: int = 0


@dataclass(eq=False)
class WeightSync:
    """One trainer's syncs with one server: opened at the first, proven each time."""

    control: ServerControl
    _: KW_ONLY
    transport: str
    """`ludic_nccl` or `ludic_shm`; it must be the backend that the server was started with."""
    served_model: str
    """The name under which the probe asks for the model."""
    dtype: torch.dtype
    probe_token_ids: list[int]
    """The fixed prompt whose log-probs are compared, 2 tokens at least."""
    deadline_s: float = 300.0
    """After which one sync has failed, whatever it waits for."""
    probe_every: int = 10
    """At every how many syncs the log-probs are compared when digests alone have nothing against it."""
    adapter_rank: int = 0
    """Above 0, the model's layers have adapters of this rank, which alone are sent: the server was started with the base."""
    fp32_head: bool = False
    """Whether the probe's logits are kept in fp32, as the model that trains has them."""
    server_gpu: str = ""
    """UUID of the GPU that the server computes on; "" for a CPU, or where it splits the model."""

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"the server's weight transfer backend is {self.transport!r}; ludic knows {', '.join(TRANSPORTS)}: "
                "start the server with `python -m ludic.inference.vllm_server`"
            )
        self._abort_reason = ""
        self._has_agreed = False
        """Whether the log-probs of any probe have: then both sides compute the same with the same weights."""
        self._talk = self._new_talk()

    def _new_talk(self) -> _Talk:
        control = self.control.branch()
        return _Talk(control, self._new_transport(control))

    def _new_transport(self, control: ServerControl) -> Transport:
        if self.transport == SharedMemoryTransport.name and self.server_gpu:
            return IpcTransport(control, server_gpu=self.server_gpu, deadline_s=self.deadline_s)
        return TRANSPORTS[self.transport](control, deadline_s=self.deadline_s)

    def sync(self, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport:
        """Send `model`'s weights and prove them; blocking, at most `deadline_s` seconds and those that cleaning up takes.

        Raises:
            WeightSyncError: the server refused, did not answer in time, or does not hold what was sent; or `abort` was
                called. It says in which state the server was left. Another attempt begins from nothing.
            ServerMismatchError: it holds what was sent, and vLLM computes something else with it than transformers.
            ServerInUseError, ServerUnauthorizedError: the server is not ours.
        """
        talk = self._talk
        talk.control.refusal = None
        self._abort_reason = ""
        # On a daemon thread: a broken NCCL call cannot be interrupted, and must not hold the trainer for ever.
        attempt = BackgroundCall(lambda: self._attempt(talk, model, policy_version))
        ended = self._wait(attempt, talk)
        cause = attempt.exception() if ended else None
        if ended and cause is None:
            return attempt.result()
        self._talk = self._new_talk()
        left = _cut_off(talk, self.control)
        pass_on = cause if ended else talk.control.refusal
        if isinstance(pass_on, _PASS_ON):
            raise pass_on
        raise WeightSyncError(self._failure(talk, cause, policy_version) + left) from cause

    def abort(self, reason: str) -> None:
        """From any thread: end the sync that is under way, if one is, at once; it raises WeightSyncError with the reason."""
        self._abort_reason = reason

    def _wait(self, attempt: BackgroundCall[WeightSyncReport], talk: _Talk) -> bool:
        """Until it ends, the deadline has passed, `abort` was called, or the server refused; whether it has ended."""
        deadline = time.monotonic() + self.deadline_s
        while not attempt.done() and (left_s := deadline - time.monotonic()) > 0 and not self._abort_reason:
            wait([attempt], min(POLL_S, left_s))
            if talk.control.refusal is not None:
                deadline = min(deadline, time.monotonic() + REFUSAL_GRACE_S)
                wait([attempt], max(0.0, deadline - time.monotonic()))
        return attempt.done()

    def _failure(self, talk: _Talk, cause: BaseException | None, policy_version: int) -> str:
        what = f"weight sync {policy_version} over {talk.transport.name}"
        if cause is not None:
            return str(cause) if isinstance(cause, WeightSyncError) else f"{what} failed: {cause}"
        if talk.control.refusal is not None:
            return f"{what} was refused by the server: {talk.control.refusal}"
        if self._abort_reason:
            return f"{what} was given up: {self._abort_reason}"
        return f"{what} did not end within {self.deadline_s:g} s; the server's log says where it waits"

    def close(self) -> None:
        self._talk.transport.close()
        self._talk = self._new_talk()
        self.control.close()

    def _open(self, talk: _Talk, weights: WireWeights) -> None:
        talk.found_paused = talk.control.is_paused()
        if talk.found_paused:
            talk.control.end_open_update()
        if self.adapter_rank:
            self._open_adapter(talk, weights)
        talk.transport.open(weights, in_place_problem=_expect(talk.control, weights))
        talk.opened = True

    def _open_adapter(self, talk: _Talk, weights: WireWeights) -> None:
        """Prove the server's base, and let it make room for the adapter.

        Raises:
            ServerMismatchError: it has another base, or cannot serve such an adapter.
        """
        base = BaseWeights(model=weights.model, dtype=self.dtype)
        _expect(talk.control, base)
        try:
            proof = _Proof.of(base, talk.control, Sent())
        except WeightSyncError as error:
            raise ServerMismatchError(
                f"the server at {talk.control.base_url} holds another base than the one below the adapter ({error}): "
                "start it with this run's --model, or restart it if a run has sent it whole models"
            ) from error
        talk.base = (
            f", over a base of which {proof.compared} of {proof.total} tensors were compared and are the trainer's"
        )
        dtype_name = str(weights.dtype).removeprefix("torch.")
        if problem := talk.control.open_adapter(self.adapter_rank, dtype_name, weights.shapes()):
            raise ServerMismatchError(f"the server at {talk.control.base_url} cannot serve the adapter: {problem}")

    def _attempt(self, talk: _Talk, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport:
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)  # each thread has a current device of its own, and NCCL goes by it
            # This thread may have another stream than the optimizer's, whose last step must be over.
            torch.cuda.synchronize(model.device)
        kind = AdapterWeights if self.adapter_rank else WireWeights
        weights = kind(model=model, dtype=self.dtype)
        laps = _Laps()
        talk.transport.touched = False
        if not talk.opened:
            self._open(talk, weights)
            laps.end("open")
        proof = _replace(talk, weights, policy_version, laps)
        path, gap = talk.transport.path, None
        talk.syncs_since_probe += 1
        if proof.in_memory < proof.total or path != talk.probed_path or talk.syncs_since_probe >= self.probe_every:
            gap = self._prove_logprobs(talk, model, policy_version, same_weights=proof.compared == proof.total)
            talk.probed_path, talk.syncs_since_probe = path, 0
            laps.end("probe")
        if proof.in_memory == proof.total:
            talk.transport.confirmed = True
        if talk.control.has_lease:
            talk.control.note_weights(policy_version, adapter=self.adapter_rank > 0)
            laps.end("note")
        talk.found_paused = talk.pausing = talk.transport.touched = False
        return WeightSyncReport(
            policy_version=policy_version,
            num_tensors=proof.total,
            num_bytes=weights.num_bytes(),
            seconds=sum(laps.seconds.values()),
            proof=_proof_words(path + talk.base, proof, gap),
            logprob_gap=gap,
            phases_s=laps.seconds,
        )

    def _prove_logprobs(
        self, talk: _Talk, model: "PreTrainedModel", policy_version: int, *, same_weights: bool
    ) -> float:
        """The mean |difference| in nats between the server's and the trainer's log-probs of the probe prompt."""
        talk.control.check_wanted()  # a thread that was left behind must not touch the model: the trainer has gone on
        salt = f"ludic-probe-{policy_version}-{time.monotonic_ns()}"
        name = ADAPTER_NAME if self.adapter_rank else self.served_model
        asked = BackgroundCall(lambda: talk.control.prompt_logprobs(name, self.probe_token_ids, cache_salt=salt))
        trained = trainer_logprobs(model, self.probe_token_ids, fp32_head=self.fp32_head)
        gaps = (torch.tensor(asked.result()) - trained).abs()
        error = gap_error(gaps, model, same_weights=same_weights and not self._has_agreed)
        if isinstance(error, ServerMismatchError):
            talk.pausing = talk.transport.touched = False  # its weights are whole, and it was resumed
        if error is not None:
            raise error
        self._has_agreed = True
        return gaps.mean().item()


def _expect(control: ServerControl, weights: WireWeights) -> str:
    """Agree on what digests are about; why the server could not take these weights in place, "" where it could."""
    dtype_name = str(weights.dtype).removeprefix("torch.")
    wanted = {name: {"dtype": dtype_name, "shape": shape} for name, shape in weights.shapes().items()}
    return next((problem for problem in control.expect_weights(wanted) if problem), "")


def _replace(talk: _Talk, weights: WireWeights, policy_version: int, laps: "_Laps") -> "_Proof":
    """Pause the server, replace its weights, prove them, and let it go on."""
    talk.pausing = True
    pause = BackgroundCall(talk.control.pause)
    try:
        if not talk.transport.one_step:
            pause.result()
            laps.end("pause")
        # Otherwise the pause, which takes vLLM 0.02 s and the step that runs, overlaps the rest: the server takes all
        # weights in one call, and serves no call in the middle of a step.
        sent = talk.transport.send(weights, weight_version=str(policy_version))
        laps.end("send")
        proof = _Proof.of(weights, talk.control, sent)
        laps.end("digests")
        pause.result()
        laps.end("pause")
    except BaseException:
        with contextlib.suppress(EngineError):  # what went wrong first is what must be seen
            pause.result()
        raise
    talk.control.resume()
    laps.end("resume")
    return proof


def _cut_off(talk: _Talk, control: ServerControl) -> str:
    """End what is left of a conversation, and leave the server as it should be; says how, for the end of an error."""
    talk.control.give_up()
    with contextlib.suppress(TimeoutError):  # NCCL may never let go of a link
        BackgroundCall(talk.transport.abort).result(LEAVE_S)
    if not talk.transport.touched:
        if talk.pausing and not talk.found_paused:
            with contextlib.suppress(EngineError):
                control.resume(timeout_s=SETTLE_S)
        return ""
    try:
        control.pause(timeout_s=SETTLE_S)
    except EngineError:
        return f"; {IN_DOUBT}"
    return f"; {STAYS_PAUSED}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    """What the digests of one sync have shown: none differed, and how many were compared."""

    total: int
    compared: int
    in_memory: int
    """Of those compared, how many in the server's memory; the others only through the layers that multiply with them."""
    inexact: str
    """A layer that cannot be read, "" for none."""

    @classmethod
    def of(cls, weights: WireWeights, control: ServerControl, sent: Sent) -> "_Proof":
        """Compare what the server holds with what was sent. Raises WeightSyncError where a tensor differs."""
        # The server computes its own while the trainer does.
        asked = BackgroundCall(control.held_digests) if sent.held is None else None
        wanted = dict(enumerate(weights.digests() if sent.digests is None else sent.digests))
        workers = sent.held if asked is None else asked.result()
        assert workers is not None
        names = list(weights.shapes())
        sizes = [len(row) for worker in workers for row in (worker.in_memory, worker.packed)]
        if any(size != len(names) for size in sizes):
            raise WeightSyncError(f"the server answered with digests of {sizes} tensors, not {len(names)}")
        in_memory, packed, wrong = set[int](), set[int](), list[tuple[str, str, str]]()
        for worker in workers:
            multiplied = [number for number, digest in enumerate(worker.packed) if digest]
            canonical = weights.canonical_digests(multiplied, flush=worker.flushes)
            for right, row, known in ((in_memory, worker.in_memory, wanted), (packed, worker.packed, canonical)):
                for number, held in enumerate(row):
                    if held and held == digest_hex(known[number]):
                        right.add(number)
                    elif held:
                        wrong.append((names[number], held, digest_hex(known[number])))
        if wrong:
            (first, held, digest), count = min(wrong), len({name for name, _, _ in wrong})
            finite = bool(dict(weights)[first].isfinite().all())
            raise WeightSyncError(
                f"after the sync {count} of {len(names)} tensors on the server differ from those sent, "
                f"the first is {first} (digest {held}, sent {digest})"
                + ("" if finite else "; the trainer's own holds numbers that are not finite")
            )
        inexact = next((worker.inexact for worker in workers if worker.inexact), "")
        return cls(total=len(names), compared=len(in_memory | packed), in_memory=len(in_memory), inexact=inexact)


class _Laps:
    """Seconds between named marks; a name that comes twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _proof_words(path: str, proof: _Proof, gap: float | None) -> str:
    if proof.compared == proof.total:
        digests = f"all {proof.total} tensors held by the server have the digests of those sent"
    else:
        why = f"{proof.inexact} rounds what it holds" if proof.inexact else "the others are split or quantised"
        digests = f"{proof.compared} of {proof.total} held tensors compared by digests ({why})"
    if proof.in_memory < proof.compared:
        digests += f", {proof.compared - proof.in_memory} of them as the layers multiply with them"
    probe = "log-probs of the probe not due" if gap is None else f"log-probs of the probe within {gap:.2g} nats"
    return f"{path}; {digests}; {probe}"
