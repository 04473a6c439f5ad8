"""Samples to micro-batches: whole sequences, laid end to end without padding, under a token budget.

Nothing is dropped and no sequence is split. Samples that agree up to their first trained token answer the same prompt; a
row holds that prompt once, however many of them it holds, and the token before their first trained one predicts it for
all. What each token's loss is multiplied by is settled here, over the whole update, before it is cut into micro-batches,
so that no cut can change the gradient.

Left out on purpose: sharing between samples of which one's prompt only begins like the other's, sequence splitting (context
parallelism), and balancing by attention cost: at the lengths of reasoning completions on small models the time goes with the
tokens.
"""

from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ludic import config
from ludic.types import MicroBatch, TrainingSample

Normalisation: TypeAlias = config.Normalisation
"""What a token's loss is divided by, with N the sequences, M the loss tokens and P the prompts of the update:

- `token_mean`: M, so that every token counts the same (DAPO, arXiv 2503.14476, and CISPO, arXiv 2506.13585);
- `sequence_mean`: N times the loss tokens of its own sequence, so that every sequence counts the same (GRPO,
  arXiv 2402.03300, and GSPO, arXiv 2507.18071);
- `prompt_mean`: P times the loss tokens of all samples of its own prompt, so that every prompt counts the same (the prompt
  average of ScaleRL, arXiv 2510.13786);
- `constant`: N times the longest completion allowed, so that a token's share does not depend on the lengths that came
  out (Dr. GRPO, arXiv 2503.20783).

What is counted where all rewards of a group are equal, so that its policy loss is 0 and it need not be packed: GRPO (eq. 3),
Dr. GRPO and GSPO (eq. 5) average over all sampled sequences, so N counts it. DAPO (eq. 8) and CISPO draw other prompts until
no group is like that, so M does not count it, and ScaleRL filters it, so P does not. With a KL penalty such groups are packed
and trained on, and every N, M and P counts what is packed."""

_Ints: TypeAlias = npt.NDArray[np.int64]


def num_loss_tokens(samples: Sequence[TrainingSample]) -> int:
    """How many tokens of the samples are trained on."""
    return sum(sample.loss_mask.count(True) for sample in samples)


def prompts_of(samples: Sequence[TrainingSample]) -> list[int]:
    """The number in the run of each sample's prompt.

    Raises:
        ValueError: a sample was not made of a rollout.
    """
    numbers = [sample.rollout[0] for sample in samples if sample.rollout is not None]
    if len(numbers) < len(samples):
        raise ValueError(
            f"{len(samples) - len(numbers)} of {len(samples)} samples have no `rollout`, so that their group is unknown; give it"
        )
    return numbers


def update_scale(
    normalisation: Normalisation, *, num_sequences: float, num_loss_tokens: int, num_prompts: int = 0
) -> float:
    """The factor of an update's normalisation that is known only when all its samples are: 1 / M, 1 / N or 1 / P.

    Micro-batches packed with `scale=1.0` give the same gradient once it is multiplied by this.

    Raises:
        ValueError: if there is nothing to divide by.
    """
    count = {"token_mean": num_loss_tokens, "prompt_mean": num_prompts}.get(normalisation, num_sequences)
    if count < 1:
        raise ValueError(f"an update of {num_sequences} sequences and {num_loss_tokens} loss tokens has no mean")
    return 1.0 / count


