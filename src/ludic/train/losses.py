"""The policy losses, made of the token log-probabilities of `logprobs`.

A loss is a plain function of `LossInputs` and `LossSettings`. Each returns the sum over t of loss_weights[t] * l[t]; the
weights hold the normalisation over the whole update (see `packing`), so the losses and gradients of micro-batches just
add up, however the update was cut. Metrics come as sums on the device and are turned into figures once an update, by
`loss_metrics.reduce_columns`.

Notation in the formulas: pi the policy being trained, old the policy at the start of the update, rollout the sampler's
own figures, ref the reference policy; A the advantage; r = pi / old, the ratio of the token's probabilities, or pi / rollout
with `ratio_to` "sampler".

With one optimizer step an update and the ratio to the update's start, both defaults, old is the policy itself: every r is 1,
and no clip acts. Only what a token's loss is divided by tells losses apart, until `epochs_per_update` or `mini_batches` is
above 1, or the ratio is to a sampler with older weights.

Left out on purpose: an entropy bonus, value losses, and losses over a full vocabulary (distillation).
"""

from dataclasses import dataclass

import torch

from ludic.config import GRPOConfig
from ludic.train.corrections import importance_weights
from ludic.train.loss_inputs import Loss, LossInputs, LossOutput, LossSettings, Metrics, bounded_exp, k3
from ludic.train.packing import Normalisation


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """A loss, the normalisation that belongs to it, and the clips that its paper uses."""

    loss: Loss
    normalisation: Normalisation
    clip_low: float = 0.2
    clip_high: float = 0.2


def log_ratio(inputs: LossInputs, settings: LossSettings) -> torch.Tensor:
    """[T]: log pi_t - log old_t, or with `ratio_to` "sampler" log pi_t - log rollout_t.

    The ratio to the sampler is that of PPO (arXiv 1707.06347), whose old policy is the one that sampled, and of the losses'
    papers, which all write it so. The ratio to the update's start leaves the rest of the way from the sampler to a weight:
    decoupled PPO (arXiv 2110.00641) and `corrections.importance_weights`.

    Raises:
        ValueError: the sampler's log-probs are needed, and there are none.
    """
    if settings.ratio_to == "update":
        return inputs.logprobs - inputs.old_logprobs
    if inputs.rollout_logprobs is None:
        raise ValueError("ratio_to sampler needs the sampler's log-probs, and the engine returned none")
    return inputs.logprobs - inputs.rollout_logprobs


def clipped_token_loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """PPO's clipped surrogate on each token:

        l_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)

    GRPO (arXiv 2402.03300, eq. 3), Dr. GRPO (arXiv 2503.20783) and DAPO (arXiv 2503.14476, eq. 8, with clip_high above
    clip_low) share it; they differ in what the tokens' losses are divided by, which is in `loss_weights`. Where `dual_clip` is
    set and A is negative, l_t is at most dual_clip |A| (see `_clipped_surrogate`).
    """
    ratio = bounded_exp(log_ratio(inputs, settings))
    return _finish(inputs, settings, *_clipped_surrogate(ratio, inputs.advantages, settings), ratio)


def gspo_loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """GSPO (arXiv 2507.18071, eq. 5 to 7): the ratio, and so the clip, belongs to the sequence y.

    s = (pi(y) / old(y))^(1 / |y|) = exp(mean over t of (log pi_t - log old_t))
    l_t = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), the same for each token of y
    """
    ratio = bounded_exp(inputs.sequence_means(log_ratio(inputs, settings)))
    return _finish(inputs, settings, *_clipped_surrogate(ratio, inputs.advantages, settings), ratio)


def cispo_loss(inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): the clipped ratio is a weight without gradient, so that no
    token's gradient is cut off by the clip.

        l_t = -detach(clip(r_t, 1 - clip_low, 1 + clip_high)) A log pi_t
    """
    ratio = bounded_exp(log_ratio(inputs, settings))
    weight = ratio.detach().clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return _finish(inputs, settings, -weight * inputs.advantages * inputs.logprobs, weight != ratio.detach(), ratio)


def _clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token [T], and whether a clip has cut its gradient off [T].

    With dual_clip c, dual-clip PPO (arXiv 1912.09729): for A < 0 the objective is max(min(r A, clip(r) A), c A). PPO's
    clip leaves r A without a bound there, and a token that the policy has since come to favour could outweigh all others.
    """
    free = ratio * advantages
    objective = torch.minimum(free, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages)
    cut = objective < free
    if settings.dual_clip is not None:
        bound = settings.dual_clip * advantages
        dual = (advantages < 0) & (objective < bound)
        objective, cut = objective.where(~dual, bound), cut | dual
    return -objective, cut


