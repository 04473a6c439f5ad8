"""What was measured, beside what this arithmetic says of the same runs. No prediction is tuned by row."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ludic.capacity.memory import GIB, Trainer, head_work, training_parts
from ludic.capacity.pace import (
    PEAK_FLOPS,
    Machine,
    Work,
    decoding_costs,
    generation_seconds,
    rows_of,
    sync_bytes,
    sync_seconds,
    training_seconds,
)
from ludic.capacity.shapes import NAMED, Shape, shape_of
from ludic.train.footprint import COMPUTE_BYTES

BUDGETS = "2026-11-28, 1 x NVIDIA H200, torch 2.11.0: benchmarks/trainer.py --parts budget"
DECODING = (
    "2026-11-28, 1 x NVIDIA H200, vLLM 0.26.0: offline LLM.generate, random weights, 256 tokens each, no log-probs"
)
TOLERANCE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One measured figure."""

    what: str
    unit: str
    measured: float
    predicted: float
    source: str
    """How its line in benchmarks/RESULTS.md begins, or date, hardware and command."""
    fitted: bool = False
    """Whether a constant of `pace` was taken from this very figure, which then proves nothing."""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def missed(self) -> bool:
        return abs(self.error) > TOLERANCE


def checks() -> list[Check]:
    """All of them."""
    return [*_head(), *_memory(), *_budgets(), *_training(), *_generation(), *_syncs()]


def _shape(name: str) -> Shape:
    return shape_of(NAMED[name], name)


def _filled(work: Work, trainer: Trainer) -> Trainer:
    """With rows as full as this work makes them."""
    share = work.rollouts * work.completion / work.forwarded
    return replace(trainer, row=round(rows_of(work, trainer)[1]), trained_share=share)


def _peak(shape: Shape, work: Work, trainer: Trainer) -> float:
    return sum(training_parts(shape, _filled(work, trainer)).values()) / GIB


SEPARATE = Work(prompt=98, completion=100, longest=250, share_prompts=False)
SHARED = replace(SEPARATE, share_prompts=True)
"""The lengths of benchmarks/trainer.py, with each sequence's own prompt and with shared ones."""


def _head() -> Iterator[Check]:
    for hidden, vocabulary, fp32, measured in (
        (576, 49152, False, 1.3), (576, 49152, True, 1.68), (896, 151936, False, 4.27), (896, 151936, True, 5.43),
        (2048, 128256, False, 4.47), (2048, 128256, True, 5.44),
    ):  # fmt: skip
        name = f"{hidden}x{vocabulary}, {'fp32' if fp32 else 'bf16'}"
        shape = replace(_shape("0.5B"), hidden=hidden, vocabulary=vocabulary)
        work = head_work(shape, Trainer(trained_share=1.0, fp32_head=fp32))
        predicted = (work + COMPUTE_BYTES * shape.vocabulary_parameters) / GIB
        yield Check(
            what=f"LM head alone, {name}", unit="GiB", measured=measured, predicted=predicted, source=f"| {name} |"
        )


def _memory() -> Iterator[Check]:
    for model, work, fp32, measured, source in (
        ("0.5B", SEPARATE, False, 19.8, "| 0.5B, packed, compiled |"),
        ("0.5B", SHARED, False, 21.6, "| 0.5B, packed, compiled, prompts shared |"),
        ("0.5B", SHARED, False, 21.6, "| `--no-fp32-head` |"),
        ("0.5B", SHARED, True, 22.8, "| `--fp32-head` |"),
        ("1.5B", SEPARATE, False, 46.7, "| 1.5B, packed, compiled |"),
        ("1.5B", SHARED, False, 49.7, "| 1.5B, packed, compiled, prompts shared |"),
    ):
        what = f"peak of training, {source.strip('| `')}"
        predicted = _peak(_shape(model), work, Trainer(fp32_head=fp32))
        yield Check(what=what, unit="GiB", measured=measured, predicted=predicted, source=source)


