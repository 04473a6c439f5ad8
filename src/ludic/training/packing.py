"""Samples to micro-batches: whole sequences, laid end to end without padding, under a token budget.

Nothing is dropped and no sequence is split. What each token's loss is multiplied by is settled here, over the whole
update, before it is cut into micro-batches, so that no cut can change the gradient. Left out on purpose: padding,
sequence splitting (context parallelism), and balancing by attention cost: at the lengths of reasoning completions on
small models the time goes with the tokens.
"""

import heapq
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch

from ludic.types import MicroBatch, TrainingSample

Normalisation = Literal["token_mean", "sequence_mean", "constant"]
"""What a token's loss is divided by, with N the sequences and M the loss tokens of the update:

- `token_mean`: M, so that every token counts the same (DAPO, arXiv 2503.14476);
- `sequence_mean`: N times the loss tokens of its own sequence, so that every sequence counts the same (GRPO,
  arXiv 2402.03300);
- `constant`: N times the longest completion allowed, so that a token's share does not depend on the lengths that came
  out (Dr. GRPO, arXiv 2503.20783).

N counts the sequences that are packed. Groups without variance are left out before (see `advantages`), so they are in
neither N nor M."""


def num_loss_tokens(samples: Sequence[TrainingSample]) -> int:
    """How many tokens of the samples are trained on."""
    return sum(sum(sample.loss_mask) for sample in samples)


def pack(
    samples: Sequence[TrainingSample],
    *,
    token_budget: int,
    normalisation: Normalisation,
    max_completion_tokens: int | None = None,
) -> list[MicroBatch]:
    """Pack the samples of one update into as few micro-batches as a best-fit heuristic finds, evenly filled.

    The same samples give the same micro-batches. Within a micro-batch sequences stand in the order of `samples`; the
    fullest micro-batch comes first, so that memory runs out at once or never.

    Args:
        samples: The whole update.
        token_budget: Tokens that a micro-batch may hold.
        normalisation: How the loss is averaged over the update.
        max_completion_tokens: The limit that completions were sampled under; for `constant` alone, which needs it.

    Returns:
        Micro-batches of CPU tensors; none for no samples.

    Raises:
        ValueError: for a sample longer than the budget, malformed (lengths that differ, nothing to train on, a loss on
            its first token), or with log-probs where others have none.

    Example: three sequences with loss on their last 2, 1 and 1 tokens, a budget of 5 and `token_mean`, 4 loss tokens

        samples[0] = [11, 12, 13]   advantage  1.0
        samples[1] = [21, 22]       advantage -1.0
        samples[2] = [31, 32, 33]   advantage  0.5

        first micro-batch                                       second
        sample_indices  (0, 1)                                  (2,)
        input_ids       [11,    12,    13,    21,    22   ]     [31,  32,  33   ]
        position_ids    [0,     1,     2,     0,     1    ]     [0,   1,   2    ]
        cu_seqlens      [0, 3, 5]                               [0, 3]
        loss_mask       [False, True,  True,  False, True ]     [False, False, True]
        loss_weights    [0,     0.25,  0.25,  0,     0.25 ]     [0,   0,   0.25 ]
        advantages      [1.0,   1.0,   1.0,   -1.0,  -1.0 ]     [0.5, 0.5, 0.5  ]
    """
    if not samples:
        return []
    _check(samples, token_budget)
    weights = _sequence_weights(samples, normalisation, max_completion_tokens)
    lengths = [len(sample.token_ids) for sample in samples]
    bins = _bins(lengths, token_budget)
    bins.sort(key=lambda members: (-sum(lengths[i] for i in members), members))
    return [_micro_batch(samples, weights, members) for members in bins]


def packing_efficiency(micro_batches: Sequence[MicroBatch], *, token_budget: int) -> float:
    """The share of the micro-batches' budgets that holds tokens, 0 to 1; 1.0 for no micro-batches."""
    if not micro_batches:
        return 1.0
    return sum(micro_batch.input_ids.numel() for micro_batch in micro_batches) / (token_budget * len(micro_batches))


