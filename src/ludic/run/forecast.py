"""`--forecast`: what the run will be like, in place of the run; and at the end of a run what came true of it."""

import argparse
import dataclasses
import json
import os
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ludic.cli import say, server_urls, total_concurrency
from ludic.commands import given_command
from ludic.config import RunPaths
from ludic.report.runs import read_json
from ludic.report.start import gpu_names
from ludic.run.preparation import Parts
from ludic.storage.inert import inert
from ludic.storage.jsonl import finite

if TYPE_CHECKING:
    import torch

    from ludic.forecast.figures import Forecast
    from ludic.rollout.engine import InferenceEngine
    from ludic.train.learner import Learner
    from ludic.train.summary import TrainingSummary


def check_forecast_arguments(args: argparse.Namespace, paths: RunPaths) -> None:
    """Refuse what cannot be forecast, and keep a server's log out of the way of an earlier run's.

    Raises:
        ValueError: --resume was given too; one line.
    """
    if not args.forecast:
        return
    if args.resume is not None:
        raise ValueError("--forecast looks at a run from its start: it contradicts --resume")
    if args.start_server and args.server_log is None:
        args.server_log = str(paths.forecast.with_suffix(".log"))


async def forecast_run(
    parts: Parts[Any], engine: "InferenceEngine", learner: "Learner", *, dtype: "torch.dtype", started: float
) -> "TrainingSummary":
    """Measure, print the forecast and write its file; the summary of a run without updates.

    Args:
        dtype: of the model's files.
        started: when this process began, by `time.perf_counter`.
    """
    from ludic.forecast.figures import forecast
    from ludic.forecast.probe import measure, num_probe_groups
    from ludic.train.checkpoint import TrainerState
    from ludic.train.schedule import DataOrder, rollout_prompts
    from ludic.train.summary import summarise

    config, samples = parts.config, parts.samples
    order = DataOrder(seed=config.seed, num_samples=len(samples.train))
    group_ids = range(num_probe_groups(config.group_size))
    prompts = rollout_prompts(config, group_ids, order, samples.train, parts.train_prompts)
    say(
        f"forecast: {len(prompts)} groups of {config.group_size} rollouts, and a trial update that changes no weight ..."
    )
    measured = await measure(
        config, learner, engine, parts.environment, parts.tokenizer, prompts, num_servers=len(server_urls(parts.args))
    )
    found = forecast(
        measured,
        config,
        concurrency=total_concurrency(parts.args),
        eval_problems=min(config.eval_limit, len(samples.evaluation)),
        stored_itemsize=dtype.itemsize,
        start_s=measured.ready_at - started,
        on_gpu=learner.device.type == "cuda",
    )
    settings = {"model": parts.args.model, **dataclasses.asdict(config), **parts.settings}
    machine = {"gpus": gpu_names(), "cpu_cores": os.cpu_count()}
    _write(parts.paths, {"time": time.time(), "settings": settings | machine, "forecast": dataclasses.asdict(found)})
    _print(found, parts, overlaps=measured.overlaps)
    if measured.trial.figures.get("skipped_update"):
        say(f"warning: the trial update was skipped: {learner.diagnosis()}")
    return summarise(TrainerState(step=0, policy_version=0, model=parts.args.model, config=settings), None)


def _print(found: "Forecast", parts: Parts[Any], *, overlaps: bool) -> None:
    from ludic.forecast.table import assumptions, forecast_table, histogram

    say(f"the {found.num_groups} groups by how many of their {found.group_size} rollouts are correct:")
    for line in histogram(found.solve_rates):
        say(f"  {line}")
    Console().print(forecast_table(found, parts.config))
    for line in assumptions(found, parts.config, overlaps=overlaps):
        say(line)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 1.5 * cores:
        say(
            f"warning: other programs keep this machine busy (load {load:.0f} on {cores} cores): seconds depend on them"
        )
    if found.flat_share == 1:
        say("warning: no group of the probes has variance in its rewards, so there was nothing to learn from")
    say(f"nothing was trained. The forecast is in {parts.paths.forecast}, and is compared with a run of this command:")
    say(f"  {given_command(without=('--forecast',))}")


def say_forecast(paths: RunPaths, summary: "TrainingSummary") -> None:
    """At the end of a run, its forecast beside what came true; nothing where there is no forecast.

    The run is over and whole: a forecast that cannot be read, or is of other settings, is said and no error.
    """
    from ludic.forecast.figures import Forecast
    from ludic.forecast.outcome import differences, read_outcome, settings_of_start
    from ludic.forecast.probe import peak_memory
    from ludic.forecast.table import outcome_table

    if not summary.updates or not paths.forecast.exists():
        return
    try:
        record = read_json(paths.forecast)
        others = differences(record["settings"], settings_of_start(read_json(paths.start)))
        found = Forecast.read(record["forecast"])
        came = read_outcome(paths, memory_bytes=peak_memory())
        table = outcome_table(found, came)
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:  # a file of another shape too
        say(inert(f"the forecast in {paths.forecast} cannot be compared with the run: {error!r:.200}"))
        return
    if others:
        say(f"the forecast in {paths.forecast} is not compared with the run, which has other settings:")
        for line in others:
            say(f"  {line}")
        return
    Console().print(table)
    try:
        _write(paths, record | {"came_true": came.figures()})
    except OSError as error:
        say(inert(f"what came true is not kept in {paths.forecast}: {error}"))


def _write(paths: RunPaths, record: dict[str, Any]) -> None:
    partial = paths.forecast.with_name(f".{paths.forecast.name}.partial")
    partial.write_text(json.dumps(finite(record), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, paths.forecast)
