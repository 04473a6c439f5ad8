"""Token log-probabilities of a packed row, and the policy losses that are made of them.

Log-probabilities: the backbone runs once over the row; only positions whose next token is trained on meet the LM head,
a chunk at a time, and a chunk's logits are thrown away and made again in the backward pass. Memory for logits is that
of one chunk, however long the row.

Losses: a loss is a plain function of `LossInputs` and `LossSettings`. Each returns the sum over t of
loss_weights[t] * l[t]; the weights hold the normalisation over the whole update (see `packing`), so the losses and
gradients of micro-batches just add up, however the update was cut. Metrics come as sums on the device and are turned
into figures once an update, by `reduce_metrics`.

Notation in the formulas: pi the policy being trained, old the policy at the start of the update, rollout the sampler's
own figures, ref the reference policy; A the advantage; r = pi / old, the ratio of the token's probabilities.

Left out on purpose: an entropy bonus, value losses, and losses over a full vocabulary (distillation).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ludic.training.attention import boundary_kwargs, packed_attention_kwargs
from ludic.training.packing import Normalisation
from ludic.types import MicroBatch

Metrics = dict[str, torch.Tensor]
"""Scalars on the device. Sums over the loss tokens of a micro-batch, but maxima where the name ends in `_max`."""


class TokenStats(NamedTuple):
    """Entry t speaks of the token input_ids[t]; 0 where it is not trained on."""

    logprobs: torch.Tensor
    """[T] float32, with gradient: log pi(input_ids[t] | what stands before it in its sequence), at the temperature"""
    entropy: torch.Tensor
    """[T] float32, detached: the entropy in nats of the distribution that the token was drawn from"""


class _Head(NamedTuple):
    """The last layer of a causal language model, and what the architecture does to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, V] float32. Under autocast the product is in the low precision, what follows in fp32."""
        logits = linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def token_logprobs(
    model: PreTrainedModel,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    chunk_size: int = 4096,
    with_entropy: bool = True,
    compile_head: bool = False,
    num_loss_tokens: int | None = None,
) -> TokenStats:
    """Log-probabilities and entropies of the tokens that are trained on. Logits are divided by the temperature in fp32.

    Args:
        model: A causal language model after `prepare_packed_attention`.
        micro_batch: On the model's device.
        temperature: The one that the completions were sampled at.
        chunk_size: Tokens that meet the LM head at a time; its logits need chunk_size x vocabulary x 4 bytes, a few
            times over.
        with_entropy: Compute entropies; zeros otherwise.
        compile_head: Compile the work on a chunk (worth it on a GPU with a large vocabulary).
        num_loss_tokens: The number of True in `micro_batch.loss_mask`, if the caller knows it on the host; else the
            host waits for the device once to learn it.

    Raises:
        ValueError: if the temperature or the chunk size is not positive, or the model has no separate LM head.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0 to train on log-probs, not {temperature}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    head = _head(model)
    hidden = model.base_model(
        input_ids=micro_batch.input_ids.unsqueeze(0),
        position_ids=micro_batch.position_ids.unsqueeze(0),
        use_cache=False,
        **packed_attention_kwargs(micro_batch),
    ).last_hidden_state[0]
    count = int(micro_batch.loss_mask.sum()) if num_loss_tokens is None else num_loss_tokens
    positions = torch.nonzero_static(micro_batch.loss_mask, size=count).squeeze(1)  # [N], never a sequence's first
    targets = micro_batch.input_ids[positions]
    predictors = hidden.index_select(0, positions - 1)
    chunk_stats = _compiled_chunk_stats() if compile_head else _chunk_stats
    stats = [
        checkpoint(chunk_stats, head, h, t, temperature, with_entropy, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(torch.split(predictors, chunk_size), torch.split(targets, chunk_size), strict=True)
    ]
    zeros = torch.zeros(micro_batch.input_ids.shape, dtype=torch.float32, device=hidden.device)
    return TokenStats(
        logprobs=zeros.index_copy(0, positions, torch.cat([logprobs for logprobs, _ in stats])),
        entropy=zeros.index_copy(0, positions, torch.cat([entropy for _, entropy in stats])),
    )


def _chunk_stats(
    head: _Head, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, H], [N] -> log-probs [N] and entropies [N]."""
    logits = head.logits(hidden)
    if temperature != 1.0:
        logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
    if not with_entropy:
        return logprobs, torch.zeros_like(logprobs)
    with torch.no_grad():
        entropy = normaliser - ((logits - normaliser.unsqueeze(-1)).exp() * logits).sum(-1)
    return logprobs, entropy


@cache
def _compiled_chunk_stats() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_chunk_stats, dynamic=True)


def _head(model: PreTrainedModel) -> _Head:
    name, config = type(model).__name__, model.config.get_text_config()
    layer: torch.nn.Linear | None = model.get_output_embeddings()
    if layer is None or model.base_model is model:
        raise ValueError(f"{name} has no LM head apart from its backbone; load it with AutoModelForCausalLM")
    if getattr(config, "lm_head_multiplier", 1.0) != 1.0:
        raise ValueError(f"{name} multiplies its logits by lm_head_multiplier, which is not supported")
    # Cohere multiplies its logits, Granite divides them, Gemma 2 caps them.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return _Head(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def check_head(model: PreTrainedModel) -> None:
    """Prove on a prepared model, with a tiny forward, that the logits here are those of the model itself.

    Worth its milliseconds once a run: an architecture may scale or shift its logits in a way unknown here.

    Raises:
        ValueError: if they differ.
    """
    head = _head(model)
    device = head.weight.device
    length = 8
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            arguments = {
                "input_ids": torch.arange(1, length + 1, device=device).unsqueeze(0) % head.weight.shape[0],
                "position_ids": torch.arange(length, device=device).unsqueeze(0),
                "use_cache": False,
                **boundary_kwargs(cu_seqlens, length),
            }
            theirs = model(**arguments).logits[0].float()
            ours = head.logits(model.base_model(**arguments).last_hidden_state[0])
    finally:
        model.train(training)
    gap = (ours - theirs).abs().max().item()
    if not gap <= 1e-2 * max(1.0, theirs.abs().max().item()):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the LM head in a way that is not supported "
            f"(largest difference {gap:.2g}); its log-probs would be wrong"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What all losses share; see `LOSSES` for the clips that belong to each."""

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference policy; 0 needs no reference log-probs."""
    tis_cap: float | None = None
    """Truncated importance sampling: the sampler's distribution differs a little from the trainer's even with equal
    weights, so a token's loss is multiplied by min(old / rollout, tis_cap), detached. None is no correction."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low must be in [0, 1] (1 is no lower clip), not {self.clip_low}")
        if self.clip_high < 0:
            raise ValueError(f"clip_high must be at least 0, not {self.clip_high}")
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must be at least 0 (0 is no KL term), not {self.kl_coef}")
        if self.tis_cap is not None and self.tis_cap <= 0:
            raise ValueError(f"tis_cap must be above 0, or None for no correction, not {self.tis_cap}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """All that a loss may look at. Log-probs are 0 where a token is not trained on."""

    logprobs: torch.Tensor
    """[T], with gradient"""
    old_logprobs: torch.Tensor
    """[T], detached: the policy's at the start of the update; equal to `logprobs` with one update a batch"""
    rollout_logprobs: torch.Tensor | None
    """[T], the sampler's own"""
    ref_logprobs: torch.Tensor | None
    """[T], the reference policy's"""
    entropy: torch.Tensor
    """[T], detached"""
    advantages: torch.Tensor
    """[T]"""
    loss_mask: torch.Tensor
    """[T] bool"""
    loss_weights: torch.Tensor
    """[T], 0 off the mask"""
    cu_seqlens: torch.Tensor
    """[S + 1] int32"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A micro-batch's share of the update's loss, and what there is to log about it."""

    loss: torch.Tensor
    """Scalar with gradient; those of an update add up."""
    metrics: Metrics


Loss = Callable[[LossInputs, LossSettings], LossOutput]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """A loss, the normalisation that belongs to it, and the clips that its paper uses."""

    loss: Loss
    normalisation: Normalisation
    clip_low: float
    clip_high: float
    source: str


def loss_inputs(
    stats: TokenStats,
    micro_batch: MicroBatch,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
) -> LossInputs:
    """Bring together what a loss looks at. Without `old_logprobs` the update is strictly on-policy: old is the policy
    itself, every ratio is 1, and the gradient is that of the plain policy gradient."""
    return LossInputs(
        logprobs=stats.logprobs,
        old_logprobs=(stats.logprobs if old_logprobs is None else old_logprobs).detach(),
        rollout_logprobs=micro_batch.rollout_logprobs,
        ref_logprobs=None if ref_logprobs is None else ref_logprobs.detach(),
        entropy=stats.entropy,
        advantages=micro_batch.advantages,
        loss_mask=micro_batch.loss_mask,
        loss_weights=micro_batch.loss_weights,
        cu_seqlens=micro_batch.cu_seqlens,
    )


def clipped_token_loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """PPO's clipped surrogate on each token:

        l_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)

    GRPO (arXiv 2402.03300, eq. 3), Dr. GRPO (arXiv 2503.20783) and DAPO (arXiv 2503.14476, eq. 8, with clip_high above
    clip_low) share it; they differ in what the tokens' losses are divided by, which is in `loss_weights`.
    """
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    return _finish(inputs, settings, *_clipped_surrogate(ratio, inputs.advantages, settings), ratio)


def gspo_loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """GSPO (arXiv 2507.18071, eq. 5 to 7): the ratio, and so the clip, belongs to the sequence y.

    s = (pi(y) / old(y))^(1 / |y|) = exp(mean over t of (log pi_t - log old_t))
    l_t = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), the same for each token of y
    """
    num_sequences = inputs.cu_seqlens.shape[0] - 1
    token = torch.arange(inputs.logprobs.shape[0], device=inputs.logprobs.device, dtype=inputs.cu_seqlens.dtype)
    sequence = torch.searchsorted(inputs.cu_seqlens[1:], token, right=True)  # [T]

    def per_sequence(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(num_sequences).index_add(0, sequence, values)

    mask = inputs.loss_mask.float()
    log_ratio = per_sequence((inputs.logprobs - inputs.old_logprobs) * mask) / per_sequence(mask).clamp(min=1)
    ratio = log_ratio.exp()[sequence]
    return _finish(inputs, settings, *_clipped_surrogate(ratio, inputs.advantages, settings), ratio)


def cispo_loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): the clipped ratio is a weight without gradient, so that no
    token's gradient is cut off by the clip.

        l_t = -detach(clip(r_t, 1 - clip_low, 1 + clip_high)) A log pi_t
    """
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    weight = ratio.detach().clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return _finish(inputs, settings, -weight * inputs.advantages * inputs.logprobs, weight != ratio.detach(), ratio)


def _clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token [T], and whether the clip has cut its gradient off [T]."""
    free = ratio * advantages
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages
    return -torch.minimum(free, clipped), clipped < free


def _finish(
    inputs: LossInputs, settings: LossSettings, token_loss: torch.Tensor, clipped: torch.Tensor, ratio: torch.Tensor
) -> LossOutput:
    """What all losses have in common: the correction for the sampler, the KL term, the weighted sum, the metrics.

        loss = sum over t of loss_weights_t (min(old_t / rollout_t, tis_cap) l_t + kl_coef k3(ref_t / pi_t))

    Truncated importance sampling: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training". k3(x) = x - 1 - log x, an unbiased estimator of the KL divergence that is never negative: Schulman 2020,
    "Approximating KL divergence", and GRPO's eq. 4.
    """
    mask = inputs.loss_mask
    old_ratio = inputs.logprobs.detach() - inputs.old_logprobs
    sums = {
        "clip_fraction": clipped,
        "ratio_mean": ratio.detach(),
        "kl_old": _k3(old_ratio),
        "entropy": inputs.entropy,
    }
    maxima: Metrics = {}
    if inputs.rollout_logprobs is not None:
        log_gap = inputs.old_logprobs - inputs.rollout_logprobs
        sums["logprob_gap_mean"] = log_gap.abs()
        sums["kl_rollout"] = _k3(log_gap)
        maxima["logprob_gap_max"] = (log_gap.abs() * mask).max()
    if settings.tis_cap is not None:
        if inputs.rollout_logprobs is None:
            raise ValueError(f"tis_cap {settings.tis_cap} needs the sampler's log-probs, and the engine returned none")
        importance = (inputs.old_logprobs - inputs.rollout_logprobs).exp()
        weight = importance.clamp(max=settings.tis_cap)
        token_loss = weight * token_loss
        sums["tis_weight_mean"] = weight
        sums["tis_capped_fraction"] = importance > settings.tis_cap
    if settings.kl_coef > 0 and inputs.ref_logprobs is None:
        raise ValueError(f"kl_coef {settings.kl_coef} needs the reference policy's log-probs")
    if inputs.ref_logprobs is not None:
        kl = _k3(inputs.ref_logprobs - inputs.logprobs)
        sums["kl_ref"] = kl.detach()
        if settings.kl_coef > 0:
            token_loss = token_loss + settings.kl_coef * kl
    loss = (inputs.loss_weights * token_loss).sum()
    metrics = {name: (values * mask).sum(dtype=torch.float32) for name, values in sums.items()}
    return LossOutput(
        loss=loss,
        metrics={"loss": loss.detach(), "num_loss_tokens": mask.sum(dtype=torch.float32), **metrics, **maxima},
    )


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 - x: estimates KL(p || q) for tokens drawn from p, with x = log q - log p."""
    return torch.expm1(log_ratio) - log_ratio


def reduce_metrics(outputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """The figures of an update from the metrics of its micro-batches: `loss` and `num_loss_tokens` are sums, `*_max`
    maxima, all others means over the update's loss tokens. Waits for the device once.

    Raises:
        ValueError: if there are no micro-batches.
    """
    if not outputs:
        raise ValueError("an update without micro-batches has no metrics")
    names = list(outputs[0])
    table = torch.stack([torch.stack([metrics[name].float() for name in names]) for metrics in outputs])
    columns = dict(zip(names, table.double().cpu().unbind(1), strict=True))
    tokens = float(columns["num_loss_tokens"].sum())
    figures: dict[str, float] = {}
    for name, column in columns.items():
        if name.endswith("_max"):
            figures[name] = float(column.max())
        elif name in ("loss", "num_loss_tokens"):
            figures[name] = float(column.sum())
        else:
            figures[name] = float(column.sum()) / tokens
    return figures


LOSSES: dict[str, LossSpec] = {
    "grpo": LossSpec(
        loss=clipped_token_loss,
        normalisation="sequence_mean",
        clip_low=0.2,
        clip_high=0.2,
        source="arXiv 2402.03300",
    ),
    "dr_grpo": LossSpec(
        loss=clipped_token_loss,
        normalisation="constant",
        clip_low=0.2,
        clip_high=0.2,
        source="arXiv 2503.20783",
    ),
    "dapo": LossSpec(
        loss=clipped_token_loss,
        normalisation="token_mean",
        clip_low=0.2,
        clip_high=0.28,
        source="arXiv 2503.14476",
    ),
    "gspo": LossSpec(
        loss=gspo_loss,
        normalisation="sequence_mean",
        clip_low=3e-4,
        clip_high=4e-4,
        source="arXiv 2507.18071",
    ),
    "cispo": LossSpec(
        loss=cispo_loss,
        normalisation="token_mean",
        clip_low=1.0,
        clip_high=4.0,
        source="arXiv 2506.13585",
    ),
}
"""The losses by name. CISPO's paper gives no clips but says that the lower one is switched off; 1 + 4 is the upper
bound that arXiv 2510.13786 settles on."""