def pack(
    samples: Sequence[TrainingSample],
    *,
    token_budget: int,
    normalisation: Normalisation,
    max_completion_tokens: int | None = None,
    share_prompts: bool = True,
    scale: float | None = None,
    pad_to_multiple: int = 1,
) -> list[MicroBatch]:
    """Pack samples into as few micro-batches as a best-fit heuristic finds, evenly filled; none for no samples.

    The same samples give the same micro-batches, on the CPU. Sequences stand in the order of `samples`, those that share a
    prompt together; those of one prompt that do not fit beside one another are spread over rows that each hold the prompt.

    Args:
        samples: The whole update, or with a `scale` a part of it.
        token_budget: Tokens that a micro-batch may hold.
        normalisation: How the loss is averaged over the update.
        max_completion_tokens: The limit that completions were sampled under; for `constant` alone, which needs it.
        share_prompts: Whether a prompt stands once in a row for all samples there that begin with it.
        scale: In the place of 1 / M, 1 / N or 1 / P (see `update_scale`); None computes it from these samples. A part must
            then hold whole groups, for `prompt_mean`.
        pad_to_multiple: Rows are rounded up to a multiple of this within the budget, with tokens of no sequence.

    Raises:
        ValueError: a sample is longer than the budget, or malformed.

    Example: three sequences, the first two with the prompt [7, 8], a budget of 5 and `token_mean` of 4 loss tokens.

        samples[0] = [7, 8, 12, 13]  advantage  1.0
        samples[1] = [7, 8, 22]      advantage -1.0
        samples[2] = [31, 32, 33]    advantage  0.5

        first micro-batch                                           second
        sample_indices       (-1, 0, 1)                             (2,)
        input_ids            [7,     8,      12,   13,    22  ]     [31,  32,  33   ]
        position_ids         [0,     1,      2,    3,     2   ]     [0,   1,   2    ]
        cu_seqlens           [0, 2, 4, 5]                           [0, 3]
        cu_seqlens_k         [0, 2, 6, 9]                           [0, 3]
        key_indices          [0, 1,  0, 1, 2, 3,  0, 1, 4]          [0, 1, 2]
        target_positions     [2, 3, 4]                              [2]
        predictor_positions  [1, 2, 1]                              [1]
        loss_mask            [False, False,  True, True,  True]     [False, False, True]
        loss_weights         [0,     0,      0.25, 0.25,  0.25]     [0,   0,   0.25 ]
        advantages           [0,     0,      1.0,  1.0,   -1.0]     [0.5, 0.5, 0.5  ]
    """
    if not samples:
        return []
    masks = [bytes(sample.loss_mask) for sample in samples]
    _check(samples, masks, token_budget, pad_to_multiple)
    trained = [mask.count(1) for mask in masks]
    if scale is None:
        prompts = len(set(prompts_of(samples))) if normalisation == "prompt_mean" else 0
        scale = update_scale(
            normalisation, num_sequences=len(samples), num_loss_tokens=sum(trained), num_prompts=prompts
        )
    if normalisation == "prompt_mean":
        weights = _prompt_weights(trained, scale, prompts_of(samples))
    else:
        weights = _sequence_weights(trained, scale, normalisation, max_completion_tokens)
    flat = _flattened(samples, masks, weights, pad_to_multiple)
    rows = _rows(_bundles(flat, masks, share_prompts), token_budget - token_budget % pad_to_multiple)
    # The fullest comes first, so that memory runs out at once or never.
    rows.sort(key=lambda row: (-sum(bundle.size for bundle in row), row[0].members))
    return [_micro_batch(flat, row, share_prompts, pad_to_multiple) for row in rows]


def _check(samples: Sequence[TrainingSample], masks: Sequence[bytes], token_budget: int, multiple: int) -> None:
    if multiple < 1:
        raise ValueError(f"pad_to_multiple must be at least 1 (no padding), not {multiple}")
    capacity = token_budget - token_budget % multiple
    rounded = "" if capacity == token_budget else f" ({capacity} in rows of a multiple of {multiple})"
    for index, (sample, mask) in enumerate(zip(samples, masks, strict=True)):
        length = len(sample.token_ids)
        if length > capacity:
            raise ValueError(
                f"sample {index} has {length} tokens, more than the budget of {token_budget}{rounded} of a micro-batch; "
                "raise the budget or lower the longest sequence"
            )
        if len(mask) != length:
            raise ValueError(f"sample {index} has {length} tokens and a loss mask of {len(mask)}")
        if 1 not in mask:
            raise ValueError(f"sample {index} has no token to train on; leave it out before packing")
        if mask[0]:
            raise ValueError(f"sample {index} has a loss on its first token, which nothing predicts")
        if sample.rollout_logprobs is not None and len(sample.rollout_logprobs) != length:
            raise ValueError(f"sample {index} has {length} tokens and {len(sample.rollout_logprobs)} rollout log-probs")


