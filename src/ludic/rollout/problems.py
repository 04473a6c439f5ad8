"""The problems of an evaluation, the records of their answers, and whether a record is of the problem in its place."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, TypeVar, cast

from ludic.storage.jsonl import read_jsonl
from ludic.task.environment import Environment
from ludic.task.prompts import encode_prompt
from ludic.types import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SampleT = TypeVar("SampleT")


class CompletionRecord(TypedDict):
    """One answer to a problem. Lengths are tokens, the stop token included."""

    text: str
    num_tokens: int
    finish_reason: str
    answer: str | None
    parse_error: str | None
    strict: bool
    flexible: bool
    qwen: bool
    correct: bool
    grader_failed: bool
    policy_version: int


class ProblemRecord(TypedDict):
    """One problem with all its answers: a line of the records file."""

    index: int
    """Its place in the list of samples, from 0."""
    question_id: str
    """A digest of the prompt's ids and the target, so that records are never taken for another problem's."""
    prompt: list[ChatMessage]
    prompt_tokens: int
    target: str
    completions: list[CompletionRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A sample on its way to the model."""

    index: int
    question_id: str
    messages: list[ChatMessage]
    prompt_token_ids: list[int]
    target: str

    @classmethod
    def of(
        cls, index: int, sample: SampleT, environment: Environment[SampleT], tokenizer: "PreTrainedTokenizerBase"
    ) -> "Problem":
        messages = environment.messages(sample)
        target = environment.target(sample)
        prompt_token_ids = encode_prompt(tokenizer, messages)
        digest = hashlib.sha256(json.dumps([prompt_token_ids, target]).encode()).hexdigest()[:16]
        return cls(index=index, question_id=digest, messages=messages, prompt_token_ids=prompt_token_ids, target=target)


def prepare_problems(
    environment: Environment[SampleT],
    samples: Sequence[SampleT],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seq_len: int | None = None,
) -> list["Problem"]:
    """The samples with their prompts encoded.

    Raises:
        ValueError: there are none, or a prompt leaves no room within `max_seq_len`.
    """
    if not samples:
        raise ValueError("there is nothing to evaluate: the list of samples is empty")
    problems = [Problem.of(index, sample, environment, tokenizer) for index, sample in enumerate(samples)]
    for problem in problems:
        _check_length(problem, max_seq_len)
    return problems


def _check_length(problem: Problem, max_seq_len: int | None) -> None:
    length = len(problem.prompt_token_ids)
    if max_seq_len is not None and length >= max_seq_len:
        raise ValueError(
            f"the prompt of problem {problem.index} has {length} tokens, which leaves no room for an answer within "
            f"max_seq_len {max_seq_len}: raise --max-seq-len or leave the problem out"
        )


def problems_digest(
    samples: Sequence[SampleT], environment: Environment[SampleT], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """Sixteen hexadecimal digits that differ where the problems, their order, their prompts or their targets differ."""
    problems = (Problem.of(index, sample, environment, tokenizer) for index, sample in enumerate(samples))
    return hashlib.sha256("".join(problem.question_id for problem in problems).encode()).hexdigest()[:16]


def read_records(path: str | os.PathLike[str]) -> list[ProblemRecord]:
    """The records that an earlier, perhaps unfinished pass wrote; a torn last line is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not such a record; `file:line: reason`.
    """
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        missing = ProblemRecord.__required_keys__ - record.keys()
        if missing:
            raise ValueError(f"{path}:{number}: not an evaluation record: it has no {', '.join(sorted(missing))}")
    return cast("list[ProblemRecord]", records)


def match_records(
    done: Sequence[ProblemRecord], problems: Sequence["Problem"], samples_per_problem: int
) -> dict[int, ProblemRecord]:
    """`done` by index, after a check that each record is of the problem that now has its place.

    Raises:
        ValueError: it is not; one line that says what differs.
    """
    records: dict[int, ProblemRecord] = {}
    for record in done:
        index = record["index"]
        if not 0 <= index < len(problems):
            raise TooFewProblemsError(1 + max(one["index"] for one in done), len(problems))
        if record["question_id"] != problems[index].question_id:
            raise ValueError(
                f"the record of problem {index} was made with {_difference(record, problems[index])}: "
                "evaluate into another file"
            )
        if len(record["completions"]) != samples_per_problem:
            raise ValueError(
                f"the record of problem {index} has {len(record['completions'])} completions, not "
                f"{samples_per_problem}: evaluate into another file, or with as many samples as before"
            )
        records[index] = record
    return records


class TooFewProblemsError(ValueError):
    """Fewer problems were asked for than are recorded already."""

    def __init__(self, num_recorded: int, num_problems: int) -> None:
        super().__init__(
            f"the records reach to problem {num_recorded - 1}, and only {num_problems} problems are asked for"
        )
        self.num_recorded = num_recorded
        """Problems that take in all records."""


def _difference(record: ProblemRecord, problem: "Problem") -> str:
    """Why a record is not of `problem`."""
    if record["prompt"] != problem.messages:
        return "another question or system prompt (did the data change, or their order?)"
    if record["target"] != problem.target:
        return f"another target ({record['target']!r:.80}, now {problem.target!r:.80})"
    return "other token ids for the same messages (another tokenizer or chat template)"
