"""What a run is doing at this moment, as it can be seen from outside the loop: requests, scores, weight syncs.

`watched` puts a thin wrapper around the engine and one around the environment. The loop does not know of them, and without a
live view there are none. All of it is written by the event loop's thread and read by the one that draws.
"""

import contextvars
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ludic.rollout.engine import InferenceEngine, Policy, WeightSyncReport
from ludic.rollout.groups import UPDATE_IN_HAND
from ludic.rollout.problems import rules_of
from ludic.rollout.turns import is_later_turn
from ludic.task.environment import Environment, several_turns
from ludic.types import ChatMessage, Completion, SamplingParams, Score

SampleT = TypeVar("SampleT")

SAMPLE_S = 4.0
"""How long a completion is shown before another takes its place: long enough to be read."""


@dataclass(slots=True)
class Batch:
    """The completions of one update, or of one evaluation, on their way."""

    total: int
    num_asked: int = 0
    num_done: int = 0
    num_tokens: int = 0
    """Of the completions that are done."""
    num_sequence_tokens: int = 0
    """The same with their prompts."""
    num_scored: int = 0
    num_correct: int = 0
    started_s: float = 0.0
    ended_s: float = 0.0
    """When the last completion so far was done."""

    @property
    def is_complete(self) -> bool:
        return self.num_done >= self.total

    @property
    def tokens_per_s(self) -> float:
        seconds = self.ended_s - self.started_s
        return self.num_tokens / seconds if seconds > 0 else 0.0

    def ask(self, num_completions: int) -> None:
        """A request begins."""
        self.started_s = self.started_s or time.monotonic()
        self.num_asked += num_completions
        self.total = max(self.total, self.num_asked)  # dynamic sampling asks for further groups

    def add_turn(self, completions: Sequence[Completion]) -> None:
        """A later turn of a conversation, which counts as done since its first."""
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        self.num_tokens += num_tokens
        self.num_sequence_tokens += num_tokens
        self.ended_s = time.monotonic()

    def add(self, num_prompt_tokens: int, completions: Sequence[Completion]) -> None:
        """A request is answered."""
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        self.num_tokens += num_tokens
        self.num_sequence_tokens += num_tokens + num_prompt_tokens * len(completions)
        self.num_done += len(completions)
        self.ended_s = time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownCompletion:
    """One scored completion, as the model wrote it: not inert."""

    question: str
    text: str
    target: str
    score: Score
    since_s: float


class Activity:
    """The state of one run.

    Args:
        rollouts_per_update: completions of an update.
        num_eval_problems: problems of an evaluation, each answered once.
        started_from: updates that were done before.
    """

    def __init__(self, *, rollouts_per_update: int = 1, num_eval_problems: int = 1, started_from: int = 0) -> None:
        self._rollouts_per_update = rollouts_per_update
        self._num_eval_problems = num_eval_problems
        self._started_from = started_from
        self._num_asked = 0
        self.updates: dict[int, Batch] = {}
        """The rollouts of each update that is not logged yet, in order."""
        self.evaluation: Batch | None = None
        """The evaluation that is under way, or was last."""
        self.sync_started_s: float | None = None
        """Of the weight sync that is under way, on the monotonic clock."""
        self.last_sync: WeightSyncReport | None = None
        self.completion: ShownCompletion | None = None
        self.trained_tokens: Callable[[], int] = lambda: 0
        """Tokens of the current update's sequences that training was given so far; 0 between two updates."""

    def ask(self, num_completions: int) -> Batch:
        """The batch that a request belongs to: an evaluation asks for one completion a problem, training for a group of two or
        more, update after update."""
        if num_completions == 1:
            if self.evaluation is None or self.evaluation.is_complete:
                self.evaluation = Batch(total=self._num_eval_problems)
            batch = self.evaluation
        else:
            update = UPDATE_IN_HAND.get() or self._started_from + 1 + self._num_asked // self._rollouts_per_update
            self._num_asked += num_completions
            batch = self.updates.setdefault(update, Batch(total=self._rollouts_per_update))
        batch.ask(num_completions)
        return batch

    def forget(self, step: int) -> None:
        """Update `step` is over."""
        self.updates = {update: batch for update, batch in self.updates.items() if update > step}

    def show(self, question: str, text: str, target: str, score: Score) -> None:
        """Show this completion from now on."""
        self.completion = ShownCompletion(
            question=question, text=text, target=target, score=score, since_s=time.monotonic()
        )

    @property
    def wants_completion(self) -> bool:
        """Whether the one that is shown has been there for long enough."""
        return self.completion is None or time.monotonic() - self.completion.since_s >= SAMPLE_S


_batch: contextvars.ContextVar[Batch | None] = contextvars.ContextVar("batch", default=None)
"""Which batch the completions that a task now scores came from; the loop generates and scores a group in one task."""


class WatchedEngine:
    """An `InferenceEngine` that tells an `Activity` of each call, and hands it on."""

    def __init__(self, engine: InferenceEngine, activity: Activity) -> None:
        self._engine = engine
        self._activity = activity

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    @property
    def overlaps_training(self) -> bool:
        return self._engine.overlaps_training

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        """As the engine's own."""
        if is_later_turn.get() and (batch := _batch.get()) is not None:
            turns = await self._engine.generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)
            batch.add_turn(turns)
            return turns
        batch = self._activity.ask(num_completions)
        _batch.set(batch)
        completions = await self._engine.generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)
        batch.add(len(prompt_token_ids), completions)
        return completions

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        """As the engine's own."""
        self._activity.sync_started_s = time.monotonic()
        try:
            self._activity.last_sync = await self._engine.update_weights(policy)
            return self._activity.last_sync
        finally:
            self._activity.sync_started_s = None

    def counts(self) -> dict[str, float]:
        """As the engine's own."""
        return self._engine.counts()

    async def aclose(self) -> None:
        """As the engine's own."""
        await self._engine.aclose()


class WatchedEnvironment(Generic[SampleT]):
    """An `Environment` that tells an `Activity` of each score, and hands everything on."""

    def __init__(self, environment: Environment[SampleT], activity: Activity) -> None:
        self._environment = environment
        self._activity = activity
        self.rules = rules_of(environment)
        self._several = several_turns(environment)
        self.next_turn = None if self._several is None else self._several.next_turn

    def messages(self, sample: SampleT, /) -> list[ChatMessage]:
        """As the environment's own."""
        return self._environment.messages(sample)

    def target(self, sample: SampleT, /) -> str:
        """As the environment's own."""
        return self._environment.target(sample)

    async def score(self, sample: SampleT, text: str, turns: Sequence[ChatMessage] = (), /) -> Score:
        """As the environment's own."""
        if self._several is None:
            score = await self._environment.score(sample, text)
        else:
            score = await self._several.score(sample, text, turns)
        if (batch := _batch.get()) is not None:
            batch.num_scored += 1
            batch.num_correct += score.correct
        if self._activity.wants_completion:
            question = self.messages(sample)[-1]["content"]
            self._activity.show(question, text, self.target(sample), score)
        return score


def watched(
    activity: Activity | None, engine: InferenceEngine, environment: Environment[Any]
) -> tuple[InferenceEngine, Environment[Any]]:
    """Both, watched; as they are where there is no `activity` to tell."""
    if activity is None:
        return engine, environment
    return WatchedEngine(engine, activity), WatchedEnvironment(environment, activity)
