"""Which prompts an update trains on, and what is known of each prompt.

Every group of a run has a place in the data order, its `group_id`, and places are handed out in ascending order. Plain
sampling takes each place as it comes. Two settings pass over places whose prompt has little to teach:

- `drop_solved` N: a prompt whose last N groups were all correct is taken with a chance of 1/16, so that it is seen again if
  the policy forgets it. Skywork-OR1 (arXiv 2505.22312) removes solved prompts between its stages, for good.
- `curriculum`: a prompt that was seen before is taken with a chance of 4p(1-p), at least 1/16, where p is its running solve
  rate. p(1-p) is the variance of its reward, which bounds from below how much an update can improve the policy (Bae et al.,
  "Online Difficulty Filtering for Reasoning Oriented Reinforcement Learning", arXiv 2504.03380).

And `dynamic_sampling` replaces a group whose rewards are all alike by one of the next place, until the update is full or its
bound is reached (DAPO, arXiv 2503.14476, section 3.2). The punishment of `overlong_buffer` is left out of that comparison.

What is saved is that of the counted updates: places that were handed out for an update which was not counted are handed out
again after a resume. Left out on purpose: weights that follow the gradient's size, and difficulty that is known beforehand.
"""

import dataclasses
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ludic.config import GRPOConfig
from ludic.rollout.groups import Prompt
from ludic.rollout.seeds import derive_seed
from ludic.train.advantages import varies_without_overlong
from ludic.train.schedule import DataOrder, rollout_prompts
from ludic.types import RolloutGroup

SampleT = TypeVar("SampleT")
logger = logging.getLogger(__name__)

RARELY = 1 / 16
"""The smallest chance that a prompt is taken when its place comes: solved for good is known only by looking again."""
_NEWEST = 0.5
"""Weight of the newest group in the running solve rate. An epoch lies between two visits, and with it many updates."""
_SEED_OF_CHANCE = 1
"""Tells these draws from the others that derive from the run's seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """What the groups of one prompt came to so far.

    Example:
        >>> PromptRecord().after(1.0).after(1.0).after(0.5)
        PromptRecord(visits=3, solved_in_a_row=0, solve_rate=0.75)
    """

    visits: int = 0
    solved_in_a_row: int = 0
    """The last so many groups were correct throughout."""
    solve_rate: float = 0.0
    """Running mean of the groups' shares of correct completions, the newest with a weight of 1/2; 0 before the first."""

    def after(self, rate: float) -> "PromptRecord":
        """The record after one more group, of which the share `rate` was correct."""
        return PromptRecord(
            visits=self.visits + 1,
            solved_in_a_row=self.solved_in_a_row + 1 if rate == 1 else 0,
            solve_rate=self.solve_rate + _NEWEST * (rate - self.solve_rate) if self.visits else rate,
        )


def chance(record: PromptRecord, config: GRPOConfig) -> float:
    """The chance that a prompt is taken when its place in the data order comes, above 0 and at most 1.

    Example:
        >>> chance(PromptRecord(visits=1, solve_rate=0.25), GRPOConfig(curriculum=True))
        0.75
    """
    if config.drop_solved and record.solved_in_a_row >= config.drop_solved:
        return RARELY
    if config.curriculum and record.visits:
        return max(RARELY, 4 * record.solve_rate * (1 - record.solve_rate))
    return 1.0


