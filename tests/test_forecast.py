"""--forecast: it measures with the parts of a run, changes nothing, and the run that follows says what came true."""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from environments.gsm8k import GSM8K, load
from ludic.config import GRPOConfig, RunPaths
from ludic.forecast.figures import (
    Forecast,
    forecast,
    generation_costs,
    num_checkpoints,
    num_evaluations,
    trained_at,
)
from ludic.forecast.generation_cost import GenerationCost
from ludic.forecast.outcome import differences
from ludic.forecast.probe import Burst, Measured, Trial, measure, num_probe_groups
from ludic.forecast.table import histogram, size
from ludic.inference.client import handshake
from ludic.inference.client.server_control import ServerControl
from ludic.rollout.engine import WeightSyncReport
from ludic.rollout.local import LocalEngine
from ludic.run.forecast import say_forecast
from ludic.task.pretrained import load_model
from ludic.task.prompts import encode_prompt, load_tokenizer
from ludic.train.learner import Learner
from ludic.train.schedule import DataOrder, rollout_prompts
from ludic.types import Completion, ParseResult, Rollout, RolloutGroup, Score, Turn
from tests.fake_vllm import FakeServer, serving

SCRIPT = Path(__file__).parent.parent / "examples" / "gsm8k" / "train_gsm8k.py"
FLAGS = [
    *("--rollouts-per-update", "16", "--group-size", "8", "--max-seq-len", "160", "--micro-token-budget", "640"),
    *("--max-tokens", "12", "--lr", "3e-3", "--warmup-steps", "0", "--eval-limit", "8"),
]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gsm8k", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- the arithmetic -----------------------------------------------------------------------------------------------------


def burst(seconds: float, *, rollouts: int, tokens: int, longest: int) -> Burst:
    return Burst(seconds=seconds, rollouts=rollouts, tokens=tokens, longest=longest, arrivals=[0.5, 1.0], grading_s=0.0)


def test_two_bursts_give_the_cost_of_a_decoding_step_and_of_a_token() -> None:
    few = burst(0.01 * 100 + 0.001 * 800, rollouts=16, tokens=800, longest=100)
    many = burst(0.01 * 120 + 0.001 * 2400, rollouts=48, tokens=2400, longest=120)
    cost, only_steps, only_tokens = generation_costs(few, many)
    assert (cost.step_s, cost.token_s) == pytest.approx((0.01, 0.001))
    assert only_steps.step_s == pytest.approx(5.4 / 220) and only_steps.token_s == 0
    assert only_tokens.token_s == pytest.approx(5.4 / 3200) and only_tokens.step_s == 0
    assert cost.seconds(256, mean=50, longest=120, in_flight=256, refills=True) == pytest.approx(1.2 + 12.8)


@pytest.mark.parametrize(
    ("few_s", "many_s", "rollouts"),
    [(2.0, 1.0, 48), (0.1, 3.0, 48), (1.0, 1.005, 16)],
    ids=["the larger burst was quicker", "more than in proportion", "bursts of equal load"],
)
def test_bursts_that_no_cost_explains_are_taken_half_for_steps_and_half_for_tokens(
    few_s: float, many_s: float, rollouts: int
) -> None:
    few = burst(few_s, rollouts=16, tokens=800, longest=100)
    many = burst(many_s, rollouts=rollouts, tokens=50 * rollouts, longest=101)
    cost, only_steps, only_tokens = generation_costs(few, many)
    assert cost == GenerationCost(step_s=only_steps.step_s / 2, token_s=only_tokens.token_s / 2)
    assert cost.step_s * 201 + cost.token_s * (800 + 50 * rollouts) == pytest.approx(few_s + many_s)


def test_what_does_not_fit_at_once_waits_for_places_or_for_the_next_batch() -> None:
    steps = GenerationCost(step_s=1.0, token_s=0.0)
    lengths = {"mean": 10.0, "longest": 40}
    assert steps.seconds(256, in_flight=256, refills=True, **lengths) == 40  # type: ignore[arg-type]
    assert steps.seconds(1024, in_flight=256, refills=True, **lengths) == 40 + 3 * 10  # type: ignore[arg-type]
    assert steps.seconds(1024, in_flight=256, refills=False, **lengths) == 4 * 40  # type: ignore[arg-type]


