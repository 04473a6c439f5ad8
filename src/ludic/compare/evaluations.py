"""Two evaluations of the same problems, compared problem by problem under each rule that both have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ludic.compare.paired import Paired, compare
from ludic.rollout.problems import ProblemRecord, read_records, recorded_rules, verdicts

STRICT, FLEXIBLE = "strict", "flexible"
"""The rules whose difference is the format: an answer in its place, and an answer anywhere (lm-evaluation-harness's names)."""
SAMPLING = ("samples", "temperature", "top_p", "max_tokens")
"""Settings of an evaluation that change its accuracy without a change of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluations:
    """What two evaluations say of each other."""

    by_rule: Mapping[str, Paired]
    """By the name of the rule, the headline first."""
    num_only_in_a: int
    """Problems that B has no record of, which are left out."""
    num_only_in_b: int
    differing_sampling: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """What differs of `SAMPLING`, as (A's, B's), by the settings files beside the records."""

    @property
    def headline(self) -> Paired:
        return next(iter(self.by_rule.values()))

    @property
    def format_gain(self) -> float | None:
        """How much of the strict rule's difference is format: what the flexible rule does not see. None without both rules."""
        if not {STRICT, FLEXIBLE} <= self.by_rule.keys():
            return None
        return self.by_rule[STRICT].difference - self.by_rule[FLEXIBLE].difference


def compare_evaluations(a: Path, b: Path, *, rule: str | None = None) -> Evaluations:
    """The files' records, paired by question; `rule` becomes the headline.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file holds other lines, its settings file is no JSON object, no question is in both, or no evaluation has
            the rule.
    """
    records_a, records_b = _by_question(read_records(a)), _by_question(read_records(b))
    both = [question for question in records_a if question in records_b]
    if not both:
        raise ValueError(
            f"{a} and {b} have no question in common: other problems, another prompt, or another tokenizer"
        )
    paired = [side[question] for question in both for side in (records_a, records_b)]
    rules = [
        name
        for name in recorded_rules(paired[0])
        if all(name in completion for record in paired for completion in record["completions"])
    ]
    if not rules:
        raise ValueError(f"{a} and {b} have no rule in common: they are of different tasks, or of different versions")
    if rule is not None:
        if rule not in rules:
            raise ValueError(f"--rule {rule}: both evaluations have the rules {', '.join(rules)}")
        rules = [rule, *(name for name in rules if name != rule)]
    return Evaluations(
        by_rule={
            name: compare(
                [verdicts(records_a[question], name) for question in both],
                [verdicts(records_b[question], name) for question in both],
            )
            for name in rules
        },
        num_only_in_a=len(records_a) - len(both),
        num_only_in_b=len(records_b) - len(both),
        differing_sampling=_differing_sampling(_settings(a), _settings(b)),
    )


def _settings(records: Path) -> dict[str, Any]:
    """The settings that an evaluation left beside its records; empty where there are none."""
    path = Path(f"{records}.settings.json")
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: a JSON object was expected, not {type(settings).__name__}")
    return settings


def _differing_sampling(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (a[name], b[name]) for name in SAMPLING if name in a and name in b and a[name] != b[name]}


def _by_question(records: Sequence[ProblemRecord]) -> dict[tuple[str, int], ProblemRecord]:
    """By the digest of prompt and target, and how often it was there before: a file may hold one question twice."""
    found: dict[tuple[str, int], ProblemRecord] = {}
    for record in sorted(records, key=lambda record: record["index"]):
        question, times = record["question_id"], 0
        while (question, times) in found:
            times += 1
        found[question, times] = record
    return found
