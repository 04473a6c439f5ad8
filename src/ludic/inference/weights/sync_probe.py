"""The log-probs of a fixed prompt on both sides of a weight sync, and what it means where they differ."""

import math
import threading
from typing import TYPE_CHECKING

import torch

from ludic.rollout.errors import EngineError, ServerMismatchError, WeightSyncError
from ludic.task.architectures import OTHER_FAMILY
from ludic.train.logprobs import token_logprobs
from ludic.train.packing import pack
from ludic.types import TrainingSample

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PROBE_GAP_LIMIT = 0.15
"""Nats. Mean log-prob difference on the probe above which a sync has failed. Measured: 1e-6 for fp32 on both sides, 0.008
to 0.02 for bf16 against fp32 masters, 0.9 for a stale output head (CPU backend of vLLM 0.32)."""
_one_at_a_time = threading.Lock()


@torch.no_grad()
def trainer_logprobs(model: "PreTrainedModel", token_ids: list[int], *, fp32_head: bool) -> torch.Tensor:
    """[P - 1] float32 on the CPU: the model's log-probability of each token after the first, as training computes it."""
    loss_mask = [False] + [True] * (len(token_ids) - 1)
    probe = TrainingSample(token_ids=token_ids, loss_mask=loss_mask, rollout_logprobs=None, advantage=0.0)
    device = next(model.parameters()).device
    (row,) = pack([probe], token_budget=len(token_ids), normalisation="token_mean")
    # Eager: a compiled policy would be compiled once more for a forward without gradients. The stance is that of all threads,
    # and what one of two probes at a time restored last could be the other's.
    with (
        _one_at_a_time,
        torch.compiler.set_stance("force_eager"),
        torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"),
    ):
        stats = token_logprobs(model, row.to(device), temperature=1.0, with_entropy=False, fp32_head=fp32_head)
    return stats.logprobs[1 - len(token_ids) :].float().cpu()


def gap_error(gaps: torch.Tensor, model: "PreTrainedModel", *, same_weights: bool) -> EngineError | None:
    """What to raise for these differences in nats ([P - 1], one for each token of the probe after the first); None if small.

    With `same_weights`, what the server holds was proven, and is not what makes the difference.
    """
    gap = gaps.mean().item()
    if gap <= PROBE_GAP_LIMIT:
        return None
    differ = (
        f"the server's log-probs of the probe prompt differ from the trainer's by {gap:.3g} nats on average "
        f"(limit {PROBE_GAP_LIMIT})"
    )
    if not same_weights or not math.isfinite(gap):
        return WeightSyncError(
            f"after the sync {differ}: the server does not compute with the weights that it was sent"
        )
    # Transformers and vLLM differ in this model, and a second try would not help.
    cause, way_out = _difference(gaps, model.config.get_text_config())
    return ServerMismatchError(
        f"the server holds exactly the weights that it was sent, and yet {differ}: vLLM and transformers compute "
        f"{type(model).__name__} differently{cause}; {way_out}"
    )


def _difference(gaps: torch.Tensor, config: "PretrainedConfig") -> tuple[str, str]:
    """What of the model differs, as far as that can be told, and what to do about it."""
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int) and 0 < window < len(gaps) and gaps[:window].mean() <= PROBE_GAP_LIMIT / 10:
        shorter = f"--max-seq-len and the server's --max-model-len at most {window}"
        return f" beyond its window of {window} tokens", f"keep {shorter}, or {OTHER_FAMILY}"
    rope = getattr(config, "rope_parameters", None) or {}
    types = sorted({str(one.get("rope_type")) for one in (rope, *rope.values()) if isinstance(one, dict)})
    suspects = [f"RoPE of the type {kind}" for kind in types if kind not in ("None", "default")]
    suspects += [name for name in ("attn_logit_softcapping", "final_logit_softcapping") if getattr(config, name, None)]
    cause = f" (it has {', '.join(suspects)})" if suspects else ""
    if any(kind == "longrope" or "dynamic" in kind for kind in types):
        # vLLM decides on such frequencies by the length of its context, the trainer by --max-seq-len.
        return cause, f"restart the server with a --max-model-len equal to --max-seq-len, or {OTHER_FAMILY}"
    return cause, OTHER_FAMILY