def test_training_begins_with_the_first_group_and_ends_after_the_last() -> None:
    assert trained_at([1.0, 0.5], rollouts_s=10, accumulate_s=4) == 12
    assert trained_at([0.5, 0.6], rollouts_s=10, accumulate_s=12) == 5 + 12
    assert trained_at([1.0, 1.0], rollouts_s=10, accumulate_s=4) == 14


def group(number: int, correct: int, *, length: int, cut_off: int = 0) -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            group_id=number,
            rollout_id=member,
            prompt_token_ids=[5] * 10,
            completion=Completion(
                token_ids=[7] * length,
                logprobs=None,
                finish_reason="length" if member < cut_off else "stop",
                policy_version=0,
            ),
            text="",
            score=Score(reward=float(member < correct), correct=member < correct, parse=ParseResult(answer="7")),
        )
        for member in range(4)
    )
    return RolloutGroup(group_id=number, target="7", rollouts=rollouts)


CONFIG = GRPOConfig(
    rollouts_per_update=64,
    group_size=4,
    train_steps=10,
    eval_every=5,
    eval_limit=32,
    save_every=3,
    micro_token_budget=4096,
)


def measured(*, overlaps: bool, **trial: float) -> Measured:
    figures: dict[str, Any] = {
        "accumulate_s": 1.0,
        "step_s": 0.5,
        "trained_share": 0.5,
        "figures": {},
        "gap_bytes": 0.0,
    } | trial
    return Measured(
        groups=[
            group(0, 0, length=20),
            group(1, 2, length=40, cut_off=1),
            group(2, 4, length=20),
            group(3, 1, length=40),
        ],
        bursts=[
            burst(0.5, rollouts=4, tokens=80, longest=20),  # 0.01 s a step, 0.00375 s a token
            burst(0.4 + 400 * 0.00375, rollouts=12, tokens=400, longest=40),
        ],
        trial=Trial(**figures),
        sync_s=0.25,
        memory_bytes=2**30,
        parameters=1000,
        rollout_bytes=100.0,
        gap_bytes=10.0,
        metrics_bytes=600,
        ready_at=0.0,
        overlaps=overlaps,
    )


def forecast_of(config: GRPOConfig = CONFIG, *, overlaps: bool = False, **trial: float) -> Forecast:
    settings = {"concurrency": 1024, "eval_problems": 32, "stored_itemsize": 2, "start_s": 30.0, "on_gpu": False}
    return forecast(measured(overlaps=overlaps, **trial), config, **settings)  # type: ignore[arg-type]


def test_an_update_is_as_many_rollouts_of_the_same_lengths_and_training_in_proportion() -> None:
    found = forecast_of()
    generation_s = 0.01 * 40 + 0.00375 * 64 * 30
    assert found.generation_s == pytest.approx(generation_s)
    assert found.generation_range_s[0] < generation_s < found.generation_range_s[1]
    training_s = 1.0 * 0.5 * 64 / 16 + 0.5
    assert found.training_s == pytest.approx(training_s)
    low, high = (1 - share for share in reversed(found.flat_ci95))
    assert found.training_range_s == pytest.approx((low * 4 + 0.5, high * 4 + 0.5))
    assert found.update_range_s[1] == pytest.approx(found.generation_range_s[1] + found.training_range_s[1] + 0.25)
    assert found.update_s == pytest.approx(generation_s + training_s + 0.25)
    assert found.evaluation_s == pytest.approx(0.01 * 40 + 0.00375 * 32 * 30)
    assert found.total_seconds(10, 3) == pytest.approx(30 + 10 * found.update_s + 3 * found.evaluation_s)
    assert found.disk_bytes(10, 2) == 2 * 14 * 1000 + 10 * (6400 + 600 + 640)


def test_a_server_generates_while_training_goes_on_and_ahead_of_it_where_rollouts_may_be_stale() -> None:
    generation_s, passes, step_s, sync_s = 0.01 * 40 + 0.00375 * 64 * 30, 2.0, 0.5, 0.25
    assert forecast_of(overlaps=True).update_s == pytest.approx(generation_s + passes / 2 + step_s + sync_s)
    stale = dataclasses.replace(CONFIG, max_staleness=1)
    assert forecast_of(stale, overlaps=True).update_s == pytest.approx(generation_s + sync_s)
    slow = forecast_of(stale, overlaps=True, accumulate_s=100.0)
    assert slow.update_s == pytest.approx(100 * 0.5 * 4 + step_s + sync_s)


