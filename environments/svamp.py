"""SVAMP: one-step word problems, with changes that a model which only matches patterns falls for (Patel et al. 2021,
https://arxiv.org/abs/2103.07191).

An evaluation reports two rules, as `ludic.task.boxed` has them: `flexible` as the headline, `strict` as the reward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from environments.gsm8k import DEFAULT_SYSTEM_PROMPT
from ludic.task.boxed import boxed_score
from ludic.task.datafiles import load_samples
from ludic.task.grading import Grader
from ludic.task.prompts import example_turns
from ludic.types import ChatMessage, Score

HUB_ID = "ChilleD/SVAMP"


@dataclass(frozen=True, slots=True, kw_only=True)
class SVAMPSample:
    """One problem: the story and its question, and the number that answers it, e.g. `145`."""

    question: str
    target: str


def load(
    split: Literal["train", "test"] = "train",
    *,
    dataset: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[SVAMPSample]:
    """The samples of a split; see `ludic.task.datafiles.load_samples`. A row has a `Body`, a `Question` and an `Answer`."""

    def make(_place: str, body: str, question: str, answer: str) -> SVAMPSample:
        return SVAMPSample(question=f"{body.strip()} {question.strip()}", target=answer.strip())

    fields = ("Body", "Question", "Answer")
    return load_samples(
        split, hub=(HUB_ID, None), fields=fields, make=make, dataset=dataset, limit=limit, seed=seed, say=say
    )


class SVAMP:
    """The environment. Without a `grader` it makes one, and closes it in `aclose`."""

    rules = ("flexible", "strict")

    def __init__(
        self,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        grader: Grader | None = None,
        examples: Sequence[SVAMPSample] = (),
    ) -> None:
        self.system_prompt = system_prompt
        self.examples = examples
        self.grader = Grader() if grader is None else grader
        self._owns_grader = grader is None

    def messages(self, sample: SVAMPSample) -> list[ChatMessage]:
        system = [ChatMessage(role="system", content=self.system_prompt)] if self.system_prompt else []
        solved = [(example.question, rf"\boxed{{{example.target}}}") for example in self.examples]
        return [*system, *example_turns(solved), ChatMessage(role="user", content=sample.question)]

    def target(self, sample: SVAMPSample) -> str:
        return sample.target

    async def score(self, sample: SVAMPSample, text: str) -> Score:
        return await boxed_score(self.grader, text, sample.target, last_number=True)

    async def aclose(self) -> None:
        """End the grader's processes, if the grader is this environment's own. Safe to call twice."""
        if self._owns_grader:
            await self.grader.aclose()
