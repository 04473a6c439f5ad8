"""What was not finite in an update that had to be skipped, and what a person can do about it.

Looked at only once a skip is certain, when another wait for the device does not matter. It finds where the numbers broke;
left out is why they did: that takes the samples of the update, which are in the rollouts file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

LARGEST_NORM = 1e15
"""A gradient beyond this is refused like one that is not finite: squared, it is at home in no fp32 second moment of AdamW,
and no update that means anything comes near it."""
MAX_SKIPPED = 3
"""This many consecutive updates with a NaN or an infinity in any of their steps end the run: it would not recover."""
_NAMED = 3
"""So many parameters are named; the others are counted."""


class NonFinite(NamedTuple):
    """Where NaN or Inf stood in a step that was skipped."""

    gradients: tuple[str, ...]
    """Parameters whose gradient is not finite, in the model's order."""
    weights: tuple[str, ...]
    """Parameters that are themselves not finite: they never should be."""
    figures: dict[str, float]
    """Counts for the metrics of the skipped update."""
    text: str
    """One line: what was not finite and where, the circumstances, and what to turn."""


@torch.no_grad()
def find_nonfinite(
    columns: Mapping[str, torch.Tensor],
    *,
    names: Sequence[str],
    masters: Sequence[torch.Tensor],
    grad_norm: float,
    learning_rate: float,
    other: Sequence[str],
    find: Callable[[Sequence[str], Sequence[torch.Tensor]], tuple[str, ...]],
) -> NonFinite:
    """Look for NaN and Inf in one step's metrics, gradients and weights. Waits for the device.

    Args:
        columns: [M] of each metric, one figure a micro-batch, on the host (see `losses.fetch_metrics`).
        names: of the parameters.
        masters: the fp32 weights, with their gradients, in the same order.
        grad_norm: of the whole gradient.
        other: metrics of the update that came out not finite.
        find: `nonfinite_names`, of all ranks where there are several.
    """
    trained = [(name, master.grad) for name, master in zip(names, masters, strict=True) if master.grad is not None]
    gradients = find([name for name, _ in trained], [gradient for _, gradient in trained])
    weights = find(names, masters)
    num_losses = int((~columns["loss"].isfinite()).sum())
    tokens = columns["num_nonfinite_policy_logprobs"]
    num_logprobs, num_rows = int(tokens.sum()), len(tokens)
    found = []
    if num_losses:
        found.append(f"the loss, in {num_losses} of {num_rows} micro-batches")
    if num_logprobs:
        rows = int(tokens.count_nonzero())
        found.append(f"{num_logprobs} of the policy's log-probs, in {rows} of {num_rows} micro-batches")
    if gradients:
        found.append(f"the gradient, in {len(gradients)} of {len(trained)} parameters{_some(gradients)}")
    elif not math.isfinite(grad_norm):
        found.append(f"the norm of the gradient ({grad_norm}: the parts are finite, the sum of squares is not)")
    parts = ["not finite: " + "; ".join(found)] if found else []
    if math.isfinite(grad_norm) and grad_norm > LARGEST_NORM:
        parts.append(f"the gradient's norm is {grad_norm:.3g}, beyond the {LARGEST_NORM:.0e} that AdamW can square")
    if other := [name for name in other if name != "loss"]:
        parts.append(f"metrics that are not finite: {', '.join(other)}")
    known = "logprob_gap_max" in columns and float(columns["num_gap_tokens"].sum()) > 0
    gap = f"{float(columns['logprob_gap_max'].max()):.3g} nats" if known else "unknown"
    parts.append(f"learning rate {learning_rate:.3g}, largest |log-ratio| to the sampler {gap}")
    if weights:
        parts.append(f"THE WEIGHTS THEMSELVES ARE NOT FINITE, in {len(weights)} parameters{_some(weights)}")
        advice = _WEIGHTS
    else:
        parts.append("the weights are finite, and as they were")
        advice = _LOGPROBS if num_logprobs else _LOSSES if num_losses else _GRADIENTS
    figures: dict[str, float] = {
        "nonfinite_losses": num_losses,
        "nonfinite_policy_logprobs": num_logprobs,
        "nonfinite_gradients": len(gradients),
    }
    return NonFinite(gradients=gradients, weights=weights, figures=figures, text=". ".join([*parts, advice]))


_WEIGHTS = (
    "No step of AdamW made that, and none mends it: --resume from an earlier checkpoint, and mistrust the one that "
    "they came from, or the machine's memory"
)
_LOGPROBS = (
    "Finite weights whose forward pass overflows have drifted far: --resume from an earlier checkpoint with a "
    "lower --learning-rate (a tenth, say), and a lower --max-grad-norm"
)
_LOSSES = (
    "The policy's log-probs are finite and what is made of them is not, although ratios are bounded: look at the rewards, with "
    "--kl-coef at the reference policy, and lower --learning-rate"
)
_GRADIENTS = (
    "The loss is finite and its gradient overflows on the way back: a lower --learning-rate, and a --tis-cap "
    "where rollouts are stale; look at logprob_gap_max and grad_norm of the updates before"
)


@torch.no_grad()
def nonfinite_names(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """The names of those tensors that hold a NaN or an Inf. Waits for the device once."""
    if not tensors:
        return ()
    largest = torch.stack(torch._foreach_norm(list(tensors), math.inf)).isfinite().tolist()
    return tuple(name for name, finite in zip(names, largest, strict=True) if not finite)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" ({', '.join(names[:_NAMED])}{more})"


def what_was_skipped(figures: Mapping[str, float]) -> str | None:
    """Of an update's figures: what was skipped, whole or in part, since it was not finite. None where nothing was.

    Example:
        >>> what_was_skipped({"skipped_update": 0.0, "optimizer_steps": 1, "skipped_steps": 3})
        'skipped 3 of its 4 optimizer steps'
    """
    if figures.get("skipped_update"):
        return "was skipped"
    if skipped := figures.get("skipped_steps"):
        return f"skipped {skipped:.0f} of its {skipped + figures['optimizer_steps']:.0f} optimizer steps"
    return None


def skipped_in_a_row(before: int, figures: Mapping[str, float]) -> int:
    """How many updates in a row were skipped, whole or in part, after one more, with these figures. One that had nothing to
    train on neither counts nor ends the row."""
    if "skipped_update" not in figures:
        return before
    return before + 1 if what_was_skipped(figures) else 0


def check_skipped(step: int, *, in_a_row: int, diagnosis: str) -> None:
    """After an update that was skipped, whole or in part, the last of so many in a row.

    Raises:
        FloatingPointError: it is the third.
    """
    if in_a_row >= MAX_SKIPPED:
        raise FloatingPointError(
            f"updates {step - in_a_row + 1} to {step} were not finite and were skipped, whole or in part; the weights are those "
            f"of the last finite step. {diagnosis}"
        )