def _check(samples: Sequence[TrainingSample], token_budget: int) -> None:
    has_logprobs = samples[0].rollout_logprobs is not None
    for index, sample in enumerate(samples):
        length = len(sample.token_ids)
        if length > token_budget:
            raise ValueError(
                f"sample {index} has {length} tokens, more than the budget of {token_budget} of a micro-batch; "
                "raise the budget or lower the longest sequence"
            )
        if len(sample.loss_mask) != length:
            raise ValueError(f"sample {index} has {length} tokens and a loss mask of {len(sample.loss_mask)}")
        if not any(sample.loss_mask):
            raise ValueError(f"sample {index} has no token to train on; leave it out before packing")
        if sample.loss_mask[0]:
            raise ValueError(f"sample {index} has a loss on its first token, which nothing predicts")
        if (sample.rollout_logprobs is not None) != has_logprobs:
            raise ValueError(f"samples 0 and {index} differ in having rollout log-probs; an update has all or none")
        if sample.rollout_logprobs is not None and len(sample.rollout_logprobs) != length:
            raise ValueError(f"sample {index} has {length} tokens and {len(sample.rollout_logprobs)} rollout log-probs")


def _sequence_weights(
    samples: Sequence[TrainingSample], normalisation: Normalisation, max_completion_tokens: int | None
) -> list[float]:
    """[N]: what each loss token of a sequence is multiplied by."""
    if normalisation == "token_mean":
        return [1.0 / num_loss_tokens(samples)] * len(samples)
    if normalisation == "sequence_mean":
        return [1.0 / (len(samples) * sum(sample.loss_mask)) for sample in samples]
    if max_completion_tokens is None or max_completion_tokens < 1:
        raise ValueError(
            f"constant normalisation needs max_completion_tokens of at least 1, not {max_completion_tokens}"
        )
    return [1.0 / (len(samples) * max_completion_tokens)] * len(samples)


def _bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices into `lengths`, in ascending order in each bin: as many bins as best-fit decreasing needs, evenly filled
    where handing the longest to the emptiest also fits."""
    descending = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = _best_fit(lengths, descending, capacity)
    return [sorted(members) for members in _evenly(lengths, descending, capacity, len(bins)) or bins]


def _best_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fitting = [b for b, free in enumerate(room) if free >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda b: room[b])
            bins[best].append(index)
            room[best] -= lengths[index]
        else:
            bins.append([index])
            room.append(capacity - lengths[index])
    return bins


def _evenly(lengths: Sequence[int], order: Sequence[int], capacity: int, num_bins: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    filled = [(0, b) for b in range(num_bins)]
    for index in order:
        tokens, emptiest = heapq.heappop(filled)
        if tokens + lengths[index] > capacity:
            return None
        bins[emptiest].append(index)
        heapq.heappush(filled, (tokens + lengths[index], emptiest))
    return bins


def _micro_batch(samples: Sequence[TrainingSample], weights: Sequence[float], members: Sequence[int]) -> MicroBatch:
    chosen = [samples[i] for i in members]
    lengths = [len(sample.token_ids) for sample in chosen]
    repeats = torch.tensor(lengths)
    loss_mask = torch.tensor([flag for sample in chosen for flag in sample.loss_mask], dtype=torch.bool)
    sequence_weights = torch.tensor([weights[i] for i in members], dtype=torch.float32).repeat_interleave(repeats)
    advantages = torch.tensor([sample.advantage for sample in chosen], dtype=torch.float32).repeat_interleave(repeats)
    logprobs = [value for sample in chosen for value in sample.rollout_logprobs or ()]
    return MicroBatch(
        input_ids=torch.tensor([token for sample in chosen for token in sample.token_ids], dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        loss_mask=loss_mask,
        loss_weights=sequence_weights * loss_mask,
        advantages=advantages,
        rollout_logprobs=torch.tensor(logprobs, dtype=torch.float32) if logprobs else None,
        sample_indices=tuple(members),
    )
