"""The forecast of a run, computed from what its probes showed. Nothing is measured here."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ludic.config import GRPOConfig
from ludic.forecast.generation_cost import GenerationCost
from ludic.forecast.probe import Burst, Measured
from ludic.rollout.intervals import clustered_interval, wilson_interval
from ludic.rollout.local import MAX_BATCH_SIZE
from ludic.train.advantages import has_variance, varies_without_overlong
from ludic.train.footprint import CHECKPOINT_BYTES
from ludic.types import RolloutGroup

Interval = tuple[float, float]


def generation_costs(few: Burst, many: Burst) -> tuple[GenerationCost, GenerationCost, GenerationCost]:
    """The cost that explains the seconds of both bursts, and the two extremes: only steps cost, only tokens cost.

    `longest * step_s + tokens * token_s = seconds` of each burst are two equations in two unknowns. Bursts of equal load, or
    whose noise makes a cost negative, do not tell: half of their seconds are then put down to steps, and half to tokens.
    """
    seconds, steps, tokens = few.seconds + many.seconds, few.longest + many.longest, few.tokens + many.tokens
    only_steps = GenerationCost(step_s=seconds / steps, token_s=0.0)
    only_tokens = GenerationCost(step_s=0.0, token_s=seconds / tokens)
    cost = GenerationCost(step_s=only_steps.step_s / 2, token_s=only_tokens.token_s / 2)
    determinant = few.longest * many.tokens - many.longest * few.tokens
    if few.rollouts != many.rollouts and determinant:
        step_s = (few.seconds * many.tokens - many.seconds * few.tokens) / determinant
        token_s = (few.longest * many.seconds - many.longest * few.seconds) / determinant
        if min(step_s, token_s) >= 0:
            cost = GenerationCost(step_s=step_s, token_s=token_s)
    return cost, only_steps, only_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What to expect of a run while its policy is the one that it starts from. Rates are fractions of 1."""

    num_groups: int
    group_size: int
    solve_rates: list[float]
    """[num_groups], the share of each group's completions that are correct."""
    correct_rate: float
    correct_ci95: Interval
    flat_share: float
    """Of the groups: those whose rewards are all equal."""
    flat_ci95: Interval
    truncation_rate: float
    truncation_ci95: Interval
    mean_length: float
    """Tokens that the model writes in a completion, as the three below."""
    median_length: float
    p95_length: float
    longest: int
    generation_s: float
    """Of an update, as the five below."""
    generation_range_s: Interval
    grading_s: float
    training_s: float
    training_range_s: Interval
    """By the interval of groups without variance, which are not trained on."""
    sync_s: float
    update_s: float
    """With what training hides behind generation."""
    update_range_s: Interval
    evaluation_s: float
    """Of one evaluation; 0 where there is none."""
    start_s: float
    """Until the first evaluation begins: loading, starting a server, the first sync."""
    memory_bytes: int
    on_gpu: bool
    """Whose memory that is: the GPU's, or the process's."""
    checkpoint_bytes: int
    rollouts_bytes: int
    """An update's, in the rollouts file."""
    metrics_bytes: int
    """An update's, in the metrics file."""
    gaps_bytes: int
    """An update's, in the file of the log-prob gaps; 0 where they are not recorded."""
    in_flight: int
    """Completions of an update that are generated at the same time."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """The forecast that `dataclasses.asdict` and JSON made a record of.

        Raises:
            TypeError: fields are missing, or there are others.
        """
        values: dict[str, Any] = {
            name: tuple(value) if name.endswith(_INTERVALS) else value for name, value in record.items()
        }
        return cls(**values)

    def total_seconds(self, updates: int, evaluations: int) -> float:
        """Of the whole run. The writing of checkpoints is not in it."""
        return self.start_s + updates * self.update_s + evaluations * self.evaluation_s

    @property
    def update_bytes(self) -> int:
        """Of an update's lines in all files."""
        return self.rollouts_bytes + self.metrics_bytes + self.gaps_bytes

    def disk_bytes(self, updates: int, checkpoints: int) -> int:
        """Of what is there at the end."""
        return checkpoints * self.checkpoint_bytes + updates * self.update_bytes


