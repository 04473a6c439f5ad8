"""The problems of an evaluation, the records of their answers, and whether a record is of the problem in its place."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar, cast

from ludic.storage.jsonl import read_jsonl
from ludic.task.environment import Environment
from ludic.task.prompts import encode_prompt
from ludic.types import ChatMessage, Completion, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SampleT = TypeVar("SampleT")


class TurnRecord(TypedDict):
    """One turn of a conversation after its prompt."""

    role: str
    content: str
    tokens: int
    """Of the model's, the stop token included; of the environment's, what the chat template puts around it."""


class CompletionRecord(TypedDict):
    """One answer to a problem; the verdict of each rule of the environment stands beside these, under the rule's name."""

    text: str
    num_tokens: int
    """Those that the model wrote, stop tokens included."""
    finish_reason: str
    answer: str | None
    parse_error: str | None
    correct: bool
    grader_failed: bool
    policy_version: int
    turns: NotRequired[list[TurnRecord]]
    """Of a conversation, the model's first; absent where the task has one turn."""


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


def rules_of(environment: Environment[Any]) -> tuple[str, ...]:
    """The names of the environment's rules, the headline first; of one that names none, `correct`, its own verdict.

    Raises:
        ValueError: there are none, one is there twice, or one has the name of another field of a record.
    """
    rules: tuple[str, ...] = getattr(environment, "rules", ("correct",))  # three methods are enough for a task
    fields = {*CompletionRecord.__required_keys__, *CompletionRecord.__optional_keys__} - {"correct"}
    if not rules or len(set(rules)) < len(rules) or fields & set(rules):
        raise ValueError(
            f"{type(environment).__name__} has the rules {rules}: name one at least, each once, and none like a field of "
            f"the records ({', '.join(sorted(fields))})"
        )
    return rules


def recorded_rules(record: ProblemRecord) -> list[str]:
    """The names of the rules that a record has verdicts of, the headline first.

    Records of before the environment named its rules have GSM8K's three, of which `flexible` was the headline and stood second.
    """
    fields = CompletionRecord.__required_keys__ - {"correct"}
    completion = cast("dict[str, object]", record["completions"][0])
    names = [name for name, value in completion.items() if isinstance(value, bool) and name not in fields]
    return sorted([name for name in names if name != "correct"] or names, key=lambda name: name != "flexible")


def verdicts(record: ProblemRecord, rule: str) -> list[bool]:
    """[K]: whether each answer is right by `rule`."""
    return [bool(cast("dict[str, object]", completion)[rule]) for completion in record["completions"]]


def answering_text(completion: CompletionRecord) -> str:
    """Where an answer stands: the model's last turn, or the whole text of a task of one turn."""
    turns = completion.get("turns")
    return turns[-1]["content"] if turns else completion["text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A sample on its way to the model."""

    index: int
    question_id: str
    messages: list[ChatMessage]
    prompt_token_ids: list[int]
    target: str

    def record(self, answers: Sequence[tuple[Completion, str, Score]], rules: Sequence[str]) -> ProblemRecord:
        """This problem with its answers, each a completion, its text and its score."""
        return ProblemRecord(
            index=self.index,
            question_id=self.question_id,
            prompt=self.messages,
            prompt_tokens=len(self.prompt_token_ids),
            target=self.target,
            completions=[_completion_record(*answer, rules) for answer in answers],
        )


def turn_records(completion: Completion) -> list[TurnRecord]:
    """The turns of a conversation, as the records of a training and of an evaluation have them."""
    return [TurnRecord(role=turn.role, content=turn.text, tokens=turn.num_tokens) for turn in completion.turns]


def _completion_record(completion: Completion, text: str, score: Score, rules: Sequence[str]) -> CompletionRecord:
    record = CompletionRecord(
        text=text,
        num_tokens=completion.num_sampled_tokens,
        finish_reason=completion.finish_reason,
        answer=score.parse.answer,
        parse_error=score.parse.error,
        correct=score.correct,
        grader_failed=bool(score.parts.get("grader_failed", False)),
        policy_version=completion.policy_version,
    )
    if completion.turns:
        record["turns"] = turn_records(completion)
    given: dict[str, float] = {**score.parts, "correct": score.correct}
    if missing := [rule for rule in rules if rule not in given]:
        raise ValueError(
            f"a score has no verdict of the rule {missing[0]!r}, its parts are {sorted(score.parts)}: "
            "give a part, 0 or 1, for each of the environment's rules"
        )
    return cast("CompletionRecord", {**record, **{rule: bool(given[rule]) for rule in rules}})


def prepare_problems(
    environment: Environment[SampleT],
    samples: Sequence[SampleT],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seq_len: int | None = None,
) -> list[Problem]:
    """The samples with their prompts encoded.

    Raises:
        ValueError: there are none, or a prompt leaves no room within `max_seq_len`.
    """
    if not samples:
        raise ValueError("there is nothing to evaluate: the list of samples is empty")
    problems = [_problem(index, sample, environment, tokenizer) for index, sample in enumerate(samples)]
    for problem in problems:
        length = len(problem.prompt_token_ids)
        if max_seq_len is not None and length >= max_seq_len:
            raise ValueError(
                f"the prompt of problem {problem.index} has {length} tokens, which leaves no room for an answer within "
                f"max_seq_len {max_seq_len}: raise --max-seq-len or leave the problem out"
            )
    return problems


def _problem(
    index: int, sample: SampleT, environment: Environment[SampleT], tokenizer: "PreTrainedTokenizerBase"
) -> Problem:
    messages, target = environment.messages(sample), environment.target(sample)
    prompt_token_ids = encode_prompt(tokenizer, messages)
    digest = hashlib.sha256(json.dumps([prompt_token_ids, target]).encode()).hexdigest()[:16]
    return Problem(index=index, question_id=digest, messages=messages, prompt_token_ids=prompt_token_ids, target=target)


def problems_digest(
    samples: Sequence[SampleT], environment: Environment[SampleT], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """Sixteen hexadecimal digits that differ where the problems, their order, their prompts or their targets differ."""
    problems = (_problem(index, sample, environment, tokenizer) for index, sample in enumerate(samples))
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
    done: Sequence[ProblemRecord], problems: Sequence[Problem], samples_per_problem: int, rules: Sequence[str]
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
        if unknown := [rule for rule in rules if any(rule not in one for one in record["completions"])]:
            raise ValueError(
                f"the record of problem {index} has no verdict of the rule {unknown[0]!r}: evaluate into another file"
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


def _difference(record: ProblemRecord, problem: Problem) -> str:
    """Why a record is not of `problem`."""
    if record["prompt"] != problem.messages:
        return "another question or system prompt (did the data change, or their order?)"
    if record["target"] != problem.target:
        return f"another target ({record['target']!r:.80}, now {problem.target!r:.80})"
    return "other token ids for the same messages (another tokenizer or chat template)"
