"""Why isn't it learning? Watches the metrics of a run and says, once each, what keeps runs from learning.

Every alarm looks at a window of updates and never at a single one. An alarm is raised once a run, because one that comes back
night after night is not read. What is wrong at the first update already is the business of `ludic.doctor`.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

# When an alarm is raised. A window is counted in updates that logged the metric: a skipped update delays an alarm and does not
# hide it. docs/metrics.md has the same in a table.
WINDOW = 5  # where no other is named
TRUNCATED_SHARE = 0.25  # mean truncation_rate above this
ZERO_VARIANCE_SHARE = 0.8  # mean zero_variance_share above this
PARSE_RATE_FALL = 0.15  # mean parse_err_rate this far above the best such mean of the run
ENTROPY_SHARE = 0.2  # mean entropy below this share of that of the first window
LOGPROB_GAP_RISE = 4.0  # mean logprob_gap above this many times that of the first window ...
# ... and above so many nats: in fp32 the gap is 1e-7, and its multiples mean nothing. Rollouts that are one update old have a
# gap that follows the learning rate through its warm-up, 0.015 nats in the demo.
LOGPROB_GAP_NATS = 0.03
# Mean logprob_gap above this without such a rise. Two sound sides in bf16 differ by 0.005 (a synthetic policy) to 0.03 nats
# (SmolLM2-135M) a token; three times that is no rounding: two sides that compute different models differ by 0.1 to 0.5.
LOGPROB_GAP_LARGE = 0.1
CHANGED_WEIGHTS_SHARE = 1e-4  # mean changed_weights_share below this
FLAT_UPDATES = 60  # the straight line through the reward_mean of so many updates does not rise ...
SOLVED_RATE = 0.9  # ... unless the mean correct_rate is above this: what is solved cannot rise
CLIPPED_UPDATES = 20  # grad_clipped in every one of so many updates
GRADER_FAILURE_SHARE = 0.01  # more than this share of the completions of a window could not be graded ...
GRADER_FAILURES = 3  # ... and at least so many
QUEUE_UPDATES = 10  # the median generation_s of so many updates is ...
GENERATION_SLOWDOWN = 3.0  # ... this many times the lowest such median, allowing for more or longer completions ...
GENERATION_SLOWDOWN_S = 2.0  # ... and so many seconds above it

_LONGEST = max(WINDOW, FLAT_UPDATES, CLIPPED_UPDATES, QUEUE_UPDATES)
_PREFIX = "alarm "
_WATCHED = (
    "truncation_rate", "zero_variance_share", "correct_rate", "parse_err_rate", "completions", "entropy", "logprob_gap",
    "changed_weights_share", "learning_rate", "reward_mean", "grad_clipped", "grad_norm", "grader_failures", "graded",
    "generation_s", "total_completion_tokens", "avg_completion_length", "replaced_groups",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One alarm, raised.

    Example:
        >>> print(Alarm(name="entropy", step=12, message="entropy fell"))
        alarm entropy: entropy fell
    """

    name: str
    """One of `ALARM_NAMES`."""
    step: int
    """The update that raised it."""
    message: str
    """One line: what was seen, with figures and their window; why it matters; which flag to turn."""

    def __str__(self) -> str:
        """The line to log as an event; `Alarms.replay` knows it again."""
        return f"{_PREFIX}{self.name}: {self.message}"


def alarm_words(event: str) -> str | None:
    """`NAME: MESSAGE` of an event that is an alarm; None of any other."""
    return event.removeprefix(_PREFIX) if event.startswith(_PREFIX) else None


