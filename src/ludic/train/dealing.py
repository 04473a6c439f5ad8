"""Deals the samples of an update to the ranks that train together, so that they finish together.

The micro-batches come in rounds of one for each rank, those of a round nearly equally long. With FSDP a rank without work in a
round forwards an empty row: all ranks meet at every layer, to gather its weights.

Left out on purpose: balance by attention cost (see `packing`), and ranks of unequal speed.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from ludic.train.packing import pack
from ludic.types import MicroBatch, TrainingSample

Pack = Callable[[int], list[MicroBatch]]
"""Packs the samples at hand into rows of at most so many tokens."""

_MARGINS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4)
"""Over the mean length of a row: best fit does not fill every row to its end."""


def deal(
    pack_within: Pack, *, longest: int, token_budget: int, num_ranks: int, empty: MicroBatch
) -> list[list[MicroBatch]]:
    """Rounds of `num_ranks` rows; the row at place r of each is rank r's.

    Where the rows of the budget do not come out even, the samples are packed into shorter ones, as many as fill all rounds.
    Only where that fails, and where there are fewer sequences than ranks, some rows of the last round are `empty`.

    Args:
        pack_within: packs the samples under a token budget; called a few times.
        longest: tokens of the longest sample, which no budget may fall below.
        token_budget: tokens that a row may hold.
        empty: a row without a token to train on.

    Example: 3 rows of 100, 100 and 40 tokens for 2 ranks become 4 rows of 60, in 2 rounds.
    """
    rows = pack_within(token_budget)
    wanted = -(-len(rows) // num_ranks) * num_ranks
    if len(rows) < wanted:
        mean = sum(row.input_ids.numel() for row in rows) / wanted
        for margin in _MARGINS:
            budget = max(longest, int(mean * margin) + 1)
            if budget < token_budget and len(shorter := pack_within(budget)) <= wanted:
                rows = shorter
                break
    rows = sorted(rows, key=lambda row: -row.input_ids.numel())
    rounds = [rows[first : first + num_ranks] for first in range(0, len(rows), num_ranks)]
    # Alternately forwards and backwards, so that the longer row of a round is not always the same rank's.
    return [[*row, *[empty] * (num_ranks - len(row))][:: -1 if number % 2 else 1] for number, row in enumerate(rounds)]


def empty_row(length: int, *, share_prompts: bool, with_logprobs: bool) -> MicroBatch:
    """A row of `length` tokens of which none is trained on: its gradient is 0, and so are its sums.

    It has what other rows have, `key_indices` and the sampler's log-probs, so that it takes the same way through the model.
    """
    sample = TrainingSample(
        token_ids=[0] * 2, loss_mask=[False, True], rollout_logprobs=[0.0] * 2 if with_logprobs else None, advantage=0.0
    )
    (row,) = pack(
        [sample],
        token_budget=max(2, length),
        normalisation="token_mean",
        share_prompts=share_prompts,
        scale=0.0,
        pad_to_multiple=max(1, length),
    )
    return replace(
        row,
        target_positions=row.target_positions[:0],
        predictor_positions=row.predictor_positions[:0],
        num_loss_tokens=0,
        num_sequence_tokens=0,
        loss_mask=torch.zeros_like(row.loss_mask),
    )


def to_wire(row: MicroBatch) -> dict[str, Any]:
    """A row as another process is sent it. A pickled array is its bytes; a pickled tensor takes ten times as long."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def from_wire(sent: Mapping[str, Any]) -> MicroBatch:
    """The row that `to_wire` was given."""
    held: dict[str, Any] = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in sent.items()}
    return MicroBatch(**held)
