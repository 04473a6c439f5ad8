"""Metrics as people read them: one line a step, and single figures in the unit that a metric's name says."""

import math
from collections.abc import Callable, Mapping


def percent(value: float) -> str:
    """A fraction of 1 as a percentage: 0.4961 is `49.6%`."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else str(value)


def seconds(value: float) -> str:
    """Seconds with as many digits as matter: `0.15s`, `12.3s`, `4m05s`, `1h02m`."""
    if not math.isfinite(value):
        return str(value)
    if value < 10:
        return f"{value:.2f}s"
    if value < 60:
        return f"{value:.1f}s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def count(value: float) -> str:
    """A whole number with thousands separators: `25,088`."""
    return f"{value:,.0f}"


def figure(value: float) -> str:
    """Any other number, with four significant digits: `0.01234`."""
    return f"{value:.4g}"


_RATES = frozenset({"correct_rate", "parse_err_rate", "truncation_rate", "zero_variance_share", "clip_fraction"})
_COUNTS = frozenset(
    {"zero_variance_groups", "policy_version", "grader_failures", "grader_timeouts", "num_problems", "num_completions"}
)


def format_metric(name: str, value: float) -> str:
    """`value` in the unit that the name of the metric says.

    Example:
        >>> format_metric("correct_rate", 0.5), format_metric("train_s", 0.913), format_metric("prompt_tokens", 25088)
        ('50.0%', '0.91s', '25,088')
    """
    base = name.rpartition("/")[2]
    if base in _RATES or base.endswith("accuracy") or base.startswith("pass@"):
        return percent(value)
    if base in _COUNTS or base.endswith(("_tokens", "_per_s")):
        return count(value)
    if base.endswith("_length"):
        return f"{value:,.1f}"
    if base == "seconds" or base.endswith("_s"):
        return seconds(value)
    return figure(value)


_STEP_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward_mean", "reward", "{:.3f}".format),
    ("correct_rate", "correct", percent),
    ("avg_completion_length", "len", "{:.0f}".format),
    ("loss", "loss", "{:.4f}".format),
    ("grad_norm", "grad", figure),
    ("logprob_gap", "gap", "{:.2g}".format),
    ("tokens_per_s", "tok/s", count),
    ("generation_s", "gen", seconds),
    ("train_s", "train", seconds),
    ("sync_s", "sync", seconds),
)


_LEFT_OUT_IF_BRIEF = ("grad_norm", "logprob_gap", "generation_s", "train_s", "sync_s")


def format_step_line(step: int, total_steps: int | None, metrics: Mapping[str, float], *, brief: bool = False) -> str:
    """One line for people: what is there of the most telling metrics, in a fixed order, and every `eval/` figure.

    A `brief` one fits 80 columns.

    Example:
        >>> format_step_line(3, 40, {"reward_mean": 0.25, "correct_rate": 0.25, "train_s": 1.0})
        'step  3/40  reward 0.250  correct 25.0%  train 1.00s'
        >>> format_step_line(3, 40, {"eval/accuracy": 0.5})
        'step  3/40  eval accuracy 50.0%'
    """
    names = metrics.keys() - set(_LEFT_OUT_IF_BRIEF if brief else ())
    parts = [f"{label} {show(metrics[name])}" for name, label, show in _STEP_COLUMNS if name in names]
    evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
    if evaluation:
        parts.append(f"eval {format_evaluation(evaluation)}")
    return "  ".join([format_step(step, total_steps), *parts])


def format_step(step: int, total_steps: int | None) -> str:
    """`step  3/40`, as wide for every step of the run; `step 3` where the total is not known."""
    return f"step {step}" if total_steps is None else f"step {step:>{len(str(total_steps))}}/{total_steps}"


def format_evaluation(metrics: Mapping[str, float]) -> str:
    """The figures of one evaluation, in the order given: `accuracy 49.6%, strict accuracy 31.2%`."""
    return ", ".join(
        f"{name.removeprefix('eval/').replace('_', ' ')} {format_metric(name, metrics[name])}" for name in metrics
    )
