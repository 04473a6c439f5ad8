"""Hands the trainer's weights to a vLLM server, and proves that they arrived.

The protocol is vLLM's own weight-transfer API: pause, start, update, finish, resume; `weight_transport` carries the bytes.
Generation is held and not drained (`mode=keep`): running requests go on with the new weights, requests that come meanwhile
wait. The prefix cache stays; its blocks are keyed by the `cache_salt` of each request, which the client renews with each sync.

A sync that did not take is an error. After every sync, digests of the tensors that the server holds are compared with those
of what was sent, wherever the server still holds a tensor in comparable form. The log-probs of a fixed prompt are compared
with the trainer's own at the first sync and at the first of another kind, then at every tenth (`probe_every`), and at each
sync where not all tensors could be compared: they also see what digests cannot (a stale output head, weights packed by a
kernel), once the two policies differ by more than `PROBE_GAP_LIMIT`. Everything has a deadline, and the server's own words
are in the error.

Left out: sharded trainers and servers whose weights are quantised or split (their digests come back empty, and the
log-prob proof stands alone).
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ludic.inference.beside import Beside
from ludic.inference.digest import digest_hex
from ludic.inference.engine import WeightSyncReport
from ludic.inference.errors import EngineError, WeightSyncError
from ludic.inference.nccl_transport import BucketTransport, NCCLTransport
from ludic.inference.server_control import ServerControl
from ludic.inference.weight_transport import SharedMemoryTransport, WeightTransport, WireWeights
from ludic.training.logprobs import token_logprobs
from ludic.training.packing import pack
from ludic.types import TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLL_S = 0.25
REFUSAL_GRACE_S = 5.0
"""How long a transfer may take to notice by itself that the server has refused it."""
PROBE_GAP_LIMIT = 0.15
"""Nats. Mean log-prob difference on the probe above which a sync has failed. Measured: 1e-6 for fp32 on both sides, 0.008
to 0.02 for bf16 against fp32 masters, 0.9 for a stale output head (CPU backend of vLLM 0.32)."""


TRANSPORTS: dict[str, Callable[[ServerControl], WeightTransport]] = {
    "ludic_nccl": BucketTransport,
    "ludic_shm": SharedMemoryTransport,
    "nccl": NCCLTransport,
}


class WeightSync:
    """One trainer's syncs with one server: opened at the first, proven each time.

    Args:
        transport: `ludic_nccl`, `ludic_shm` or `nccl`; it must be the backend that the server was started with.
        served_model: the name under which the probe asks for the model.
        probe_token_ids: the fixed prompt whose log-probs are compared, 2 tokens at least.
        deadline_s: after which one sync has failed, whatever it waits for.
        probe_every: at every how many syncs the log-probs are compared when digests alone have nothing against it.
    """

    def __init__(
        self,
        control: ServerControl,
        *,
        transport: str,
        served_model: str,
        dtype: torch.dtype,
        probe_token_ids: list[int],
        deadline_s: float = 300.0,
        probe_every: int = 10,
    ) -> None:
        if transport not in TRANSPORTS:
            raise ValueError(
                f"the server's weight transfer backend is {transport!r}; ludic knows {', '.join(TRANSPORTS)}: "
                "start the server with `python -m ludic.inference.vllm_server`"
            )
        self._control = control
        self._transport: WeightTransport = TRANSPORTS[transport](control)
        self._served_model = served_model
        self._dtype = dtype
        self._probe = probe_token_ids
        self._deadline_s = deadline_s
        self._probe_every = probe_every
        self._opened = False
        self._salted = False
        self._probed_path = ""
        self._syncs_since_probe = 0

    def sync(self, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport:
        """Send `model`'s weights and prove them; blocking, at most `deadline_s` seconds.

        Raises:
            WeightSyncError: the server refused, did not answer in time, or does not hold what was sent.
        """
        outcome: list[WeightSyncReport | BaseException] = []
        # On a daemon thread: a broken NCCL call cannot be interrupted, and must not hold the trainer for ever.
        thread = threading.Thread(target=lambda: outcome.append(self._attempt(model, policy_version)), daemon=True)
        self._control.refusal = None
        thread.start()
        self._wait(thread)
        if not outcome:
            what = f"weight sync {policy_version} over {self._transport.name}"
            if self._control.refusal is not None:
                raise WeightSyncError(f"{what} was refused by the server: {self._control.refusal}")
            raise WeightSyncError(
                f"{what} did not end within {self._deadline_s:g} s; the server's log says where it waits"
            )
        result = outcome[0]
        if isinstance(result, WeightSyncError):
            raise result
        if isinstance(result, BaseException):
            raise WeightSyncError(
                f"weight sync {policy_version} over {self._transport.name} failed: {result}"
            ) from result
        return result

    def _wait(self, thread: threading.Thread) -> None:
        """Until the thread ends, the deadline has passed, or the server refused what the thread goes on waiting for."""
        deadline = time.monotonic() + self._deadline_s
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(min(POLL_S, max(0.0, deadline - time.monotonic())))
            if self._control.refusal is not None:
                deadline = min(deadline, time.monotonic() + REFUSAL_GRACE_S)
                thread.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        self._transport.close()
        self._opened = False
        self._control.close()

    def _attempt(self, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport | BaseException:
        try:
            if model.device.type == "cuda":
                torch.cuda.set_device(model.device)  # each thread has a current device of its own, and NCCL goes by it
                # This thread may have another stream than the optimizer's, whose last step must be over.
                torch.cuda.synchronize(model.device)
            return self._sync(model, policy_version)
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._transport.close()  # the next attempt agrees with the server anew: it may be another one by then
            self._opened = False
            return error

    def _open(self, weights: WireWeights) -> None:
        dtype_name = str(weights.dtype).removeprefix("torch.")
        self._salted = bool(self._control.server_info().get("cache_salt", False))
        problems = self._control.expect_weights(
            {name: {"dtype": dtype_name, "shape": shape} for name, shape in weights.shapes().items()}
        )
        self._transport.open(weights, in_place_problem=next((problem for problem in problems if problem), ""))
        self._opened = True
        self._probed_path = ""

    def _sync(self, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport:
        weights = WireWeights(model=model, dtype=self._dtype)
        laps = _Laps()
        if not self._opened:
            self._open(weights)
            laps.end("open")
        # Even a pause that times out may have paused the server: it is resumed below.
        pause = Beside(lambda: self._control.pause(drain=not self._salted))
        try:
            if not self._transport.one_step:
                pause.result()
                laps.end("pause")
            # Otherwise the pause, which takes vLLM 0.02 s and the step that runs, overlaps the rest: the server takes all
            # weights in one call, and serves no call in the middle of a step.
            sent = self._transport.send(weights, weight_version=str(policy_version))
            laps.end("send")
            proven = self._prove_digests(weights, sent)
            laps.end("digests")
            pause.result()
            laps.end("pause")
        except BaseException:
            with contextlib.suppress(EngineError):  # what went wrong first is what must be seen
                pause.result()
            with contextlib.suppress(EngineError):
                self._control.resume()
            raise
        self._control.resume()
        laps.end("resume")
        total, path = len(weights.shapes()), self._transport.path()
        gap = None
        self._syncs_since_probe += 1
        if proven < total or path != self._probed_path or self._syncs_since_probe >= self._probe_every:
            gap = self._prove_logprobs(model, policy_version)
            self._probed_path, self._syncs_since_probe = path, 0
            laps.end("probe")
        if proven == total:
            self._transport.confirm()
        return WeightSyncReport(
            policy_version=policy_version,
            num_tensors=total,
            num_bytes=weights.num_bytes(),
            seconds=laps.total(),
            proof=_proof_words(path, proven, total, gap),
            logprob_gap=gap,
            phases_s=laps.seconds,
        )

    def _prove_digests(self, weights: WireWeights, sent: list[int] | None) -> int:
        """Compare what the server holds with what was sent; the number of tensors that could be compared."""
        asked = Beside(self._control.held_digests)  # the server computes its own while the trainer does
        wanted = [digest_hex(digest) for digest in (weights.digests() if sent is None else sent)]
        workers = asked.result()
        names = list(weights.shapes())
        if any(len(worker) != len(names) for worker in workers):
            raise WeightSyncError(
                f"the server answered with digests of {[len(w) for w in workers]} tensors, not {len(names)}"
            )
        held = [set(digests) - {""} for digests in zip(*workers, strict=True)]
        wrong = [number for number, digests in enumerate(held) if digests - {wanted[number]}]
        if wrong:
            first = min(wrong, key=lambda number: names[number])
            raise WeightSyncError(
                f"after the sync {len(wrong)} of {len(names)} tensors on the server differ from those sent, "
                f"the first is {names[first]} (digest {'/'.join(sorted(held[first]))}, sent {wanted[first]})"
            )
        return sum(bool(digests) for digests in held)

    def _prove_logprobs(self, model: "PreTrainedModel", policy_version: int) -> float:
        """The mean |difference| in nats between the server's and the trainer's log-probs of the probe prompt."""
        salt = f"ludic-probe-{policy_version}-{time.monotonic_ns()}"
        asked = Beside(lambda: self._control.prompt_logprobs(self._served_model, self._probe, cache_salt=salt))
        trained = _prompt_logprobs(model, self._probe)
        served = torch.tensor(asked.result())
        gap = (served - trained).abs().mean().item()
        if not gap <= PROBE_GAP_LIMIT:
            raise WeightSyncError(
                f"after the sync the server's log-probs of the probe prompt differ from the trainer's by {gap:.3g} nats "
                f"on average (limit {PROBE_GAP_LIMIT}): the server does not compute with the weights that it was sent"
            )
        return gap


class _Laps:
    """Seconds between named marks; a name that comes twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        return sum(self.seconds.values())


