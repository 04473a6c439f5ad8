"""What `record.py` writes down of a seed: the entry (entry.json), and its row in the table of benchmarks/RECORD.md.

Everything is read from the files of the phases, so that an entry can be made again without a GPU:

    python examples/gsm8k/record_entry.py OUT
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import record_warm_up

from environments.gsm8k import NAME
from ludic.cli import say
from ludic.compare.evaluations import compare_evaluations
from ludic.compare.paired import Paired, compare
from ludic.config import RunPaths
from ludic.rollout.problems import read_records, verdicts
from ludic.storage.jsonl import read_jsonl

SCORED_WARM_UP, SCORED, ENTRY = "score_warm_up.jsonl", "score_grpo.jsonl", "entry.json"
RULES = ("flexible", "strict", "qwen")
COLUMNS = ("seed", "warm-up, %", "after GRPO, %", "change, points", "won, lost", "p", "updates", "rollouts",
           "s from the warm-up to the accuracy", "of these GRPO", "syncs proven")  # fmt: skip


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def summary_of(records: Path) -> Path:
    return Path(f"{records}.summary.json")


def make(out_dir: Path, folder: Path, *, warm_up: Path, checkpoint: Path, score_s: float, proof: str) -> dict[str, Any]:
    """The entry of the seed in `folder`, whose last `checkpoint` took `score_s` seconds to score."""
    from ludic.train.checkpoint import read_state

    paths, state = RunPaths(out_dir=folder, name=NAME), read_state(checkpoint)
    start, grpo = json.loads(paths.start.read_text()), json.loads((folder / "grpo.json").read_text())
    compared = compare_evaluations(out_dir / SCORED_WARM_UP, folder / SCORED)
    seconds = {"server_after_warm_up": grpo["server_after_warm_up"], "grpo": grpo["seconds"], "score": score_s}
    return {
        "date": str(datetime.date.today()),
        "command": start["command"],
        "seed": start["settings"]["seed"],
        "machine": start["machine"],
        "versions": start["versions"],
        "warm_up": json.loads(record_warm_up.about(warm_up).read_text()),
        "settings": start["settings"],
        "checkpoint": str(checkpoint),
        "stopped_at_a_deadline": grpo["stopped"],
        "updates": state.step,
        "rollouts": state.rollouts,
        "completion_tokens": state.completion_tokens,
        "seconds": {**seconds, "server": grpo["server"]},
        "seconds_from_warm_up_to_accuracy": sum(seconds.values()),
        "syncs": _syncs(paths, state.step, proof),
        "num_problems": compared.headline.num_problems,
        "before": _accuracies(out_dir / SCORED_WARM_UP),
        "after": _accuracies(folder / SCORED),
        "paired": {rule: dataclasses.asdict(one) for rule, one in compared.by_rule.items()},
        "curve": _curve(paths, state),
    }


def _syncs(paths: RunPaths, updates: int, proof: str) -> dict[str, Any]:
    """Of the run's updates, how many had their sync proven; an unproven one is made again, or ends the run."""
    lines: list[Any] = read_jsonl(paths.metrics)
    proven = {line["step"] for line in lines if line.get("sync_s") is not None and line["step"] <= updates}
    gaps = [line["sync/logprob_gap"] for line in lines if line.get("sync/logprob_gap") is not None]
    return {
        "proven": len(proven),
        "updates": updates,
        "mean_s": fmean(line["sync_s"] for line in lines if line.get("sync_s") is not None) if proven else None,
        "largest_probe_gap_nats": max(gaps, default=None),
        "of_the_scored_checkpoint": proof,
    }


def _accuracies(records: Path) -> dict[str, Any]:
    summary = json.loads(summary_of(records).read_text())
    names = {"flexible": "accuracy", "strict": "strict_accuracy", "qwen": "qwen_accuracy"}
    rules = {rule: {"accuracy": summary[name], "ci95": summary[f"{name}_ci95"]} for rule, name in names.items()}
    others = ("truncation_rate", "parse_err_rate", "avg_completion_length", "seconds")
    return {**rules, **{name: summary[name] for name in others}}


def _curve(paths: RunPaths, state: Any) -> list[dict[str, Any]]:
    """A point an update: its cost so far, the share of its samples that were right, greedy accuracy where it was taken."""
    greedy = {one["step"]: [one["strict_accuracy"], *one["strict_accuracy_ci95"]] for one in state.evaluations}
    points, rollouts, seconds = list[dict[str, Any]](), 0, 0.0
    lines: list[Any] = read_jsonl(paths.metrics)
    for line in lines:
        if "step_s" not in line or line["step"] > state.step:
            continue
        rollouts += state.config["rollouts_per_update"]
        seconds += line["step_s"]
        point = {"step": line["step"], "rollouts": rollouts, "seconds": seconds, "correct_rate": line["correct_rate"]}
        for name in ("zero_variance_share", "entropy", "grad_norm", "avg_completion_length", "truncation_rate"):
            point[name] = line.get(name)
        points.append({**point, "greedy_strict_ci95": greedy.get(line["step"])})
    return points


# -- the table ---------------------------------------------------------------------------------------------------------


def say_all(out_dir: Path, seeds: Sequence[int]) -> None:
    """The table of these seeds by the strict rule, which is the reward, and what they say together by every rule."""
    entries = [json.loads((out_dir / f"seed_{seed}" / ENTRY).read_text()) for seed in seeds]
    say(f"\n| {' | '.join(COLUMNS)} |\n|{'--:|' * len(COLUMNS)}")
    for entry in entries:
        say(row(entry))
    for rule in RULES:
        one = together(out_dir, seeds, rule)
        low, high = (100 * bound for bound in one.difference_ci95)
        say(f"{rule}: {one.accuracy_a:.1%} before, {one.accuracy_b:.1%} after, {100 * one.difference:+.1f} points "
            f"({low:+.1f} to {high:+.1f}), p {one.p_value:.2g}, {len(seeds)} seed(s), {one.num_problems} problems")  # fmt: skip


def row(entry: dict[str, Any]) -> str:
    """One line of the table, by the strict rule."""
    paired, seconds = entry["paired"]["strict"], entry["seconds"]
    low, high = (100 * bound for bound in paired["difference_ci95"])
    cells = [
        entry["seed"], _share(entry["before"]["strict"]), _share(entry["after"]["strict"]),
        f"{100 * paired['difference']:+.1f} ({low:+.1f} to {high:+.1f})", f"{paired['won']}, {paired['lost']}",
        f"{paired['p_value']:.2g}", entry["updates"], f"{entry['rollouts']:,}",
        f"{entry['seconds_from_warm_up_to_accuracy']:.0f}", f"{seconds['grpo']:.0f}",
        f"{entry['syncs']['proven']} of {entry['syncs']['updates']}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _share(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{100 * found['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def together(out_dir: Path, seeds: Sequence[int], rule: str) -> Paired:
    """The seeds' answers against the warm-up's, problem by problem: by the sign test, and McNemar's where there is one seed."""
    before = {record["question_id"]: verdicts(record, rule) for record in read_records(out_dir / SCORED_WARM_UP)}
    after: dict[str, list[bool]] = {question: [] for question in before}
    for seed in seeds:
        for record in read_records(out_dir / f"seed_{seed}" / SCORED):
            after[record["question_id"]] += verdicts(record, rule)
    return compare(list(before.values()), [after[question] for question in before])


if __name__ == "__main__":
    _out = Path(sys.argv[1])
    _seeds = sorted(int(path.parent.name.removeprefix("seed_")) for path in _out.glob(f"seed_*/{ENTRY}"))
    say_all(_out, _seeds)