def test_further_epochs_cost_their_passes_again() -> None:
    two = dataclasses.replace(CONFIG, epochs_per_update=2)
    found = forecast_of(two, accumulate_s=1.0, step_s=1.5)  # a step of 0.25 s an epoch, and the passes of the second
    assert found.training_s == pytest.approx(2 * (1.0 * 0.5 * 4) + 2 * 0.25)


def test_groups_without_variance_truncation_and_solve_rates_have_their_shares_and_intervals() -> None:
    found = forecast_of()
    assert found.solve_rates == [0, 0.5, 1, 0.25] and found.correct_rate == 7 / 16
    assert found.flat_share == 0.5 and found.flat_ci95 == pytest.approx((0.15, 0.85), abs=0.01)
    assert found.truncation_rate == 1 / 16 and found.truncation_ci95[0] < 1 / 16 < found.truncation_ci95[1]
    assert (found.mean_length, found.longest) == (30, 40)
    assert Forecast.read(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_what_an_environment_says_is_no_part_of_the_lengths() -> None:
    whole = measured(overlaps=False)
    first, *others = whole.groups
    said = [
        Turn(role="assistant", text="", num_tokens=3),
        Turn(role="user", text="", num_tokens=15),
        Turn(role="assistant", text="", num_tokens=2),
    ]
    longer = [
        dataclasses.replace(one, completion=dataclasses.replace(one.completion, turns=tuple(said)))
        for one in first.rollouts
    ]
    groups = [dataclasses.replace(first, rollouts=tuple(longer)), *others]
    settings = {"concurrency": 1024, "eval_problems": 32, "stored_itemsize": 2, "start_s": 30.0, "on_gpu": False}
    found = forecast(dataclasses.replace(whole, groups=groups), CONFIG, **settings)  # type: ignore[arg-type]
    assert found.mean_length == (5 + 40 + 20 + 40) / 4


def test_where_no_group_is_trained_on_an_update_has_no_optimizer_step() -> None:
    assert forecast_of(trained_share=0.0).training_s == 0


@pytest.mark.parametrize(
    ("config", "evaluations", "checkpoints"),
    [
        ({}, 3, 2),
        ({"eval_every": 0}, 2, 2),
        ({"eval_every": 4, "save_every": 0}, 4, 1),
        ({"eval_limit": 0, "keep_checkpoints": 9}, 0, 4),
    ],
)
def test_evaluations_and_checkpoints_are_counted_as_a_run_makes_them(
    config: dict[str, int], evaluations: int, checkpoints: int
) -> None:
    settings = dataclasses.replace(CONFIG, **config)  # type: ignore[arg-type]
    assert (num_evaluations(settings), num_checkpoints(settings)) == (evaluations, checkpoints)


def test_the_probes_are_whole_groups_that_come_to_64_and_two_at_least() -> None:
    assert [num_probe_groups(size) for size in (2, 8, 24, 64, 128)] == [32, 8, 2, 2, 2]


def test_every_group_is_in_one_bar_and_those_without_variance_have_their_own() -> None:
    lines = histogram([0.0, 0.125, 0.25, 0.5, 0.875, 1.0, 1.0, 1.0])
    assert [int(line.split()[-1]) for line in lines] == [1, 2, 1, 0, 1, 3]
    assert [line.count("#") for line in lines] == [5, 10, 5, 0, 5, 15]


def test_sizes_are_shown_in_their_largest_unit() -> None:
    assert [size(number) for number in (12, 1536, 3 * 2**30)] == ["12 B", "1.5 KiB", "3.0 GiB"]


def test_a_setting_that_changes_what_an_update_costs_is_a_difference_and_the_learning_rate_is_none() -> None:
    before = {"group_size": 8, "learning_rate": 1e-6, "train_steps": 50, "compile": True}
    now = {"group_size": 4, "learning_rate": 2e-6, "train_steps": 20, "compile": True, "new": "\x1b[2J"}
    assert differences(before, now) == ["--group-size was 8, is 4", "--new was the default, is '\\x1b[2J'"]


# --- the measurement ----------------------------------------------------------------------------------------------------


async def test_where_no_probe_is_among_the_groups_with_log_probs_one_is_asked_for_them_and_counts_by_their_share(
    digit_policy_dir: Path, digit_problems: Path
) -> None:
    found: dict[tuple[bool, float], Measured] = {}
    for recorded, share in ((False, 0.0625), (True, 0.0625), (True, 1.0), (True, 0.0)):
        config = GRPOConfig(
            rollouts_per_update=128, group_size=8, max_seq_len=160, max_completion_len=12, micro_token_budget=640,
            record_token_logprobs=recorded, logprob_share=share, kl_coef=0.01,
        )  # fmt: skip
        tokenizer, samples = load_tokenizer(digit_policy_dir), load("train", dataset=digit_problems)
        model, reference = (load_model(digit_policy_dir, dtype=torch.float32) for _ in range(2))
        engine, environment = LocalEngine.from_pretrained(digit_policy_dir), GSM8K()
        try:
            token_ids = [encode_prompt(tokenizer, environment.messages(sample)) for sample in samples]
            prompts = rollout_prompts(config, range(8), DataOrder(seed=0, num_samples=len(samples)), samples, token_ids)
            learner = Learner(config, model, reference_model=reference)
            found[recorded, share] = await measure(config, learner, engine, environment, tokenizer, prompts)
        finally:
            await environment.aclose()
            await engine.aclose()
    plain, some, every, none = (one for one in found.values())
    assert plain.gap_bytes == none.gap_bytes == 0 and every.gap_bytes > 0
    assert some.gap_bytes == pytest.approx(every.gap_bytes / 16, rel=0.3)  # one group of an update's 16
    more = (some.rollout_bytes - plain.rollout_bytes) / (every.rollout_bytes - plain.rollout_bytes)
    assert more == pytest.approx(1 / 16, rel=0.3)
    with_logprobs = [one.group_id for one in some.groups if one.rollouts[0].completion.logprobs is not None]
    assert with_logprobs == [7] and none.rollout_bytes == plain.rollout_bytes


async def test_the_probes_are_what_the_run_would_sample_first_and_no_weight_moves(
    digit_policy_dir: Path, digit_problems: Path
) -> None:
    config = GRPOConfig(
        rollouts_per_update=16, group_size=8, max_seq_len=160, max_completion_len=12, micro_token_budget=640,
        weight_decay=0.1, max_staleness=1,
    )  # fmt: skip
    tokenizer, samples = load_tokenizer(digit_policy_dir), load("train", dataset=digit_problems)
    model = load_model(digit_policy_dir, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner, engine = Learner(config, model), LocalEngine.from_pretrained(digit_policy_dir)
    environment = GSM8K()
    try:
        token_ids = [encode_prompt(tokenizer, environment.messages(sample)) for sample in samples]
        order = DataOrder(seed=0, num_samples=len(samples))
        prompts = rollout_prompts(config, range(8), order, samples, token_ids)
        found = await measure(config, learner, engine, environment, tokenizer, prompts)
        again = await engine.generate(prompts[0].token_ids, num_completions=8, sampling=prompts[0].sampling)
    finally:
        await environment.aclose()
        await engine.aclose()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert engine.policy_version == 0 and {
        rollout.completion.policy_version for rollout in found.groups[0].rollouts
    } == {0}
    assert sorted(group.group_id for group in found.groups) == list(range(8))
    assert [burst.rollouts for burst in found.bursts] == [16, 48]
    first = next(group for group in found.groups if group.group_id == 0)
    assert [rollout.completion.token_ids for rollout in first.rollouts] == [one.token_ids for one in again]
    assert found.trial.figures["grad_norm"] > 0 and found.trial.accumulate_s > 0 and 0 < found.trial.trained_share <= 1
    assert learner.optimizer.state and found.memory_bytes > 2**20 and found.parameters == model.num_parameters()


# --- the script ---------------------------------------------------------------------------------------------------------


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *FLAGS, "--logger", "none", *flags])
    code: int = asyncio.run(script.main())
    return code