class Alarms:
    """Watches one run. What it keeps is bounded: a window of each metric that it looks at.

    Example:
        >>> alarms = Alarms()
        >>> for step in range(1, 6):
        ...     raised = alarms.observe(step, {"truncation_rate": 0.4})
        >>> [alarm.name for alarm in raised]
        ['truncated']
    """

    def __init__(self) -> None:
        self._history = _History()
        self._raised: set[str] = set()

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in the metrics of update `step`; the alarms that it raises for the first time in the run.

        Metrics that are missing or not finite are passed over. Steps come in ascending order.
        """
        self._history.add(step, metrics)
        alarms = []
        for name, check in _CHECKS.items():
            if name not in self._raised and (message := check(self._history)) is not None:
                self._raised.add(name)
                alarms.append(Alarm(name=name, step=step, message=message))
        return alarms

    def replay(self, records: Iterable[Mapping[str, object]]) -> None:
        """Catch up with a resumed run from the lines of its metrics file; what was raised then is not raised again.

        Lines that are no update (evaluations, say) are passed over; of an update that is there twice the later line counts.
        """
        updates: dict[int, dict[str, float]] = {}
        for record in records:
            event, step = record.get("event"), record.get("step")
            if isinstance(event, str) and event.startswith(_PREFIX):
                self._raised |= _CHECKS.keys() & {event.removeprefix(_PREFIX).partition(":")[0]}
            elif isinstance(step, int) and "reward_mean" in record:
                updates[step] = {name: v for name, v in record.items() if isinstance(v, int | float)}
        for step in sorted(updates):
            self.observe(step, updates[step])


class _Seen:
    """The last values of one metric, with their updates, and the mean of a window at first and at its lowest."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=_LONGEST)
        self.steps: deque[int] = deque(maxlen=_LONGEST)
        self.first = math.nan
        self.lowest, self.lowest_step = math.inf, 0

    def add(self, step: int, value: float) -> None:
        self.values.append(value)
        self.steps.append(step)
        if len(self.values) == WINDOW:
            self.first = self.mean()
        if self.mean() < self.lowest:
            self.lowest, self.lowest_step = self.mean(), step

    def last(self, count: int = WINDOW) -> list[float]:
        """The last `count` values; none as long as there are fewer."""
        return list(self.values)[-count:] if len(self.values) >= count else []

    def mean(self) -> float:
        # NaN is above and below no threshold, so no alarm has to ask whether its window is full.
        return statistics.fmean(self.last() or [math.nan])

    def over(self, count: int = WINDOW) -> str:
        """Which updates the last `count` values are of, in words."""
        return f"updates {self.steps[-count]} to {self.steps[-1]}"


class _Pace(NamedTuple):
    """Medians of some updates, up to `step`: how long generation took, and for what."""

    seconds: float
    tokens: float
    length: float
    step: int


class _History(dict[str, _Seen]):
    """What the checks look at."""

    def __init__(self) -> None:
        super().__init__((name, _Seen()) for name in _WATCHED)
        self._peak_learning_rate = 0.0
        self.best_pace: _Pace | None = None

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        figures = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        tokens, length = figures.get("total_completion_tokens", 0.0), figures.get("avg_completion_length", 0.0)
        if tokens > 0 and length > 0:
            figures["completions"] = tokens / length
        # Warm-up and decay make small steps on purpose: only steps of half the highest learning rate so far count.
        rate = figures.get("learning_rate", 0.0)
        self._peak_learning_rate = max(self._peak_learning_rate, rate)
        if rate < self._peak_learning_rate / 2:
            figures.pop("changed_weights_share", None)
        if "grader_failures" in figures and "completions" in figures:  # a share needs both, of the same updates
            figures["graded"] = figures["completions"]
        else:
            figures.pop("grader_failures", None)
        for name in self.keys() & figures.keys():
            self[name].add(step, figures[name])
        pace = self.pace()
        if pace is not None and (self.best_pace is None or pace.seconds < self.best_pace.seconds):
            self.best_pace = pace

    def pace(self) -> _Pace | None:
        """Over the last `QUEUE_UPDATES` updates; None as long as there are fewer."""
        parts = [
            self[name].last(QUEUE_UPDATES)
            for name in ("generation_s", "total_completion_tokens", "avg_completion_length")
        ]
        if not all(parts):
            return None
        seconds, tokens, length = map(statistics.median, parts)
        return _Pace(seconds, tokens, length, self["generation_s"].steps[-1])


# -- the checks: each has the name of its alarm, and returns the message, or None as long as all is well


