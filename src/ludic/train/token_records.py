"""What a run records of its rollouts beside their texts: advantages, and where they are asked for the numbers of each token.

The sampler's log-probs are known when a rollout is recorded. The trainer's are known after the backward pass of its update,
so that they are lines of a file of their own, which `(step, group, rollout)` joins with the rollouts.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ludic.config import GRPOConfig
from ludic.storage.jsonl import JsonlWriter
from ludic.task.prompts import decode_completion
from ludic.train.advantages import group_advantages
from ludic.types import MicroBatch, Rollout, RolloutGroup, TrainingSample, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DECIMALS = 4
"""Of log-probs in nats: the two sides differ by more in bf16, and a digit more would be a tenth of the file."""
_GAP_DECIMALS = 6
"""In float32 the two sides agree to 1e-5 or so."""
_WINDOW = 16
"""Tokens that are decoded together at most, but for those in the middle of a character."""
_CHARACTER = 4
"""Bytes of the longest character in UTF-8, and so the most tokens that it can have."""


def training_fields(
    group: RolloutGroup, *, config: GRPOConfig, tokenizer: "PreTrainedTokenizerBase"
) -> list[dict[str, Any]]:
    """What each member's record has beside `rollout_record`.

    Raises:
        ValueError: a reward is not finite.
    """
    rewards = [rollout.score.reward for rollout in group.rollouts]
    records: list[dict[str, Any]] = [
        {"advantage": round(advantage, 6)}
        for advantage in group_advantages(
            rewards,
            normalise_std=config.scales_rewards and config.advantage_std == "group",  # the update's is not known yet
            baseline=config.baseline,
        )
    ]
    if config.record_token_logprobs:
        for record, rollout in zip(records, group.rollouts, strict=True):
            completion = rollout.completion
            if (logprobs := completion.logprobs) is not None:
                numbers = zip(logprobs, completion.sampled_mask, strict=True)
                record["completion_logprobs"] = [round(one, _DECIMALS) if sampled else None for one, sampled in numbers]
                record["completion_token_ends"] = _completion_token_ends(rollout, tokenizer)
    return records


def _completion_token_ends(rollout: Rollout, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """[C]: where in `rollout.text` each token ends; a turn of the environment is all its first token's."""
    token_ids = rollout.completion.token_ids
    ends, start, length = list[int](), 0, 0
    for turn in rollout.completion.turns or (Turn(role="assistant", text=rollout.text, num_tokens=len(token_ids)),):
        own = token_ids[start : start + turn.num_tokens]
        inside = (
            token_ends(lambda ids: decode_completion(tokenizer, ids), own, turn.text)
            if turn.is_sampled
            else [len(turn.shown)] * turn.num_tokens
        )
        ends += [length + end for end in inside]
        start, length = start + turn.num_tokens, length + len(turn.shown)
    return ends


def token_ends(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int], text: str) -> list[int]:
    """Where in `text`, which they decode to, each token ends: [C] characters, ascending, the last one its length.

    Tokens inside a character end where it begins, and the last one of them where it ends; a special token has no text. Tokens
    are decoded together with some that stand before them, because a decoder may write a token differently at the start of a
    text; not with all of them, which would take quadratic time.

    Example:
        >>> token_ends(lambda ids: bytes(ids).decode(errors="replace"), list("2≠3".encode()), "2≠3")
        [1, 1, 1, 2, 3]
    """
    ends: list[int] = []
    start = whole = length = 0  # token_ids[start:whole] decode to `before`, which ends at `length`
    before = ""
    for place in range(1, len(token_ids) + 1):
        piece = decode(token_ids[start:place])
        # A replacement character at the end is a character that is not whole yet, or bytes that will never be one.
        if not piece.endswith("\ufffd") or place - whole >= _CHARACTER:
            length += len(piece) - len(before)
            if place - start > _WINDOW:
                start, piece = whole, decode(token_ids[whole:place])
            whole, before = place, piece
        ends.append(min(length, len(text)))
    return [*ends[:-1], len(text)] if ends else []


class TokenGaps(contextlib.AbstractContextManager["TokenGaps"]):
    """Writes one line for each completion that was trained on and whose sampler gave log-probs: trainer - sampler, a token.

    Args:
        path: of the JSON lines; None records nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._writer = None if path is None else JsonlWriter(path)
        self._kept: list[tuple[list[TrainingSample], torch.Tensor]] = []

    def watch(self, samples: Sequence[TrainingSample], row: MicroBatch, logprobs: torch.Tensor) -> None:
        """Keep the gaps of one row on the device, without waiting for it; see `learner.Watch`."""
        if self._writer is not None and row.rollout_logprobs is not None:
            gaps = (logprobs - row.rollout_logprobs).index_select(0, row.target_positions)
            # A sequence's trained tokens are in one segment, and the segments stand in this order.
            self._kept.append(([samples[place] for place in row.sample_indices if place >= 0], gaps))

    def write(self, step: int) -> None:
        """Write the lines of the update that was made of the rows since the last call; waits for the device once, and for
        the disk.

        Raises:
            OSError: a line could not be written.
        """
        kept, self._kept = self._kept, []
        if self._writer is None or not kept:
            return
        gaps = torch.cat([gaps for _, gaps in kept]).tolist()
        end = 0
        for sample in (sample for samples, _ in kept for sample in samples):
            start, end = end, end + sample.loss_mask.count(True)
            if sample.rollout_logprobs is not None and sample.rollout is not None:
                group, member = sample.rollout
                numbers = [round(gap, _GAP_DECIMALS) + 0.0 for gap in gaps[start:end]]
                line = {"step": step, "group": group, "rollout": member, "completion_logprob_gaps": numbers}
                self._writer.write(line)
        self._writer.flush()

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
