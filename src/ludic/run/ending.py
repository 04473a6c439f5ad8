"""What a finished run leaves and says: the summary's file, the reward curve, and a summary to paste into a message."""

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ludic.cli import say
from ludic.config import RunPaths
from ludic.run.forecast import say_forecast
from ludic.run.report_page import write_page
from ludic.storage.inert import inert
from ludic.storage.jsonl import read_jsonl
from ludic.telemetry.formatting import seconds as duration
from ludic.telemetry.report import comparison_table, reward_curve_text, save_reward_curve

if TYPE_CHECKING:
    from ludic.train.checkpoint import TrainerState
    from ludic.train.summary import TrainingSummary

TABLE_WIDTH = 80
"""Whatever terminal there is: a person pastes the table into a message."""


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
    rows: list[Any] = [row for row in read_jsonl(paths.metrics) if row.get("reward_mean") is not None]
    _draw_curve(paths, summary, rows)
    has_page = write_page(paths.metrics, paths.report)  # one of an earlier end may be there
    say("")
    _say_facts(_what_ran(paths, record["model"]))
    compare(summary)
    total = _amounts(summary.updates, summary.rollouts, summary.completion_tokens)
    if before is None:
        say(f"{total} in {seconds:.0f} s")
    else:
        say(f"{_amounts(**own)} in {seconds:.0f} s, after update {before.step}")
        say(f"the whole run: {total} in {summary.seconds:.0f} s of training")
    started_from = before.step if before else 0
    facts = {
        "seconds": _seconds_by_phase([row for row in rows if row["step"] > started_from], summary, before),
        "checkpoint": summary.last_checkpoint,
        "metrics": paths.metrics,
        "rollouts": paths.rollouts,
        "summary": paths.summary,
        "reward curve": paths.curve if paths.curve.exists() else None,
        "report": paths.report if has_page else None,
        "tensorboard": paths.tensorboard if paths.tensorboard.exists() else None,
    }
    _say_facts(facts)
    say_forecast(paths, summary)


def _say_facts(facts: Mapping[str, object]) -> None:
    for what, value in facts.items():
        if value:
            say(f"  {what + ':':<13} {value}")


def _what_ran(paths: RunPaths, model: str) -> dict[str, str]:
    """What ran, and on what, for who was not there; as the process that ends here was started."""
    start = json.loads(paths.start.read_text())
    settings, versions, machine = start["settings"], start["versions"], start["machine"]
    engine = settings["engine"]
    packages = ("python", "torch", "transformers", *(["vllm"] if engine == "vllm" else []))
    here = Path(model).absolute().is_relative_to(Path.cwd()) and Path(model).exists()
    shown = os.path.relpath(model) if here else model
    say(f"GRPO of {inert(shown)} on {paths.name}, {datetime.date.today()}")
    return {
        "settings": f"{settings['rollouts_per_update']} rollouts an update, {settings['loss']}, "
        f"lr {settings['learning_rate']:g}, seed {settings['seed']}",
        "machine": f"{machine['system']}, {machine['cpu_cores']} CPU cores, {' and '.join(machine['gpus']) or 'no GPU'}",
        "engine": f"{engine}; " + ", ".join(f"{name} {versions[name]}" for name in packages if name in versions),
        "command": start["command"],
    }


def _seconds_by_phase(rows: list[Any], summary: "TrainingSummary", before: "TrainerState | None") -> str:
    """Where the seconds of this process went; generation and training overlap where there is a server."""
    phases = {
        label: sum(row.get(name) or 0.0 for row in rows)
        for name, label in (("generation_s", "generation"), ("train_s", "training"), ("sync_s", "syncs"))
    }
    evaluated = [one for one in summary.evaluations if before is None or one["step"] > before.step]
    phases["evaluation"] = sum(one["seconds"] for one in evaluated)
    return ", ".join(f"{label} {duration(value)}" for label, value in phases.items() if value)


def _draw_curve(paths: RunPaths, summary: "TrainingSummary", rows: list[Any]) -> None:
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
    console = Console(width=TABLE_WIDTH)
    with console.capture() as table:
        console.print(comparison_table(first, last, title=title, headings=headings))
    say("\n" + "\n".join(line.rstrip() for line in table.get().splitlines()))
