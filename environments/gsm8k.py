r"""GSM8K: grade-school word problems with one numeric answer (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168).

The one place that knows the data, the prompt, the target and the score; training and evaluation both use it. To make a
task of your own, write a module like this one: samples, and a class with `messages`, `target` and `score`.

Three rules are reported for each completion, and only the first is the reward:
- strict: the last `\boxed{...}` equals the target;
- flexible: the last box, or without one the last number of the text, equals the target;
- qwen: the rule of Qwen's published figures (`extract_answer` of `eval/evaluate_chat_gsm8k.py` in QwenLM/Qwen). The last run
  of digits (`\d+`) in the text and the last one in the reference solution are the same number. It knows no sign, comma or
  point, so it errs both ways: `10` passes for -10, `7,125` for 2,125 and `3.50` for 50, while `18.00` fails for 18, and 1080
  for 1,080, since Python reads no number in `080`.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from ludic.task.datafiles import read_rows, split_files
from ludic.task.grading import Grader, Verdict
from ludic.task.numbers import MAX_ANSWER_CHARS
from ludic.task.parsers import boxed_parser, last_number_parser
from ludic.types import ChatMessage, Score

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
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}; leave it out for the whole split")
    if dataset is None:
        source, rows = f"{HUB_ID} (hub)", _hub_rows(split)
    else:
        files = split_files(split, Path(dataset))
        others = f" and {len(files) - 1} more beside it" if len(files) > 1 else ""
        source, rows = f"{files[0]}{others}", read_rows(files)
    samples = list(_samples(rows))
    if not samples:
        raise ValueError(f"{dataset or HUB_ID} holds no rows for the split {split!r}")
    if seed is not None:
        random.Random(seed).shuffle(samples)
    used = samples[:limit]
    say(f"{len(used)} problems" + (f" of the {len(samples)}" if len(used) < len(samples) else "") + f" in {source}")
    question, count = Counter(sample.question.strip() for sample in used).most_common(1)[0]
    if count > 1:
        repeated = len(used) - len({sample.question.strip() for sample in used})
        say(
            f"warning: {repeated} of these problems repeat the question of another (one is there {count} times: "
            f"{question!r:.60}), and count again: intervals are too narrow"
        )
    if too_long := sum(len(sample.target) > MAX_ANSWER_CHARS for sample in used):
        say(
            f"warning: {too_long} of these problems have a target of more than {MAX_ANSWER_CHARS} characters, which is not "
            "graded: every answer to them counts as wrong"
        )
    return used


class GSM8K:
    """The environment (`ludic.task.environment.Environment`). Without a `grader` it makes one, and closes it in `aclose`."""

    def __init__(self, system_prompt: str = DEFAULT_SYSTEM_PROMPT, grader: Grader | None = None) -> None:
        self.system_prompt = system_prompt
        self.grader = Grader() if grader is None else grader
        self._owns_grader = grader is None

    def messages(self, sample: GSM8KSample) -> list[ChatMessage]:
        """The question as the user's turn, after the system prompt unless that is empty."""
        question = ChatMessage(role="user", content=sample.question)
        if not self.system_prompt:
            return [question]
        return [ChatMessage(role="system", content=self.system_prompt), question]

    def target(self, sample: GSM8KSample) -> str:
        return sample.target

    async def score(self, sample: GSM8KSample, text: str) -> Score:
        """1.0 if the boxed answer is right, else 0.0.

        `parts` has the three rules' verdicts; `grader_failed`, 1 where the grader gave up on the answer, for whatever
        reason; and `grader_timeout`, 1 where that was because math-verify met its deadline.
        """
        boxed = boxed_parser(text)
        answer = boxed.answer if boxed.answer is not None else last_number_parser(text).answer
        verdict = Verdict(matched=False) if answer is None else await self.grader.match(answer, sample.target)
        # The two rules differ only in where the answer comes from, so one grading serves both.
        strict = verdict.matched and boxed.answer is not None
        return Score(
            reward=float(strict),
            correct=strict,
            parse=boxed,
            parts={
                "strict": float(strict),
                "flexible": float(verdict.matched),
                "qwen": float(_last_digits(text) == _last_digits(sample.answer) != ""),
                "grader_failed": float(verdict.failure is not None),
                "grader_timeout": float(verdict.failure == "timeout"),
            },
        )

    async def aclose(self) -> None:
        """End the grader's processes, if the grader is this environment's own. Safe to call twice."""
        if self._owns_grader:
            await self.grader.aclose()


def _last_digits(text: str) -> str:
    """The last run of digits if Python reads a number in it, else "": the published script calls `eval` on it."""
    match = re.search(r"\d+", text[::-1])  # From behind: the time does not grow with the digits in front.
    digits = "" if match is None else match.group()[::-1]
    if not digits.isascii() or len(digits) > MAX_INT_DIGITS:
        return ""
    if digits.startswith("0"):
        return "0" if set(digits) == {"0"} else ""  # 000 is a number in Python, 080 is a syntax error
    return digits


def _hub_rows(split: Split) -> Iterator[tuple[str, object]]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"loading {HUB_ID} from the hub needs the package {error.name}: run `uv sync --extra examples`, "
            "or give a local file or folder with --dataset"
        ) from error
    try:
        rows = load_dataset(HUB_ID, "main", split=split)
    except OSError as error:  # Every way in which the hub is out of reach; the library's own errors derive from it.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"cannot load {HUB_ID} from the hub ({reason}); give a local file or folder with --dataset"
        ) from error
    return ((f"{HUB_ID}/{split}:{i}", row) for i, row in enumerate(cast(Iterable[object], rows), start=1))


def _samples(rows: Iterable[tuple[str, object]]) -> Iterator[GSM8KSample]:
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a row must be an object with `question` and `answer`, not {_kind(row)}")
        question, answer = (_text_field(place, row, name) for name in ("question", "answer"))
        _, mark, after = answer.rpartition("####")
        if not mark:
            raise ValueError(f"{place}: no `####` before the final answer in `answer`")
        target = next(iter(after.strip().splitlines()), "").strip()
        if not target:
            raise ValueError(f"{place}: nothing after `####` in `answer`")
        yield GSM8KSample(question=question, answer=answer, target=target)


def _text_field(place: str, row: dict[str, object], name: str) -> str:
    if name not in row:
        raise ValueError(f"{place}: no `{name}`")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{place}: `{name}` must be a string, not {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{place}: `{name}` is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: `{name}` holds half a surrogate pair at character {error.start}") from error
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"
