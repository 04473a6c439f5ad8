"""The policy losses, made of the token log-probabilities of `logprobs`.

A loss is a plain function of `LossInputs` and `LossSettings`. Each returns the sum over t of loss_weights[t] * l[t]; the
weights hold the normalisation over the whole update (see `packing`), so the losses and gradients of micro-batches just
add up, however the update was cut. Metrics come as sums on the device and are turned into figures once an update, by
`reduce_columns`.

The sampler's log-probs may be unknown, for some samples or for all: its share in the metrics is then over the tokens
where they are known. Only the correction for the sampler needs them all; `check_rollout_logprobs` says so on the host.

Notation in the formulas: pi the policy being trained, old the policy at the start of the update, rollout the sampler's
own figures, ref the reference policy; A the advantage; r = pi / old, the ratio of the token's probabilities.

With one optimizer step an update, the default, old is the policy itself: every r is 1, and no clip acts. Then `cispo` has
`dapo`'s gradient to the bit, and `gspo` has `grpo`'s loss to the bit and its gradient but for the rounding of one sum a
sequence. Only what a token's loss is divided by tells losses apart, until `epochs_per_update` is above 1.

Left out on purpose: an entropy bonus, value losses, and losses over a full vocabulary (distillation).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ludic.train.logprobs import TokenStats
from ludic.train.packing import Normalisation
from ludic.types import MicroBatch, TrainingSample

Metrics = dict[str, torch.Tensor]
"""Scalars on the device. Sums over the loss tokens of a micro-batch, but maxima where the name ends in `_max`."""


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
    counts_zero_variance: bool
    """Whether the paper's mean counts sequences of groups without variance, whose policy loss is 0."""
    clip_low: float
    clip_high: float


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
    "Approximating KL divergence", and GRPO's eq. 4. The KL term is owed by every sampled token, also where the advantage is 0.
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
        known = mask & log_gap.isfinite()  # what is not finite of the policy is counted by itself, and stops the update
        log_gap = log_gap.where(known, 0)
        sums["num_gap_tokens"] = known
        sums["logprob_gap_mean"] = log_gap.abs()
        sums["kl_rollout"] = _k3(log_gap)
        maxima["logprob_gap_max"] = log_gap.abs().max()
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
    counts = {
        "num_loss_tokens": mask.sum(dtype=torch.float32),
        "num_nonfinite_policy_logprobs": (~inputs.logprobs.detach().isfinite()).sum(dtype=torch.float32),
    }
    return LossOutput(loss=loss, metrics={"loss": loss.detach(), **counts, **metrics, **maxima})


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 - x: estimates KL(p || q) for tokens drawn from p, with x = log q - log p."""
    return torch.expm1(log_ratio) - log_ratio


_COUNTS = ("num_loss_tokens", "num_gap_tokens")
_OVER_GAP_TOKENS = ("logprob_gap_mean", "kl_rollout")


def fetch_metrics(
    outputs: Sequence[Mapping[str, torch.Tensor]], *others: torch.Tensor
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The metrics of M micro-batches by name, [M] float64 on the host, and other scalars of the device with them. Waits for
    the device once.

    Raises:
        ValueError: if there are no micro-batches.
    """
    if not outputs:
        raise ValueError("an update without micro-batches has no metrics")
    names = list(dict.fromkeys(name for metrics in outputs for name in metrics))
    none = torch.zeros_like(outputs[0]["loss"])  # what a row lacks: one without the sampler's log-probs has no gap
    values = [metrics.get(name, none) for metrics in outputs for name in names]
    fetched = torch.stack([value.float() for value in (*values, *others)]).double().cpu()
    table = fetched[: len(values)].view(len(outputs), len(names))
    return dict(zip(names, table.unbind(1), strict=True)), fetched[len(values) :].tolist()


def reduce_columns(columns: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], list[str]]:
    """The figures of an update from those of its micro-batches, by name, and the names of those that are not finite.

    `loss` and counts (`num_...`) are sums, `*_max` maxima, all others means over the update's loss tokens, but
    `logprob_gap_mean` and `kl_rollout` over those whose log-prob the sampler gave (`num_gap_tokens`); without any, what
    compares with the sampler is absent. So is a figure that is not finite: a NaN in a log is read as a gap or as a zero,
    its name in the second part of the answer is not.
    """
    tokens, gap_tokens = (float(columns[name].sum()) if name in columns else 0.0 for name in _COUNTS)
    figures: dict[str, float] = {}
    for name, column in columns.items():
        if (
            name == "num_nonfinite_policy_logprobs"
        ):  # of interest where there are any, and then `nonfinite` reports them
            continue
        if gap_tokens == 0 and name in ("num_gap_tokens", "logprob_gap_max", *_OVER_GAP_TOKENS):
            continue
        if name.endswith("_max"):
            figures[name] = float(column.max())
        elif name == "loss" or name in _COUNTS:
            figures[name] = float(column.sum())
        else:
            figures[name] = float(column.sum()) / (gap_tokens if name in _OVER_GAP_TOKENS else tokens)
    broken = [name for name, value in figures.items() if not math.isfinite(value)]
    return {name: value for name, value in figures.items() if name not in broken}, broken


def check_rollout_logprobs(samples: Sequence[TrainingSample], settings: LossSettings) -> None:
    """On the host and before the first micro-batch: a correction for the sampler needs its log-probs of all samples.

    Raises:
        ValueError: if some are unknown and `tis_cap` asks for them; says how many.
    """
    unknown = sum(sample.rollout_logprobs is None for sample in samples)
    if settings.tis_cap is not None and unknown:
        raise ValueError(
            f"tis_cap {settings.tis_cap} needs the sampler's log-probs, and {unknown} of {len(samples)} samples have "
            "none; have the engine return them for all, or train without the correction"
        )


LOSSES: dict[str, LossSpec] = {
    "grpo": LossSpec(  # arXiv 2402.03300
        loss=clipped_token_loss,
        normalisation="sequence_mean",
        counts_zero_variance=True,
        clip_low=0.2,
        clip_high=0.2,
    ),
    "dr_grpo": LossSpec(  # arXiv 2503.20783
        loss=clipped_token_loss,
        normalisation="constant",
        counts_zero_variance=True,
        clip_low=0.2,
        clip_high=0.2,
    ),
    "dapo": LossSpec(  # arXiv 2503.14476
        loss=clipped_token_loss,
        normalisation="token_mean",
        counts_zero_variance=False,
        clip_low=0.2,
        clip_high=0.28,
    ),
    "gspo": LossSpec(  # arXiv 2507.18071
        loss=gspo_loss,
        normalisation="sequence_mean",
        counts_zero_variance=True,
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    "cispo": LossSpec(  # arXiv 2506.13585
        loss=cispo_loss,
        normalisation="token_mean",
        counts_zero_variance=False,
        clip_low=1.0,
        clip_high=4.0,
    ),
}
"""The losses by name. DAPO and CISPO draw other prompts until every group has variance, the others keep what was drawn: see
`packing.Normalisation` for what that means here. CISPO's paper gives no clips but says that the lower one is switched off;
1 + 4 is the upper bound that arXiv 2510.13786 settles on."""
