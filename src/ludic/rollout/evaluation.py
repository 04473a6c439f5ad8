"""How good a policy is on a list of problems: accuracy under three named rules with intervals, pass@k, and records.

One pass: every prompt is encoded and checked first, then all are generated with a bounded number of completions in
flight, scored as they come in, and recorded one problem a line. The result is computed from the records alone, so that
a run that was cut short and one that was taken up again give the figures of an unbroken one.

The rules are whatever the environment reports in `Score.parts`: `flexible`, `strict` and `qwen`. An environment with
one rule only gets its verdict (`Score.correct`) under all three names.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypeVar, cast

from ludic.rollout.engine import InferenceEngine
from ludic.rollout.groups import derive_seed
from ludic.rollout.intervals import clustered_interval, mean, pass_at_k
from ludic.rollout.problems import CompletionRecord, Problem, ProblemRecord, match_records, prepare_problems
from ludic.storage.jsonl import JsonlWriter
from ludic.task.environment import Environment
from ludic.task.prompts import decode_completion
from ludic.types import Completion, SamplingParams, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SampleT = TypeVar("SampleT")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProgress:
    """How far an evaluation is, for a display. Counts include problems that were already recorded."""

    num_done: int
    num_problems: int
    accuracy: float
    """Over the problems that are done."""
    completion_tokens: int
    """Generated in this pass."""
    seconds: float
    """Since this pass began to generate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """The figures of an evaluation. Rates are fractions of 1, intervals are (low, high) at 95%."""

    num_problems: int
    num_completions: int
    accuracy: float
    """Share of completions that are right by the flexible rule (an answer in a box, else the last number)."""
    accuracy_ci95: tuple[float, float]
    strict_accuracy: float
    """Right by the strict rule (in a box only)."""
    strict_accuracy_ci95: tuple[float, float]
    qwen_accuracy: float
    """Right by the rule that Qwen's published figures use (the last digits of the text equal the target)."""
    qwen_accuracy_ci95: tuple[float, float]
    correct_rate: float
    """Share that the environment itself calls correct: what the reward is made of."""
    parse_err_rate: float
    """Share in which the environment's parser found no answer."""
    truncation_rate: float
    """Share that was cut off at the token limit."""
    avg_completion_length: float
    """Tokens."""
    total_completion_tokens: int
    prompt_tokens: int
    """Each prompt counted once, however many completions it got."""
    grader_failures: int
    """Completions whose grader gave up (a deadline, a crash); they count as wrong."""
    seconds: float
    """Wall clock of this pass; work of an earlier pass, taken over from its records, is not in it."""
    tokens_per_s: float
    """Completion tokens of this pass over its seconds."""
    num_taken_over: int
    """Problems whose records came from an earlier pass."""
    pass_at_k: dict[int, float]
    """For k = 1 to the completions per problem, by the flexible rule."""

    def to_summary(self, *, model: str, settings: Mapping[str, object]) -> dict[str, object]:
        """A flat, JSON-ready dict, with `pass@k` keys and the settings under `settings`."""
        figures: dict[str, object] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key != "pass_at_k"
        }
        figures |= {f"pass@{k}": value for k, value in self.pass_at_k.items()}
        return {"model": model, **figures, "settings": dict(settings)}


