"""What was not finite in an update that had to be skipped, and what a person can do about it.

Looked at only once a skip is certain, when another wait for the device does not matter. It finds where the numbers broke;
left out is why they did: that takes the samples of the update, which are in the rollouts file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

LARGEST_NORM = 1e15
"""A gradient beyond this is refused like one that is not finite: squared, it is at home in no fp32 second moment of AdamW,
and no update that means anything comes near it."""
_NAMED = 3
"""So many parameters are named; the others are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """Where NaN or Inf stood in a step that was skipped."""

    learning_rate: float
    num_micro_batches: int
    losses: int
    """Micro-batches whose loss is not finite."""
    logprobs: int
    """Tokens whose log-probability under the policy is not finite."""
    logprob_micro_batches: int
    """Micro-batches with such tokens."""
    grad_norm: float
    gradients: tuple[str, ...]
    """Parameters whose gradient is not finite, in the model's order."""
    num_parameters: int
    """How many have a gradient at all."""
    weights: tuple[str, ...]
    """Parameters that are themselves not finite: they never should be."""
    largest_log_ratio: float | None
    """To the sampler, in nats, over the tokens where it is known and finite."""
    other: tuple[str, ...]
    """Metrics that are not finite either."""

    def figures(self) -> dict[str, float]:
        """The counts, for the metrics of the skipped update."""
        return {
            "nonfinite_losses": self.losses,
            "nonfinite_policy_logprobs": self.logprobs,
            "nonfinite_gradients": len(self.gradients),
        }

    def describe(self) -> str:
        """One line: what was not finite and where, the circumstances, and what to turn."""
        found = []
        if self.losses:
            found.append(f"the loss, in {self.losses} of {self.num_micro_batches} micro-batches")
        if self.logprobs:
            found.append(
                f"{self.logprobs} of the policy's log-probs, in {self.logprob_micro_batches} of {self.num_micro_batches} "
                "micro-batches"
            )
        if self.gradients:
            found.append(
                f"the gradient, in {len(self.gradients)} of {self.num_parameters} parameters{_some(self.gradients)}"
            )
        if not math.isfinite(self.grad_norm) and not self.gradients:
            found.append(
                f"the norm of the gradient ({self.grad_norm}: the parts are finite, the sum of squares is not)"
            )
        parts = ["not finite: " + "; ".join(found)] if found else []
        if math.isfinite(self.grad_norm) and self.grad_norm > LARGEST_NORM:
            parts.append(
                f"the gradient's norm is {self.grad_norm:.3g}, beyond the {LARGEST_NORM:.0e} that AdamW can square"
            )
        if self.other:
            parts.append(f"metrics that are not finite: {', '.join(self.other)}")
        gap = "unknown" if self.largest_log_ratio is None else f"{self.largest_log_ratio:.3g} nats"
        parts.append(f"learning rate {self.learning_rate:.3g}, largest |log-ratio| to the sampler {gap}")
        parts.append(
            f"THE WEIGHTS THEMSELVES ARE NOT FINITE, in {len(self.weights)} parameters{_some(self.weights)}"
            if self.weights
            else "the weights are finite, and as they were"
        )
        return ". ".join(parts) + ". " + self._advice()

    def _advice(self) -> str:
        if self.weights:
            return (
                "No step of AdamW made that, and none mends it: --resume from an earlier checkpoint, and mistrust the one that "
                "they came from, or the machine's memory"
            )
        if self.logprobs:
            return (
                "Finite weights whose forward pass overflows have drifted far: --resume from an earlier checkpoint with a "
                "lower --learning-rate (a tenth, say), and a lower --max-grad-norm"
            )
        if self.losses:
            return (
                "The log-probs are finite and what is made of them is not: a ratio that overflows. A lower --learning-rate, "
                "fewer --epochs-per-update, a --tis-cap, or no --kl-coef, whichever of them is in use"
            )
        return (
            "The loss is finite and its gradient overflows on the way back: a lower --learning-rate, and a --tis-cap "
            "where rollouts are stale; look at logprob_gap_max and grad_norm of the updates before"
        )


@torch.no_grad()
def find_nonfinite(
    columns: Mapping[str, torch.Tensor],
    *,
    names: Sequence[str],
    masters: Sequence[torch.Tensor],
    grad_norm: float,
    learning_rate: float,
    other: Sequence[str],
) -> NonFinite:
    """Look for NaN and Inf in one step's metrics, gradients and weights. Waits for the device.

    Args:
        columns: [M] of each metric, one figure a micro-batch, on the host (see `losses.fetch_metrics`).
        names: of the parameters.
        masters: the fp32 weights, with their gradients, in the same order.
        grad_norm: of the whole gradient.
        other: metrics of the update that came out not finite.
    """
    gradients = [(name, master.grad) for name, master in zip(names, masters, strict=True) if master.grad is not None]
    tokens = columns["num_nonfinite_policy_logprobs"]
    gaps = columns.get("logprob_gap_max")
    known = gaps is not None and float(columns["num_gap_tokens"].sum()) > 0
    return NonFinite(
        learning_rate=learning_rate,
        num_micro_batches=len(columns["loss"]),
        losses=int((~columns["loss"].isfinite()).sum()),
        logprobs=int(tokens.sum()),
        logprob_micro_batches=int(tokens.count_nonzero()),
        grad_norm=grad_norm,
        gradients=nonfinite_names([name for name, _ in gradients], [gradient for _, gradient in gradients]),
        num_parameters=len(gradients),
        weights=nonfinite_names(names, masters),
        largest_log_ratio=float(gaps.max()) if gaps is not None and known else None,
        other=tuple(name for name in other if name != "loss"),
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
