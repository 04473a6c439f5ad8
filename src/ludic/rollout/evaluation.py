"""How good a policy is on a list of problems: accuracy by the environment's rules with intervals, pass@k, and records.

One pass: every prompt is encoded and checked first, then all are generated with a bounded number of completions in
flight, scored as they come in, and recorded one problem a line. The result is computed from the records alone, so that
a run that was cut short and one that was taken up again give the figures of an unbroken one.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar, cast

from ludic.rollout.engine import InferenceEngine
from ludic.rollout.intervals import clustered_interval, mean, pass_at_k
from ludic.rollout.problems import Problem, ProblemRecord, match_records, prepare_problems, rules_of, verdicts
from ludic.rollout.seeds import derive_seed
from ludic.rollout.turns import Conversations, all_or_first_failure
from ludic.rollout.votes import maj_at_k, telling_ks, votes_of
from ludic.storage.jsonl import JsonlWriter
from ludic.task.environment import Environment
from ludic.types import Completion, SamplingParams

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
class RuleAccuracy:
    """The share of completions that one rule calls right, and its interval (low, high) at 95%."""

    accuracy: float
    ci95: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """The figures of an evaluation. Rates are fractions of 1."""

    num_problems: int
    num_completions: int
    rules: dict[str, RuleAccuracy]
    """By name, in the order of the environment's `rules`: the first is the headline."""
    correct_rate: float
    """Share that the environment itself calls correct."""
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
    """For k = 1 to the completions per problem, by the headline rule."""
    maj_at_k: dict[int, float] = field(default_factory=dict)
    """By the headline rule, for k = 1, 2, 4 and so on, and the completions per problem; empty where that is one."""

    @property
    def accuracy(self) -> float:
        """By the headline rule."""
        return next(iter(self.rules.values())).accuracy

    @property
    def accuracy_ci95(self) -> tuple[float, float]:
        """By the headline rule."""
        return next(iter(self.rules.values())).ci95

    def to_summary(self, *, model: str, settings: Mapping[str, object]) -> dict[str, object]:
        """A flat, JSON-ready dict: `accuracy` by the headline rule, `NAME_accuracy` by others, `pass@k`, `maj@k`, `settings`."""
        figures = asdict(self)
        passes = {f"pass@{k}": share for k, share in figures.pop("pass_at_k").items()}
        passes |= {f"maj@{k}": share for k, share in figures.pop("maj_at_k").items()}
        accuracies: dict[str, object] = {}
        for place, (rule, figure) in enumerate(figures.pop("rules").items()):
            name = f"{rule}_accuracy" if place else "accuracy"
            accuracies |= {name: figure["accuracy"], f"{name}_ci95": list(figure["ci95"])}
        return {"model": model, **accuracies, **figures, **passes, "settings": dict(settings)}


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
        engine: neither given weights nor closed.
        sampling: `seed` is the evaluation's; every request gets its own, derived from it and the problem's place.
        concurrency: the most completions in flight at a time.
        record_writer: gets one `ProblemRecord` a problem, as it is finished; flushed at the end, also after a failure.
        done: records of an earlier pass; these problems are not generated again and count in the result.
        on_progress: called once at the start and after each problem.
        max_seq_len: tokens of prompt and completion together; a completion's `max_tokens` is cut down to fit.

    Raises:
        ValueError: no samples, a prompt that leaves no room within `max_seq_len`, or `done` of other problems; at once.
        Exception: the first failure of the engine, the environment or the writer; the rest is cancelled.
    """
    if min(samples_per_problem, concurrency) < 1:
        counts = f"{samples_per_problem} and {concurrency}"
        raise ValueError(f"samples_per_problem and concurrency must be at least 1, not {counts}")
    rules = rules_of(environment)
    problems = prepare_problems(environment, samples, tokenizer, max_seq_len=max_seq_len)
    taken_over = match_records(done, problems, samples_per_problem, rules)
    progress = _Progress(taken_over, rules[0], len(problems), on_progress)
    conversations = Conversations(engine, environment, tokenizer)
    per_request = min(samples_per_problem, concurrency)
    places = asyncio.Semaphore(concurrency // per_request)  # so that at most `concurrency` completions are in flight

    async def work(problem: Problem, sample: SampleT) -> None:
        completions: list[Completion] = []
        for start in range(0, samples_per_problem, per_request):
            count = min(per_request, samples_per_problem - start)
            request = _request_sampling(sampling, problem, start, max_seq_len)
            async with places:
                completions += await conversations.generate(
                    problem.prompt_token_ids, sample, num_completions=count, sampling=request
                )
        record = problem.record(await conversations.scored(completions, sample), rules)
        if record_writer is not None:
            record_writer.write(cast("dict[str, object]", record))
        progress.add(record)

    try:
        pairs = zip(problems, samples, strict=True)
        await all_or_first_failure(work(*pair) for pair in pairs if pair[0].index not in taken_over)
    finally:
        if record_writer is not None:
            record_writer.flush()
    records = [progress.records[problem.index] for problem in problems]
    return summarise(records, rules=rules, seconds=progress.seconds, taken_over=taken_over)


def summarise(
    records: Sequence[ProblemRecord], *, rules: Sequence[str], seconds: float, taken_over: Collection[int] = ()
) -> EvaluationResult:
    """The figures of finished problems, each with the same number of completions.

    `rules` are the environment's, the headline first. `taken_over` names the problems, by index, that were not generated in
    the `seconds` of this pass.
    """
    completions = [completion for record in records for completion in record["completions"]]
    count = len(completions)
    total_tokens = sum(completion["num_tokens"] for completion in completions)
    tokens_of_pass = sum(_num_tokens(record) for record in records if record["index"] not in taken_over)
    by_rule = {rule: [verdicts(record, rule) for record in records] for rule in rules}
    headline = by_rule[rules[0]]
    num_samples = len(headline[0])
    votes = [votes_of(record, rules[0]) for record in records] if num_samples > 1 else []
    return EvaluationResult(
        num_problems=len(records),
        num_completions=count,
        rules={
            rule: RuleAccuracy(accuracy=mean(given), ci95=clustered_interval(given)) for rule, given in by_rule.items()
        },
        correct_rate=sum(completion["correct"] for completion in completions) / count,
        parse_err_rate=sum(completion["parse_error"] is not None for completion in completions) / count,
        truncation_rate=sum(completion["finish_reason"] == "length" for completion in completions) / count,
        avg_completion_length=total_tokens / count,
        total_completion_tokens=total_tokens,
        prompt_tokens=sum(record["prompt_tokens"] for record in records),
        grader_failures=sum(completion["grader_failed"] for completion in completions),
        seconds=seconds,
        tokens_per_s=tokens_of_pass / seconds if seconds > 0 else 0.0,
        num_taken_over=len(taken_over),
        pass_at_k={
            k: sum(pass_at_k(num_samples, sum(given), k) for given in headline) / len(records)
            for k in range(1, num_samples + 1)
        },
        maj_at_k={
            k: sum(maj_at_k(*given, k) for given in votes) / len(votes) for k in telling_ks(num_samples) if votes
        },
    )


class _Progress:
    """Collects finished problems and tells the display."""

    def __init__(
        self,
        taken_over: Mapping[int, ProblemRecord],
        headline: str,
        num_problems: int,
        on_progress: Callable[[EvaluationProgress], None] | None,
    ) -> None:
        self.records = dict(taken_over)
        self._headline, self._num_problems, self._on_progress = headline, num_problems, on_progress
        self._num_right = sum(sum(verdicts(record, headline)) for record in taken_over.values())
        self._num_completions = sum(len(record["completions"]) for record in taken_over.values())
        self._completion_tokens = 0
        self._start = time.perf_counter()
        self._tell()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def add(self, record: ProblemRecord) -> None:
        self.records[record["index"]] = record
        self._num_right += sum(verdicts(record, self._headline))
        self._num_completions += len(record["completions"])
        self._completion_tokens += _num_tokens(record)
        self._tell()

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(
                EvaluationProgress(
                    num_done=len(self.records),
                    num_problems=self._num_problems,
                    accuracy=self._num_right / max(1, self._num_completions),
                    completion_tokens=self._completion_tokens,
                    seconds=self.seconds,
                )
            )


def _num_tokens(record: ProblemRecord) -> int:
    return sum(completion["num_tokens"] for completion in record["completions"])


def _request_sampling(
    sampling: SamplingParams, problem: Problem, start: int, max_seq_len: int | None
) -> SamplingParams:
    """`sampling` for one request: its own seed, no more tokens than fit, and no log-probs: an evaluation does not use them."""
    seed = None if sampling.seed is None else derive_seed(sampling.seed, problem.index, start)
    room = sampling.max_tokens if max_seq_len is None else max_seq_len - len(problem.prompt_token_ids)
    return replace(sampling, logprobs=False, seed=seed, max_tokens=min(sampling.max_tokens, room))
