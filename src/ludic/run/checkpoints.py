"""Several checkpoints in one call: each is evaluated as by a call of its own, and one table compares them.

Each has its records and what lies beside them (`gsm8k_eval_step_100.jsonl`). `--resume-eval` finishes them all: what is done is
not generated again. The first checkpoint is what the others are compared with, problem by problem.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ludic.cli import expand_home, say
from ludic.compare.evaluations import compare_evaluations
from ludic.compare.paired import Paired
from ludic.flags import check_evaluation_arguments
from ludic.run.evaluation import Evaluation, earlier_settings, evaluate_from_flags, model_config, write_json
from ludic.run.task import Task
from ludic.storage.inert import inert
from ludic.task.hub import cache_without_hub

if TYPE_CHECKING:
    from ludic.rollout.evaluation import EvaluationResult


class Compared(NamedTuple):
    """One checkpoint of several."""

    name: str
    result: "EvaluationResult"
    paired: Mapping[str, Paired]
    """By rule, against the first checkpoint; empty for the first, and where no question is the same."""


async def evaluate_all_from_flags(args: argparse.Namespace, task: Task[Any]) -> list[Evaluation]:
    """What `--checkpoints` names, one after another, and their comparison; without it the one model of `--model`.

    Raises:
        ValueError: as `evaluate_from_flags`, or no weights can be loaded in turn.
    """
    if not args.checkpoints:
        return [await evaluate_from_flags(args, task)]
    expand_home(args)
    check_evaluation_arguments(args)
    calls = checkpoint_calls(args)
    _check_calls(list(calls.values()), task)
    records = [_records(call) for call in calls.values()]
    evaluations = []
    for place, (name, call) in enumerate(calls.items(), start=1):
        say(f"checkpoint {place} of {len(calls)}: {inert(name)} ({inert(call.model)})")
        # All old records go with the first's: --resume-eval must not take those of a later checkpoint for done.
        evaluations.append(await evaluate_from_flags(call, task, also_replaced=records[1:] if place == 1 else ()))
    found = zip(calls.items(), evaluations, strict=True)
    first = records[0]
    compared = [
        Compared(name, one.result, {} if _records(call) == first else _paired(name, first, _records(call)))
        for (name, call), one in found
    ]
    Console().print(checkpoints_table(compared, title=task.heading))
    out = _comparison_file(args)
    write_json(out, {"checkpoints": [_summary(one, calls[one.name]) for one in compared]})
    say(f"written: {out}")
    return evaluations


def _check_calls(calls: Sequence[argparse.Namespace], task: Task[Any]) -> None:
    """Find what keeps any of them from working before the first is evaluated.

    Raises:
        ValueError: a model or the records of one are not what they have to be; one line.
    """
    for call in calls:
        earlier_settings(call, _records(call))
    cache_without_hub([call.tokenizer or call.model for call in calls], dataset=task.hub_dataset, say=say)
    for call in calls:
        model_config(call)


def checkpoint_calls(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """The flags of each checkpoint's own evaluation, by a name that no other has.

    Raises:
        ValueError: a folder holds no model and no checkpoints, or one is named twice.
    """
    models = [model for given in args.checkpoints for model in _models(given)]
    if twice := next((model for model in models if models.count(model) > 1), None):
        raise ValueError(f"--checkpoints has {twice} twice")
    out, calls = Path(args.out), {}
    for model, name in zip(models, _names(models), strict=True):
        changed: dict[str, Any] = {
            "model": model,
            "checkpoints": None,
            "out": str(out.with_name(f"{out.stem}_{name}{out.suffix}")),
        }
        if args.start_server and args.server_log is None:
            changed["server_log"] = str(Path(args.out_dir) / f"vllm_server_{name}.log")
        changed["resolved"] = {
            title: {flag: changed.get(flag, value) for flag, value in flags.items() if flag != "checkpoints"}
            for title, flags in args.resolved.items()
        }
        calls[name] = argparse.Namespace(**{**vars(args), **changed})
    return calls


def _models(given: str) -> list[str]:
    """The model folder or hub name that was given, or all checkpoints below an --out-dir."""
    from ludic.train.checkpoint import list_checkpoints  # brings torch

    folder = Path(given).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return [given]
    inside = [one for one in [folder, *sorted(folder.glob("checkpoints_*"))] if one.is_dir()]
    found = [str(checkpoint) for one in inside for checkpoint in list_checkpoints(one)]
    if not found:
        raise ValueError(
            f"--checkpoints {given}: neither a model folder (no config.json) nor a folder with finished checkpoints (step_N)"
        )
    return found


def _names(models: Sequence[str]) -> list[str]:
    """For each model the end of its path, as short as it is unlike the others': `step_100`, or `run_a_step_100`."""
    parts = [[part for part in Path(model).parts if not part.startswith("checkpoints_")] for model in models]
    length = 1
    while True:
        names = [re.sub(r"[^\w.-]+", "_", "_".join(one[-length:])).strip("_") for one in parts]
        if len(set(names)) == len(names) or length >= max(map(len, parts)):
            break
        length += 1
    return [name if names.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(names, start=1)]


def _records(call: argparse.Namespace) -> Path:
    return Path(call.out_dir, call.out)


def _comparison_file(args: argparse.Namespace) -> Path:
    out = Path(args.out_dir, args.out)
    return out.with_name(f"{out.stem}_comparison.json")


def _paired(name: str, first: Path, records: Path) -> Mapping[str, Paired]:
    try:
        return compare_evaluations(first, records).by_rule
    except ValueError as error:  # another tokenizer or chat template: other prompts
        say(f"{inert(name)} is not compared problem by problem: {inert(str(error))}")
        return {}


def _summary(one: Compared, call: argparse.Namespace) -> dict[str, Any]:
    from ludic.train.checkpoint import checkpoint_step  # brings torch

    step = checkpoint_step(Path(call.model))
    return {
        "name": one.name,
        "model": call.model,
        **({} if step is None else {"step": step}),
        "records": str(_records(call)),
        "rules": {name: dataclasses.asdict(found) for name, found in one.result.rules.items()},
        "against_first": {name: dataclasses.asdict(found) for name, found in one.paired.items()},
    }


def checkpoints_table(compared: Sequence[Compared], *, title: str = "") -> Table:
    """Rules x checkpoints: accuracy, and the paired difference to the first with the p of McNemar's exact test."""
    right = [Column(name, justify="right", no_wrap=True) for name in ("accuracy", "95% CI", "vs. first", "95% CI", "p")]
    table = Table(
        Column("", overflow="fold"), *right, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
        title=Text(inert(title)) if title else None, title_style="bold", title_justify="left",
    )  # fmt: skip
    for rule in compared[0].result.rules:
        table.add_row(Text(inert(rule), style="bold"))
        for one in compared:
            found = one.result.rules[rule]
            low, high = found.ci95
            figures = (f"{found.accuracy:.1%}", f"{low * 100:.1f} to {high * 100:.1f}")
            table.add_row(Text(f"  {inert(one.name)}"), *figures, *_against_first(one.paired.get(rule)))
        table.add_section()
    return table


def _against_first(paired: Paired | None) -> tuple[str, str, str]:
    if paired is None:
        return "", "", ""
    low, high = paired.difference_ci95
    p_value = f"{paired.p_value:.2g}" if paired.p_value >= 1e-4 else "< 0.0001"
    return f"{paired.difference * 100:+.1f}", f"{low * 100:+.1f} to {high * 100:+.1f}", p_value
