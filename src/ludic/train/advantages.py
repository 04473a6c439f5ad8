"""Group-relative advantages: scored rollout groups become samples to train on.

A completion is judged only against the other completions of the same prompt, so there is no value model. Left out on
purpose: baselines across prompts, and resampling of groups without variance; they are counted instead, and it is for
the run's metrics to say how many prompts teach nothing.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ludic.types import Completion, Rollout, RolloutGroup, TrainingSample

_STD_EPS = 1e-6
"""Added to the standard deviation; rewards are of the order of 1, and groups without variance never come this far."""
_VARIANCE_TOLERANCE = 1e-9
"""Rewards closer than this, relative to their size, are equal: a sum of parts may round differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """What became of the groups of one update."""

    num_zero_variance_groups: int
    """Groups whose rewards are all equal, so that every advantage is 0."""
    num_truncated_masked: int
    """Truncated completions left out of the loss by `mask_truncated`, in groups that are trained on."""
    num_samples: int
    """Samples that are left to train on."""
    num_without_loss: int
    """Sequences of groups without variance that are not among the samples, but for those that `mask_truncated` leaves out:
    their loss is 0, and some losses count them in N (see `packing.Normalisation`)."""
    num_nonfinite_logprobs: int
    """Completions, of all groups, with a log-prob of the sampler that is not finite: they count as without."""


def has_variance(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group differ, that is whether the group says anything about better and worse.

    Raises:
        ValueError: if a reward is not finite.
    """
    for reward in rewards:
        if not math.isfinite(reward):
            raise ValueError(f"a reward must be finite, not {reward}; let the environment return a bounded score")
    if len(rewards) < 2:
        return False
    low, high = min(rewards), max(rewards)
    return high - low > _VARIANCE_TOLERANCE * max(1.0, abs(low), abs(high))


def group_advantages(rewards: Sequence[float], *, normalise_std: bool) -> list[float]:
    """The advantage of each member of one group, from the rewards [G] of that group.

    With `normalise_std`, (r - mean) / (std + 1e-6) as in GRPO (arXiv 2402.03300, section 4.1.2); std is the sample
    standard deviation (n - 1), as trainers in use compute it. Without, r - mean as in Dr. GRPO (arXiv 2503.20783),
    which shows that the division favours prompts that are nearly always or nearly never solved. All zeros where the
    rewards do not differ.

    Raises:
        ValueError: if a reward is not finite.

    Example:
        >>> group_advantages([1.0, 0.0, 0.0, 1.0], normalise_std=False)
        [0.5, -0.5, -0.5, 0.5]
    """
    if not has_variance(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + _STD_EPS if normalise_std else 1.0
    return [(reward - mean) / scale for reward in rewards]


def training_samples(
    groups: Sequence[RolloutGroup], *, scale_rewards: bool, mask_truncated: bool, keep_zero_variance: bool = False
) -> tuple[list[TrainingSample], GroupStats]:
    """The samples that one update trains on, in the order of the groups and their members, and what was left out.

    In groups without variance every advantage is 0, so the policy loss of their tokens is 0 and they need no forward pass.
    They are left out here and counted in `num_without_loss`. A KL penalty is owed by every sampled token: with
    `keep_zero_variance` they are samples like all others, with an advantage of 0. With `mask_truncated` a completion that was
    cut off keeps its reward in the mean of its group but is not trained on (DAPO's overlong filtering).

    Args:
        groups: Scored groups.
        scale_rewards: Divide by the standard deviation of the group (GRPO) or not (Dr. GRPO).
        mask_truncated: Leave completions with finish reason `length` out of the loss.
        keep_zero_variance: Train on groups without variance too.

    Raises:
        ValueError: for a rollout with an empty prompt or completion, a reward that is not finite, or a completion whose
            log-probs do not match its tokens.
    """
    samples: list[TrainingSample] = []
    num_zero_variance_groups = num_truncated_masked = num_without_loss = num_nonfinite_logprobs = 0
    for group in groups:
        num_nonfinite_logprobs += sum(not _has_finite_logprobs(rollout.completion) for rollout in group.rollouts)
        rewards = [rollout.score.reward for rollout in group.rollouts]
        flat = not has_variance(rewards)
        num_zero_variance_groups += flat
        advantages = group_advantages(rewards, normalise_std=scale_rewards)
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            masked = mask_truncated and rollout.completion.finish_reason == "length"
            if flat and not keep_zero_variance:
                num_without_loss += not masked
            elif masked:
                num_truncated_masked += 1
            else:
                samples.append(_training_sample(rollout, advantage))
    stats = GroupStats(
        num_zero_variance_groups=num_zero_variance_groups,
        num_truncated_masked=num_truncated_masked,
        num_samples=len(samples),
        num_without_loss=num_without_loss,
        num_nonfinite_logprobs=num_nonfinite_logprobs,
    )
    return samples, stats


def _has_finite_logprobs(completion: Completion) -> bool:
    """Whether the sampler's log-probs are fit to compare or correct with, or were never given. Beyond this point NaN means
    that one is unknown: a sampler's own would pass for that, or poison a correction."""
    return completion.logprobs is None or all(map(math.isfinite, completion.logprobs))


def _training_sample(rollout: Rollout, advantage: float) -> TrainingSample:
    prompt, completion = rollout.prompt_token_ids, rollout.completion
    name = f"rollout {rollout.rollout_id} of group {rollout.group_id}"
    if not prompt or not completion.token_ids:
        raise ValueError(
            f"{name} has {len(prompt)} prompt and {len(completion.token_ids)} completion tokens; both need at least 1"
        )
    if completion.logprobs is not None and len(completion.logprobs) != len(completion.token_ids):
        raise ValueError(
            f"{name} has {len(completion.logprobs)} log-probs for {len(completion.token_ids)} completion tokens; "
            "the engine must return one a token, or None"
        )
    logprobs = completion.logprobs if _has_finite_logprobs(completion) else None
    return TrainingSample(
        token_ids=[*prompt, *completion.token_ids],
        loss_mask=[False] * len(prompt) + [True] * len(completion.token_ids),
        rollout_logprobs=None if logprobs is None else [0.0] * len(prompt) + logprobs,
        advantage=advantage,
    )
