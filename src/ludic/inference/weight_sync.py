"""Hands the trainer's weights to a vLLM server, and proves that they arrived.

The protocol is vLLM's own weight-transfer API: pause, start, update, finish, resume; `weight_transport` carries the bytes.
A sync that did not take is an error. Two things are compared after every sync: digests of the tensors that the server
holds with digests of what was sent, wherever the server still holds a tensor in comparable form; and the log-probs of a
fixed prompt with the trainer's own, which also sees what the first cannot (a stale output head, weights packed by a
kernel). Everything has a deadline, and the server's own words are in the error.

Left out: sharded trainers and servers whose weights are quantised or split (their digests come back empty, and the
log-prob proof stands alone).
"""

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import torch

from ludic.inference.engine import WeightSyncReport
from ludic.inference.errors import EngineError, WeightSyncError
from ludic.inference.server_control import ServerControl
from ludic.inference.weight_transport import TRANSPORTS, WeightTransport, WireWeights
from ludic.training.losses import token_logprobs
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


class WeightSync:
    """One trainer's syncs with one server: opened at the first, proven each time.

    Args:
        transport: `nccl` or `ludic_shm`; it must be the backend that the server was started with.
        served_model: the name under which the probe asks for the model.
        probe_token_ids: the fixed prompt whose log-probs are compared, 2 tokens at least.
        deadline_s: after which one sync has failed, whatever it waits for.
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
        self._opened = False

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

    def _attempt(self, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport | BaseException:
        try:
            if model.device.type == "cuda":
                torch.cuda.set_device(model.device)  # each thread has a current device of its own, and NCCL goes by it
            return self._sync(model, policy_version)
        except BaseException as error:  # handed to the caller's thread, which raises it
            return error

    def _sync(self, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport:
        weights = WireWeights(model=model, dtype=self._dtype)
        marks = [time.perf_counter()]
        phases: dict[str, float] = {}

        def lap(name: str) -> None:
            marks.append(time.perf_counter())
            phases[name] = marks[-1] - marks[-2]

        if not self._opened:
            self._transport.open(weights)
            self._opened = True
            lap("open")
        try:
            self._control.pause()  # even one that times out may have paused the server: it is resumed below
            lap("pause")
            self._transport.send(weights, weight_version=str(policy_version))
            lap("send")
            proven = self._prove_digests(weights)
            lap("digests")
        except BaseException:
            with contextlib.suppress(EngineError):  # what went wrong first is what must be seen
                self._control.resume()
            raise
        self._control.resume()
        lap("resume")
        gap = self._prove_logprobs(model)
        lap("probe")
        total = len(weights.shapes())
        return WeightSyncReport(
            policy_version=policy_version,
            num_tensors=total,
            num_bytes=weights.num_bytes(),
            seconds=marks[-1] - marks[0],
            proof=f"{self._proof_words(proven, total)}; log-probs of the probe within {gap:.2g} nats",
            logprob_gap=gap,
            phases_s=phases,
        )

    def _proof_words(self, proven: int, total: int) -> str:
        if proven == total:
            return f"all {total} tensors held by the server have the digests of those sent"
        received = "digests of all tensors checked on receipt, " if self._transport.name == "ludic_shm" else ""
        return f"{received}{proven} of {total} held tensors compared (the others are packed by the backend)"

    def _prove_digests(self, weights: WireWeights) -> int:
        """Compare what the server holds with what was sent; the number of tensors that could be compared."""
        dtype_name = str(weights.dtype).removeprefix("torch.")
        workers = self._control.held_digests(
            {name: {"dtype": dtype_name, "shape": shape} for name, shape in weights.shapes().items()}
        )
        sent = weights.digests()
        held = {name: {worker.get(name, "") for worker in workers} - {""} for name in sent}
        wrong = sorted(name for name, digests in held.items() if digests - {sent[name]})
        if wrong:
            raise WeightSyncError(
                f"after the sync {len(wrong)} of {len(sent)} tensors on the server differ from those sent, "
                f"the first is {wrong[0]} (digest {'/'.join(sorted(held[wrong[0]]))}, sent {sent[wrong[0]]})"
            )
        return sum(bool(digests) for digests in held.values())

    def _prove_logprobs(self, model: "PreTrainedModel") -> float:
        """The mean |difference| in nats between the server's and the trainer's log-probs of the probe prompt."""
        served = torch.tensor(self._control.prompt_logprobs(self._served_model, self._probe))
        trained = _prompt_logprobs(model, self._probe)
        gap = (served - trained).abs().mean().item()
        if not gap <= PROBE_GAP_LIMIT:
            raise WeightSyncError(
                f"after the sync the server's log-probs of the probe prompt differ from the trainer's by {gap:.3g} nats "
                f"on average (limit {PROBE_GAP_LIMIT}): the server does not compute with the weights that it was sent"
            )
        return gap


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
    return stats.logprobs[1:].float().cpu()
