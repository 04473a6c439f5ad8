"""Prompts in, scored rollout groups out: the generation half of the training loop.

Every prompt is one task: generate its group, and score its members as soon as they are there. Scoring and training thus
overlap the generation of the other groups. How many completions are in flight is the engine's business.
"""

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ludic.rollout.engine import InferenceEngine
from ludic.rollout.problems import turn_records
from ludic.rollout.turns import Conversations
from ludic.task.environment import Environment
from ludic.types import Completion, Rollout, RolloutGroup, SamplingParams, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SampleT = TypeVar("SampleT")

UPDATE_IN_HAND: contextvars.ContextVar[int | None] = contextvars.ContextVar("update_in_hand", default=None)
"""The update that a request is for, as whoever watches an engine sees it; None in an evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(Generic[SampleT]):
    """One sample on its way to becoming a group."""

    group_id: int
    sample: SampleT
    token_ids: list[int]
    """[P]"""
    sampling: SamplingParams


class GroupStream(Generic[SampleT]):
    """Generates and scores the groups of several updates at once, and hands them out update by update.

    The caller decides how far ahead of the policy it submits; what was submitted is generated at once, as far as the engine
    lets it. Updates are handed out whole and in order, so no completion is left behind for being long.

    Args:
        group_size: rollouts of each prompt.
        record: takes one record a rollout as its group is handed out, e.g. `JsonlWriter.write`.
        further_fields: what the records of a group's members have beside `rollout_record`, e.g. their advantages;
            called in another thread where `fields_take_long`, since a decoder at work would hold up all requests.
        shape_reward: from the environment's score of a completion and the tokens that it might have had, the score to train on.
        replacement: given the update's number and a scored group, the prompt to generate in its place, or None to keep it.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        environment: Environment[SampleT],
        *,
        group_size: int,
        tokenizer: "PreTrainedTokenizerBase",
        record: Callable[[dict[str, Any]], None] | None = None,
        further_fields: Callable[[RolloutGroup], Sequence[Mapping[str, Any]]] = lambda group: (
            [{}] * len(group.rollouts)
        ),
        fields_take_long: bool = False,
        shape_reward: Callable[[Score, Completion, int], Score] = lambda score, completion, max_tokens: score,
        replacement: Callable[[int, RolloutGroup], Prompt[SampleT] | None] | None = None,
    ) -> None:
        self._environment = environment
        self._conversations = Conversations(engine, environment, tokenizer)
        self._group_size = group_size
        self._record = record
        self._further_fields = further_fields
        self._fields_take_long = fields_take_long
        self._shape_reward = shape_reward
        self._replacement = replacement
        # Replies that come in a fixed order are to make requests in a fixed order: see `_some_scored`.
        self._in_rounds = self._conversations.go_in_step or (replacement is not None and not engine.overlaps_training)
        self._updates: dict[int, _Update[SampleT]] = {}

    def submit(self, step: int, prompts: Sequence[Prompt[SampleT]]) -> None:
        """Start the groups of update `step`; returns at once. An update that was submitted before is left as it is."""
        if step not in self._updates:
            self._updates[step] = _Update(step=step, started=time.perf_counter())
            for prompt in prompts:
                self._start(self._updates[step], prompt)

    async def groups(self, step: int) -> AsyncIterator[list[RolloutGroup]]:
        """The groups of update `step` as they are scored, each time all that are ready, until there are no more.

        A group that another takes the place of is recorded and not handed out; `replaced` has it. The first failure cancels
        everything that is in flight and propagates: no group is silently short.
        """
        update = self._updates[step]
        seen = set[asyncio.Task[RolloutGroup]]()
        while waiting := [task for task in update.tasks if task not in seen]:
            await self._some_scored(waiting)
            ready = [task for task in waiting if task.done()]  # in the order of their prompts
            if any(task.exception() is not None for task in ready):
                await self.aclose()
            elif self._in_rounds:
                for task in ready:
                    self._replace_if_asked(update, task.result())
            for task in ready:  # what was generated ahead for a run that then ended is never recorded
                await self._record_group(task.result(), update.tasks[task], update)
            seen.update(ready)
            yield [task.result() for task in ready if task.result().group_id not in update.replaced]

    def replaced(self, step: int) -> list[RolloutGroup]:
        """The groups of update `step` that others took the place of, in the order of their numbers."""
        replaced = self._updates[step].replaced
        return [replaced[group_id] for group_id in sorted(replaced)]

    def timings(self, step: int) -> "GenerationTimes":
        """What the generation of update `step` took; call it when all its groups are there, which forgets the update."""
        update = self._updates.pop(step)
        return GenerationTimes(
            generation_s=update.last_generated - update.started, grading_s=update.last_scored - update.last_generated
        )

    async def settled(self) -> None:
        """Wait until nothing is in flight; a failure is left to whoever asks for its group."""
        while pending := [task for update in self._updates.values() for task in update.tasks if not task.done()]:
            await asyncio.wait(pending)

    async def aclose(self) -> None:
        """Cancel what is in flight, and wait until it is gone."""
        tasks = [task for update in self._updates.values() for task in update.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, update: "_Update[SampleT]", prompt: Prompt[SampleT]) -> None:
        update.tasks[asyncio.create_task(self._group_or_further(update, prompt))] = prompt

    async def _group_or_further(self, update: "_Update[SampleT]", prompt: Prompt[SampleT]) -> RolloutGroup:
        UPDATE_IN_HAND.set(update.step)
        group = await self._group(update, prompt)
        if not self._in_rounds:  # at once, also while the trainer is busy with the update before
            self._replace_if_asked(update, group)
        return group

    def _replace_if_asked(self, update: "_Update[SampleT]", group: RolloutGroup) -> None:
        further = None if self._replacement is None else self._replacement(update.step, group)
        if further is not None:
            update.replaced[group.group_id] = group
            self._start(update, further)

    async def _some_scored(self, waiting: "Sequence[asyncio.Task[RolloutGroup]]") -> None:
        """Wait for the next group; in rounds for everything in flight, so that scores and turns which take longer in one run
        than in another change neither the prompts, nor the weights of a later turn, nor what is decoded together."""
        if self._in_rounds:
            await self.settled()
        else:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    async def _group(self, update: "_Update[SampleT]", prompt: Prompt[SampleT]) -> RolloutGroup:
        completions = await self._conversations.generate(
            prompt.token_ids, prompt.sample, num_completions=self._group_size, sampling=prompt.sampling
        )
        update.last_generated = time.perf_counter()
        answers = await self._conversations.scored(completions, prompt.sample)
        rollouts = tuple(
            Rollout(
                group_id=prompt.group_id,
                rollout_id=member,
                prompt_token_ids=prompt.token_ids,
                completion=completion,
                text=text,
                score=self._shape_reward(score, completion, prompt.sampling.max_tokens),
            )
            for member, (completion, text, score) in enumerate(answers)
        )
        update.last_scored = time.perf_counter()
        return RolloutGroup(group_id=prompt.group_id, target=self._environment.target(prompt.sample), rollouts=rollouts)

    async def _record_group(self, group: RolloutGroup, prompt: Prompt[SampleT], update: "_Update[SampleT]") -> None:
        if self._record is not None:
            question = self._environment.messages(prompt.sample)[-1]["content"]
            make = self._further_fields
            fields = await asyncio.to_thread(make, group) if self._fields_take_long else make(group)
            mark = {"replaced": True} if group.group_id in update.replaced else {}
            for rollout, further in zip(group.rollouts, fields, strict=True):
                record = rollout_record(rollout, step=update.step, prompt=question, target=group.target)
                self._record({**record, **further, **mark})


