"""What an evaluation's records say beyond their accuracy: pass@k, majority votes, kinds of errors, the worst problems."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ludic.report.runs import Row, read_json
from ludic.rollout.intervals import clustered_interval, mean, pass_at_k
from ludic.rollout.problems import ProblemRecord, recorded_rules
from ludic.rollout.votes import maj_at_k, telling_ks, votes_of
from ludic.storage.jsonl import read_jsonl

_WORST = 40
_FIELDS = {"text", "num_tokens", "finish_reason", "answer", "parse_error", "correct", "grader_failed", "policy_version"}


def read_records(path: Path) -> list[Row]:
    """The problems of an evaluation.

    Raises:
        ValueError: `file:line: reason` for a line that is not one, or is of another version.
    """
    records: list[Row] = read_jsonl(path)
    rules: set[str] = set()
    for number, record in enumerate(records, start=1):
        completions = record.get("completions") or []
        fits = bool(completions) and {"index", "prompt", "target"} <= record.keys()
        if fits and number == 1:
            rules = set(rules_of(records))
        if not fits or any(not one.keys() >= _FIELDS | rules for one in completions):
            raise ValueError(f"{path}:{number}: this is no problem of an evaluation of this version of ludic")
    return records


def rules_of(records: Sequence[Row]) -> list[str]:
    """The rules that the records have verdicts of, the headline first."""
    return recorded_rules(cast("ProblemRecord", records[0]))


def analysed(records: Sequence[Row], path: Path) -> Row:
    """The figures of finished problems; of an evaluation that goes on, of those that are done."""
    summary = read_json(Path(f"{path}.summary.json"))
    completions = [one for record in records for one in record["completions"]]
    rates: Row = {}
    headline, *_ = rules = rules_of(records)
    for rule in rules:
        verdicts = [[bool(one[rule]) for one in record["completions"]] for record in records]
        rates[rule] = {"rate": mean(verdicts), "ci95": list(clustered_interval(verdicts))}
    samples = min(len(record["completions"]) for record in records)
    ks = telling_ks(samples)
    return {
        "file": path.name,
        "finished": bool(summary),
        "num_problems": len(records),
        "samples": samples,
        "rates": rates,
        "parse_err_rate": sum(one["parse_error"] is not None for one in completions) / len(completions),
        "truncation_rate": sum(one["finish_reason"] == "length" for one in completions) / len(completions),
        "avg_completion_length": sum(one["num_tokens"] for one in completions) / len(completions),
        "k": ks,
        "pass_at_k": [_pass_at(records, k, headline) for k in ks],
        "majority_at_k": [_majority_at(records, k, headline) for k in ks],
        "kinds": _kinds(completions, headline),
        "worst": _worst(records, headline),
        "settings": read_json(Path(f"{path}.settings.json")),
        "weights": summary.get("weights", {}).get("description"),
    }


def _pass_at(records: Sequence[Row], k: int, rule: str) -> float:
    total = 0.0
    for record in records:
        right = sum(bool(one[rule]) for one in record["completions"])
        total += pass_at_k(len(record["completions"]), right, k)
    return total / len(records)


def _majority_at(records: Sequence[Row], k: int, rule: str) -> float:
    return sum(maj_at_k(*votes_of(cast("ProblemRecord", record), rule), k) for record in records) / len(records)


def kind_of(completion: Row, rule: str) -> str:
    """What became of one completion, by a rule."""
    if completion["grader_failed"]:
        return "the grader gave up"
    if completion[rule]:
        return "right" if completion.get("strict", True) else "right, but not in a box"
    if completion["finish_reason"] == "length":
        return "truncated"
    return "wrong answer" if completion["parse_error"] is None else f"no answer: {completion['parse_error']}"


def _kinds(completions: Sequence[Row], rule: str) -> list[Row]:
    counts = Counter(kind_of(one, rule) for one in completions)
    return [{"kind": kind, "count": count} for kind, count in counts.most_common()]


def _worst(records: Sequence[Row], rule: str) -> list[Row]:
    """The problems that were solved least often, with their most frequent wrong answers; none that was always solved."""
    rows = []
    for place, record in enumerate(sorted(records, key=lambda record: int(record["index"]))):
        completions = record["completions"]
        right = sum(bool(one[rule]) for one in completions)
        if right < len(completions):
            wrong = Counter(str(one["answer"]) for one in completions if not one[rule])
            rows.append(
                {
                    "place": place,
                    "index": record["index"],
                    "question": str(record["prompt"][-1]["content"])[:300],
                    "target": record["target"],
                    "right": right,
                    "samples": len(completions),
                    "wrong": [[answer[:40], count] for answer, count in wrong.most_common(3)],
                }
            )
    return sorted(rows, key=lambda row: (row["right"] / row["samples"], row["index"]))[:_WORST]