async def evaluate(
    engine: InferenceEngine,
    environment: Environment[SampleT],
    samples: Sequence[SampleT],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    sampling: SamplingParams,
    samples_per_problem: int = 1,
    concurrency: int = 64,
    record_writer: JsonlWriter | None = None,
    done: Sequence[ProblemRecord] = (),
    on_progress: Callable[[EvaluationProgress], None] | None = None,
    max_seq_len: int | None = None,
) -> EvaluationResult:
    """Generate, score and record `samples_per_problem` completions of every sample.

    Args:
        engine: generates; it is neither given weights nor closed.
        environment: puts the samples to the model and scores the texts.
        samples: the problems, in order.
        tokenizer: the policy's.
        sampling: `seed` is the evaluation's; every request gets its own, derived from it and the problem's place.
        samples_per_problem: K.
        concurrency: the most completions in flight at a time.
        record_writer: gets one `ProblemRecord` a problem, as it is finished; flushed at the end, also after a failure.
        done: records of an earlier pass; these problems are not generated again and count in the result.
        on_progress: called once at the start and after each problem.
        max_seq_len: tokens of prompt and completion together; a completion's `max_tokens` is cut down to fit.

    Raises:
        ValueError: no samples; a prompt that leaves no room within `max_seq_len`; `done` belongs to other problems.
            All before anything is generated.
        Exception: the first failure of the engine, the environment or the writer; the rest is cancelled.
    """
    if samples_per_problem < 1 or concurrency < 1:
        raise ValueError(
            f"samples_per_problem and concurrency must be at least 1, not {samples_per_problem} and {concurrency}"
        )
    problems = prepare_problems(environment, samples, tokenizer, max_seq_len=max_seq_len)
    records = match_records(done, problems, samples_per_problem)
    progress = _Progress(len(problems), records, on_progress)

    per_request = min(samples_per_problem, concurrency)
    # A request holds one of these places, so that at most `concurrency` completions are in flight.
    places = asyncio.Semaphore(concurrency // per_request)

    async def work(problem: Problem, sample: SampleT) -> None:
        completions: list[Completion] = []
        for start in range(0, samples_per_problem, per_request):
            num_completions = min(per_request, samples_per_problem - start)
            request = _request_sampling(sampling, problem, start, max_seq_len)
            async with places:
                completions += await engine.generate(
                    problem.prompt_token_ids, num_completions=num_completions, sampling=request
                )
        texts = [decode_completion(tokenizer, completion.token_ids) for completion in completions]
        scores = await asyncio.gather(*(environment.score(sample, text) for text in texts))
        record = _record(problem, completions, texts, scores)
        if record_writer is not None:
            record_writer.write(cast("dict[str, object]", record))
        progress.add(record)

    try:
        async with asyncio.TaskGroup() as group:
            for problem, sample in zip(problems, samples, strict=True):
                if problem.index not in records:
                    group.create_task(work(problem, sample))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        if record_writer is not None:
            record_writer.flush()
    return summarise(
        [progress.records[problem.index] for problem in problems],
        seconds=progress.seconds,
        taken_over=frozenset(records),
    )


def summarise(
    records: Sequence[ProblemRecord], *, seconds: float, taken_over: Collection[int] = ()
) -> EvaluationResult:
    """The figures of finished problems, each with the same number of completions.

    `taken_over` names the problems, by index, that were not generated in the `seconds` of this pass.
    """
    completions = [completion for record in records for completion in record["completions"]]
    num_completions = len(completions)
    total_tokens = sum(completion["num_tokens"] for completion in completions)
    tokens_of_pass = sum(
        completion["num_tokens"]
        for record in records
        if record["index"] not in taken_over
        for completion in record["completions"]
    )

    def share(verdicts: Sequence[bool]) -> float:
        return sum(verdicts) / num_completions

    flexible = [[completion["flexible"] for completion in record["completions"]] for record in records]
    strict = [[completion["strict"] for completion in record["completions"]] for record in records]
    qwen = [[completion["qwen"] for completion in record["completions"]] for record in records]
    num_samples = len(flexible[0])
    return EvaluationResult(
        num_problems=len(records),
        num_completions=num_completions,
        accuracy=mean(flexible),
        accuracy_ci95=clustered_interval(flexible),
        strict_accuracy=mean(strict),
        strict_accuracy_ci95=clustered_interval(strict),
        qwen_accuracy=mean(qwen),
        qwen_accuracy_ci95=clustered_interval(qwen),
        correct_rate=share([completion["correct"] for completion in completions]),
        parse_err_rate=share([completion["parse_error"] is not None for completion in completions]),
        truncation_rate=share([completion["finish_reason"] == "length" for completion in completions]),
        avg_completion_length=total_tokens / num_completions,
        total_completion_tokens=total_tokens,
        prompt_tokens=sum(record["prompt_tokens"] for record in records),
        grader_failures=sum(completion["grader_failed"] for completion in completions),
        seconds=seconds,
        tokens_per_s=tokens_of_pass / seconds if seconds > 0 else 0.0,
        num_taken_over=len(taken_over),
        pass_at_k={
            k: sum(pass_at_k(num_samples, sum(verdicts), k) for verdicts in flexible) / len(records)
            for k in range(1, num_samples + 1)
        },
    )


class _Progress:
    """Collects finished problems and tells the display."""

    def __init__(
        self,
        num_problems: int,
        records: Mapping[int, ProblemRecord],
        on_progress: Callable[[EvaluationProgress], None] | None,
    ) -> None:
        self.records = dict(records)
        self.completion_tokens = 0
        self._num_problems = num_problems
        self._num_right = sum(_num_right(record) for record in records.values())
        self._num_completions = sum(len(record["completions"]) for record in records.values())
        self._on_progress = on_progress
        self._start = time.perf_counter()
        self._tell()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def add(self, record: ProblemRecord) -> None:
        self.records[record["index"]] = record
        self.completion_tokens += sum(completion["num_tokens"] for completion in record["completions"])
        self._num_right += _num_right(record)
        self._num_completions += len(record["completions"])
        self._tell()

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(
                EvaluationProgress(
                    num_done=len(self.records),
                    num_problems=self._num_problems,
                    accuracy=self._num_right / self._num_completions if self._num_completions else 0.0,
                    completion_tokens=self.completion_tokens,
                    seconds=self.seconds,
                )
            )


def _request_sampling(
    sampling: SamplingParams, problem: Problem, start: int, max_seq_len: int | None
) -> SamplingParams:
    """`sampling` for one request: its own seed, no more tokens than fit, and no log-probs: an evaluation does not use them."""
    sampling = replace(sampling, logprobs=False)
    if sampling.seed is not None:
        sampling = replace(sampling, seed=derive_seed(sampling.seed, problem.index, start))
    if max_seq_len is not None:
        room = max_seq_len - len(problem.prompt_token_ids)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
    return sampling


def _record(
    problem: Problem, completions: Sequence[Completion], texts: Sequence[str], scores: Sequence[Score]
) -> ProblemRecord:
    return ProblemRecord(
        index=problem.index,
        question_id=problem.question_id,
        prompt=problem.messages,
        prompt_tokens=len(problem.prompt_token_ids),
        target=problem.target,
        completions=[
            CompletionRecord(
                text=text,
                num_tokens=len(completion.token_ids),
                finish_reason=completion.finish_reason,
                answer=score.parse.answer,
                parse_error=score.parse.error,
                strict=bool(score.parts.get("strict", score.correct)),
                flexible=bool(score.parts.get("flexible", score.correct)),
                qwen=bool(score.parts.get("qwen", score.correct)),
                correct=score.correct,
                grader_failed=bool(score.parts.get("grader_failed", False)),
                policy_version=completion.policy_version,
            )
            for completion, text, score in zip(completions, texts, scores, strict=True)
        ],
    )


def _num_right(record: ProblemRecord) -> int:
    return sum(completion["flexible"] for completion in record["completions"])
