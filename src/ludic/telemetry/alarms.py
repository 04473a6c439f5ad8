"""Why isn't it learning? Watches the metrics of a run and says, once each, what keeps runs from learning.

Every alarm looks at a window of updates and never at a single one, compares with thresholds that are documented here, and
needs nothing but the metrics that are logged: a metrics file tells a resumed run which alarms it has raised. An alarm is
raised once a run. One that comes back night after night is not read, and the curve of the metric that it names goes on
being logged.

Left out: what is wrong at the first update already, which is `ludic.doctor`'s business; advice that looks at rollouts; and
any action. A window counts the updates that logged the metric, so a skipped update delays an alarm and does not hide it.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

_PREFIX = "alarm "


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmThresholds:
    """When an alarm is raised. Shares are fractions of 1, windows are in updates.

    Raises:
        ValueError: a threshold is not positive, or a window is not a whole number of updates.
    """

    truncated_share: float = 0.25
    """Truncated: the mean `truncation_rate` of `window` updates is above this."""
    zero_variance_share: float = 0.8
    """No variance: the mean `zero_variance_share` of `window` updates is above this."""
    parse_rate_fall: float = 0.15
    """Parse rate falling: the mean `parse_err_rate` of `window` updates is this far above the best such mean of the run.
    Never less than 2 / sqrt(completions in the window), four of its standard deviations: small updates are noisy."""
    entropy_share: float = 0.2
    """Entropy collapsing: the mean `entropy` of `window` updates is below this share of that of the first `window`."""
    logprob_gap_rise: float = 4.0
    """Log-prob gap rising: the mean `logprob_gap` of `window` updates is this many times that of the first `window` ..."""
    logprob_gap_nats: float = 0.03
    """... and above this many nats: in fp32 the gap is 1e-7, and its multiples mean nothing. Rollouts that are one update old
    have a gap that follows the learning rate through its warm-up, 0.015 nats in the demo."""
    logprob_gap_large: float = 0.1
    """Log-prob gap large: the mean `logprob_gap` of `window` updates is above this many nats, and it has not risen to that, as
    the alarm before has it. Two sound sides in bf16 differ by 0.005 (a synthetic policy) to 0.03 nats (SmolLM2-135M) a token;
    three times that is no rounding: two sides that compute different models differ by 0.1 to 0.5."""
    changed_weights_share: float = 1e-4
    """Weights do not change: the mean `changed_weights_share` of `window` updates is below this; only updates count
    whose learning rate is at least half of the highest so far, since warm-up and decay make small steps on purpose."""
    flat_updates: int = 60
    """Reward flat: the straight line through `reward_mean` of so many updates does not rise ..."""
    solved_rate: float = 0.9
    """... unless the mean `correct_rate` of the last `window` of them is above this: what is solved cannot rise."""
    clipped_updates: int = 20
    """Gradient clipped: `grad_clipped` in every one of so many updates."""
    grader_failure_share: float = 0.01
    """Grader: more than this share of the completions of `window` updates could not be graded, and `grader_failures` ..."""
    grader_failures: int = 3
    """... were at least so many."""
    generation_slowdown: float = 3.0
    """Queue: the median `generation_s` of `queue_updates` is this many times the lowest such median of the run, after
    allowing for more or longer completions ..."""
    generation_slowdown_s: float = 2.0
    """... and so many seconds above it."""
    queue_updates: int = 10
    window: int = 5

    def __post_init__(self) -> None:
        for threshold in fields(self):
            value = getattr(self, threshold.name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"the alarm threshold {threshold.name} must be above 0, not {value}")
        for name in ("flat_updates", "clipped_updates", "queue_updates", "window"):
            if getattr(self, name) != int(getattr(self, name)):
                raise ValueError(
                    f"the alarm window {name} must be a whole number of updates, not {getattr(self, name)}"
                )


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


class Alarms:
    """Watches one run. What it keeps is bounded: a window of each metric that it looks at.

    Example:
        >>> alarms = Alarms()
        >>> for step in range(1, 6):
        ...     raised = alarms.observe(step, {"truncation_rate": 0.4})
        >>> [alarm.name for alarm in raised]
        ['truncated']
    """

    def __init__(self, thresholds: AlarmThresholds | None = None) -> None:
        self.thresholds = AlarmThresholds() if thresholds is None else thresholds
        self._history = _History(self.thresholds)
        self._raised: set[str] = set()

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in the metrics of update `step`; the alarms that it raises for the first time in the run.

        Metrics that are missing or not finite are passed over. Steps come in ascending order.
        """
        self._history.add(step, metrics)
        alarms = []
        for name, check in _CHECKS.items():
            if name not in self._raised and (message := check(self._history, self.thresholds)) is not None:
                self._raised.add(name)
                alarms.append(Alarm(name=name, step=step, message=message))
        return alarms

    def replay(self, records: Iterable[Mapping[str, object]], *, last_step: int | None = None) -> None:
        """Catch up with a resumed run from the lines of its metrics file; what was raised then is not raised again.

        Updates after `last_step`, which a run was cut off from and will do again, are passed over, as is what is no update
        (evaluations, say); of an update that was done twice the later line counts. Alarms that the file
        tells of stay told, wherever they stand.
        """
        updates: dict[int, dict[str, float]] = {}
        for record in records:
            event, step = record.get("event"), record.get("step")
            if isinstance(event, str) and event.startswith(_PREFIX):
                self._raised |= _CHECKS.keys() & {event[len(_PREFIX) :].partition(":")[0]}
            elif isinstance(step, int) and "reward_mean" in record and (last_step is None or step <= last_step):
                updates[step] = {name: v for name, v in record.items() if isinstance(v, int | float)}
        for step in sorted(updates):
            self.observe(step, updates[step])