def _finish(
    inputs: LossInputs, settings: LossSettings, token_loss: torch.Tensor, clipped: torch.Tensor, ratio: torch.Tensor
) -> LossOutput:
    """What all losses have in common: the correction for the sampler, the KL term, the weighted sum, the metrics.

        loss = sum over t of loss_weights_t (weight_t l_t + kl_coef k3(ref_t / pi_t))

    The weight is that of `corrections.importance_weights`. The KL term is owed by every sampled token, also where the
    advantage is 0.
    """
    weight, figures = importance_weights(inputs, settings)
    if weight is not None:
        token_loss = weight * token_loss
    sums = _figures(inputs, settings, clipped, ratio) | figures
    if settings.kl_coef > 0 and inputs.ref_logprobs is None:
        raise ValueError(f"kl_coef {settings.kl_coef} needs the reference policy's log-probs")
    if inputs.ref_logprobs is not None:
        kl = k3(inputs.ref_logprobs - inputs.logprobs)
        sums["kl_ref"] = kl.detach()
        if settings.kl_coef > 0:
            token_loss = token_loss + settings.kl_coef * kl
    loss = (inputs.loss_weights * token_loss).sum()
    mask = inputs.loss_mask
    metrics: Metrics = {name: (values * mask).sum(dtype=torch.float32) for name, values in sums.items()}
    metrics |= {
        "loss": loss.detach(),
        "num_loss_tokens": mask.sum(dtype=torch.float32),
        "num_nonfinite_policy_logprobs": (~inputs.logprobs.detach().isfinite()).sum(dtype=torch.float32),
    }
    if inputs.rollout_logprobs is not None:
        metrics |= _gap_to_sampler(inputs, inputs.rollout_logprobs)
    return LossOutput(loss=loss, metrics=metrics)


def _figures(
    inputs: LossInputs, settings: LossSettings, clipped: torch.Tensor, ratio: torch.Tensor
) -> dict[str, torch.Tensor]:
    """[T] each, to be summed over the loss tokens."""
    kl_old = k3(log_ratio(inputs, settings).detach())
    positive, negative = inputs.advantages > 0, inputs.advantages < 0
    return {
        "clip_fraction": clipped,
        "clip_fraction_positive": clipped & positive,
        "clip_fraction_negative": clipped & negative,
        "ratio_mean": ratio.detach(),
        "kl_old": kl_old,
        "kl_old_positive": kl_old * positive,
        "kl_old_negative": kl_old * negative,
        "num_positive_tokens": positive,
        "num_negative_tokens": negative,
        "entropy": inputs.entropy,
    }


def _gap_to_sampler(inputs: LossInputs, rollout_logprobs: torch.Tensor) -> Metrics:
    """Sums and the largest of the gap between the two sides, over the tokens whose log-prob the sampler gave."""
    gap = inputs.old_logprobs - rollout_logprobs
    # What is not finite of the policy is counted by itself, and stops the update.
    known = inputs.loss_mask & gap.isfinite()
    gap = gap.where(known, 0)
    return {
        "num_gap_tokens": known.sum(dtype=torch.float32),
        "logprob_gap": gap.abs().sum(dtype=torch.float32),
        "kl_rollout": k3(gap).sum(dtype=torch.float32),
        "logprob_gap_max": gap.abs().max(),
    }


LOSSES: dict[str, LossSpec] = {
    "grpo": LossSpec(loss=clipped_token_loss, normalisation="sequence_mean"),
    "dr_grpo": LossSpec(loss=clipped_token_loss, normalisation="constant"),
    "dapo": LossSpec(loss=clipped_token_loss, normalisation="token_mean", clip_high=0.28),
    "gspo": LossSpec(loss=gspo_loss, normalisation="sequence_mean", clip_low=3e-4, clip_high=4e-4),
    # The paper gives no clips but says that the lower one is switched off; arXiv 2510.13786 settles on 1 + 4 as the upper.
    "cispo": LossSpec(loss=cispo_loss, normalisation="token_mean", clip_low=1.0, clip_high=4.0),
}
"""The losses by name; their papers stand at the functions and at `packing.Normalisation`."""


def loss_settings(config: GRPOConfig) -> LossSettings:
    """What the run's loss is given: its own settings, or those of the flags in their place."""
    loss, (mask_low, mask_high) = LOSSES[config.loss], config.mask_band
    return LossSettings(
        clip_low=loss.clip_low if config.clip_low is None else config.clip_low,
        clip_high=loss.clip_high if config.clip_high is None else config.clip_high,
        dual_clip=config.dual_clip or None,
        ratio_to=config.ratio_to,
        kl_coef=config.kl_coef,
        tis_cap=config.importance_cap,
        importance_mask=config.importance_mask,
        mask_low=mask_low,
        mask_high=mask_high,
    )