def _truncated(history: _History) -> str | None:
    seen = history["truncation_rate"]
    if not seen.mean() > TRUNCATED_SHARE:
        return None
    length = history["avg_completion_length"].mean()
    tokens = "" if math.isnan(length) else f" ({length:.0f} tokens each on average)"
    return (
        f"{seen.mean():.0%} of the completions of {seen.over()} were cut off{tokens}; they end before their answer and are "
        "marked wrong for being long: raise --max-tokens and --max-seq-len, or leave them out of the loss with --mask-truncated"
    )


def _zero_variance(history: _History) -> str | None:
    seen, correct = history["zero_variance_share"], history["correct_rate"].mean()
    if not seen.mean() > ZERO_VARIANCE_SHARE:
        return None
    turn = "easier or harder problems (--dataset), or a larger --group-size"
    if correct < 0.25:
        turn = (
            f"{correct:.1%} of the completions are right, so the problems are too hard for the policy: easier ones (--dataset), "
            "a larger --group-size, a better prompt (--system-prompt, --chat-template), or a stronger --model"
        )
    elif correct > 0.75:
        turn = f"{correct:.1%} of the completions are right, so the problems are too easy: harder ones (--dataset), or be done"
    if history["replaced_groups"].last(1):
        price = (
            "--dynamic-sampling generated others in their place, which takes its time: --drop-solved, --curriculum, "
        )
    else:
        price = "what is left is a small, noisy update: --dynamic-sampling generates others in their place; or "
    return (
        f"{seen.mean():.0%} of the groups of {seen.over()} got one and the same reward for all completions; they teach "
        f"nothing, and {price}{turn}"
    )


def _parse_rate(history: _History) -> str | None:
    seen, completions = history["parse_err_rate"], sum(history["completions"].last())
    # 2 / sqrt(completions) is at least four of the mean's standard deviations: small updates are noisy.
    margin = max(PARSE_RATE_FALL, 2 / math.sqrt(completions)) if completions else PARSE_RATE_FALL
    if not seen.mean() - seen.lowest > margin:
        return None
    return (
        f"{1 - seen.mean():.0%} of the completions of {seen.over()} have an answer that the parser finds, and up to update "
        f"{seen.lowest_step} {1 - seen.lowest:.0%} had; the policy is losing the format that its reward depends on: look at "
        "completions in the rollouts file; a lower --lr, some --kl-coef, or more --max-tokens if they are cut off"
    )


def _entropy(history: _History) -> str | None:
    seen = history["entropy"]
    entropy = seen.mean()
    if not entropy < ENTROPY_SHARE * seen.first:
        return None
    return (
        f"the entropy of {seen.over()} is {entropy:.3g} nats, {entropy / seen.first:.0%} of the {seen.first:.3g} of the "
        "first updates; a policy that always says the same explores nothing more: a lower --lr, a higher "
        "--temperature, a higher --clip-high (with --epochs-per-update, --mini-batches or --ratio-to sampler), or some --kl-coef"
    )


def _logprob_gap(history: _History) -> str | None:
    seen = history["logprob_gap"]
    if not seen.mean() > max(LOGPROB_GAP_RISE * seen.first, LOGPROB_GAP_NATS):
        return None
    return (
        f"the sampler's and the trainer's log-probs differ by {seen.mean():.2g} nats a token over {seen.over()}, and by "
        f"{seen.first:.2g} at first; the rollouts are no longer the trained policy's own: look at sync/logprob_gap (stale "
        "or corrupted weights, a quantised server), correct with --tis-cap 2 (unless --ratio-to sampler or an "
        "--importance-mask does), lower --max-staleness or --lr"
    )


def _logprob_gap_large(history: _History) -> str | None:
    seen = history["logprob_gap"]
    if not seen.mean() > LOGPROB_GAP_LARGE or _logprob_gap(history) is not None:
        return None
    return (
        f"the sampler's and the trainer's log-probs differ by {seen.mean():.2g} nats a token over {seen.over()}, and two sides "
        "that compute the same in bf16 by up to 0.03; one of them computes another model: benchmarks/logprob_gap.py shows what "
        "the gap is made of; look for a quantised server, a window or RoPE that a longer --max-model-len changes, other sampling "
        "settings; --tis-cap 2 corrects meanwhile, unless --ratio-to sampler or an --importance-mask does"
    )