@dataclass(slots=True, kw_only=True)
class _Update(Generic[SampleT]):
    """The groups of one update on their way."""

    step: int
    started: float
    tasks: dict[asyncio.Task[RolloutGroup], Prompt[SampleT]] = field(default_factory=dict)
    replaced: dict[int, RolloutGroup] = field(default_factory=dict)
    """By `group_id`."""
    last_generated: float = 0.0
    last_scored: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTimes:
    """Wall clock of one update's rollouts."""

    generation_s: float
    """From their submission until the last completion had arrived."""
    grading_s: float
    """From then until the last score was there: the part of the scoring that generation did not hide."""


def rollout_record(rollout: Rollout, *, step: int, prompt: str, target: str) -> dict[str, Any]:
    """One line of the rollouts file."""
    completion, score = rollout.completion, rollout.score
    return {
        "step": step,
        "group": rollout.group_id,
        "rollout": rollout.rollout_id,
        "prompt": prompt,
        "completion": rollout.text,
        "completion_token_ids": completion.token_ids,
        "answer": score.parse.answer,
        "parse_error": score.parse.error,
        "target": target,
        "reward": score.reward,
        "reward_parts": dict(score.parts),
        "correct": score.correct,
        "finish_reason": completion.finish_reason,
        "policy_version": completion.policy_version,
        "prompt_tokens": len(rollout.prompt_token_ids),
        "completion_tokens": completion.num_sampled_tokens,
        **({"turns": turn_records(completion)} if completion.turns else {}),
    }


def rollout_metrics(groups: Sequence[RolloutGroup], *, policy_version: int) -> dict[str, float]:
    """The figures of one update's rollouts, as they are logged; rates are fractions of 1."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = len(rollouts)
    if not count:
        raise ValueError("there are no rollouts to take metrics of")
    rewards = [rollout.score.reward for rollout in rollouts]
    mean = sum(rewards) / count
    completion_tokens = sum(rollout.completion.num_sampled_tokens for rollout in rollouts)
    overlong = [rollout.score.parts["overlong"] for rollout in rollouts if "overlong" in rollout.score.parts]
    return {
        **({"overlong_reward": sum(overlong) / count} if overlong else {}),
        "reward_mean": mean,
        "reward_std": (sum((reward - mean) ** 2 for reward in rewards) / count) ** 0.5,
        "correct_rate": sum(rollout.score.correct for rollout in rollouts) / count,
        "parse_err_rate": sum(rollout.score.parse.error is not None for rollout in rollouts) / count,
        "truncation_rate": sum(rollout.completion.finish_reason == "length" for rollout in rollouts) / count,
        "avg_completion_length": completion_tokens / count,
        "total_completion_tokens": completion_tokens,
        "prompt_tokens": sum(len(group.rollouts[0].prompt_token_ids) * len(group.rollouts) for group in groups),
        "staleness": sum(policy_version - rollout.completion.policy_version for rollout in rollouts) / count,
        "staleness_max": max(policy_version - rollout.completion.policy_version for rollout in rollouts),
        "grader_failures": sum(rollout.score.parts.get("grader_failed", 0.0) for rollout in rollouts),
        "grader_timeouts": sum(rollout.score.parts.get("grader_timeout", 0.0) for rollout in rollouts),
    }
