"""What a finished run leaves and says: the summary's file, the reward curve, the table of before and after."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ludic.cli import say
from ludic.config import RunPaths
from ludic.storage.jsonl import read_jsonl
from ludic.telemetry.report import comparison_table, evaluation_rows, reward_curve_text, save_reward_curve

if TYPE_CHECKING:
    from ludic.train.checkpoint import TrainerState
    from ludic.train.summary import TrainingSummary


def finish(
    paths: RunPaths, summary: "TrainingSummary", *, model: str, seconds: float, before: "TrainerState | None"
) -> None:
    """Write the summary and the curve, and print the result of a run that took this process `seconds` since `before`."""
    own = {
        name: getattr(summary, name) - (getattr(before, counted) if before else 0)
        for name, counted in (
            ("updates", "step"),
            ("rollouts", "rollouts"),
            ("completion_tokens", "completion_tokens"),
        )
    }
    process = {"started_from": before.step if before else 0, **own, "wall_seconds": seconds}
    record = {**dataclasses.asdict(summary), "this_process": process, "model": before.model if before else model}
    paths.summary.write_text(json.dumps(record, indent=2) + "\n")
    _draw_curve(paths, summary)
    compare(summary)
    total = _amounts(summary.updates, summary.rollouts, summary.completion_tokens)
    if before is None:
        say(f"{total} in {seconds:.0f} s")
    else:
        say(f"{_amounts(**own)} in {seconds:.0f} s, after update {before.step}")
        say(f"the whole run: {total} in {summary.seconds:.0f} s of training")
    for what, path in (
        ("checkpoint", summary.last_checkpoint),
        ("metrics", paths.metrics),
        ("rollouts", paths.rollouts),
        ("summary", paths.summary),
        ("reward curve", paths.curve if paths.curve.exists() else None),
    ):
        if path:
            say(f"  {what + ':':<13} {path}")


def _draw_curve(paths: RunPaths, summary: "TrainingSummary") -> None:
    rows: list[Any] = [row for row in read_jsonl(paths.metrics) if row.get("reward_mean") is not None]
    if len(rows) > 1:
        steps, rewards = [row["step"] for row in rows], [row["reward_mean"] for row in rows]
        say(reward_curve_text(steps, rewards))
        points = [(one["step"], one["accuracy"]) for one in summary.compared]
        save_reward_curve(paths.curve, steps, rewards, evaluations=points)


def _amounts(updates: int, rollouts: int, completion_tokens: int) -> str:
    return f"{updates} updates, {rollouts} rollouts, {completion_tokens} completion tokens"


def compare(summary: "TrainingSummary") -> None:
    """The table of the first and the last evaluation that measured the same."""
    compared = summary.compared
    if len(compared) < len(summary.evaluations):
        others = len(summary.evaluations) - len(compared)
        say(f"earlier evaluations with other problems, another prompt or other sampling, not compared: {others}")
    if len(compared) < 2:
        return
    first, last = compared[0], compared[-1]
    headings = (
        f"update {first['step']}" if first["step"] else "before",
        "after" if last["step"] == summary.updates else f"update {last['step']}",
    )
    title = f"{last['num_problems']} held-out problems"
    if settings := last.get("settings"):
        title += f", temperature {settings['temperature']:g}"
    Console().print(comparison_table(evaluation_rows(first, last), title=title, headings=headings))
