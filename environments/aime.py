"""AIME 2024: 30 problems of the American Invitational Mathematics Examination, whose answers are whole numbers from 0 to 999.
For evaluation only, though the hub calls the split `train`. With 30 problems intervals are wide: sample each several times.

An evaluation reports two rules, as `ludic.task.boxed` has them: `flexible` as the headline, `strict` as the reward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from environments.gsm8k import DEFAULT_SYSTEM_PROMPT
from ludic.task.boxed import boxed_score
from ludic.task.datafiles import load_samples
from ludic.task.grading import Grader
from ludic.types import ChatMessage, Score

HUB_ID = "HuggingFaceH4/aime_2024"


@dataclass(frozen=True, slots=True, kw_only=True)
class AIMESample:
    """One problem, and the number that answers it, e.g. `204` or `073`."""

    question: str
    target: str


def load(
    split: Literal["train"] = "train",
    *,
    dataset: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[AIMESample]:
    """The problems; see `ludic.task.datafiles.load_samples`. A row has a `problem` and an `answer`."""

    def make(_place: str, problem: str, answer: str) -> AIMESample:
        return AIMESample(question=problem, target=answer.strip())

    fields = ("problem", "answer")
    return load_samples(
        split, hub=(HUB_ID, None), fields=fields, make=make, dataset=dataset, limit=limit, seed=seed, say=say
    )


class AIME:
    """The environment. Without a `grader` it makes one, and closes it in `aclose`."""

    rules = ("flexible", "strict")

    def __init__(self, system_prompt: str = DEFAULT_SYSTEM_PROMPT, grader: Grader | None = None) -> None:
        self.system_prompt = system_prompt
        self.grader = Grader() if grader is None else grader
        self._owns_grader = grader is None

    def messages(self, sample: AIMESample) -> list[ChatMessage]:
        system = [ChatMessage(role="system", content=self.system_prompt)] if self.system_prompt else []
        return [*system, ChatMessage(role="user", content=sample.question)]

    def target(self, sample: AIMESample) -> str:
        return sample.target

    async def score(self, sample: AIMESample, text: str) -> Score:
        return await boxed_score(self.grader, text, sample.target, last_number=True)

    async def aclose(self) -> None:
        """End the grader's processes, if the grader is this environment's own. Safe to call twice."""
        if self._owns_grader:
            await self.grader.aclose()
