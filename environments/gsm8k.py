r"""GSM8K: grade-school word problems with one numeric answer (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168).

The one place that knows the data, the prompt, the target and the score; training and evaluation both use it. To make a
task of your own, write a module like this one: samples, and a class with `messages`, `target` and `score`.

An evaluation reports three rules, `flexible` as the headline; `strict` is the reward:
- flexible: the last `\boxed{...}`, or without one the last number of the text, equals the target;
- strict: the last box equals the target;
- qwen: the rule of Qwen's published figures (`extract_answer` of `eval/evaluate_chat_gsm8k.py` in QwenLM/Qwen). The last run
  of digits (`\d+`) in the text and the last one in the reference solution are the same number. It knows no sign, comma or
  point, so it errs both ways: `10` passes for -10, `7,125` for 2,125 and `3.50` for 50, while `18.00` fails for 18, and 1080
  for 1,080, since Python reads no number in `080`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ludic.task.boxed import boxed_score
from ludic.task.datafiles import load_samples
from ludic.task.grading import Grader
from ludic.task.prompts import example_turns
from ludic.types import ChatMessage, Score

NAME = "gsm8k"
"""Begins the names of a run's files."""
HUB_ID = "openai/gsm8k"
DEFAULT_SYSTEM_PROMPT = r"First, think step by step. Then put your final answer inside \boxed{...}."

MAX_INT_DIGITS = 4300
"""Python's default limit for a whole number that is read from text."""

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GSM8KSample:
    """One problem. `target` is the line that follows `####` in `answer`, as it is written there, e.g. `1,080`."""

    question: str
    answer: str
    target: str


def load(
    split: Split = "train",
    *,
    dataset: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[GSM8KSample]:
    """The samples of a split, in their order, or shuffled by `seed`; the first `limit` of those.

    `dataset` is None for the Hugging Face hub, or a file or folder as in `ludic.task.datafiles.split_files`, whose rows have a
    `question` and an `answer`. `say` gets a line on what was read, and one each if questions are repeated or targets too long.

    Raises:
        ValueError: the data cannot be had, a row is malformed (`test.jsonl:17: ...`), or `limit` is below 1.
    """
    return load_samples(
        split,
        hub=(HUB_ID, "main"),
        fields=("question", "answer"),
        make=_sample,
        dataset=dataset,
        limit=limit,
        seed=seed,
        say=say,
    )


def _sample(place: str, question: str, answer: str) -> GSM8KSample:
    _, mark, after = answer.rpartition("####")
    if not mark:
        raise ValueError(f"{place}: no `####` before the final answer in `answer`")
    target = next(iter(after.strip().splitlines()), "").strip()
    if not target:
        raise ValueError(f"{place}: nothing after `####` in `answer`")
    return GSM8KSample(question=question, answer=answer, target=target)


class GSM8K:
    """The environment (`ludic.task.environment.Environment`). Without a `grader` it makes one, and closes it in `aclose`."""

    rules = ("flexible", "strict", "qwen")

    def __init__(
        self,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        grader: Grader | None = None,
        examples: Sequence[GSM8KSample] = (),
    ) -> None:
        self.system_prompt = system_prompt
        self.examples = examples
        self.grader = Grader() if grader is None else grader
        self._owns_grader = grader is None

    def messages(self, sample: GSM8KSample) -> list[ChatMessage]:
        """The question as the user's turn, after the system prompt unless that is empty, and after the `examples`, if any."""
        system = [ChatMessage(role="system", content=self.system_prompt)] if self.system_prompt else []
        solved = [(example.question, worked(example)) for example in self.examples]
        return [*system, *example_turns(solved), ChatMessage(role="user", content=sample.question)]

    def target(self, sample: GSM8KSample) -> str:
        return sample.target

    async def score(self, sample: GSM8KSample, text: str) -> Score:
        """1.0 if the boxed answer is right, else 0.0; `parts` are those of `boxed_score`, and the verdict of `qwen`."""
        score = await boxed_score(self.grader, text, sample.target, last_number=True)
        qwen = float(_last_digits(text) == _last_digits(sample.answer) != "")
        return replace(score, parts={**score.parts, "qwen": qwen})

    async def aclose(self) -> None:
        """End the grader's processes, if the grader is this environment's own. Safe to call twice."""
        if self._owns_grader:
            await self.grader.aclose()


def worked(sample: GSM8KSample) -> str:
    r"""The reference solution as a completion: without the calculator's `<<48/2=24>>`, its answer in a box.

    Example:
        >>> worked(GSM8KSample(question="", answer="He has 48/2 = <<48/2=24>>24.\n#### 24", target="24"))
        'He has 48/2 = 24.\n\\boxed{24}'
    """
    steps = re.sub(r"<<[^<>]*>>", "", sample.answer.rpartition("####")[0]).rstrip()
    return f"{steps}\n\\boxed{{{sample.target}}}"


def _last_digits(text: str) -> str:
    """The last run of digits if Python reads a number in it, else "": the published script calls `eval` on it."""
    match = re.search(r"\d+", text[::-1])  # From behind: the time does not grow with the digits in front.
    digits = "" if match is None else match.group()[::-1]
    if not digits.isascii() or len(digits) > MAX_INT_DIGITS:
        return ""
    if digits.startswith("0"):
        return "0" if set(digits) == {"0"} else ""  # 000 is a number in Python, 080 is a syntax error
    return digits
