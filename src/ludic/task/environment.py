"""What a task is to ludic: how a sample is put to the model, and how an answer is scored.

A task is one module like `environments/gsm8k.py`. The trainer and the evaluation use the same object, so that a prompt,
a parser or a rule can never differ between them. The data set is an ordinary sequence of samples; an environment does
not own it.
"""

from typing import Protocol, TypeVar

from ludic.types import ChatMessage, Score

SampleT_contra = TypeVar("SampleT_contra", contravariant=True)


class Environment(Protocol[SampleT_contra]):
    """One single-turn task with verifiable answers."""

    def messages(self, sample: SampleT_contra, /) -> list[ChatMessage]:
        """The chat that is put to the model; the model's turn comes next."""
        ...

    def target(self, sample: SampleT_contra, /) -> str:
        """The right answer, as it is written to logs."""
        ...

    async def score(self, sample: SampleT_contra, text: str, /) -> Score:
        """Score one completion's text. Slow or unsafe work belongs in another process (`ludic.task.grading.Grader`)."""
        ...