class PromptSource(Generic[SampleT]):
    """Hands out the prompts of a run's groups, and learns from the groups of every counted update.

    Updates are counted from 1. With an engine whose replies come in a fixed order, the same calls give the same prompts.
    Where replies may overtake one another, so may the requests for replacements: which of them gets the next place is then
    a matter of their timing.

    Args:
        samples: of the training data, with the token ids [P] of the prompt of each.
        step: updates that were counted before.
        state: what `state()` returned then; without, all places before that of update `step + 1` count as handed out.

    Example:
        >>> source = PromptSource(config, samples, token_ids)
        >>> prompts = source.take(1)
        >>> figures = source.count(1, groups)
    """

    def __init__(
        self,
        config: GRPOConfig,
        samples: Sequence[SampleT],
        token_ids: Sequence[list[int]],
        *,
        step: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self._samples, self._token_ids = config, samples, token_ids
        self._order = DataOrder(seed=config.seed, num_samples=len(samples))
        self._records: dict[int, PromptRecord] = {}
        self._first_open, self._done = step * config.groups_per_update, set[int]()
        if state:
            self._first_open, self._done = state["next_group"], set(state["done_after"])
            names = [one.name for one in dataclasses.fields(PromptRecord)]
            for index, values in state["prompts"].items():
                self._records[int(index)] = PromptRecord(**dict(zip(names, values, strict=True)))
        self._next = self._first_open
        self._updates: dict[int, _Handed[SampleT]] = {}

    def take(self, update: int) -> list[Prompt[SampleT]]:
        """The prompts that update `update` begins with; asked again, the same."""
        if update not in self._updates:
            handed: _Handed[SampleT] = _Handed()
            self._updates[update] = handed
            handed.first = [self._hand_out(update, handed, slot) for slot in range(self.config.groups_per_update)]
        return self._updates[update].first

    def replacement(self, update: int, group: RolloutGroup) -> Prompt[SampleT] | None:
        """The prompt to generate in place of a scored group; None where the group stays.

        A group stays if its rewards differ, the punishment of `overlong_buffer` left aside: DAPO's eq. 11 looks at correctness.
        The log-probs of a replacement are asked for if those of the group were, so that an update keeps its share of them.

        Raises:
            ValueError: a reward is not finite.
        """
        if varies_without_overlong(group):
            return None
        handed = self._updates[update]
        if len(handed.indices) >= self.config.max_groups_per_update:
            handed.num_refused += 1
            return None
        return self._hand_out(update, handed, handed.slots[group.group_id])

    def count(self, update: int, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Learn from all groups of an update that is over, the replaced ones too; its figures, for the log."""
        handed = self._updates.pop(update)
        self._done |= handed.places
        while self._first_open in self._done:
            self._done.remove(self._first_open)
            self._first_open += 1
        for group in sorted(groups, key=lambda group: group.group_id):  # not as they came: a prompt may be there twice
            index = handed.indices[group.group_id]
            rate = statistics.fmean(rollout.score.correct for rollout in group.rollouts)
            self._records[index] = self._records.get(index, PromptRecord()).after(rate)
        if handed.num_refused:
            logger.warning(
                "update %d: %d of its %d groups have no variance and stay: --max-sampling-factor %d allows no more than the "
                "%d groups that were generated; raise it, or choose problems that are solved now and then",
                update, handed.num_refused, self.config.groups_per_update, self.config.max_sampling_factor,
                len(handed.indices),
            )  # fmt: skip
        return self._figures(handed)

    def state(self) -> dict[str, Any]:
        """What a run resumed after the last counted update needs, as JSON; a few numbers a prompt that was seen."""
        return {
            "next_group": self._first_open,
            "done_after": sorted(self._done),
            "prompts": {str(index): dataclasses.astuple(record) for index, record in sorted(self._records.items())},
        }

    def _figures(self, handed: "_Handed[SampleT]") -> dict[str, float]:
        config, figures = self.config, dict[str, float]()
        if config.dynamic_sampling:
            figures["generated_groups"] = len(handed.indices)
            figures["replaced_groups"] = len(handed.indices) - config.groups_per_update
            figures["sampling_bound_reached"] = float(handed.num_refused > 0)
        if config.drop_solved:
            solved = (record.solved_in_a_row >= config.drop_solved for record in self._records.values())
            figures["solved_prompts"] = sum(solved)
        if config.drop_solved or config.curriculum:
            figures["skipped_prompts"] = len(handed.places) - len(handed.indices)
        return figures

    def _hand_out(self, update: int, handed: "_Handed[SampleT]", slot: int) -> Prompt[SampleT]:
        """The prompt of the next place that is taken, for the group `slot` of the update. After a whole epoch of passing over,
        the next place is."""
        for _ in range(len(self._samples)):
            place = self._next_place(handed)
            if self._takes(place):
                break
        else:
            place = self._next_place(handed)
        handed.indices[place] = self._order.index(place)
        handed.slots[place] = slot
        (prompt,) = rollout_prompts(
            self.config, [place], self._order, self._samples, self._token_ids, step=update - 1, slots=[slot]
        )
        return prompt

    def _next_place(self, handed: "_Handed[SampleT]") -> int:
        self._next = max(self._next, self._first_open)
        while self._next in self._done:  # counted before the resume, and places before it were not
            self._next += 1
        handed.places.add(self._next)
        self._next += 1
        return self._next - 1

    def _takes(self, place: int) -> bool:
        likely = chance(self._records.get(self._order.index(place), PromptRecord()), self.config)
        return likely == 1 or derive_seed(self.config.seed, 0, place, _SEED_OF_CHANCE) < likely * 2**62


@dataclass(slots=True)
class _Handed(Generic[SampleT]):
    """What was handed out for one update that is not counted yet."""

    first: list[Prompt[SampleT]] = field(default_factory=list)
    """[groups of an update]"""
    indices: dict[int, int] = field(default_factory=dict)
    """By `group_id`, which sample it is; replacements included."""
    slots: dict[int, int] = field(default_factory=dict)
    """By `group_id`, which of the update's groups it is, from 0; a replacement has that of the group before it."""
    places: set[int] = field(default_factory=set)
    """The same places, and those that were passed over on the way."""
    num_refused: int = 0
    """Groups that the bound left without a replacement."""
