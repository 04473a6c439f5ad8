"""What is done about tokens that another policy sampled: importance weights and masks.

rho_t = old_t / rollout_t is the ratio of the trainer's policy to the sampler's, detached. The two differ because the
sampler's weights are older (`max_staleness`), and because the same weights round otherwise in another program.

A masked token has no policy loss. It stays in what the loss is divided by, as in the papers: the mean is still one over
all sampled tokens, of which the masked ones contribute 0. (verl and slime also take it out of the denominator.) The KL term
stays too: every sampled token owes it.

With `ratio_to` "sampler" the loss's own ratio is the importance weight, so a mask only masks.
"""

from collections.abc import Sequence

import torch

from ludic.train.loss_inputs import LossInputs, LossSettings, bounded_exp
from ludic.types import TrainingSample


def importance_weights(
    inputs: LossInputs, settings: LossSettings
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """What each token's policy loss is multiplied by [T], None for 1 everywhere; and figures of each token [T].

    - `tis_cap`: min(rho_t, tis_cap). Truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly
      brings you off-policy RL training".
    - `importance_mask` "token": rho_t where mask_low <= rho_t <= mask_high, else 0. IcePop, in Ring-1T, arXiv 2510.18855.
    - "sequence": rho(y) where mask_low <= rho(y) <= mask_high, else 0, with rho(y) the product of the sequence's rho_t.
      Masked importance sampling, Liu et al. 2025, "When speed kills stability: demystifying RL collapse from the
      training-inference mismatch".
    - "geometric": 1 where the geometric mean rho(y)^(1 / |y|) is in the band, else 0, times the weight of `tis_cap` if that
      is set. Same source: unlike the product, the mean does not mask a sequence for being long.

    Raises:
        ValueError: the sampler's log-probs are needed, and there are none.
    """
    if not settings.needs_rollout_logprobs:
        return None, {}
    if inputs.rollout_logprobs is None:
        raise ValueError(f"{_why(settings)} needs the sampler's log-probs, and the engine returned none")
    log_rho = inputs.old_logprobs - inputs.rollout_logprobs
    weight: torch.Tensor | None = None
    figures: dict[str, torch.Tensor] = {}
    if settings.tis_cap is not None:
        rho = bounded_exp(log_rho)
        weight = rho.clamp(max=settings.tis_cap)
        figures["tis_capped_fraction"] = rho > settings.tis_cap
    if settings.importance_mask != "none":
        if settings.importance_mask == "sequence":
            log_rho = inputs.sequence_sums(log_rho)
        elif settings.importance_mask == "geometric":
            log_rho = inputs.sequence_means(log_rho)
        rho = bounded_exp(log_rho)
        inside = (rho >= settings.mask_low) & (rho <= settings.mask_high)
        figures["importance_masked_fraction"] = ~inside
        carries_weight = settings.importance_mask != "geometric" and settings.ratio_to == "update"
        factor = rho if carries_weight else torch.ones_like(rho) if weight is None else weight
        weight = factor.where(inside, 0)
    if weight is not None:
        figures["tis_weight_mean"] = weight
    return weight, figures


def _why(settings: LossSettings) -> str:
    """The setting that asks for the sampler's log-probs."""
    if settings.tis_cap is not None:
        return f"tis_cap {settings.tis_cap}"
    if settings.importance_mask != "none":
        return f"importance_mask {settings.importance_mask}"
    return f"ratio_to {settings.ratio_to}"


def check_rollout_logprobs(samples: Sequence[TrainingSample], settings: LossSettings) -> None:
    """On the host and before the first micro-batch: a correction for the sampler needs its log-probs of all samples.

    Raises:
        ValueError: if some are unknown and the settings ask for them; says how many.
    """
    unknown = sum(sample.rollout_logprobs is None for sample in samples)
    if settings.needs_rollout_logprobs and unknown:
        raise ValueError(
            f"{_why(settings)} needs the sampler's log-probs, and {unknown} of {len(samples)} samples have "
            "none; have the engine return them for all, or train without the correction"
        )
