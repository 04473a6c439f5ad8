"""An update cut into mini-batches: disjoint parts, each of whole groups, with an optimizer step on each.

A loss compares the policy with itself at the start of the update, so all log-probs are taken before the first step: without
gradient, as the groups arrive. The passes with gradient begin when the last group is there, since only then it is known
which groups a part has. That is one forward pass more, and less training behind generation, than without mini-batches.

Which groups belong together depends on their numbers alone and not on the order in which they arrived, so a run repeats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ludic.train.packing import num_loss_tokens, prompts_of
from ludic.types import MicroBatch, TrainingSample


@dataclass(slots=True)
class Row:
    """A micro-batch on the device."""

    batch: MicroBatch
    reference: torch.Tensor | None
    """[T], the reference policy's log-probs"""
    old: torch.Tensor | None = None
    """[T], the policy's at the start of the update; None in the very pass that computes them"""


@dataclass(slots=True)
class Part:
    """What one optimizer step is taken on: the whole update, or a mini-batch of it."""

    num_sequences: int = 0
    num_loss_tokens: int = 0
    prompts: set[int] = field(default_factory=set)
    """Group numbers of its samples, as far as they are known."""
    rows: list[Row] = field(default_factory=list)

    def count(self, samples: Sequence[TrainingSample]) -> None:
        """Take in the samples' share of what a mean divides by."""
        self.num_sequences += len(samples)
        self.num_loss_tokens += num_loss_tokens(samples)
        self.prompts.update(sample.rollout[0] for sample in samples if sample.rollout is not None)


def split(samples: Sequence[TrainingSample], num_parts: int) -> list[list[int]]:
    """The places of the samples in each mini-batch: the groups in the order of their numbers, as many in each as can be.

    Fewer mini-batches where there are fewer groups. Within a part samples stand in the order of their rollouts.

    Raises:
        ValueError: a sample's group is unknown.

    Example: three groups, of which the first two come to the second of two mini-batches and to the first.

        groups of the samples    [7, 7, 5, 6]        split(..., 2)    [[2], [3, 0, 1]]
    """
    prompts = prompts_of(samples)
    groups = sorted(set(prompts))
    num_parts = min(num_parts, len(groups))
    part_of = {group: place * num_parts // len(groups) for place, group in enumerate(groups)}
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for place in sorted(range(len(samples)), key=lambda place: samples[place].rollout or (0, 0)):
        parts[part_of[prompts[place]]].append(place)
    return parts


def by_sample(row: MicroBatch, values: torch.Tensor, samples: Sequence[TrainingSample]) -> dict[int, torch.Tensor]:
    """By a sample's place in `samples`, which the row was packed of: `values` [T] at its trained tokens."""
    places = [place for place in row.sample_indices if place >= 0]
    # A sequence's trained tokens are in one segment, and the segments stand in this order.
    counts = [samples[place].loss_mask.count(True) for place in places]
    return dict(zip(places, values.index_select(0, row.target_positions).split(counts), strict=True))


def on_row(row: MicroBatch, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """[T]: the opposite of `by_sample`, from the values of each sample's trained tokens; 0 on all other tokens."""
    placed = torch.cat([values[place] for place in row.sample_indices if place >= 0])
    return placed.new_zeros(row.input_ids.shape[0]).index_copy(0, row.target_positions, placed)
