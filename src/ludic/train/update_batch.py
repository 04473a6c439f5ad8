"""What an update gathers while its rollouts come in, and the figures that are made of it."""

import time
from dataclasses import dataclass, field

from ludic.config import GRPOConfig
from ludic.rollout.engine import WeightSyncReport
from ludic.rollout.groups import GenerationTimes
from ludic.train.advantages import BatchStd, GroupStats, training_samples
from ludic.types import RolloutGroup, TrainingSample


@dataclass(slots=True)
class UpdateBatch:
    """The groups of one update as they come in, and what became of them."""

    started: float = field(default_factory=time.perf_counter)
    groups: list[RolloutGroup] = field(default_factory=list)
    replaced: list[RolloutGroup] = field(default_factory=list)
    """Groups without variance that others took the place of: they count in what was sampled, and are not trained on."""
    stats: list[GroupStats] = field(default_factory=list)
    std: BatchStd = field(default_factory=BatchStd)
    num_too_old: int = 0
    num_without_logprobs: int = 0
    wait_s: float = 0.0
    train_s: float = 0.0
    times: GenerationTimes = field(default_factory=lambda: GenerationTimes(generation_s=0.0, grading_s=0.0))
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the update, once it is counted."""
    report: WeightSyncReport | None = None
    """Of the sync of its weights, once that is proven."""

    def take(self, group: RolloutGroup, config: GRPOConfig, policy_version: int) -> list[TrainingSample]:
        """What there is to train on in one group: nothing if it has become too old, or all its rewards are alike and there
        is no KL penalty; with `dynamic_sampling` that is left out in any case."""
        age = policy_version - min(rollout.completion.policy_version for rollout in group.rollouts)
        if age > config.max_staleness:
            self.num_too_old += 1
            return []
        samples, stats = training_samples(
            [group],
            scale_rewards=config.scales_rewards and config.advantage_std == "group",
            mask_truncated=config.mask_truncated,
            keep_zero_variance=config.keeps_zero_variance,
            baseline=config.baseline,
        )
        self.stats.append(stats)
        self.std.add([rollout.score.reward for rollout in group.rollouts])
        if config.needs_logprobs:  # a ratio cannot be corrected without the sampler's log-probs
            with_logprobs = [sample for sample in samples if sample.rollout_logprobs is not None]
            self.num_without_logprobs += len(samples) - len(with_logprobs)
            return with_logprobs
        return samples

    def advantage_scale(self, config: GRPOConfig) -> float:
        """What all advantages are multiplied by, now that all groups are there."""
        return self.std.scale if config.advantage_std == "batch" else 1.0

    def counts(self) -> dict[str, float]:
        """How many groups and sequences were trained on, and why others were not."""
        zero_variance = sum(stats.num_zero_variance_groups for stats in self.stats) + len(self.replaced)
        return {
            "zero_variance_groups": zero_variance,
            "zero_variance_share": zero_variance / max(len(self.stats) + len(self.replaced), 1),
            "truncated_masked": sum(stats.num_truncated_masked for stats in self.stats),
            "trained_sequences": sum(stats.num_samples for stats in self.stats) - self.num_without_logprobs,
            "dropped_groups": self.num_too_old,
            "dropped_without_logprobs": self.num_without_logprobs,
            "nonfinite_logprobs": sum(stats.num_nonfinite_logprobs for stats in self.stats),
        }

    def figures(self) -> dict[str, float]:
        """The metrics, and where the update's time went, in seconds."""
        step_s = time.perf_counter() - self.started
        figures = self.metrics | {
            "generation_s": self.times.generation_s,
            "grading_s": self.times.grading_s,
            "wait_s": self.wait_s,
            "train_s": self.train_s,
            "step_s": step_s,
            "tokens_per_s": self.metrics["total_completion_tokens"] / step_s,
        }
        if self.report is not None:
            figures["sync_s"] = self.report.seconds
            figures |= {f"sync/{name}_s": seconds for name, seconds in self.report.phases_s.items()}
            if self.report.logprob_gap is not None:
                figures["sync/logprob_gap"] = self.report.logprob_gap
        return figures

    def why_nothing_was_learned(self, config: GRPOConfig) -> str:
        """In words, for an update without a sequence to train on.

        Raises:
            ValueError: the sequences lack the log-probs that `config` corrects with.
        """
        if self.num_without_logprobs:
            raise ValueError(
                f"the engine returned no log-probs for any of {self.num_without_logprobs} sequences, and {needed_for(config)}"
            )
        counts = self.counts()
        reasons = [
            f"{counts['zero_variance_groups']:.0f} of {len(self.groups) + len(self.replaced)} groups have no variance in "
            "their rewards"
        ]
        if masked := counts["truncated_masked"]:
            reasons.append(f"{masked:.0f} completions were cut off and masked")
        if self.num_too_old:
            reasons.append(f"{self.num_too_old} groups were too old")
        return ", and ".join(reasons)


def needed_for(config: GRPOConfig) -> str:
    """What cannot do without the sampler's log-probs, and what can."""
    if config.importance_cap is not None:
        return f"--tis-cap {config.importance_cap} corrects with them; --tis-cap 0 trains without the correction"
    if config.importance_mask != "none":
        return f"--importance-mask {config.importance_mask} compares with them; --importance-mask none trains without"
    return f"--ratio-to {config.ratio_to} needs them; --ratio-to update trains without"
