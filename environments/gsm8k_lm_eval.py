r"""GSM8K as lm-evaluation-harness puts and scores it: its task `gsm8k`, version 3 (lm_eval/tasks/gsm8k/gsm8k.yaml).

The prompt is plain text without a chat template: five solved problems of the training split, drawn anew for each question by
the harness's seed, then `Question: ...\nAnswer:`. A completion is cut at the first stop text. Two rules judge it by the
harness's regular expressions and its exact match with the reference's last line; `tests/test_gsm8k_lm_eval.py` compares prompts
and verdicts with the harness's own code. For evaluation only.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from environments import gsm8k
from environments.few_shot import training_problems
from environments.gsm8k import GSM8KSample
from ludic.types import ChatMessage, ParseResult, Score

VERSION = 3.0
"""Of the harness's task."""
NUM_FEW_SHOT = 5
FEW_SHOT_SEED = 1234
"""The harness's default for its few-shot sampler."""
STOPS = ("Question:", "</s>", "<|im_end|>")
RULES = {
    "flexible-extract": re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"),
    "strict-match": re.compile(r"#### (\-?[0-9\.\,]+)"),
}
"""By the harness's names of its filters, what an answer is. The flexible rule takes the last one, the strict rule the first."""
INVALID = "[invalid]"
"""What the harness puts where nothing was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LMEvalSample:
    """One problem with its whole prompt. `answer` is the reference solution, `target` what follows `####` in it."""

    question: str
    answer: str
    target: str
    prompt: str


def load(
    split: str = "test",
    *,
    dataset: str | Path | None = None,
    limit: int | None = None,
    num_few_shot: int = NUM_FEW_SHOT,
    say: Callable[[str], object] = lambda line: None,
) -> list[LMEvalSample]:
    """The first `limit` problems of the test split, each with its own solved problems of the training split.

    Raises:
        ValueError: as `environments.gsm8k.load`, another split, or too few training problems that are not evaluated.
    """
    if split != "test":
        raise ValueError(f"lm-evaluation-harness evaluates GSM8K's split test, not {split}: leave out --split")
    evaluated = gsm8k.load("test", dataset=dataset, limit=limit, say=say)
    pool = training_problems(gsm8k.load, evaluated, at_least=num_few_shot, dataset=dataset)
    draw = random.Random(FEW_SHOT_SEED)  # one stream over the problems in their order, as in the harness
    return [_sample(sample, draw.sample(pool, num_few_shot)) for sample in evaluated]


def _sample(sample: GSM8KSample, examples: Sequence[GSM8KSample]) -> LMEvalSample:
    solved = "".join(f"{_question(one)} {one.answer}\n\n" for one in examples)
    return LMEvalSample(
        question=sample.question, answer=sample.answer, target=sample.target, prompt=solved + _question(sample)
    )


def _question(sample: GSM8KSample) -> str:
    return f"Question: {sample.question}\nAnswer:"


class GSM8KLMEval:
    """The environment. Its one message is the whole prompt, to be rendered as plain text."""

    rules = tuple(RULES)

    def messages(self, sample: LMEvalSample) -> list[ChatMessage]:
        return [ChatMessage(role="user", content=sample.prompt)]

    def target(self, sample: LMEvalSample) -> str:
        return sample.target

    async def score(self, sample: LMEvalSample, text: str) -> Score:
        """`correct` is the verdict of `strict-match`; the answer is that of `flexible-extract`."""
        found = {rule: extract(rule, text) for rule in RULES}
        reference = _comparable(sample.answer)
        verdicts = {rule: float(_comparable(answer) == reference) for rule, answer in found.items()}
        answer = found["flexible-extract"]
        parse = ParseResult(error="no number in the text") if answer == INVALID else ParseResult(answer=answer)
        strict = verdicts["strict-match"]
        return Score(reward=strict, correct=bool(strict), parse=parse, parts=verdicts)

    async def aclose(self) -> None:
        """Nothing is held."""


def until_stop(text: str) -> str:
    """`text` before its first stop text: engines stop at token ids alone."""
    for stop in STOPS:
        text = text.partition(stop)[0]
    return text


def extract(rule: str, text: str) -> str:
    """The answer that `rule` finds in a completion, or `[invalid]`."""
    found = [match[match.lastindex or 0].strip() for match in RULES[rule].finditer(until_stop(text))]
    if not found:
        return INVALID
    return found[-1] if rule == "flexible-extract" else found[0]


def _comparable(text: str) -> str:
    """What the harness compares: without commas and dollar signs, what precedes `#### `, a last point, and case."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()