class _Seen:
    """The last values of one metric, with their updates, and what the mean of a window of them was at first and at best."""

    def __init__(self, length: int) -> None:
        self.values: deque[float] = deque(maxlen=length)
        self.steps: deque[int] = deque(maxlen=length)
        self.first: float | None = None
        self.lowest = math.inf
        self.lowest_step = 0

    def add(self, step: int, value: float, window: int) -> None:
        self.values.append(value)
        self.steps.append(step)
        mean = self.mean(window)
        if mean is None:
            return
        if self.first is None:
            self.first = mean
        if mean < self.lowest:
            self.lowest, self.lowest_step = mean, step

    def last(self, count: int) -> list[float] | None:
        """The last `count` values; None as long as there are fewer."""
        return list(self.values)[-count:] if len(self.values) >= count else None

    def mean(self, count: int) -> float | None:
        values = self.last(count)
        return None if values is None else statistics.fmean(values)

    def over(self, count: int) -> str:
        """Which updates those are, in words."""
        return f"updates {self.steps[-count]} to {self.steps[-1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pace:
    """How long generation took at its best, and for what."""

    seconds: float
    tokens: float
    length: float
    step: int


class _History:
    """What the checks look at."""

    def __init__(self, thresholds: AlarmThresholds) -> None:
        self._thresholds = thresholds
        t = thresholds
        self._length = max(t.window, t.flat_updates, t.clipped_updates, t.queue_updates)
        self._seen = {name: _Seen(self._length) for name in _WATCHED}
        self._peak_learning_rate = 0.0
        self.best_pace: _Pace | None = None

    def __getitem__(self, name: str) -> _Seen:
        return self._seen[name]

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        figures = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        tokens, length = figures.get("total_completion_tokens", 0.0), figures.get("avg_completion_length", 0.0)
        if tokens > 0 and length > 0:
            figures["completions"] = tokens / length
        rate = figures.get("learning_rate", 0.0)
        self._peak_learning_rate = max(self._peak_learning_rate, rate)
        if rate < self._peak_learning_rate / 2:
            figures.pop("changed_weights_share", None)
        if "grader_failures" in figures and "completions" in figures:  # a share needs both, of the same updates
            figures["graded"] = figures["completions"]
        else:
            figures.pop("grader_failures", None)
        for name in _WATCHED & figures.keys():
            self._seen[name].add(step, figures[name], self._thresholds.window)
        pace = self.pace(self._thresholds.queue_updates)
        if pace is not None and (self.best_pace is None or pace.seconds < self.best_pace.seconds):
            self.best_pace = pace

    def pace(self, count: int) -> _Pace | None:
        """Medians over the last `count` updates."""
        parts = [
            self[name].last(count) for name in ("generation_s", "total_completion_tokens", "avg_completion_length")
        ]
        if any(part is None for part in parts):
            return None
        seconds, tokens, length = (statistics.median(part) for part in parts if part is not None)
        return _Pace(seconds=seconds, tokens=tokens, length=length, step=self["generation_s"].steps[-1])


