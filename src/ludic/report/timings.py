"""Where a run's seconds went, from what each update's metrics record.

An update's metrics say how long its parts took and when it ended, not when each part began. A timeline therefore places an
update by its end and its length, and puts the trainer's parts inside it in the order wait, train, sync, other.
"""

from collections.abc import Sequence

from ludic.report.runs import Row, Run

TRAINER = ("wait", "train", "sync", "other")
"""What an update is made of for the trainer; together they are `step_s`."""
BESIDE = ("generation", "grading")
"""What goes on at the same time elsewhere."""
SHOWN = 1500
"""Updates on a timeline; more are narrower than a pixel."""


def seconds_of(row: Row) -> dict[str, float]:
    """The seconds of each part of an update."""
    parts = {name: float(row.get(f"{name}_s") or 0.0) for name in ("wait", "train", "sync", *BESIDE)}
    step = float(row.get("step_s") or 0.0)
    return parts | {"other": max(0.0, step - parts["wait"] - parts["train"] - parts["sync"]), "step": step}


def table(run: Run) -> list[Row]:
    """Mean seconds and share of each part over all updates, the phases of a sync under it."""
    if not run.updates:
        return []
    count = len(run.updates)
    sums = dict.fromkeys((*TRAINER, *BESIDE, "step"), 0.0)
    phases: dict[str, float] = {}
    for row in run.updates:
        for name, value in seconds_of(row).items():
            sums[name] += value
        for name, value in row.items():
            if name.startswith("sync/") and name.endswith("_s"):
                phases[name] = phases.get(name, 0.0) + (value or 0.0)
    whole = sums["step"] or 1.0

    def rows(names: Sequence[str], kind: str) -> list[Row]:
        return [{"name": name, "kind": kind, "mean": sums[name] / count, "share": sums[name] / whole} for name in names]

    below = [
        {"name": name, "kind": "phase", "mean": value / count, "share": value / whole}
        for name, value in sorted(phases.items(), key=lambda item: -item[1])
    ]
    trainer = rows(TRAINER, "trainer")
    after_sync = TRAINER.index("sync") + 1
    return [*trainer[:after_sync], *below, *trainer[after_sync:], *rows(BESIDE, "beside"), *rows(("step",), "whole")]


def generates_ahead(run: Run) -> bool:
    """Whether completions may be older than the update that trains on them, so that their generation began before it."""
    stale = any((row.get("staleness_max") or 0) > 0 for row in run.updates)
    return stale or bool(run.settings.get("max_staleness"))


def timeline(run: Run) -> list[Row]:
    """Blocks `lane`, `part`, `start`, `end` (seconds since the run's first line), `step`; of the last updates of a long run."""
    updates = run.updates[-SHOWN:]
    if not updates:
        return []
    timed = [*updates, *(row for row in run.evaluations if row["step"] >= updates[0]["step"] - 1)]
    first = min(row["time"] - (row.get("step_s") or row.get("seconds") or 0.0) for row in timed)
    ahead = generates_ahead(run)
    blocks: list[Row] = []
    for row in updates:
        parts = seconds_of(row)
        begins = row["time"] - parts["step"] - first
        at = begins
        for part in TRAINER:
            blocks.append({"lane": "trainer", "part": part, "start": at, "end": at + parts[part], "step": row["step"]})
            at += parts[part]
        if not ahead:  # else the start of its generation, in an earlier update, is not recorded
            at = begins
            for part in BESIDE:
                blocks.append(
                    {"lane": "rollouts", "part": part, "start": at, "end": at + parts[part], "step": row["step"]}
                )
                at += parts[part]
    for row in run.evaluations:
        if row in timed:
            end = row["time"] - first
            start = end - (row.get("seconds") or 0.0)
            blocks.append({"lane": "evaluation", "part": "evaluation", "start": start, "end": end, "step": row["step"]})
    return [block for block in blocks if block["end"] > block["start"]]
