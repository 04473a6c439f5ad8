"""Generates, scores and trains on a few groups with the parts of a real run, and times each of them.

The weights stay as they are: the trial update has a learning rate of 0, and the engine is sent version 0 only.
"""

import asyncio
import dataclasses
import functools
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ludic.config import GRPOConfig
from ludic.rollout.engine import InferenceEngine, WeightSyncReport
from ludic.rollout.groups import GroupStream, Prompt, rollout_metrics
from ludic.rollout.overlong import overlong_shaping
from ludic.storage.jsonl import encode_line
from ludic.task.environment import Environment
from ludic.train.advantages import training_samples, varies_without_overlong
from ludic.train.learner import Learner, Watch
from ludic.train.learner_thread import LearnerThread
from ludic.train.memory import fit_budget, worst_samples
from ludic.train.token_records import TokenGaps, training_fields
from ludic.train.update_batch import UpdateBatch
from ludic.types import RolloutGroup, TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SampleT = TypeVar("SampleT")

PROBE_ROLLOUTS = 64
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """Groups that were asked for at the same time."""

    seconds: float
    """Until the last completion was there."""
    rollouts: int
    tokens: int
    """That the model wrote in all its completions: what an environment says is not decoded."""
    longest: int
    """Of these, those of the longest completion."""
    arrivals: list[float]
    """When each group was there with its scores, as a share of the burst's whole time."""
    grading_s: float
    """From the last completion until the last score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One update on the probe rollouts with a learning rate of 0. Seconds are those of the second try."""

    accumulate_s: float
    """Forward and backward passes of all groups, also those without variance."""
    step_s: float
    """The optimizer's step with what belongs to it; with several epochs also their passes."""
    trained_share: float
    """Of the tokens: the share that a run trains on. Groups without variance are left out."""
    figures: dict[str, float]
    gap_bytes: float
    """Of the lines with the log-prob gaps of all groups, also those without variance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the probes showed."""

    groups: list[RolloutGroup]
    bursts: list[Burst]
    trial: Trial
    sync_s: float
    memory_bytes: int
    parameters: int
    rollout_bytes: float
    """Mean size of a rollout's line in the rollouts file."""
    gap_bytes: float
    """Mean size of a rollout's line in the file of the log-prob gaps, 0 for a rollout that has none."""
    metrics_bytes: int
    """Of an update's line in the metrics file."""
    ready_at: float
    """When a run would have begun its first evaluation, by `time.perf_counter`."""
    overlaps: bool
    """Whether the engine generates while the trainer trains."""


def num_probe_groups(group_size: int) -> int:
    """Whole groups that come to 64 rollouts, and at least two."""
    return max(2, PROBE_ROLLOUTS // group_size)


async def measure(
    config: GRPOConfig,
    learner: Learner,
    engine: InferenceEngine,
    environment: Environment[SampleT],
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt[SampleT]],
    *,
    num_servers: int = 1,
) -> Measured:
    """Measure on `prompts`, at least two, one group each, with an engine of so many servers.

    Raises:
        EngineError: the engine failed.
        OutOfMemory: the trainer's device is too small.
        ValueError: micro-batches do not fit, or a correction needs log-probs that the engine does not return.
    """
    async with LearnerThread(learner, version=0) as policy:
        await engine.update_weights(policy)  # as a run begins; the first also sets the transfer up
        await policy.call(fit_budget, learner)
        ready_at = time.perf_counter()
        records: list[dict[str, Any]] = []
        stream = GroupStream(
            engine,
            environment,
            group_size=config.group_size,
            tokenizer=tokenizer,
            record=records.append,
            further_fields=functools.partial(training_fields, config=config, tokenizer=tokenizer),
            fields_take_long=config.record_token_logprobs,
            shape_reward=overlong_shaping(config.overlong_buffer),
        )
        prompts = _one_with_logprobs(prompts) if config.record_token_logprobs and _logprob_share(config) else prompts
        await _warm_up(engine, prompts[0], config.group_size, num_servers)
        groups, bursts = await _generate(stream, prompts)
        batch = UpdateBatch()
        trial = await _try_update(config, policy, batch, groups)
        report = await engine.update_weights(policy)
        memory_bytes = await policy.call(_peak_of_worst, learner)
    return Measured(
        groups=groups,
        bursts=bursts,
        trial=trial,
        sync_s=report.seconds,
        memory_bytes=memory_bytes,
        parameters=sum(master.numel() for master in learner.masters.parameters),
        **_bytes_of_a_rollout(config, prompts, records, trial),
        metrics_bytes=_metrics_bytes(batch, trial, report, engine),
        ready_at=ready_at,
        overlaps=engine.overlaps_training,
    )


async def _warm_up(engine: InferenceEngine, prompt: Prompt[Any], group_size: int, num_servers: int) -> None:
    """A few tokens that are thrown away: what a server does for its first request only is no part of a burst.

    Groups that are asked for at the same time go to the least loaded server, so that each one gets one.
    """
    few = min(_WARM_UP_TOKENS, prompt.sampling.max_tokens)
    sampling = dataclasses.replace(prompt.sampling, max_tokens=few)
    one = functools.partial(engine.generate, prompt.token_ids, num_completions=group_size, sampling=sampling)
    await asyncio.gather(*(one() for _ in range(num_servers)))


