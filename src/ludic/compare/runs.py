"""Two sets of training runs, one run a seed: final accuracies, and what it took to reach a given one."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any, cast

from ludic.compare.paired import ALPHA, Z_ALPHA, Z_POWER
from ludic.storage.jsonl import read_jsonl

SUMMARY, METRICS = "_train_summary.json", "_train_metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One evaluation of a run, and what the run had cost until then."""

    step: int
    accuracy: float
    seconds: float
    """Of updates: waiting, training and weight syncs, without the evaluations."""
    rollouts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run's evaluations in their order."""

    path: Path
    evaluations: tuple[Evaluated, ...]
    accuracy_ci95: tuple[float, float]
    """Of the last one."""
    problems: str
    """A digest of what was evaluated, and how."""

    @property
    def final(self) -> Evaluated:
        return self.evaluations[-1]

    def reached(self, accuracy: float) -> Evaluated | None:
        """The first evaluation with at least this accuracy."""
        return next((one for one in self.evaluations if one.accuracy >= accuracy), None)


def is_run(path: Path) -> bool:
    return path.is_dir() and any(path.glob(f"*{SUMMARY}"))


def read_run(path: Path) -> Run:
    """The run in an `--out-dir`.

    Raises:
        ValueError: it is not finished, or evaluated nothing.
    """
    summaries, metrics = sorted(path.glob(f"*{SUMMARY}")), sorted(path.glob(f"*{METRICS}"))
    if len(summaries) != 1 or len(metrics) != 1:
        raise ValueError(f"{path} has {len(summaries)} files *{SUMMARY}: name the folder of one finished training run")
    summary = json.loads(summaries[0].read_text())
    if not summary["evaluations"]:
        raise ValueError(f"{path} has no evaluation: train with --eval-limit above 0")
    lines = cast("list[dict[str, Any]]", read_jsonl(metrics[0]))
    updates = {line["step"]: line["step_s"] for line in lines if "step_s" in line}
    last = summary["evaluations"][-1]
    return Run(
        path=path,
        evaluations=tuple(
            Evaluated(
                step=one["step"],
                accuracy=one["accuracy"],
                seconds=sum(seconds for step, seconds in updates.items() if step <= one["step"]),
                rollouts=round(summary["rollouts"] / max(1, summary["updates"]) * one["step"]),
            )
            for one in summary["evaluations"]
            if one["settings"] == last["settings"]  # others cannot be compared with it
        ),
        accuracy_ci95=tuple(last["accuracy_ci95"]),
        problems=json.dumps(last["settings"], sort_keys=True),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Final accuracies of B's seeds against those of A's. Fractions of 1, the interval is (low, high) at 95%."""

    accuracy_a: float
    accuracy_b: float
    difference: float
    difference_ci95: tuple[float, float]
    p_value: float | None
    """Of Welch's t-test over seeds; None where a side has one seed only."""
    num_more_seeds: int | None
    """Further seeds of each side after which the difference would probably be seen; 0 where it is seen already, None where
    none was seen or the spread over seeds is not known."""


def compare_runs(a: Sequence[Run], b: Sequence[Run]) -> Runs:
    """Raises ValueError where the runs were evaluated on different problems or with different settings."""
    for run in [*a, *b]:
        if run.problems != a[0].problems:
            raise ValueError(
                f"{a[0].path} and {run.path} were evaluated differently: other problems, prompts or sampling "
                f"({a[0].problems} against {run.problems})"
            )
    finals_a, finals_b = ([run.final.accuracy for run in side] for side in (a, b))
    difference = fmean(finals_b) - fmean(finals_a)
    interval, p_value, more = _unpaired_interval(a, b, difference), None, None
    if min(len(finals_a), len(finals_b)) > 1 and variance(finals_a) + variance(finals_b) > 0:
        from scipy.stats import ttest_ind

        test = ttest_ind(finals_b, finals_a, equal_var=False)
        bounds, p_value = test.confidence_interval(1 - ALPHA), float(test.pvalue)
        interval = (float(bounds.low), float(bounds.high))
        more = 0 if p_value < ALPHA else _more_seeds(finals_a, finals_b)
    return Runs(
        accuracy_a=fmean(finals_a),
        accuracy_b=fmean(finals_b),
        difference=difference,
        difference_ci95=interval,
        p_value=p_value,
        num_more_seeds=more,
    )


def _unpaired_interval(a: Sequence[Run], b: Sequence[Run], difference: float) -> tuple[float, float]:
    """From the intervals over problems alone, where no spread over seeds is known (Newcombe 1998, Statistics in Medicine
    17:873-890, method 10). It takes the problems for different ones, and is therefore wider than a paired one."""
    (below_a, above_a), (below_b, above_b) = (
        (fmean(run.final.accuracy - run.accuracy_ci95[0] for run in side),
         fmean(run.accuracy_ci95[1] - run.final.accuracy for run in side))
        for side in (a, b)
    )  # fmt: skip
    return difference - math.hypot(below_b, above_a), difference + math.hypot(above_b, below_a)


def _more_seeds(a: Sequence[float], b: Sequence[float]) -> int | None:
    """Further seeds of each side that would show this difference, with this spread, at `ALPHA` with `POWER`."""
    seen = fmean(b) - fmean(a)
    if seen == 0:
        return None
    needed = (Z_ALPHA + Z_POWER) ** 2 * (variance(a) + variance(b)) / seen**2
    return max(1, math.ceil(needed) - min(len(a), len(b)))