def _changed_weights(history: _History) -> str | None:
    seen = history["changed_weights_share"]
    if not seen.mean() < CHANGED_WEIGHTS_SHARE:
        return None
    rates = history["learning_rate"].last(1)
    rate = f" at a learning rate of {rates[0]:.2g}" if rates else ""
    return (
        f"an update changed {seen.mean():.2g} of the bf16 weights over {seen.over()}{rate}; the steps are lost in rounding and "
        "the server generates with the policy that it had: raise --lr (1e-6 changes about one in a hundred)"
    )


def _reward_flat(history: _History) -> str | None:
    seen = history["reward_mean"]
    rewards = seen.last(FLAT_UPDATES)
    if not rewards or history["correct_rate"].mean() > SOLVED_RATE:
        return None
    line = statistics.linear_regression(range(FLAT_UPDATES), rewards)
    rise = line.slope * (FLAT_UPDATES - 1)
    if rise > 1e-9:
        return None
    return (
        f"the reward has not risen over {seen.over(FLAT_UPDATES)}: a line through them goes from {line.intercept:.3g} to "
        f"{line.intercept + rise:.3g}; either it has learned what it can, or the signal drowns: more --rollouts-per-update, a "
        "higher --lr, problems that are solved now and then, and a look at the other alarms"
    )


def _clipping(history: _History) -> str | None:
    seen = history["grad_clipped"]
    clipped = seen.last(CLIPPED_UPDATES)
    if not clipped or not all(clipped):
        return None
    norms = history["grad_norm"].last(CLIPPED_UPDATES)
    norm = f" (median norm {statistics.median(norms):.3g})" if norms else ""
    return (
        f"the gradient was clipped in each of {seen.over(CLIPPED_UPDATES)}{norm}; every update has one length, whatever was "
        "learned, and outliers are no longer told from the rest: raise --max-grad-norm above that norm, or "
        "--rollouts-per-update, which makes it smaller"
    )


def _grader(history: _History) -> str | None:
    seen = history["grader_failures"]
    failures, graded = sum(seen.last()), sum(history["graded"].last())
    if failures < GRADER_FAILURES or failures <= GRADER_FAILURE_SHARE * graded:
        return None
    return (
        f"{failures:.0f} completions ({failures / graded:.1%}) of {seen.over()} could not be graded in time and count as wrong; "
        "right answers may be among them: see reward_parts.grader_failed in the rollouts file, leave the machine more CPU, or "
        "give the grader a longer timeout_s and more num_workers"
    )


def _queue(history: _History) -> str | None:
    now, best = history.pace(), history.best_pace
    if now is None or best is None or best.seconds <= 0:
        return None
    work = max(1.0, now.tokens / best.tokens if best.tokens else 1.0, now.length / best.length if best.length else 1.0)
    if now.seconds <= GENERATION_SLOWDOWN * work * best.seconds or now.seconds - best.seconds <= GENERATION_SLOWDOWN_S:
        return None
    return (
        f"generation takes {now.seconds:.1f} s an update over {history['generation_s'].over(QUEUE_UPDATES)} and took "
        f"{best.seconds:.1f} s up to update {best.step}, for {now.tokens:.0f} tokens and {best.tokens:.0f}: requests wait in the "
        "server. Look for other clients and for preemptions in its log; a lower --concurrency, or more of the GPU for its "
        "cache (--server-args '--gpu-memory-utilization 0.9')"
    )


_CHECKS: dict[str, Callable[[_History], str | None]] = {
    check.__name__.removeprefix("_"): check
    for check in (
        _truncated, _zero_variance, _parse_rate, _entropy, _logprob_gap, _logprob_gap_large, _changed_weights,
        _reward_flat, _clipping, _grader, _queue,
    )
}  # fmt: skip
ALARM_NAMES = tuple(_CHECKS)