def _budgets() -> Iterator[Check]:
    """640 sequences, so that even the largest budget has two full rows."""
    shape, work = _shape("0.5B"), replace(SEPARATE, rollouts=640)
    for budget, gib, mfu in (
        (4096, 12.2, 14.6), (8192, 15.6, 22.9), (16384, 22.5, 42.5), (32768, 32.5, 45.7), (65536, 52.2, 44.0),
    ):  # fmt: skip
        trainer = Trainer(row=budget)
        peak = _peak(shape, work, trainer)
        yield Check(
            what=f"peak of training, 0.5B, budget {budget:,}", unit="GiB", measured=gib, predicted=peak, source=BUDGETS
        )
        seconds = training_seconds(shape, Machine(), work, trainer)
        predicted = 100 * 6 * shape.parameters * work.forwarded / seconds / PEAK_FLOPS
        what, fitted = f"MFU, 0.5B, budget {budget:,}", budget <= 8192
        yield Check(what=what, unit="%", measured=mfu, predicted=predicted, source=BUDGETS, fitted=fitted)


def _training() -> Iterator[Check]:
    even = Work(rollouts=512, prompt=100, completion=100, longest=100, share_prompts=False)
    for model, work, measured, source in (
        ("0.5B", SEPARATE, 0.387, "| 0.5B, packed, compiled |"),
        ("0.5B", SHARED, 0.237, "| 0.5B, packed, compiled, prompts shared |"),
        ("0.5B", even, 0.678, "| each sequence with its own prompt |"),
        ("0.5B", replace(even, share_prompts=True), 0.456, "| prompts shared |"),
        ("1.5B", SEPARATE, 0.922, "| 1.5B, packed, compiled |"),
        ("1.5B", SHARED, 0.576, "| 1.5B, packed, compiled, prompts shared |"),
    ):
        predicted = training_seconds(_shape(model), Machine(), work, Trainer())
        yield Check(
            fitted=measured == 0.387,  # its kernels' 0.322 s are where MFU comes from
            what=f"training of an update, {source.strip('| ')}",
            unit="s",
            measured=measured,
            predicted=predicted,
            source=source,
        )


def _generation() -> Iterator[Check]:
    shape, machine = _shape("0.5B"), Machine()
    for in_flight, measured in ((1, 2.27), (8, 2.92), (64, 3.46), (256, 8.57)):
        costs = decoding_costs(shape, machine, tensor_parallel=1, context=128)
        predicted = 1e3 * max(cost.step_s + cost.token_s * in_flight for cost in costs.values())
        what, fitted = f"a decoding step, {in_flight} in flight", in_flight in (1, 256)
        yield Check(what=what, unit="ms", measured=measured, predicted=predicted, source=DECODING, fitted=fitted)
    work = Work(prompt=98, completion=128, longest=128)
    generation = generation_seconds(shape, machine, work, servers=1, tensor_parallel=1, in_flight=256)
    training = training_seconds(shape, machine, work, Trainer())
    sync = sync_seconds(shape, machine, Trainer())
    source = "| e6f58f0 (one learner's thread) | 1.45 |"
    for what, measured, predicted in (
        ("256 rollouts of 128 tokens each: generation", 1.03, generation),
        ("their training", 0.318, training),
        ("the sync after it", 0.094, sync),
        ("this whole update, on-policy", 1.45, generation + training + sync),
    ):
        yield Check(what=what, unit="s", measured=measured, predicted=predicted, source=source)


def _syncs() -> Iterator[Check]:
    for model, gib, quiet_s, busy_s in (("0.5B", 0.92, 0.049, 0.063), ("1.5B", 2.88, 0.074, 0.072)):
        shape, source = _shape(model), f"| {model}, ludic, proven |"
        sent, seconds = sync_bytes(shape) / GIB, sync_seconds(shape, Machine(), Trainer())
        yield Check(what=f"sent by a sync, {model}", unit="GiB", measured=gib, predicted=sent, source=source)
        yield Check(what=f"a sync, {model}", unit="s", measured=quiet_s, predicted=seconds, source=source, fitted=True)
        busy = f"| {model}, ludic, proven, 256 completions in flight |"
        yield Check(what=f"a sync under load, {model}", unit="s", measured=busy_s, predicted=seconds, source=busy)