def _proof_words(path: str, proven: int, total: int, gap: float | None) -> str:
    if proven == total:
        digests = f"all {total} tensors held by the server have the digests of those sent"
    else:
        digests = f"{proven} of {total} held tensors compared by digests (the others are packed by the backend)"
    probe = "log-probs of the probe not due" if gap is None else f"log-probs of the probe within {gap:.2g} nats"
    return f"{path}; {digests}; {probe}"


@torch.no_grad()
def _prompt_logprobs(model: "PreTrainedModel", token_ids: list[int]) -> torch.Tensor:
    """[P - 1] float32 on the CPU: the model's log-probability of each token after the first, as training computes it."""
    probe = TrainingSample(
        token_ids=token_ids,
        loss_mask=[False] + [True] * (len(token_ids) - 1),
        rollout_logprobs=None,
        advantage=0.0,
        policy_version=0,
    )
    device = next(model.parameters()).device
    (row,) = pack([probe], token_budget=len(token_ids), normalisation="token_mean")
    was_training = model.training
    model.eval()
    # Eager: a compiled policy would be compiled once more for a forward without gradients.
    with (
        torch.compiler.set_stance("force_eager"),
        torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"),
    ):
        stats = token_logprobs(model, row.to(device), temperature=1.0, with_entropy=False)
    model.train(was_training)
    return stats.logprobs[1 - len(token_ids) :].float().cpu()