_WATCHED = frozenset({
    "truncation_rate", "zero_variance_share", "correct_rate", "parse_err_rate", "completions", "entropy", "logprob_gap",
    "changed_weights_share", "learning_rate", "reward_mean", "grad_clipped", "grad_norm", "grader_failures", "graded",
    "generation_s", "total_completion_tokens", "avg_completion_length",
})  # fmt: skip


# -- the checks: each returns the message, or None as long as all is well -----------------------------------------------------


def _truncated(history: _History, t: AlarmThresholds) -> str | None:
    seen = history["truncation_rate"]
    share = seen.mean(t.window)
    if share is None or share <= t.truncated_share:
        return None
    length = history["avg_completion_length"].mean(t.window)
    tokens = f" ({length:.0f} tokens each on average)" if length is not None else ""
    return (
        f"{share:.0%} of the completions of {seen.over(t.window)} were cut off{tokens}; they end before their answer and are "
        "marked wrong for being long: raise --max-tokens and --max-seq-len, or leave them out of the loss with --mask-truncated"
    )


def _zero_variance(history: _History, t: AlarmThresholds) -> str | None:
    seen = history["zero_variance_share"]
    share = seen.mean(t.window)
    if share is None or share <= t.zero_variance_share:
        return None
    correct = history["correct_rate"].mean(t.window)
    turn = "easier or harder problems (--dataset), or a larger --group-size"
    if correct is not None and correct < 0.25:
        turn = (
            f"{correct:.1%} of the completions are right, so the problems are too hard for the policy: easier ones (--dataset), "
            "a larger --group-size, a better prompt (--system-prompt, --chat-template), or a stronger --model"
        )
    elif correct is not None and correct > 0.75:
        turn = f"{correct:.1%} of the completions are right, so the problems are too easy: harder ones (--dataset), or be done"
    return (
        f"{share:.0%} of the groups of {seen.over(t.window)} got one and the same reward for all completions; they teach "
        f"nothing, and what is left is a small, noisy update: {turn}"
    )


def _parse_rate(history: _History, t: AlarmThresholds) -> str | None:
    seen = history["parse_err_rate"]
    errors, completions = seen.mean(t.window), history["completions"].last(t.window)
    if errors is None:
        return None
    margin = t.parse_rate_fall
    if completions is not None and sum(completions) > 0:
        margin = max(margin, 2 / math.sqrt(sum(completions)))
    if errors - seen.lowest <= margin:
        return None
    return (
        f"{1 - errors:.0%} of the completions of {seen.over(t.window)} have an answer that the parser finds, and up to update "
        f"{seen.lowest_step} {1 - seen.lowest:.0%} had; the policy is losing the format that its reward depends on: look at "
        "completions in the rollouts file; a lower --learning-rate, some --kl-coef, or more --max-tokens if they are cut off"
    )


def _entropy(history: _History, t: AlarmThresholds) -> str | None:
    seen = history["entropy"]
    entropy = seen.mean(t.window)
    if entropy is None or seen.first is None or entropy >= t.entropy_share * seen.first:
        return None
    return (
        f"the entropy of {seen.over(t.window)} is {entropy:.3g} nats, {entropy / seen.first:.0%} of the {seen.first:.3g} of the "
        "first updates; a policy that always says the same explores nothing more: a lower --learning-rate, a higher "
        "--temperature, a higher --clip-high (with several epochs), or some --kl-coef"
    )


def _logprob_gap(history: _History, t: AlarmThresholds) -> str | None:
    seen = history["logprob_gap"]
    gap = seen.mean(t.window)
    if gap is None or seen.first is None or gap <= max(t.logprob_gap_rise * seen.first, t.logprob_gap_nats):
        return None
    return (
        f"the sampler's and the trainer's log-probs differ by {gap:.2g} nats a token over {seen.over(t.window)}, and by "
        f"{seen.first:.2g} at first; the rollouts are no longer the trained policy's own: look at sync/logprob_gap (stale "
        "or corrupted weights, a quantised server), correct with --tis-cap 2, lower --max-staleness or --learning-rate"
    )


def _logprob_gap_large(history: _History, t: AlarmThresholds) -> str | None:
    seen = history["logprob_gap"]
    gap = seen.mean(t.window)
    if gap is None or gap <= t.logprob_gap_large or _logprob_gap(history, t) is not None:
        return None
    return (
        f"the sampler's and the trainer's log-probs differ by {gap:.2g} nats a token over {seen.over(t.window)}, and two sides "
        "that compute the same in bf16 by up to 0.03; one of them computes another model: benchmarks/logprob_gap.py shows what "
        "the gap is made of; look for a quantised server, a window or RoPE that a longer --max-model-len changes, other sampling "
        "settings; --tis-cap 2 corrects meanwhile"
    )