async def _generate(
    stream: GroupStream[SampleT], prompts: Sequence[Prompt[SampleT]]
) -> tuple[list[RolloutGroup], list[Burst]]:
    """All groups, in two bursts of different size, from which the cost of a token can be told."""
    groups: list[RolloutGroup] = []
    few = max(1, len(prompts) // 4)
    try:
        bursts = [
            await _burst(stream, number, part, groups) for number, part in enumerate((prompts[:few], prompts[few:]))
        ]
    finally:
        await stream.aclose()
    return groups, bursts


async def _burst(
    stream: GroupStream[SampleT], number: int, prompts: Sequence[Prompt[SampleT]], groups: list[RolloutGroup]
) -> Burst:
    """Generate and score one group for each prompt, all at the same time; they are added to `groups`."""
    started, arrivals, own = time.perf_counter(), list[float](), list[RolloutGroup]()
    stream.submit(number, prompts)
    async for ready in stream.groups(number):
        own += ready
        arrivals += [time.perf_counter() - started] * len(ready)
    times = stream.timings(number)
    groups += own
    lengths = [rollout.completion.num_sampled_tokens for group in own for rollout in group.rollouts]
    return Burst(
        seconds=times.generation_s,
        rollouts=len(lengths),
        tokens=sum(lengths),
        longest=max(lengths),
        arrivals=[arrival / max(arrivals) for arrival in arrivals],
        grading_s=times.grading_s,
    )


async def _try_update(
    config: GRPOConfig, policy: LearnerThread, batch: UpdateBatch, groups: Sequence[RolloutGroup]
) -> Trial:
    """Train on all groups, so that there is something to time also where none has variance; `batch` gets the counts."""
    groups = sorted(groups, key=lambda group: group.group_id)
    batch.groups += groups
    trained = list[TrainingSample]()
    for group in groups:
        taken = batch.take(group, config, policy_version=0)
        if not config.dynamic_sampling or varies_without_overlong(group):  # else it would be replaced
            trained += taken
    samples, _ = training_samples(
        groups, scale_rewards=False, mask_truncated=config.mask_truncated, keep_zero_variance=True
    )
    if config.needs_logprobs:
        samples = [sample for sample in samples if sample.rollout_logprobs is not None]
    if not samples:
        batch.why_nothing_was_learned(config)  # raises where log-probs are missing
        return Trial(accumulate_s=0.0, step_s=0.0, trained_share=0.0, figures={}, gap_bytes=0.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gaps.jsonl"
        with TokenGaps(path if config.record_token_logprobs else None) as gaps:
            for attempt in range(2):  # the first try also compiles, and makes the optimizer's state
                accumulate_s, step_s, figures = await policy.call(_timed_update, policy.learner, samples, gaps.watch)
                await policy.call(gaps.write, attempt)
        gap_bytes = path.stat().st_size / 2 if config.record_token_logprobs else 0.0
    share = _num_tokens(trained) / _num_tokens(samples)
    return Trial(accumulate_s=accumulate_s, step_s=step_s, trained_share=share, figures=figures, gap_bytes=gap_bytes)


def _timed_update(
    learner: Learner, samples: Sequence[TrainingSample], watch: Watch
) -> tuple[float, float, dict[str, float]]:
    started = time.perf_counter()
    learner.accumulate(samples, watch)
    _wait_for(learner.device)
    accumulated = time.perf_counter()
    figures = learner.step(learning_rate=0.0)  # AdamW's whole work, and no weight moves
    _wait_for(learner.device)
    return accumulated - started, time.perf_counter() - accumulated, figures


def _num_tokens(samples: Sequence[TrainingSample]) -> int:
    return sum(len(sample.token_ids) for sample in samples)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_of_worst(learner: Learner) -> int:
    """On a GPU the peak of the worst micro-batch beside the optimizer's state; on the CPU what the process came to."""
    if learner.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(learner.device)
        learner.add_up(worst_samples(learner.config, learner.token_budget))
        _wait_for(learner.device)
        learner.discard()
    return peak_memory()


def peak_memory() -> int:
    """Bytes: the most that PyTorch had allocated on this thread's GPU, where there is one; else this process's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _logprob_share(config: GRPOConfig) -> float:
    """Of an update's groups: those whose log-probs the sampler is asked for."""
    return statistics.fmean(map(config.wants_logprobs, range(config.groups_per_update)))


def _one_with_logprobs(prompts: Sequence[Prompt[SampleT]]) -> list[Prompt[SampleT]]:
    """The prompts; where none of so few is among those that log-probs are asked for, the last one is, for their bytes."""
    *others, last = prompts
    if not any(prompt.sampling.logprobs for prompt in prompts):
        last = dataclasses.replace(last, sampling=dataclasses.replace(last.sampling, logprobs=True))
    return [*others, last]


def _bytes_of_a_rollout(
    config: GRPOConfig, prompts: Sequence[Prompt[Any]], records: Sequence[dict[str, Any]], trial: Trial
) -> dict[str, float]:
    """The means over a run's rollouts, of which another share may have log-probs than of the probes."""
    asked = {prompt.group_id for prompt in prompts if prompt.sampling.logprobs}
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for record in records:
        sizes[record["group"] in asked].append(len(encode_line(record)))
    share = _logprob_share(config)
    every = sizes[True] + sizes[False]
    with_logprobs, without = (statistics.fmean(sizes[kind] or every) for kind in (True, False))
    gap_bytes = trial.gap_bytes * trial.trained_share / max(1, len(sizes[True]))
    return {"rollout_bytes": share * with_logprobs + (1 - share) * without, "gap_bytes": share * gap_bytes}


def _metrics_bytes(batch: UpdateBatch, trial: Trial, report: WeightSyncReport, engine: InferenceEngine) -> int:
    batch.metrics = rollout_metrics(batch.groups, policy_version=0) | batch.counts() | trial.figures
    batch.report = report
    return len(encode_line({"step": 1, "time": time.time()} | batch.figures() | engine.counts()))
