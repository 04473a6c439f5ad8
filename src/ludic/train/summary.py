"""What a run comes to, and which of its evaluations can be held against one another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ludic.train.checkpoint import TrainerState


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSummary:
    """What a run did. Accuracies are fractions of 1 by the environment's headline rule, None where nothing was evaluated.

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
        return [one for one in self.evaluations if one.get("settings") == self.evaluations[-1].get("settings")]


def summarise(state: TrainerState, last_checkpoint: Path | None) -> TrainingSummary:
    """What the run came to whose state this is."""
    evaluations: list[dict[str, Any]] = state.evaluations
    last = evaluations[-1] if evaluations else {}
    before = next(
        (one for one in evaluations if one["step"] == 0 and one.get("settings") == last.get("settings")), None
    )
    return TrainingSummary(
        accuracy_before=before["accuracy"] if before else None,
        accuracy_after=last["accuracy"] if last and last["step"] == state.step > 0 else None,
        eval_problems=last.get("num_problems", 0),
        updates=state.step,
        seconds=state.seconds,
        rollouts=state.rollouts,
        completion_tokens=state.completion_tokens,
        last_checkpoint=str(last_checkpoint) if last_checkpoint else None,
        evaluations=evaluations,
    )
