"""What a loss is given and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ludic.config import ImportanceMask, RatioTo
from ludic.train.logprobs import TokenStats
from ludic.types import MicroBatch

Metrics = dict[str, torch.Tensor]
"""Scalars on the device. Sums over the loss tokens of a micro-batch, but maxima where the name ends in `_max`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What all losses share, checked by `GRPOConfig`; see `LOSSES` for the clips that belong to each."""

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Where the advantage is negative, the loss of a token is at most this times |A|; None is no such bound."""
    ratio_to: RatioTo = "update"
    """Which policy the ratio is to: the trainer's own at the start of the update, or the sampler's as it drew the token."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference policy; 0 needs no reference log-probs."""
    tis_cap: float | None = None
    """Truncated importance sampling: the cap of the weight old / rollout (see `corrections`). None is no weight."""
    importance_mask: ImportanceMask = "none"
    """What is left out where old / rollout is outside `mask_low` to `mask_high` (see `corrections`)."""
    mask_low: float = 0.0
    mask_high: float = float("inf")

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Whether a loss cannot be computed without the sampler's log-probs."""
        return self.tis_cap is not None or self.importance_mask != "none" or self.ratio_to == "sampler"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """All that a loss may look at. Log-probs are 0 where a token is not trained on."""

    logprobs: torch.Tensor
    """[T], with gradient"""
    old_logprobs: torch.Tensor
    """[T], detached: the policy's at the start of the update; equal to `logprobs` with one optimizer step an
    update."""
    rollout_logprobs: torch.Tensor | None
    """[T], the sampler's own, NaN where unknown"""
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
    """[S + 1] int32: segments, each with the trained tokens of one sequence, or with none"""

    def sequence_sums(self, values: torch.Tensor) -> torch.Tensor:
        """[T]: at each token the sum of `values` [T] over the loss tokens of its sequence."""
        num_segments = self.cu_seqlens.shape[0] - 1
        token = torch.arange(values.shape[0], device=values.device, dtype=self.cu_seqlens.dtype)
        segment = torch.searchsorted(self.cu_seqlens[1:], token, right=True)  # [T]
        sums = values.new_zeros(num_segments).index_add(0, segment, values * self.loss_mask)
        return sums[segment]

    def sequence_means(self, values: torch.Tensor) -> torch.Tensor:
        """[T]: at each token the mean of `values` [T] over the loss tokens of its sequence."""
        return self.sequence_sums(values) / self.sequence_sums(torch.ones_like(values)).clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A micro-batch's share of the update's loss, and what there is to log about it."""

    loss: torch.Tensor
    """Scalar with gradient; those of an update add up."""
    metrics: Metrics


Loss = Callable[[LossInputs, LossSettings], LossOutput]


def loss_inputs(
    stats: TokenStats,
    micro_batch: MicroBatch,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
) -> LossInputs:
    """Bring together what a loss looks at. Without `old_logprobs` old is the policy itself: a ratio to it is 1, and the
    gradient is that of the plain policy gradient."""
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


MAX_LOG_RATIO = 20.0
"""Where a log-ratio is cut off before it becomes a ratio, in nats. e^20 is 5e8: a million such tokens add up to 5e14, below
the gradient that is refused (`nonfinite.LARGEST_NORM`) and far below fp32's largest number, which e^89 exceeds. A token
that far off has no gradient by its ratio any more. Below there is nothing to bound: e^-200 is 0."""


def bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(min(x, MAX_LOG_RATIO)), so that one token cannot make the loss of an update infinite."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 - x with x bounded as in `bounded_exp`: estimates KL(p || q) for tokens drawn from p, x = log q - log p.

    Unbiased and never negative: Schulman 2020, "Approximating KL divergence", and GRPO's eq. 4.
    """
    bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(bounded) - bounded