def _changed_weights(history: _History, t: AlarmThresholds) -> str | None:
    seen = history["changed_weights_share"]
    share = seen.mean(t.window)
    if share is None or share >= t.changed_weights_share:
        return None
    rate = history["learning_rate"].last(1)
    at = f" at a learning rate of {rate[0]:.2g}" if rate is not None else ""
    return (
        f"an update changed {share:.2g} of the bf16 weights over {seen.over(t.window)}{at}; the steps are lost in rounding and "
        "the server generates with the policy that it had: raise --learning-rate (1e-6 changes about one in a hundred)"
    )


def _reward_flat(history: _History, t: AlarmThresholds) -> str | None:
    seen, correct = history["reward_mean"], history["correct_rate"].mean(t.window)
    rewards = seen.last(t.flat_updates)
    if rewards is None or (correct is not None and correct > t.solved_rate):
        return None
    line = statistics.linear_regression(range(len(rewards)), rewards)
    rise = line.slope * (len(rewards) - 1)
    if rise > 1e-9:
        return None
    return (
        f"the reward has not risen over {seen.over(t.flat_updates)}: a line through them goes from {line.intercept:.3g} to "
        f"{line.intercept + rise:.3g}; either it has learned what it can, or the signal drowns: more --rollouts-per-update, a "
        "higher --learning-rate, problems that are solved now and then, and a look at the other alarms"
    )


def _clipping(history: _History, t: AlarmThresholds) -> str | None:
    seen = history["grad_clipped"]
    clipped = seen.last(t.clipped_updates)
    if clipped is None or not all(clipped):
        return None
    norms = history["grad_norm"].last(t.clipped_updates)
    norm = f" (median norm {statistics.median(norms):.3g})" if norms is not None else ""
    return (
        f"the gradient was clipped in each of {seen.over(t.clipped_updates)}{norm}; every update has one length, whatever was "
        "learned, and outliers are no longer told from the rest: raise --max-grad-norm above that norm, or "
        "--rollouts-per-update, which makes it smaller"
    )


def _grader(history: _History, t: AlarmThresholds) -> str | None:
    seen = history["grader_failures"]
    failures, graded = seen.last(t.window), history["graded"].last(t.window)
    if failures is None or graded is None:
        return None
    count, share = sum(failures), sum(failures) / sum(graded)
    if count < t.grader_failures or share <= t.grader_failure_share:
        return None
    return (
        f"{count:.0f} completions ({share:.1%}) of {seen.over(t.window)} could not be graded in time and count as wrong; right "
        "answers may be among them: see reward_parts.grader_failed in the rollouts file, leave the machine more CPU, or give "
        "the grader a longer timeout_s and more num_workers"
    )


def _queue(history: _History, t: AlarmThresholds) -> str | None:
    now, best = history.pace(t.queue_updates), history.best_pace
    if now is None or best is None or best.seconds <= 0:
        return None
    work = max(1.0, *(new / old for new, old in ((now.tokens, best.tokens), (now.length, best.length)) if old > 0))
    if (
        now.seconds <= t.generation_slowdown * work * best.seconds
        or now.seconds - best.seconds <= t.generation_slowdown_s
    ):
        return None
    return (
        f"generation takes {now.seconds:.1f} s an update over {history['generation_s'].over(t.queue_updates)} and took "
        f"{best.seconds:.1f} s up to update {best.step}, for {now.tokens:.0f} tokens and {best.tokens:.0f}: requests wait in the "
        "server. Look for other clients and for preemptions in its log; a lower --concurrency, or more of the GPU for its "
        "cache (--server-args '--gpu-memory-utilization 0.9')"
    )


_CHECKS: dict[str, Callable[[_History, AlarmThresholds], str | None]] = {
    "truncated": _truncated,
    "zero_variance": _zero_variance,
    "parse_rate": _parse_rate,
    "entropy": _entropy,
    "logprob_gap": _logprob_gap,
    "logprob_gap_large": _logprob_gap_large,
    "changed_weights": _changed_weights,
    "reward_flat": _reward_flat,
    "clipping": _clipping,
    "grader": _grader,
    "queue": _queue,
}
ALARM_NAMES = tuple(_CHECKS)