_INTERVALS = ("_ci95", "_range_s")


def num_evaluations(config: GRPOConfig) -> int:
    """How often a run evaluates, from its start to its end."""
    if not config.eval_limit:
        return 0
    every = config.eval_every or config.train_steps
    return len({0, config.train_steps, *range(every, config.train_steps, every)})


def num_checkpoints(config: GRPOConfig) -> int:
    """How many checkpoints are there at the end of a run."""
    every = config.save_every or config.train_steps
    return min(config.keep_checkpoints, -(-config.train_steps // every))


def forecast(
    measured: Measured,
    config: GRPOConfig,
    *,
    concurrency: int,
    eval_problems: int,
    stored_itemsize: int,
    start_s: float,
    on_gpu: bool,
) -> Forecast:
    """The forecast of a run with these settings.

    Args:
        concurrency: completions that the server, or all of several, are sent at once.
        eval_problems: of one evaluation.
        stored_itemsize: bytes of a weight in the model's own files.
    """
    most = concurrency if measured.overlaps else MAX_BATCH_SIZE
    lengths = _lengths(measured.groups)
    rates = _rates(measured.groups, config)
    costs = generation_costs(*measured.bursts)

    def generation_s(rollouts: int, *, at_once: int) -> list[float]:
        """By each of the costs."""
        size = {"mean": lengths["mean_length"], "longest": lengths["longest"], "in_flight": min(at_once, most)}
        return [cost.seconds(rollouts, **size, refills=measured.overlaps) for cost in costs]

    grading_s = measured.bursts[-1].grading_s
    at_once = config.rollouts_per_update  # a replacement is asked for when the group before it is there
    generated = [round(sampling_factor(config, share) * at_once) for share in _flat_shares(rates)]
    seconds = [generation_s(rollouts, at_once=at_once) for rollouts in generated]
    return Forecast(
        num_groups=len(measured.groups),
        group_size=config.group_size,
        **rates,
        **lengths,
        **_update(measured, config, seconds, _flat_shares(rates)),
        grading_s=grading_s,
        sync_s=measured.sync_s,
        evaluation_s=generation_s(eval_problems, at_once=eval_problems)[0] + grading_s if eval_problems else 0.0,
        start_s=start_s,
        memory_bytes=measured.memory_bytes,
        on_gpu=on_gpu,
        checkpoint_bytes=measured.parameters * (CHECKPOINT_BYTES + (0 if stored_itemsize == 4 else stored_itemsize)),
        rollouts_bytes=round(measured.rollout_bytes * generated[0]),
        metrics_bytes=measured.metrics_bytes,
        gaps_bytes=round(measured.gap_bytes * generated[0]),
        in_flight=min(config.rollouts_per_update, most),
    )


def sampling_factor(config: GRPOConfig, flat_share: float) -> float:
    """How many groups are generated for each one of an update, where this share of them has no variance.

    Example:
        >>> sampling_factor(GRPOConfig(dynamic_sampling=True, max_sampling_factor=8), 0.75)
        4.0
    """
    if not config.dynamic_sampling:
        return 1.0
    return 1 / max(1 - flat_share, 1 / config.max_sampling_factor)


def _flat_shares(rates: Mapping[str, Any]) -> tuple[float, float, float]:
    """Expected, at least, at most."""
    return (rates["flat_share"], *rates["flat_ci95"])


def _rates(groups: Sequence[RolloutGroup], config: GRPOConfig) -> dict[str, Any]:
    correct = [[rollout.score.correct for rollout in group.rollouts] for group in groups]
    cut_off = [[rollout.completion.finish_reason == "length" for rollout in group.rollouts] for group in groups]
    if config.dynamic_sampling:  # groups that it would replace
        flat = [not varies_without_overlong(group) for group in groups]
    else:
        flat = [not has_variance([rollout.score.reward for rollout in group.rollouts]) for group in groups]
    flat_share = sum(flat) / len(flat)
    return {
        "solve_rates": [statistics.fmean(of_group) for of_group in correct],
        "correct_rate": statistics.fmean(map(statistics.fmean, correct)),
        "correct_ci95": clustered_interval(correct),
        "flat_share": flat_share,
        "flat_ci95": wilson_interval(flat_share, len(flat)),
        "truncation_rate": statistics.fmean(map(statistics.fmean, cut_off)),
        "truncation_ci95": clustered_interval(cut_off),
    }


def _lengths(groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    lengths = sorted(rollout.completion.num_sampled_tokens for group in groups for rollout in group.rollouts)
    return {
        "mean_length": statistics.fmean(lengths),
        "median_length": statistics.median(lengths),
        "p95_length": lengths[min(len(lengths) - 1, round(0.95 * len(lengths)))],
        "longest": lengths[-1],
    }


def _update(
    measured: Measured, config: GRPOConfig, generation_s: Sequence[Sequence[float]], flat_shares: Sequence[float]
) -> dict[str, Any]:
    """Seconds of an update's phases and of all of it, from those of generation by each of the shares and each of the costs;
    the first of both is the expected one, the others are its range."""
    factor = sampling_factor(config, flat_shares[0])
    share = measured.trial.trained_share * factor
    trained = [(1 - flat) * sampling_factor(config, flat) for flat in flat_shares[1:]]
    if config.keeps_zero_variance:
        trained = [share]
    quickest, slowest = min(map(min, generation_s)), max(map(max, generation_s))
    cases = [  # the quickest, the expected, the slowest
        (quickest, *_training(measured, config, min(share, *trained))),
        (generation_s[0][0], *_training(measured, config, share)),
        (slowest, *_training(measured, config, max(share, *trained))),
    ]
    training = [passes_s + steps_s for _, passes_s, steps_s in cases]
    whole = [_update_seconds(measured, config, *case) for case in cases]
    return {
        "generation_s": generation_s[0][0],
        "generation_range_s": (quickest, slowest),
        "training_s": training[1],
        "training_range_s": (training[0], training[2]),
        "update_s": whole[1],
        "update_range_s": (whole[0], whole[2]),
    }


def _training(measured: Measured, config: GRPOConfig, trained_share: float) -> tuple[float, float]:
    """Seconds of an update's first passes, in proportion to its tokens, and of its end: steps, and further epochs' passes."""
    trial, epochs = measured.trial, config.epochs_per_update
    one_step = max(0.0, trial.step_s - (epochs - 1) * trial.accumulate_s) / epochs
    num_probes = sum(len(group.rollouts) for group in measured.groups)
    passes = trial.accumulate_s * trained_share * config.rollouts_per_update / num_probes
    if config.mini_batches > 1:  # those were without gradient; the others are in the trial's end, and nearly all of it
        return passes, trial.step_s * trained_share * config.rollouts_per_update / num_probes
    return passes, epochs * one_step + (epochs - 1) * passes if passes else 0.0


def _update_seconds(
    measured: Measured, config: GRPOConfig, generation_s: float, accumulate_s: float, step_s: float
) -> float:
    """Of a whole update: with a server, training takes the groups as they arrive, as those of the larger burst did."""
    last = measured.bursts[-1]
    rollouts_s = generation_s + last.grading_s
    if not measured.overlaps:
        return rollouts_s + accumulate_s + step_s + measured.sync_s
    if config.max_staleness:
        return max(rollouts_s, accumulate_s + step_s) + measured.sync_s
    return trained_at(last.arrivals, rollouts_s=rollouts_s, accumulate_s=accumulate_s) + step_s + measured.sync_s


def trained_at(arrivals: Sequence[float], *, rollouts_s: float, accumulate_s: float) -> float:
    """When the gradient of all groups is there, each trained on once it has arrived and those before it are done.

    Example:
        >>> trained_at([0.5, 1.0], rollouts_s=10.0, accumulate_s=4.0)  # the second arrives at 10 s and takes 2
        12.0
    """
    done = 0.0
    for arrival in sorted(arrivals):
        done = max(done, arrival * rollouts_s) + accumulate_s / len(arrivals)
    return done
