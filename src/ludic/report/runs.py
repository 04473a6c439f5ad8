"""What a run's folder holds, read into memory: updates, evaluations, events, settings. The rollouts are left on the disk."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ludic.rollout.intervals import wilson_interval
from ludic.storage.jsonl import read_jsonl

Row = dict[str, Any]

_METRICS = "_train_metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run, or a folder of evaluations; a run that goes on has no summary yet."""

    name: str
    updates: list[Row] = field(default_factory=list)
    """Each update's metrics, with `step` and `time` (Unix seconds)."""
    evaluations: list[Row] = field(default_factory=list)
    """Each evaluation of the training: `step`, rates and `*_ci95`."""
    events: list[Row] = field(default_factory=list)
    """`step`, `time` and `event`; an alarm begins with `alarm NAME: `."""
    settings: Row = field(default_factory=dict)
    start: Row = field(default_factory=dict)
    """What the run was started with: `command`, `versions`, `machine`."""
    summary: Row = field(default_factory=dict)
    rollouts: Path | None = None
    token_gaps: Path | None = None
    evaluation_files: tuple[Path, ...] = ()


def find_runs(paths: list[Path]) -> list[Run]:
    """The runs that `paths` name, each a training's or an evaluation's folder, or one of its JSON lines files.

    The records of an evaluation that lie in a folder of `paths` are shown with that folder, and not again.

    Raises:
        ValueError: there is no run at a path; one line.
        OSError: a file cannot be read.
    """
    found: list[Run] = []
    folders = {path.resolve() for path in paths if path.is_dir()}
    paths = [path for path in paths if path.resolve().parent not in folders or not _is_records(path)]
    for path, name in zip(paths, _names(paths), strict=True):
        if path.is_dir():
            trainings = sorted(path.glob(f"*{_METRICS}"))
            evaluations = tuple(file for file in sorted(path.glob("*.jsonl")) if _is_evaluation(file))
            for metrics in trainings:
                several = f"{name} {metrics.name.removesuffix(_METRICS)}" if len(trainings) > 1 else name
                own = evaluations if metrics == trainings[0] else ()  # a folder's evaluations are shown once
                found.append(_training(metrics, several, own))
            if not trainings and evaluations:
                found.append(Run(name=name, evaluation_files=evaluations))
            if not trainings and not evaluations:
                raise ValueError(
                    f"{path} has neither a *{_METRICS} nor the records of an evaluation: give the --out-dir of a run"
                )
        elif path.name.endswith(_METRICS):
            found.append(_training(path, name, ()))
        elif path.is_file() and _is_evaluation(path):
            found.append(Run(name=name, evaluation_files=(path,)))
        else:
            what = "is no file of a run that can be shown" if path.exists() else "is not there"
            raise ValueError(
                f"{path} {what}: give the --out-dir of a run, its *{_METRICS}, or the --out of an evaluation"
            )
    return found


def default_page(path: Path) -> Path:
    """Where the page of a run goes by default: beside its files, named as the training's other files are."""
    metrics = next(iter(sorted(path.glob(f"*{_METRICS}"))), None) if path.is_dir() else path
    if metrics is None:
        return path / "report.html"
    if metrics.name.endswith(_METRICS):
        return metrics.with_name(metrics.name.removesuffix("_metrics.jsonl") + "_report.html")
    return metrics.with_name(f"{metrics.name}.report.html")


def read_json(path: Path) -> Row:
    """The object in a JSON file; empty where the file is not there.

    Raises:
        ValueError: it is no JSON object; one line with the path.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value


def _names(paths: list[Path]) -> list[str]:
    """As little of each path's end as tells them apart."""
    folders = [path.parent if path.name.endswith(_METRICS) else path for path in paths]
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(one[-1:])} ({place})" for place, one in enumerate(parts, start=1)]  # a path that is given twice


def _is_evaluation(path: Path) -> bool:
    """Whether the first line is a problem with its completions; an empty file is not one."""
    with path.open("rb") as file:
        line = file.readline()
    try:
        first = json.loads(line)
    except ValueError:
        return False
    return isinstance(first, dict) and "completions" in first


def _is_records(path: Path) -> bool:
    return path.suffix == ".jsonl" and path.is_file() and _is_evaluation(path)


def _training(metrics: Path, name: str, evaluations: tuple[Path, ...]) -> Run:
    folder, task = metrics.parent, metrics.name.removesuffix(_METRICS)
    rows: list[Row] = read_jsonl(metrics)
    rollouts, gaps = (folder / f"{task}_train_{kind}.jsonl" for kind in ("rollouts", "token_gaps"))
    summary = read_json(folder / f"{task}_train_summary.json")
    start = read_json(folder / f"{task}_train_start.json")
    state = _newest_state(folder / f"checkpoints_{task}")
    settings = {**state.get("config", {}), **state.get("task", {}), **start.get("settings", {})}
    settings = {"model": summary.get("model") or state.get("model") or start.get("model"), **settings}
    measured = {
        one["step"]: one for one in [*state.get("evaluations", []), *summary.get("evaluations", [])] if "step" in one
    }
    return Run(
        name=name,
        updates=[row for row in rows if "reward_mean" in row],
        evaluations=[_with_intervals(row, measured) for row in rows if "eval/accuracy" in row],
        events=[row for row in rows if "event" in row],
        settings={key: value for key, value in settings.items() if key != "model" or value},
        start=start,
        summary=summary,
        rollouts=rollouts if rollouts.exists() else None,
        token_gaps=gaps if gaps.exists() else None,
        evaluation_files=evaluations,
    )


def _newest_state(checkpoints: Path) -> Row:
    """What the newest checkpoint says of the run; a run writes the file last and renames the folder, so it is whole."""
    states = list(checkpoints.glob("step_*/training/trainer_state.json"))
    return read_json(max(states, key=lambda path: path.stat().st_mtime)) if states else {}


def _with_intervals(row: Row, measured: dict[int, Row]) -> Row:
    """An evaluation's figures without their prefix. Its intervals come from the run's summary; before there is one they are
    Wilson's, which are the same: an evaluation in a training has one completion a problem."""
    figures = {key.removeprefix("eval/"): value for key, value in row.items()}
    known = measured.get(row["step"], {})
    for rule in [key for key in figures if key == "accuracy" or key.endswith("_accuracy")]:
        interval = known.get(f"{rule}_ci95") or wilson_interval(figures[rule], figures["num_problems"])
        figures[f"{rule}_ci95"] = list(interval)
    return figures
