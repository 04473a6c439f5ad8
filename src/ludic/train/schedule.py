"""What belongs to which update: its place in the data, and its learning rate. Both follow from the update's number."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ludic.config import GRPOConfig
from ludic.rollout.groups import derive_seed
from ludic.train.checkpoint import TrainerState


class DataOrder:
    """The data in a fresh random order each epoch, cut into updates without a gap.

    Args:
        seed: of the run.
        num_samples: how many samples there are, at least 1.
    """

    def __init__(self, *, seed: int, num_samples: int) -> None:
        self._seed, self._num_samples = seed, num_samples
        self._epoch, self._order = -1, [0]

    def index(self, group_id: int) -> int:
        """Which sample the group `group_id` of the run answers."""
        epoch, place = divmod(group_id, self._num_samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self._num_samples, generator=generator).tolist()
        return self._order[place]


def schedule_factor(config: GRPOConfig, step: int) -> float:
    """What the peak learning rate is multiplied by in update `step` (from 0): a linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, config.train_steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return max(0.0, 1.0 - done)
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def check_same_data_order(state: TrainerState, settings: Mapping[str, Any]) -> None:
    """A resumed run finds its place in the data from the update's number, so what that depends on must not change.

    Raises:
        ValueError: one of those settings is another than the checkpoint's; names it and both values.
    """
    for name in ("seed", "rollouts_per_update", "group_size", "num_train_samples"):
        if state.config.get(name, settings[name]) != settings[name]:
            what = "the number of training samples" if name == "num_train_samples" else "--" + name.replace("_", "-")
            raise ValueError(
                f"the checkpoint was made with {what} {state.config[name]!r:.40}, this run has {settings[name]}: with another, "
                "prompts would be repeated or skipped; resume with the same, or start a run with --model CHECKPOINT"
            )
