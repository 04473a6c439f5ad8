"""What came true of a forecast, from the files of the run, and which settings it was not made for."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ludic.config import RunPaths
from ludic.storage.inert import inert
from ludic.storage.jsonl import read_jsonl
from ludic.survival.changed_settings import shown_apart

_OF_NO_MATTER = {
    # A forecast is computed for as many updates, evaluations and checkpoints as the run had.
    "train_steps", "eval_every", "save_every", "keep_checkpoints",
    # The policy's way, and not what an update costs or where it starts.
    "learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm",
    "clip_low", "clip_high", "scale_rewards",
    # Every day another, where the chat template writes the date.
    "rendered_at", "rendered_chat", "rendered_ids",
}  # fmt: skip
"""Settings in which a run may differ from its forecast; one that is not listed matters."""


COMPARED = {
    "correct_rate": "correct_rate",
    "flat_share": "zero_variance_share",
    "truncation_rate": "truncation_rate",
    "mean_length": "avg_completion_length",
    "generation_s": "generation_s",
    "grading_s": "grading_s",
    "training_s": "train_s",
    "sync_s": "sync_s",
    "update_s": "step_s",
}
"""The forecast's figures of an update, and the metrics that say what came true."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The figures of a finished run."""

    updates: list[dict[str, Any]]
    """Each one's metrics."""
    evaluation_s: list[float]
    """Of each evaluation."""
    memory_bytes: int
    """Of the last process."""
    disk_bytes: int
    num_checkpoints: int
    seconds: float | None
    """From the start of the process to the end of training; None for a run of several processes."""

    def first(self, name: str) -> float:
        """A metric of the first update, whose policy the forecast was made for."""
        return float(self.updates[0].get(name) or 0.0)

    def mean(self, name: str) -> float:
        """A metric's mean over all updates; 0 where one lacks it, as one without a sequence to train on does."""
        return statistics.fmean(float(update.get(name) or 0.0) for update in self.updates)

    def figures(self) -> dict[str, Any]:
        """As they are kept beside the forecast; the means of `COMPARED` under the forecast's names."""
        means = {name: self.mean(metric) for name, metric in COMPARED.items()}
        evaluation_s = statistics.fmean(self.evaluation_s) if self.evaluation_s else None
        return {
            "updates": len(self.updates),
            **means,
            "evaluation_s": evaluation_s,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
        }


def read_outcome(paths: RunPaths, *, memory_bytes: int) -> Outcome:
    """The outcome of the run whose summary is written. `memory_bytes` is what no file has.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged.
    """
    rows: list[dict[str, Any]] = read_jsonl(paths.metrics)
    process = json.loads(paths.summary.read_text(encoding="utf-8"))["this_process"]
    checkpoints = [path for path in paths.checkpoints.glob("step_*") if path.is_dir()]
    return Outcome(
        updates=[row for row in rows if row.get("step_s") is not None],
        evaluation_s=[row["eval/seconds"] for row in rows if row.get("eval/seconds") is not None],
        memory_bytes=memory_bytes,
        disk_bytes=sum(map(_size, [*paths.grown, *checkpoints])),
        num_checkpoints=len(checkpoints),
        seconds=None if process["started_from"] else process["wall_seconds"],
    )


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0


def differences(forecast: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """One line for each setting that matters to a forecast and is another in the run.

    Example:
        >>> differences({"group_size": 8, "train_steps": 50}, {"group_size": 4, "train_steps": 20})
        ['--group-size was 8, is 4']
    """
    lines = []
    for name in sorted((forecast.keys() | run.keys()) - _OF_NO_MATTER):
        before, now = forecast.get(name), run.get(name)
        if json.dumps(before, sort_keys=True) != json.dumps(now, sort_keys=True):
            lines.append("--{} was {}, is {}".format(name.replace("_", "-"), *shown_apart(before, now)))
    return [inert(line) for line in lines]


def settings_of_start(start: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the file that a run starts with, and the machine's parts that decide how quick it is."""
    machine: Mapping[str, Any] = start.get("machine", {})
    return {**start.get("settings", {}), "gpus": machine.get("gpus"), "cpu_cores": machine.get("cpu_cores")}