def test_a_forecast_trains_nothing_and_the_run_that_follows_says_what_came_true(
    digit_policy_dir: Path,
    digit_problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script, paths = load_script(), RunPaths(out_dir=tmp_path, name="gsm8k")
    flags = ["--model", str(digit_policy_dir), "--dataset", str(digit_problems), "--out-dir", str(tmp_path)]
    flags += ["--engine", "local", "--train-steps", "2"]
    paths.metrics.write_text('{"step": 1, "of": "an earlier run"}\n')
    half = paths.checkpoints / ".step_4.partial" / "model.safetensors"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    earlier = snapshot(tmp_path)

    assert call(script, monkeypatch, *flags, "--forecast") == 0
    said = capsys.readouterr().out
    assert snapshot(tmp_path).keys() - earlier.keys() == {"gsm8k_forecast.json"}
    assert earlier.items() <= snapshot(tmp_path).items()
    record = json.loads(paths.forecast.read_text())
    found = Forecast.read(record["forecast"])
    assert found.num_groups * found.group_size == 64 and found.in_flight == 16 and found.evaluation_s > 0
    assert "8 groups of 8 rollouts" in said and "groups without variance" in said and "hours in all" in said
    assert said.splitlines()[-1].endswith("--train-steps 2") and "--forecast" not in said.splitlines()[-1]

    assert call(script, monkeypatch, *flags) == 0
    said = capsys.readouterr().out
    assert "the forecast, and what came true" in said and "an update in all" in said
    came = json.loads(paths.forecast.read_text())["came_true"]
    rows = [row for row in map(json.loads, paths.metrics.read_text().splitlines()) if "step_s" in row]
    assert came["updates"] == len(rows) == 2
    assert came["update_s"] == pytest.approx(sum(row["step_s"] for row in rows) / 2)
    assert came["disk_bytes"] > paths.rollouts.stat().st_size and came["memory_bytes"] > 2**20
    assert abs(paths.rollouts.stat().st_size / 2 / found.rollouts_bytes - 1) < 0.2
    (tmp_path / f".{paths.forecast.name}.partial").mkdir()  # the file cannot be written, as on a full disk
    say_forecast(paths, argparse.Namespace(updates=2))  # type: ignore[arg-type]
    assert "what came true is not kept in" in capsys.readouterr().out

    assert call(script, monkeypatch, *flags, "--concurrency", "4") == 0
    said = capsys.readouterr().out
    assert "is not compared with the run" in said and "--concurrency was 1024, is 4" in said
    assert "what came true" not in said


def test_recorded_log_probs_and_their_gaps_are_in_the_disk_that_is_forecast_and_in_what_came_true(
    digit_policy_dir: Path, digit_problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script, paths = load_script(), RunPaths(out_dir=tmp_path, name="gsm8k")
    flags = ["--model", str(digit_policy_dir), "--dataset", str(digit_problems), "--out-dir", str(tmp_path)]
    flags += ["--engine", "local", "--train-steps", "4", "--record-token-logprobs", "--logprob-share", "1"]
    flags += ["--kl-coef", "0.01", "--lr", "1e-9"]  # groups without variance are trained on too, and nothing changes
    assert call(script, monkeypatch, *flags, "--forecast") == 0
    assert not paths.token_gaps.exists()
    found = Forecast.read(json.loads(paths.forecast.read_text())["forecast"])
    assert call(script, monkeypatch, *flags) == 0
    for path, forecast_bytes in ((paths.rollouts, found.rollouts_bytes), (paths.token_gaps, found.gaps_bytes)):
        assert abs(path.stat().st_size / 4 / forecast_bytes - 1) < 0.15, path
    checkpoints = sum(path.stat().st_size for path in paths.checkpoints.rglob("*") if path.is_file())
    came = json.loads(paths.forecast.read_text())["came_true"]
    assert came["disk_bytes"] == checkpoints + sum(path.stat().st_size for path in paths.grown)


def test_a_forecast_that_cannot_be_read_does_not_end_a_run_that_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = RunPaths(out_dir=tmp_path, name="gsm8k")
    shapes = [
        '{"settings": {}, "forecast": {"other": 1}}',
        '{"settings": {}, "forecast": null}',
        '{"settings": null, "forecast": {}}',
        '{"settings": [], "forecast": {}}',
    ]
    for damaged in ("{", "[]", *shapes):
        paths.forecast.write_text(damaged)
        say_forecast(paths, argparse.Namespace(updates=2))  # type: ignore[arg-type]
        assert "cannot be compared with the run" in capsys.readouterr().out


def test_a_forecast_contradicts_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--forecast looks at a run from its start: it contradicts --resume"):
        call(load_script(), monkeypatch, "--engine", "local", "--out-dir", str(tmp_path), "--forecast", "--resume")


class Sync:
    """Stands in for `WeightSync`: notes which version was sent."""

    synced: ClassVar[list[int]] = []

    def __init__(self, control: ServerControl, **settings: Any) -> None: ...

    def sync(self, model: torch.nn.Module, policy_version: int) -> WeightSyncReport:
        self.synced.append(policy_version)
        return WeightSyncReport(policy_version=policy_version, num_tensors=1, num_bytes=4, seconds=0.5, proof="held")

    def close(self) -> None: ...


async def test_a_forecast_gives_its_server_back_with_the_weights_that_it_had(
    digit_policy_dir: Path, digit_problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sync, "synced", [])
    monkeypatch.setattr("ludic.inference.client.vllm_client.WeightSync", Sync)
    fake = FakeServer(tokenizer=load_tokenizer(digit_policy_dir), model=str(digit_policy_dir))  # type: ignore[arg-type]
    fake.server_info |= {"vllm_version": "0.32.0"}
    flags = [
        "--model",
        str(digit_policy_dir),
        "--dataset",
        str(digit_problems),
        "--out-dir",
        str(tmp_path),
        "--forecast",
    ]
    async with serving(fake) as server:
        flags += ["--port", server.base_url.rpartition(":")[2], "--concurrency", "16"]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *FLAGS, *flags])
        assert await load_script().main() == 0
        assert await asyncio.to_thread(handshake.holder, ServerControl(server.base_url)) is None
        assert server.most_in_flight <= 16 and sum(body["n"] for body in server.requests) == 64 + 8
    assert Sync.synced == [0, 0]
    found = Forecast.read(json.loads((tmp_path / "gsm8k_forecast.json").read_text())["forecast"])
    assert (found.sync_s, found.in_flight, found.longest) == (0.5, 16, 4)


