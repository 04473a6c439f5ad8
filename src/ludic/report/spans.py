"""The numbers of a completion's tokens for the page, where a run recorded them (`--record-token-logprobs`).

The rollouts file has the sampler's log-probs and where in the text each token ends; the trainer's gaps are in a file of their
own, because they are known later.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from ludic.report.lines import decoded, step_of, whole_lines
from ludic.report.runs import Row
from ludic.types import Turn

_FIELDS = {"step", "group", "rollout", "completion_logprob_gaps"}


class TokenGaps:
    """The trainer's gaps, read along with the rollouts: both files are in the order of the updates.

    Args:
        path: of the lines; None if the run has none.
        steps: the updates that are asked for, in ascending order. Lines of others are not parsed.
    """

    def __init__(self, path: Path | None, steps: set[int]) -> None:
        self._updates = groupby(_records(path, steps), key=lambda record: record["step"]) if path else iter(())
        self._step = -1
        self._gaps: dict[tuple[int, int], list[float | None]] = {}

    def of(self, record: Row) -> list[float | None] | None:
        """The gap of each token of a rollout, in nats; None if it was not trained on or the sampler gave no log-probs."""
        while self._step < record["step"]:
            step, lines = next(self._updates, (record["step"], ()))
            self._step, self._gaps = (
                step,
                {(one["group"], one["rollout"]): one["completion_logprob_gaps"] for one in lines},
            )
        return self._gaps.get((record["group"], record.get("rollout", -1))) if self._step == record["step"] else None


def spans(record: Row, gaps: TokenGaps) -> list[Any] | None:
    """`[lengths, log-probs, gaps]` of a rollout's tokens, each [C], gaps or None; None where nothing is recorded.

    A length is in units of UTF-16, which JavaScript counts a text in; it is 0 for a token inside a character and for one
    without text.
    """
    logprobs, ends = record.get("completion_logprobs"), record.get("completion_token_ends")
    if not logprobs or not ends:
        return None
    text: str = record["completion"]
    pieces = [text[start:end] for start, end in pairwise([0, *ends])]
    lengths = [_utf16(piece) for piece in pieces]
    own = gaps.of(record)
    if own is not None:  # tokens of an environment's turns have neither a log-prob nor a gap
        trained = iter(own)
        own = [None if logprob is None else next(trained, None) for logprob in logprobs]
    return [lengths, logprobs, own and [None if gap is None else float(f"{gap:.3g}") for gap in own]]


def said(record: Row) -> list[list[list[int]]]:
    """One list of the `[start, end]` in a conversation's text that the environment wrote, in units of UTF-16; none for a
    completion of one turn. The page marks them: a model may write what looks like such a turn."""
    if not record.get("turns"):
        return []
    places, end = [], 0
    for turn in record["turns"]:
        shown = Turn(role=turn["role"], text=turn["content"], num_tokens=turn["tokens"])
        start, end = end, end + _utf16(shown.shown)
        if not shown.is_sampled:
            places.append([start, end])
    return [places]


def _utf16(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _records(path: Path, steps: set[int]) -> Iterator[Row]:
    for number, line in whole_lines(path):
        if step_of(path, number, line, _FIELDS) in steps:
            yield decoded(path, number, line, _FIELDS)
