"""From the sums that each micro-batch leaves on the device to the figures of an update."""

import math
from collections.abc import Mapping, Sequence

import torch

_COUNTS = ("num_loss_tokens", "num_gap_tokens")
_SIGN_COUNTS = ("num_positive_tokens", "num_negative_tokens")
_OVER_GAP_TOKENS = ("logprob_gap", "kl_rollout")
_OF_STEPS = ("loss", "grad_norm", "grad_clipped")


def fetch_metrics(
    outputs: Sequence[Mapping[str, torch.Tensor]], *others: torch.Tensor
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The metrics of M micro-batches by name, [M] float64 on the host, and other scalars of the device with them. Waits for
    the device once.

    Raises:
        ValueError: if there are no micro-batches.
    """
    if not outputs:
        raise ValueError("an update without micro-batches has no metrics")
    names = list(dict.fromkeys(name for metrics in outputs for name in metrics))
    none = torch.zeros_like(outputs[0]["loss"])  # what a row lacks: one without the sampler's log-probs has no gap
    values = [metrics.get(name, none) for metrics in outputs for name in names]
    fetched = torch.stack([value.float() for value in (*values, *others)]).double().cpu()
    table = fetched[: len(values)].view(len(outputs), len(names))
    return dict(zip(names, table.unbind(1), strict=True)), fetched[len(values) :].tolist()


def _divisor(name: str) -> str:
    """The count of the tokens that a figure is a mean over."""
    if name in _OVER_GAP_TOKENS:
        return "num_gap_tokens"
    for sign in ("positive", "negative"):
        if name.endswith(f"_{sign}"):
            return f"num_{sign}_tokens"
    return "num_loss_tokens"


def reduce_columns(columns: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], list[str]]:
    """The figures of an update from those of its micro-batches, by name, and the names of those that are not finite.

    `loss` and counts (`num_...`) are sums, `*_max` maxima, all others means over the update's loss tokens, but
    `logprob_gap` and `kl_rollout` over those whose log-prob the sampler gave (`num_gap_tokens`), and `*_positive` and
    `*_negative` over those whose advantage has that sign; a mean over no token is absent. So is a figure that is not finite:
    a NaN in a log is read as a gap or as a zero, its name in the second part of the answer is not.
    """
    sums = {name: float(column.sum()) for name, column in columns.items()}
    figures: dict[str, float] = {}
    for name, column in columns.items():
        if name == "num_nonfinite_policy_logprobs":  # `nonfinite` reports them where there are any
            continue
        if name in ("num_gap_tokens", "logprob_gap_max") and sums.get("num_gap_tokens", 0.0) == 0:
            continue
        if name.endswith("_max"):
            figures[name] = float(column.max())
        elif name in ("loss", *_COUNTS, *_SIGN_COUNTS):
            figures[name] = sums[name]
        elif (tokens := sums.get(_divisor(name), 0.0)) or _divisor(name) == "num_loss_tokens":
            figures[name] = sums[name] / tokens
    broken = [name for name, value in figures.items() if not math.isfinite(value)]
    return {name: value for name, value in figures.items() if name not in broken}, broken


def merge_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of an update from those of the optimizer steps on its mini-batches: means over all tokens of the
    mini-batches, sums of counts, largest maxima, and the mean over the steps of `loss`, `grad_norm` and `grad_clipped`.

    Raises:
        ValueError: if there are no steps.

    Example:
        >>> merge_steps([{"loss": 1.0, "num_loss_tokens": 1.0, "entropy": 2.0},
        ...              {"loss": 3.0, "num_loss_tokens": 3.0, "entropy": 4.0}])
        {'loss': 2.0, 'num_loss_tokens': 4.0, 'entropy': 3.5}
    """
    if not steps:
        raise ValueError("an update without optimizer steps has no figures")
    if len(steps) == 1:
        return dict(steps[0])
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        having = [step for step in steps if name in step]
        values = [step[name] for step in having]
        if name.endswith("_max"):
            merged[name] = max(values)
        elif name.startswith("num_") or name == "nonfinite_metrics":
            merged[name] = sum(values)
        elif name in _OF_STEPS:
            merged[name] = sum(values) / len(values)
        else:
            counts = [step.get(_divisor(name), 0.0) for step in having]
            products = (value * count for value, count in zip(values, counts, strict=True))
            merged[name] = sum(products) / sum(counts)
    return merged