def _sequence_weights(
    trained: Sequence[int], scale: float, normalisation: Normalisation, max_completion_tokens: int | None
) -> list[float]:
    """What each loss token of a sequence is multiplied by; `trained` counts those of each sequence."""
    if normalisation == "token_mean":
        return [scale] * len(trained)
    if normalisation == "sequence_mean":
        return [scale / count for count in trained]
    if max_completion_tokens is None or max_completion_tokens < 1:
        raise ValueError(
            f"constant normalisation needs max_completion_tokens of at least 1, not {max_completion_tokens}"
        )
    return [scale / max_completion_tokens] * len(trained)


def _prompt_weights(trained: Sequence[int], scale: float, prompts: Sequence[int]) -> list[float]:
    """The same where the loss tokens of a prompt's samples share its weight."""
    tokens: Counter[int] = Counter()
    for prompt, count in zip(prompts, trained, strict=True):
        tokens[prompt] += count
    return [scale / tokens[prompt] for prompt in prompts]


class _Flat(NamedTuple):
    """All samples end to end, then the padding of a row. Index -1 of what goes by samples speaks of no sample.

    Rows are cut out of these arrays, so that the host's time does not grow with a Python loop over tokens.
    """

    token_ids: _Ints
    loss_mask: npt.NDArray[np.bool_]
    rollout_logprobs: npt.NDArray[np.float32]
    """0 off the mask, NaN on it for a sample without"""
    starts: list[int]
    """Where each sample begins, and at the end where the padding does"""
    lengths: list[int]
    weights: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float32]


def _flattened(
    samples: Sequence[TrainingSample], masks: Sequence[bytes], weights: Sequence[float], padding: int
) -> _Flat:
    token_ids, logprobs = array("q"), array("f")
    for sample in samples:
        token_ids.extend(array("q", sample.token_ids))
        known = sample.rollout_logprobs
        logprobs.extend(array("f", [float("nan")]) * len(sample.token_ids) if known is None else array("f", known))
    token_ids.extend([0] * padding)
    logprobs.extend([0.0] * padding)
    loss_mask = np.frombuffer(b"".join([*masks, bytes(padding)]), dtype=np.bool_)
    lengths = [len(mask) for mask in masks]
    return _Flat(
        token_ids=np.frombuffer(token_ids, dtype=np.int64),
        loss_mask=loss_mask,
        rollout_logprobs=np.where(loss_mask, np.frombuffer(logprobs, dtype=np.float32), np.float32(0)),
        starts=list(accumulate(lengths, initial=0)),
        lengths=lengths,
        weights=np.array([*weights, 0], dtype=np.float32),
        advantages=np.array([*(sample.advantage for sample in samples), 0], dtype=np.float32),
    )


class _Bundle(NamedTuple):
    """Samples of one prompt that stand together in a row."""

    prompt: int
    """Tokens of the prompt; 0 where there is nothing to share"""
    members: tuple[int, ...]
    """Indices into the samples, ascending"""
    extra: tuple[int, ...]
    """What each of them adds to the prompt, in tokens"""
    key: int
    """Which prompt it is"""

    @property
    def size(self) -> int:
        return self.prompt + sum(self.extra)

    def cut(self, room: int) -> "tuple[_Bundle, _Bundle] | None":
        """What of it fits into `room` beside a copy of the prompt, the longest first, and the rest; None if nothing."""
        left, taken = room - self.prompt, set()
        for place in sorted(range(len(self.extra)), key=lambda place: (-self.extra[place], place)):
            if self.extra[place] <= left:
                taken.add(place)
                left -= self.extra[place]
        return (self._part(taken), self._part(set(range(len(self.extra))) - taken)) if taken else None

    def _part(self, places: set[int]) -> "_Bundle":
        order = sorted(places)
        return self._replace(
            members=tuple(self.members[place] for place in order), extra=tuple(self.extra[place] for place in order)
        )


