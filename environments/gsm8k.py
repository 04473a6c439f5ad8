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

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from ludic.grading import Grader, Verdict
from ludic.parsers import boxed_parser, last_number_parser
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
    split: Split = "train", *, dataset: str | Path | None = None, limit: int | None = None, seed: int | None = None
) -> list[GSM8KSample]:
    """The samples of a split, in their order, or shuffled by `seed`; the first `limit` of those.

    `dataset` is None for the Hugging Face hub; a file (JSONL, parquet or CSV) of rows with a `question` and an `answer`,
    whatever the split; or a folder that holds `{split}.jsonl`, or else `{split}.parquet` or `.csv`, in shards or not. Of a
    clone of the hub's data set, the configuration `main` is read, as from the hub.

    Raises:
        ValueError: the data cannot be had, a row is malformed (`test.jsonl:17: ...`), or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}; leave it out for the whole split")
    samples = list(_read_hub(split) if dataset is None else _read_local(split, Path(dataset)))
    if not samples:
        raise ValueError(f"{dataset or HUB_ID} holds no rows for the split {split!r}")
    if seed is not None:
        random.Random(seed).shuffle(samples)
    return samples[:limit]


class GSM8K:
    """The environment (`ludic.environment.Environment`). Without a `grader` it makes one, and closes it in `aclose`."""

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


def _read_hub(split: Split) -> Iterator[GSM8KSample]:
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
    return _samples((f"{HUB_ID}/{split}:{i}", row) for i, row in enumerate(cast(Iterable[object], rows), start=1))


def _read_local(split: Split, path: Path) -> Iterator[GSM8KSample]:
    if path.is_dir():
        if (path / f"{split}.jsonl").is_file():
            return _samples(_jsonl_rows(path / f"{split}.jsonl"))
        for kind in ("parquet", "csv"):
            if files := _split_files(split, path, kind):
                return _samples(_table_rows(kind, files))
        raise ValueError(f"{path} holds no {split}.jsonl (and no {split}*.parquet or {split}*.csv)")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --dataset takes a JSONL file or a folder that holds {split}.jsonl")
    if path.suffix in (".parquet", ".csv"):
        return _samples(_table_rows(path.suffix[1:], [path]))
    return _samples(_jsonl_rows(path))


def _split_files(split: Split, folder: Path, kind: str) -> list[Path]:
    """The files of a split, as the hub names them (`train.parquet`, `train-00000-of-00001.parquet`), not in hidden folders.

    A clone of the hub's data set has a folder for each configuration; as from the hub, `main` is read.

    Raises:
        ValueError: files in several folders, none of them `main`: they may hold the same problems.
    """
    named = re.compile(rf"{split}([-.]\d.*)?\.{kind}")
    files = [
        file
        for file in sorted(folder.rglob(f"{split}*.{kind}"))
        if named.fullmatch(file.name) and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    folders = {file.parent for file in files}
    if len(folders) > 1:
        main = folder / "main"
        if main not in folders:
            names = ", ".join(sorted(f"{one.relative_to(folder)}/" for one in folders))
            raise ValueError(
                f"{folder} holds {split} files in several folders ({names}): give one of them to --dataset"
            )
        files = [file for file in files if file.parent == main]
    return files


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield place, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
            except RecursionError as error:
                raise ValueError(f"{place}: not a row (nested too deeply)") from error


def _table_rows(kind: str, files: list[Path]) -> Iterator[tuple[str, object]]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading {files[0]} needs the package {error.name}: run `uv sync --extra examples`, "
            "or turn it into a JSONL file"
        ) from error
    from datasets.exceptions import DatasetGenerationError

    for file in files:
        try:
            rows = load_dataset(kind, data_files=str(file), split="train")
        except (DatasetGenerationError, OSError, ValueError) as error:
            cause = error.__cause__ or error
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            raise ValueError(f"{file}: not a {kind} file that can be read ({reason})") from error
        for number, row in enumerate(cast(Iterable[object], rows), start=1):
            yield f"{file}:{number}", row


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
