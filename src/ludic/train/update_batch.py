"""What an update gathers while its rollouts come in, and the figures that are made of it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ludic.rollout.engine import WeightSyncReport
from ludic.rollout.groups import GenerationTimes
from ludic.train.advantages import GroupStats
from ludic.types import RolloutGroup


@dataclass(slots=True)
class UpdateBatch:
    """The groups of one update as they come in, and what became of them."""

    started: float = field(default_factory=time.perf_counter)
    groups: list[RolloutGroup] = field(default_factory=list)
    stats: list[GroupStats] = field(default_factory=list)
    num_too_old: int = 0
    num_without_logprobs: int = 0
    wait_s: float = 0.0
    train_s: float = 0.0
    times: GenerationTimes = field(default_factory=lambda: GenerationTimes(generation_s=0.0, grading_s=0.0))
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the update, once it is counted."""
    report: WeightSyncReport | None = None
    """Of the sync of its weights, once that is proven."""

    def counts(self) -> dict[str, float]:
        """How many groups and sequences were trained on, and why others were not."""
        zero_variance = sum(stats.num_zero_variance_groups for stats in self.stats)
        return {
            "zero_variance_groups": zero_variance,
            "zero_variance_share": zero_variance / max(len(self.stats), 1),
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

    def why_nothing_was_learned(self) -> str:
        """In words, for an update without a sequence to train on."""
        counts = self.counts()
        masked = counts["truncated_masked"]
        reasons = [
            f"{counts['zero_variance_groups']:.0f} of {len(self.groups)} groups have no variance in their rewards",
            f"{masked:.0f} completions were cut off and masked" if masked else "",
            f"{self.num_too_old} groups were too old" if self.num_too_old else "",
        ]
        return ", and ".join(filter(None, reasons))


_METRIC_NAMES = {"logprob_gap_mean": "logprob_gap"}


def named(metrics: Mapping[str, float]) -> dict[str, float]:
    """The loss's metrics under their names in the log; `kl` is to the reference policy, else to the sampler."""
    renamed = {_METRIC_NAMES.get(name, name): value for name, value in metrics.items()}
    kl = renamed.get("kl_ref", renamed.get("kl_rollout"))
    return renamed if kl is None else {**renamed, "kl": kl}
