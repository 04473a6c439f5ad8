"""Completions for the page: a small index that is read at once, and compressed chunks of text that are read when shown.

A page of 50,000 rollouts opens in the time of its index. Filters on rewards, lengths and verdicts need the index alone; a
search in the texts unpacks one chunk after another.
"""

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ludic.report.evaluations import rules_of
from ludic.report.lines import decoded, step_of, whole_lines
from ludic.report.runs import Row
from ludic.report.spans import TokenGaps, said, spans
from ludic.storage.jsonl import finite

_CHUNK_CHARACTERS = 1 << 19
"""Of JSON in a chunk: unpacked in a few milliseconds, and compressed well."""
_FIELDS = {"step", "group", "prompt", "completion", "answer", "parse_error", "target", "reward", "reward_parts", "correct",
           "finish_reason", "policy_version", "completion_tokens"}  # fmt: skip
RIGHT, CUT_OFF, NO_ANSWER, NOT_STRICT, GRADER_FAILED, HAS_LOGPROBS = 1, 2, 4, 8, 16, 32
"""Bits of a completion's flags."""


@dataclass(slots=True, kw_only=True)
class Source:
    """The completions of a training or of an evaluation, in groups. What begins with `member_` has one entry a completion."""

    name: str
    kind: str
    run: int
    """The run's place on the page."""
    total: int = 0
    """Completions in the file; `len(member_reward)` of them are on the page."""
    part_names: list[str] = field(default_factory=list)
    """Names of the reward's parts."""
    scale_rewards: bool = True
    """Whether advantages are divided by the group's standard deviation."""
    step: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    chunk: list[int] = field(default_factory=list)
    place: list[int] = field(default_factory=list)
    """The group's place in its chunk."""
    member_reward: list[float] = field(default_factory=list)
    member_flags: list[int] = field(default_factory=list)
    member_tokens: list[int] = field(default_factory=list)
    member_version: list[int] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    """Base64 of gzip of a JSON list of groups."""

    def index(self) -> Row:
        """All but the chunks, for the page's main data."""
        names = [name for name in self.__slots__ if name != "chunks"]
        return {name: getattr(self, name) for name in names} | {"num_chunks": len(self.chunks)}


def packed(value: object) -> str:
    """`value` as compressed JSON, with null for NaN and the infinities."""
    return compressed(json.dumps(finite(value), separators=(",", ":"), allow_nan=False).encode("ascii"))


def compressed(data: bytes) -> str:
    """Base64 of gzip: no character of it can end a script element."""
    return base64.b64encode(gzip.compress(data, compresslevel=6, mtime=0)).decode("ascii")


def training_source(
    path: Path,
    *,
    name: str,
    run: int,
    limit: int,
    scale_rewards: bool,
    token_gaps: Path | None = None,
) -> Source:
    """The rollouts of a training; of more than `limit`, those of evenly spread updates, the first and the last among them.

    Args:
        token_gaps: the file of the trainer's gaps, if the run has one.

    Raises:
        ValueError: `file:line: reason` for a line that is no rollout.
    """
    counts, end = _count_steps(path)
    source = Source(name=name, kind="training", run=run, total=sum(counts.values()), scale_rewards=scale_rewards)
    kept = _evenly_spread(counts, limit)
    gaps = TokenGaps(token_gaps, kept)
    packer = _Packer(source)
    for (step, group), records in groupby(
        _rollouts(path, kept, end), key=lambda record: (record["step"], record["group"])
    ):
        members = list(records)
        source.part_names = source.part_names or list(members[0]["reward_parts"])
        texts = [
            [
                record["completion"],
                record["answer"],
                record["parse_error"],
                [_short(record["reward_parts"].get(part, 0.0)) for part in source.part_names],
                spans(record, gaps),
                record.get("advantage"),
                *said(record),
            ]
            for record in members
        ]
        for record in members:
            source.member_reward.append(_short(record["reward"]))
            source.member_flags.append(_flags(record))
            source.member_tokens.append(record["completion_tokens"])
            source.member_version.append(record["policy_version"])
        packer.add(step, group, [members[0]["prompt"], members[0]["target"], texts])
    packer.close()
    return source


def evaluation_source(records: Sequence[Row], *, name: str, run: int) -> Source:
    """The completions of an evaluation: a problem is a group, the verdict of the headline rule is its reward."""
    source = Source(name=name, kind="evaluation", run=run, part_names=rules_of(records) if records else [])
    packer = _Packer(source)
    for record in sorted(records, key=lambda record: int(record["index"])):
        texts = []
        for one in record["completions"]:
            parts = [int(one[rule]) for rule in source.part_names]
            texts.append([one["text"], one["answer"], one["parse_error"], parts, None, None, *said(one)])
            source.member_reward.append(int(one[source.part_names[0]]))
            source.member_flags.append(_flags({**one, "correct": one[source.part_names[0]]}))
            source.member_tokens.append(one["num_tokens"])
            source.member_version.append(one["policy_version"])
        prompt = "\n\n".join(str(message["content"]) for message in record["prompt"])
        packer.add(0, record["index"], [prompt, record["target"], texts])
    packer.close()
    source.total = len(source.member_reward)
    return source


class _Packer:
    """Fills a source's chunks, each with whole groups."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._groups: list[str] = []
        self._characters = 0

    def add(self, step: int, group: int, content: list[Any]) -> None:
        text = json.dumps(content, separators=(",", ":"))
        source = self._source
        source.step.append(step)
        source.group.append(group)
        source.size.append(len(content[2]))
        source.chunk.append(len(source.chunks))
        source.place.append(len(self._groups))
        self._groups.append(text)
        self._characters += len(text)
        if self._characters > _CHUNK_CHARACTERS:
            self.close()

    def close(self) -> None:
        if self._groups:
            data = f"[{','.join(self._groups)}]".encode("ascii")
            self._source.chunks.append(compressed(data))
            self._groups, self._characters = [], 0


def _flags(record: Row) -> int:
    parts = record.get("reward_parts", {})
    failed = record.get("grader_failed", parts.get("grader_failed"))
    strict = record.get("strict", parts.get("strict", record["correct"]))
    bits = (
        RIGHT * bool(record["correct"])
        | CUT_OFF * (record["finish_reason"] == "length")
        | NO_ANSWER * (record["parse_error"] is not None)
        | NOT_STRICT * (bool(record["correct"]) and not strict)
        | GRADER_FAILED * bool(failed)
        | HAS_LOGPROBS * bool(record.get("completion_logprobs") and record.get("completion_token_ends"))
    )
    return int(bits)


def _short(value: float) -> float:
    """At most six digits: a reward on the page is read, not computed with."""
    return float(f"{value:.6g}")


def _count_steps(path: Path) -> tuple[dict[int, int], int]:
    """How many rollouts each update has, and where the file ended: a run that goes on writes more meanwhile."""
    counts: dict[int, int] = {}
    end = 0
    for number, line in whole_lines(path):
        end += len(line)
        step = step_of(path, number, line, _FIELDS)
        counts[step] = counts.get(step, 0) + 1
    return counts, end


def _evenly_spread(counts: dict[int, int], limit: int) -> set[int]:
    steps, total = sorted(counts), sum(counts.values())
    if total <= limit:
        return set(steps)
    keep = max(2, len(steps) * limit // total)
    return {steps[round(place * (len(steps) - 1) / (keep - 1))] for place in range(keep)}


def _rollouts(path: Path, steps: set[int], end: int) -> Iterator[Row]:
    for number, line in whole_lines(path, end):
        if step_of(path, number, line, _FIELDS) in steps:
            yield decoded(path, number, line, _FIELDS)
