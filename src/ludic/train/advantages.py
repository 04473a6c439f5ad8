"""Group-relative advantages: scored rollout groups become samples to train on.

A completion is judged only against the other completions of the same prompt, so there is no value model. Left out on
purpose: baselines (not scales) across prompts. Groups without variance are counted here; `prompt_source` looks for others.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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


def varies_without_overlong(group: RolloutGroup) -> bool:
    """Whether the rewards of a group differ before the punishment for length (`rollout.overlong`) is added.

    What DAPO's filter asks (arXiv 2503.14476, eq. 11): a group that is wrong throughout stays uninformative where one of its
    completions is also too long.

    Raises:
        ValueError: if a reward is not finite.
    """
    scores = [rollout.score for rollout in group.rollouts]
    return has_variance([score.reward - score.parts.get("overlong", 0.0) for score in scores])


def group_advantages(
    rewards: Sequence[float], *, normalise_std: bool, baseline: Literal["mean", "leave_one_out"] = "mean"
) -> list[float]:
    """The advantage of each member of one group, from the rewards [G] of that group.

    With `normalise_std`, (r - mean) / (std + 1e-6) as in GRPO (arXiv 2402.03300, section 4.1.2); std is the sample
    standard deviation (n - 1), as trainers in use compute it. Without, r - mean as in Dr. GRPO (arXiv 2503.20783),
    which shows that the division favours prompts that are nearly always or nearly never solved. All zeros where the
    rewards do not differ.

    With the baseline `leave_one_out`, r minus the mean of the *other* rewards (RLOO, arXiv 2402.14740), so that
    the baseline does not depend on the completion that it judges. That is G / (G - 1) (r - mean).

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
    if baseline == "leave_one_out":
        scale *= (len(rewards) - 1) / len(rewards)
    return [(reward - mean) / scale for reward in rewards]


class BatchStd:
    """The standard deviation of an update's group-centred rewards, gathered group by group as they come in.

    REINFORCE++-baseline (arXiv 2501.03262): a reward has the mean of its group taken off, and is then divided
    by the standard deviation over the whole batch, which no single easy or hard prompt can make small. (Lite PPO,
    arXiv 2508.08221, takes the standard deviation of the rewards themselves, which also holds the spread between prompts.)
    It is one number an update, known when all its rewards are, so it scales the summed gradient.
    """

    def __init__(self) -> None:
        self._count, self._squares = 0, 0.0

    def add(self, rewards: Sequence[float]) -> None:
        """Take in the rewards [G] of one group, without variance too."""
        mean = statistics.fmean(rewards)
        self._count += len(rewards)
        self._squares += sum((reward - mean) ** 2 for reward in rewards)

    @property
    def scale(self) -> float:
        """What advantages are multiplied by: 1 / (std + 1e-6), std with n - 1. The mean of what is centred is 0."""
        return 1.0 / (math.sqrt(self._squares / max(1, self._count - 1)) + _STD_EPS)


def training_samples(
    groups: Sequence[RolloutGroup],
    *,
    scale_rewards: bool,
    mask_truncated: bool,
    keep_zero_variance: bool = False,
    baseline: Literal["mean", "leave_one_out"] = "mean",
) -> tuple[list[TrainingSample], GroupStats]:
    """The samples that one update trains on, in the order of the groups and their members, and what was left out.

    Groups without variance have a policy loss of 0 and need no forward pass: they are left out, and counted in
    `num_without_loss`.

    Args:
        groups: Scored groups.
        scale_rewards: Divide by the standard deviation of the group (GRPO) or not (Dr. GRPO).
        mask_truncated: Leave completions with finish reason `length` out of the loss (DAPO's overlong filtering). Their rewards
            stay in the mean of the group.
        keep_zero_variance: Train on groups without variance too, for a KL penalty, which every sampled token owes.
        baseline: What a reward is compared with (see `group_advantages`).

    Raises:
        ValueError: for a rollout with an empty prompt or completion, a reward that is not finite, or a completion whose
            log-probs do not match its tokens.
    """
    samples: list[TrainingSample] = []
    num_zero_variance_groups = num_truncated_masked = num_without_loss = num_nonfinite_logprobs = 0
    for group in groups:
        num_nonfinite_logprobs += sum(not _has_finite_logprobs(rollout.completion) for rollout in group.rollouts)
        rewards = [rollout.score.reward for rollout in group.rollouts]
        advantages = group_advantages(rewards, normalise_std=scale_rewards, baseline=baseline)
        flat = not any(advantages)
        num_zero_variance_groups += flat
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
        loss_mask=[False] * len(prompt) + completion.sampled_mask,
        rollout_logprobs=None if logprobs is None else [0.0] * len(prompt) + logprobs,
        advantage=advantage,
        rollout=(rollout.group_id, rollout.rollout_id),
    )