def _bundles(flat: _Flat, masks: Sequence[bytes], share_prompts: bool) -> list[_Bundle]:
    """The samples by their prompts, in the order in which the prompts come first."""
    members: dict[bytes | int, list[int]] = {}
    for index, mask in enumerate(masks):
        start, prompt = flat.starts[index], mask.index(1)
        prompt_ids = flat.token_ids[start : start + prompt].tobytes()
        members.setdefault(prompt_ids if share_prompts else index, []).append(index)
    bundles = []
    for key, indices in enumerate(members.values()):
        prompt = masks[indices[0]].index(1)
        extra = tuple(flat.lengths[index] - prompt for index in indices)
        bundles.append(_Bundle(prompt=prompt, members=tuple(indices), extra=extra, key=key))
    return bundles


_MOST_REPEATED = 0.01
"""How much more, at most, may be forwarded for rows that are evenly filled."""


def _rows(bundles: Sequence[_Bundle], capacity: int) -> list[list[_Bundle]]:
    """The bundles of each row, in the order of their first members: as few rows as best fit needs, evenly filled where
    handing the largest to the emptiest takes no more of them and hardly repeats a prompt."""
    tight = [_merged(row) for row in _tightly(bundles, capacity)]
    even = _evenly(bundles, capacity, len(tight))
    if even is None:
        return tight
    merged = [_merged(row) for row in even if row]
    tight_tokens, tokens = (sum(bundle.size for row in rows for bundle in row) for rows in (tight, merged))
    return merged if tokens <= (1 + _MOST_REPEATED) * tight_tokens else tight