async def test_several_servers_have_their_places_together_and_each_is_warmed_up(
    digit_policy_dir: Path, digit_problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer(Exception):
        def __init__(self, **settings: Any) -> None:
            super().__init__(settings["eval_concurrency"], settings["task"]["servers"])
            raise self

    monkeypatch.setattr("ludic.inference.client.vllm_client.WeightSync", Sync)
    monkeypatch.setattr("ludic.train.trainer.GRPOTrainer", Trainer)
    flags = ["--model", str(digit_policy_dir), "--dataset", str(digit_problems), "--out-dir", str(tmp_path)]
    flags += ["--concurrency", "8", "--logger", "none"]
    async with contextlib.AsyncExitStack() as stack:
        fakes = [
            FakeServer(tokenizer=load_tokenizer(digit_policy_dir), model=str(digit_policy_dir))  # type: ignore[arg-type]
            for _ in range(2)
        ]
        for fake in fakes:
            fake.server_info |= {"vllm_version": "0.32.0"}
            server = await stack.enter_async_context(serving(fake))
            flags += ["--server", server.base_url]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *FLAGS, *flags, "--forecast"])
        assert await load_script().main() == 0
        assert [fake.requests[0]["max_tokens"] for fake in fakes] == [8, 8]
        assert sum(body["n"] for fake in fakes for body in fake.requests) == 64 + 2 * 8
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *FLAGS, *flags])
        with pytest.raises(Trainer) as made:
            await load_script().main()
        assert made.value.args == (16, 2)
    record = json.loads((tmp_path / "gsm8k_forecast.json").read_text())
    assert record["settings"]["servers"] == 2 and record["forecast"]["in_flight"] == 16
    assert differences(record["settings"], record["settings"] | {"servers": 1}) == ["--servers was 2, is 1"]


@pytest.mark.slow
def test_the_doctor_hands_over_to_the_forecast_of_a_script_once_no_check_has_failed(
    digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    flags = [*FLAGS, "--model", str(digit_policy_dir), "--dataset", str(digit_problems), "--out-dir", str(tmp_path)]
    words = [sys.executable, "-m", "ludic.doctor", *flags, "--engine", "local", "--forecast"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    checks = list(itertools.takewhile(lambda line: line.split()[0] in ("ok", "warning"), lines))
    assert len(checks) > 8 and "0 failed" in lines[len(checks)]
    assert "hours in all" in done.stdout and (tmp_path / "gsm8k_forecast.json").is_file()
    assert not list(tmp_path.glob("*_train_*")) and not (tmp_path / "checkpoints_gsm8k").exists()
    missing = subprocess.run([*words, "no_such.py"], capture_output=True, text=True, timeout=100)
    assert missing.returncode == 2 and "--forecast no_such.py is no file" in missing.stderr
