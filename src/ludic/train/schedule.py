"""What belongs to which update: its place in the data, its learning rate, its evaluation. All follow from its number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from ludic.config import GRPOConfig
from ludic.rollout.groups import Prompt
from ludic.rollout.seeds import derive_seed
from ludic.train.checkpoint import TrainerState
from ludic.types import SamplingParams

SampleT = TypeVar("SampleT")


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


def rollout_prompts(
    config: GRPOConfig,
    group_ids: Sequence[int],
    order: DataOrder,
    samples: Sequence[SampleT],
    token_ids: Sequence[list[int]],
    *,
    step: int | None = None,
    slots: Sequence[int] | None = None,
) -> list[Prompt[SampleT]]:
    """The prompts of the groups with these numbers in the run; `token_ids` are those of each sample's prompt: [P].

    `step` is the number of updates before the one that they are for, and `slots` are their places in it, which decide whose
    log-probs are asked for; by default both follow from the groups' numbers.
    """
    prompts = []
    for group_id, slot in zip(group_ids, slots or group_ids, strict=True):
        index = order.index(group_id)
        sampling = SamplingParams(
            temperature=config.temperature,
            max_tokens=config.completion_cap(len(token_ids[index])),
            seed=derive_seed(config.seed, group_id // config.groups_per_update if step is None else step, group_id),
            logprobs=config.wants_logprobs(slot),
        )
        prompts.append(Prompt(group_id=group_id, sample=samples[index], token_ids=token_ids[index], sampling=sampling))
    return prompts


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
    """A resumed run goes on from a place in the data order, so what that order and its updates depend on must not change.

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


def evaluation_is_due(config: GRPOConfig, state: TrainerState, settings: Mapping[str, Any]) -> bool:
    """Whether the policy of `state` is to be evaluated with these settings of evaluations."""
    if not config.eval_limit or not state.evaluations:
        return bool(config.eval_limit)
    last, step = state.evaluations[-1], state.step
    if step < config.train_steps and last.get("settings") != settings:
        return True  # a resumed run was given other settings: later ones could not be compared with the last
    due = step in (0, config.train_steps) or (config.eval_every and step % config.eval_every == 0)
    return bool(due and last["step"] != step)
