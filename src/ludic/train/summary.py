"""What a run comes to, and which of its evaluations can be held against one another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ludic.train.checkpoint import TrainerState


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSummary:
    """What a run did. Accuracies are fractions of 1 under the flexible rule, None where nothing was evaluated.

    `accuracy_before` is None, too, where it was measured on other problems, with another prompt or other sampling.
    """

    accuracy_before: float | None
    accuracy_after: float | None
    eval_problems: int
    updates: int
    seconds: float
    rollouts: int
    completion_tokens: int
    last_checkpoint: str | None
    evaluations: list[dict[str, Any]]
    """Every evaluation's figures with its `step` and its `settings`."""

    @property
    def compared(self) -> list[dict[str, Any]]:
        """The evaluations that can be held against the last one, and itself: those with its settings."""
        return _comparable(self.evaluations)


def _comparable(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in evaluations if one.get("settings") == evaluations[-1].get("settings")]


def summarise(state: TrainerState, last_checkpoint: Path | None) -> TrainingSummary:
    """What the run came to whose state this is."""
    evaluations: list[dict[str, Any]] = state.evaluations
    before = next((one for one in _comparable(evaluations) if one["step"] == 0), None)
    after = evaluations[-1] if evaluations and evaluations[-1]["step"] == state.step > 0 else None
    return TrainingSummary(
        accuracy_before=before["accuracy"] if before else None,
        accuracy_after=after["accuracy"] if after else None,
        eval_problems=evaluations[-1]["num_problems"] if evaluations else 0,
        updates=state.step,
        seconds=state.seconds,
        rollouts=state.rollouts,
        completion_tokens=state.completion_tokens,
        last_checkpoint=str(last_checkpoint) if last_checkpoint else None,
        evaluations=evaluations,
    )
