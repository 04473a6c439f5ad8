r"""MATH-500: 500 competition problems, chosen by Lightman et al. 2023 (https://arxiv.org/abs/2305.20050) from those of MATH
(Hendrycks et al. 2021, https://arxiv.org/abs/2103.03874). For evaluation only: the hub has them as the split `test`.

Answers are LaTeX (`\left( 3, \frac{\pi}{2} \right)`), so the box alone counts: a last number would be a piece of an answer.
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

HUB_ID = "HuggingFaceH4/MATH-500"


@dataclass(frozen=True, slots=True, kw_only=True)
class MATH500Sample:
    """One problem, and its answer in LaTeX."""

    question: str
    target: str


def load(
    split: Literal["test"] = "test",
    *,
    dataset: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[MATH500Sample]:
    """The problems; see `ludic.task.datafiles.load_samples`. A row has a `problem` and an `answer`."""

    def make(_place: str, problem: str, answer: str) -> MATH500Sample:
        return MATH500Sample(question=problem, target=answer.strip())

    fields = ("problem", "answer")
    return load_samples(
        split, hub=(HUB_ID, None), fields=fields, make=make, dataset=dataset, limit=limit, seed=seed, say=say
    )


class MATH500:
    """The environment. Without a `grader` it makes one, and closes it in `aclose`."""

    def __init__(self, system_prompt: str = DEFAULT_SYSTEM_PROMPT, grader: Grader | None = None) -> None:
        self.system_prompt = system_prompt
        self.grader = Grader() if grader is None else grader
        self._owns_grader = grader is None

    def messages(self, sample: MATH500Sample) -> list[ChatMessage]:
        system = [ChatMessage(role="system", content=self.system_prompt)] if self.system_prompt else []
        return [*system, ChatMessage(role="user", content=sample.question)]

    def target(self, sample: MATH500Sample) -> str:
        return sample.target

    async def score(self, sample: MATH500Sample, text: str) -> Score:
        return await boxed_score(self.grader, text, sample.target, last_number=False)

    async def aclose(self) -> None:
        """End the grader's processes, if the grader is this environment's own. Safe to call twice."""
        if self._owns_grader:
            await self.grader.aclose()