def _tightly(bundles: Sequence[_Bundle], capacity: int) -> list[list[_Bundle]]:
    """Best fit, the largest first. A bundle that no row has room for fills a gap in part, where that brings more than it
    repeats, or begins a new row."""
    rows: list[list[_Bundle]] = []
    room: list[tuple[int, int]] = []  # (tokens, row), ascending
    fewest = -(-sum(bundle.size for bundle in bundles) // capacity)
    waiting = [(-bundle.size, bundle.members[0], bundle) for bundle in bundles]
    heapify(waiting)
    while waiting:
        bundle = heappop(waiting)[2]
        place = bisect_left(room, (bundle.size, -1))
        rest: _Bundle | None = None
        if place == len(room):  # it fits nowhere whole
            parts = bundle.cut(room[-1][0]) if len(rows) >= fewest and room else None
            if parts is not None and parts[0].size >= 2 * bundle.prompt:
                place -= 1
                bundle, rest = parts
            else:
                room.append((capacity, len(rows)))
                rows.append([])
                if bundle.size > capacity:
                    parts = bundle.cut(capacity)
                    assert parts is not None  # no sample is longer than the capacity
                    bundle, rest = parts
        left, row = room.pop(place)
        rows[row].append(bundle)
        insort(room, (left - bundle.size, row))
        if rest is not None:
            heappush(waiting, (-rest.size, rest.members[0], rest))
    return rows


def _evenly(bundles: Sequence[_Bundle], capacity: int, num_rows: int) -> list[list[_Bundle]] | None:
    """The largest to the emptiest row; one that does not fit there fills it up to the mean of all rows, if it can."""
    rows: list[list[_Bundle]] = [[] for _ in range(num_rows)]
    filled = [(0, row) for row in range(num_rows)]
    mean = -(-sum(bundle.size for bundle in bundles) // num_rows)
    waiting = [(-bundle.size, bundle.members[0], bundle) for bundle in bundles]
    heapify(waiting)
    while waiting:
        bundle = heappop(waiting)[2]
        tokens, emptiest = filled[0]
        if tokens + bundle.size > capacity:
            parts = bundle.cut(min(mean, capacity) - tokens) or bundle.cut(capacity - tokens)
            if parts is None:
                return None
            bundle, rest = parts
            heappush(waiting, (-rest.size, rest.members[0], rest))
        rows[emptiest].append(bundle)
        heapreplace(filled, (tokens + bundle.size, emptiest))
    return rows


def _merged(row: Sequence[_Bundle]) -> list[_Bundle]:
    """Parts of one bundle that came to stand in the same row need its prompt once."""
    parts: dict[int, list[_Bundle]] = {}
    for bundle in row:
        parts.setdefault(bundle.key, []).append(bundle)
    merged = []
    for group in parts.values():
        pairs = sorted(pair for bundle in group for pair in zip(bundle.members, bundle.extra, strict=True))
        members, extra = zip(*pairs, strict=True)
        merged.append(group[0]._replace(members=members, extra=extra))
    return sorted(merged, key=lambda bundle: bundle.members)


def _segments(flat: _Flat, row: Sequence[_Bundle], pad_to_multiple: int) -> _Ints:
    """[6, S]: each segment's sample (-1 for none), where its tokens and its sequence begin in the flat arrays, its length,
    and where in the row the prompt before it begins and how long that is (0 for none)."""
    segments: list[tuple[int, int, int, int, int, int]] = []
    tokens = 0
    for bundle in row:
        first, prompt = bundle.members[0], (0, 0)
        if len(bundle.members) > 1:
            prompt = (tokens, bundle.prompt)
            segments.append((-1, flat.starts[first], flat.starts[first], bundle.prompt, 0, 0))
            tokens += bundle.prompt
        for member in bundle.members:
            start, length = flat.starts[member], flat.lengths[member] - prompt[1]
            segments.append((member, start + prompt[1], start, length, *prompt))
            tokens += length
    padding = -tokens % pad_to_multiple
    if padding:
        segments.append((-1, flat.starts[-1], flat.starts[-1], padding, 0, 0))
    return np.array(segments, dtype=np.int64).T


def _micro_batch(flat: _Flat, row: Sequence[_Bundle], indexed: bool, pad_to_multiple: int) -> MicroBatch:
    samples, sources, origins, lengths, prompt_starts, prompt_lengths = _segments(flat, row, pad_to_multiple)
    num_keys = prompt_lengths + lengths
    ends = lengths.cumsum()
    starts = ends - lengths
    source = _stretches(sources, lengths)
    loss_mask = flat.loss_mask[source]
    targets = np.flatnonzero(loss_mask)
    predictors = np.arange(-1, len(source) - 1)
    behind = prompt_lengths > 0
    predictors[starts[behind]] = (prompt_starts + prompt_lengths - 1)[behind]
    keys = np.stack([prompt_starts, starts], axis=1).ravel(), np.stack([prompt_lengths, lengths], axis=1).ravel()
    logprobs = flat.rollout_logprobs[source]
    members = [member for bundle in row for member in bundle.members]
    return MicroBatch(
        input_ids=torch.from_numpy(flat.token_ids[source]),
        position_ids=torch.from_numpy(source - np.repeat(origins, lengths)),
        cu_seqlens=_boundaries(ends),
        max_seqlen=int(lengths.max()),
        cu_seqlens_k=_boundaries(num_keys.cumsum()),
        max_seqlen_k=int(num_keys.max()),
        # Also where nothing is shared: a compiled forward would be compiled once more for a row without.
        key_indices=torch.from_numpy(_stretches(*keys)) if indexed else None,
        target_positions=torch.from_numpy(targets),
        predictor_positions=torch.from_numpy(predictors[targets]),
        num_loss_tokens=len(targets),
        num_sequence_tokens=sum(flat.lengths[member] for member in members),
        loss_mask=torch.from_numpy(loss_mask),
        loss_weights=torch.from_numpy(np.repeat(flat.weights[samples], lengths) * loss_mask),
        advantages=torch.from_numpy(np.repeat(flat.advantages[samples], lengths)),
        rollout_logprobs=None if np.isnan(logprobs[targets]).all() else torch.from_numpy(logprobs),
        sample_indices=tuple(samples.tolist()),
    )


def _stretches(starts: _Ints, lengths: _Ints) -> _Ints:
    """start, start + 1, ... of each stretch, end to end: [sum of lengths]."""
    return np.arange(lengths.sum()) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)


def _boundaries(ends: _Ints) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
