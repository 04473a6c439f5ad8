"""Prompts in, scored rollout groups out: the generation half of the training loop.

Every prompt is one task: generate its group, score its members as soon as they are there, log them. Scoring thus overlaps
the generation of the other groups, and so does whatever the caller does with the groups that it has been handed. How many
completions are in flight is the engine's business.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ludic.rollout.engine import InferenceEngine
from ludic.task.environment import Environment
from ludic.task.prompts import decode_completion
from ludic.types import Rollout, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SampleT = TypeVar("SampleT")


class RecordWriter(Protocol):
    """Takes records off the hot path; `ludic.storage.jsonl.JsonlWriter` is one."""

    def write(self, record: Mapping[str, Any], /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(Generic[SampleT]):
    """One sample on its way to becoming a group."""

    group_id: int
    sample: SampleT
    token_ids: list[int]
    """[P]"""
    sampling: SamplingParams


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2^62) that depends on every part, e.g. (run seed, step, prompt).

    Example:
        >>> derive_seed(0, 3, 1) == derive_seed(0, 3, 1) != derive_seed(0, 1, 3)
        True
    """
    digest = hashlib.blake2b(b",".join(str(part).encode() for part in parts), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


class GroupStream(Generic[SampleT]):
    """Generates and scores the groups of several updates at once, and hands them out update by update.

    The caller decides how far ahead of the policy it submits; what was submitted is generated at once, as far as the engine
    lets it. Updates are handed out whole and in order, so no completion is left behind for being long.

    Args:
        group_size: rollouts of each prompt.
        writer: takes one record a rollout as its group is handed out.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        environment: Environment[SampleT],
        *,
        group_size: int,
        tokenizer: "PreTrainedTokenizerBase",
        writer: RecordWriter | None = None,
    ) -> None:
        self._engine = engine
        self._environment = environment
        self._group_size = group_size
        self._tokenizer = tokenizer
        self._writer = writer
        self._updates: dict[int, _Update[SampleT]] = {}

    def submit(self, step: int, prompts: Sequence[Prompt[SampleT]]) -> None:
        """Start the groups of update `step`; returns at once. An update that was submitted before is left as it is."""
        if step not in self._updates:
            samples = {prompt.group_id: prompt.sample for prompt in prompts}
            update: _Update[SampleT] = _Update(started=time.perf_counter(), samples=samples)
            update.tasks = [asyncio.create_task(self._group(update, prompt)) for prompt in prompts]
            self._updates[step] = update

    async def groups(self, step: int) -> AsyncIterator[list[RolloutGroup]]:
        """The groups of update `step` as they are scored, each time all that are ready, until there are no more.

        The first failure cancels everything that is in flight and propagates: no group is silently short.
        """
        update = self._updates[step]
        waiting = set(update.tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            ready = [task for task in update.tasks if task in done]  # in the order of their prompts
            if any(task.exception() is not None for task in ready):
                await self.aclose()
            groups = [task.result() for task in ready]
            for group in groups:
                self._record(group, step)
            yield groups

    def timings(self, step: int) -> "GenerationTimes":
        """What the generation of update `step` took; call it when all its groups are there, which forgets the update."""
        update = self._updates.pop(step)
        return GenerationTimes(
            generation_s=update.last_generated - update.started, grading_s=update.last_scored - update.last_generated
        )

    async def aclose(self) -> None:
        """Cancel what is in flight, and wait until it is gone."""
        tasks = [task for update in self._updates.values() for task in update.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _group(self, update: "_Update[SampleT]", prompt: Prompt[SampleT]) -> RolloutGroup:
        completions = await self._engine.generate(
            prompt.token_ids, num_completions=self._group_size, sampling=prompt.sampling
        )
        update.last_generated = time.perf_counter()
        texts = [decode_completion(self._tokenizer, completion.token_ids) for completion in completions]
        scores = await asyncio.gather(*(self._environment.score(prompt.sample, text) for text in texts))
        rollouts = tuple(
            Rollout(
                group_id=prompt.group_id,
                rollout_id=member,
                prompt_token_ids=prompt.token_ids,
                completion=completion,
                text=text,
                score=score,
            )
            for member, (completion, text, score) in enumerate(zip(completions, texts, scores, strict=True))
        )
        update.last_scored = time.perf_counter()
        return RolloutGroup(group_id=prompt.group_id, target=self._environment.target(prompt.sample), rollouts=rollouts)

    def _record(self, group: RolloutGroup, step: int) -> None:
        """Log a group as it is handed out: what was generated ahead for a run that then ended was never trained on."""
        if self._writer is not None:
            question = self._environment.messages(self._updates[step].samples[group.group_id])[-1]["content"]
            for rollout in group.rollouts:
                self._writer.write(rollout_record(rollout, step=step, prompt=question, target=group.target))


@dataclass(slots=True, kw_only=True)
class _Update(Generic[SampleT]):
    """The groups of one update on their way."""

    started: float
    samples: dict[int, SampleT]
    """By group id."""
    tasks: list[asyncio.Task[RolloutGroup]] = field(default_factory=list)
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
        "completion_tokens": len(completion.token_ids),
    }


def rollout_metrics(groups: Sequence[RolloutGroup], *, policy_version: int) -> dict[str, float]:
    """The figures of one update's rollouts, as they are logged; rates are fractions of 1."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = len(rollouts)
    if not count:
        raise ValueError("there are no rollouts to take metrics of")
    rewards = [rollout.score.reward for rollout in rollouts]
    mean = sum(rewards) / count
    completion_tokens = sum(len(rollout.completion.token_ids) for rollout in rollouts)
    return {
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
