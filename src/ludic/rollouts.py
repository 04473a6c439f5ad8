"""Prompts in, scored rollout groups out: the generation half of one update.

Every prompt is one task: generate its group, score its members as soon as they are there, log them. Scoring thus overlaps
the generation of the other groups. How many completions are in flight is the engine's business.
"""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ludic.environment import Environment
from ludic.inference.engine import InferenceEngine
from ludic.prompts import decode_completion
from ludic.types import Rollout, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SampleT = TypeVar("SampleT")


class RecordWriter(Protocol):
    """Takes records off the hot path; `ludic.telemetry.jsonl.JsonlWriter` is one."""

    def write(self, record: Mapping[str, Any], /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(Generic[SampleT]):
    """One sample on its way to becoming a group."""

    group_id: int
    sample: SampleT
    token_ids: list[int]
    """[P]"""
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """The groups of one update, in the order of their prompts."""

    groups: tuple[RolloutGroup, ...]
    generation_s: float
    """Until the last completion had arrived."""
    grading_s: float
    """From then until the last score was there: the part of the scoring that generation did not hide."""


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2^62) that depends on every part, e.g. (run seed, step, prompt).

    Example:
        >>> derive_seed(0, 3, 1) == derive_seed(0, 3, 1) != derive_seed(0, 1, 3)
        True
    """
    digest = hashlib.blake2b(b",".join(str(part).encode() for part in parts), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


async def collect_groups(
    engine: InferenceEngine,
    environment: Environment[SampleT],
    prompts: Sequence[Prompt[SampleT]],
    *,
    group_size: int,
    tokenizer: "PreTrainedTokenizerBase",
    step: int,
    writer: RecordWriter | None = None,
) -> RolloutBatch:
    """Generate and score `group_size` rollouts of each prompt.

    The first failure cancels the rest and propagates: no group is silently short.
    """
    started = time.perf_counter()
    generated_at = [started] * len(prompts)

    async def one(index: int, prompt: Prompt[SampleT]) -> RolloutGroup:
        completions = await engine.generate(prompt.token_ids, num_completions=group_size, sampling=prompt.sampling)
        generated_at[index] = time.perf_counter()
        texts = [decode_completion(tokenizer, completion.token_ids) for completion in completions]
        scores = await asyncio.gather(*(environment.score(prompt.sample, text) for text in texts))
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
        group = RolloutGroup(group_id=prompt.group_id, target=environment.target(prompt.sample), rollouts=rollouts)
        if writer is not None:
            question = environment.messages(prompt.sample)[-1]["content"]
            for rollout in rollouts:
                writer.write(rollout_record(rollout, step=step, prompt=question, target=group.target))
        return group

    async with asyncio.TaskGroup() as tasks:
        pending = [tasks.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
    last_generated = max(generated_at, default=started)
    return RolloutBatch(
        groups=tuple(task.result() for task in pending),
        generation_s=last_generated - started,
        grading_s=time.perf_counter() - last_generated,
    )


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
        "parse_error_rate": sum(rollout.score.parse.error is not None for rollout in rollouts) / count,
        "truncation_rate": sum(rollout.completion.finish_reason == "length" for rollout in rollouts) / count,
        "avg_completion_length": completion_tokens / count,
        "total_completion_tokens": completion_tokens,
        "prompt_tokens": sum(len(group.rollouts[0].prompt_token_ids) * len(group.rollouts) for group in groups),
        "staleness": sum(policy_version - rollout.completion.policy_version for rollout in rollouts) / count,
        "grader_failures": sum(rollout.score.parts.get("grader_failed", 0.0) for rollout in rollouts),
    }
