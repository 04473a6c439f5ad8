"""Whole runs with dynamic sampling, solved prompts left out and a curriculum: exact, full updates, counted bounds."""

import asyncio
import dataclasses
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ludic.forecast.figures import _rates, sampling_factor
from ludic.forecast.table import assumptions
from ludic.rollout.groups import GroupStream, Prompt
from ludic.telemetry.activity import Activity, WatchedEngine
from ludic.telemetry.alarms import Alarms
from ludic.train.checkpoint import CheckpointError, read_prompts, verify_checkpoint
from ludic.types import Completion, ParseResult, Rollout, RolloutGroup, SamplingParams, Score
from tests.test_forecast import CONFIG, forecast_of
from tests.test_rollouts import EchoEngine, LastDigit, ListWriter, prompts, tokenizer
from tests.test_trainer import AlwaysSeven, Remote, Run, load, same_weights

__all__ = ["tokenizer"]  # a fixture

CLEVER: dict[str, Any] = {
    "dynamic_sampling": True,
    "max_sampling_factor": 4,
    "drop_solved": 1,
    "curriculum": True,
    "samples": range(9),
    "eval_limit": 0,
}


class Mixed(AlwaysSeven):
    """Of three prompts one is always right, one never, and one by the trained rule; scores come at odd moments."""

    def __init__(self, jitter: int = 0) -> None:
        super().__init__()
        self._random = random.Random(jitter)

    async def score(self, sample: int, text: str, /) -> Score:
        for _ in range(self._random.randrange(30)):
            await asyncio.sleep(0)
        score = await super().score(sample, text)
        reward = [1.0, 0.0, score.reward][sample % 3]
        return Score(reward=reward, correct=reward == 1.0, parse=score.parse)


def groups_of(run: Run) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The records by update and group."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for record in run.rollouts():
        groups.setdefault((record["step"], record["group"]), []).append(record)
    return groups


def is_flat(records: Sequence[dict[str, Any]]) -> bool:
    return len({record["reward"] for record in records}) == 1


# --- exact --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 1])
def test_two_updates_and_two_after_a_resume_are_four_updates_with_all_that_is_known_of_the_prompts(
    digit_policy_dir: Path, tmp_path: Path, staleness: int
) -> None:
    given = {**CLEVER, "max_staleness": staleness, "save_every": 2}
    whole = Run(digit_policy_dir, tmp_path / "whole", environment=Mixed(1), train_steps=4, **given)
    summary = whole.go()
    Run(digit_policy_dir, tmp_path / "parts", environment=Mixed(2), train_steps=2, **given).go()
    second = Run(digit_policy_dir, tmp_path / "parts", environment=Mixed(3), train_steps=4, resume=True, **given)
    resumed = second.go()
    assert second.logger.updates() == whole.logger.updates()[2:]
    assert second.rollouts() == whole.rollouts()
    assert same_weights(second.model, whole.model)
    assert second.trainer.prompts.state() == whole.trainer.prompts.state()
    assert resumed.rollouts == summary.rollouts == len(whole.rollouts()) > 4 * 16
    assert sum(row["skipped_prompts"] for row in whole.logger.updates()) > 0, "the curriculum did not act"


def test_the_state_of_the_prompts_is_under_the_checksums_and_an_old_checkpoint_has_none(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    run = Run(digit_policy_dir, tmp_path, environment=Mixed(), train_steps=1, **CLEVER)
    run.go()
    checkpoint = run.paths.checkpoints / "step_1"
    assert read_prompts(checkpoint) == json.loads(json.dumps(run.trainer.prompts.state()))
    path = checkpoint / "training" / "prompts.json"
    path.write_text(path.read_text().replace("0.0", "0.5"))
    with pytest.raises(CheckpointError, match=r"prompts\.json was altered"):
        verify_checkpoint(checkpoint)
    path.unlink()
    assert read_prompts(checkpoint) is None


# --- full updates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["local", "remote"])
def test_an_update_is_filled_and_trains_on_groups_with_variance_only(
    digit_policy_dir: Path, tmp_path: Path, engine: str
) -> None:
    given = {**CLEVER, "drop_solved": 0, "curriculum": False, "max_sampling_factor": 50}
    run = Run(digit_policy_dir, tmp_path, environment=Mixed(), train_steps=2, rollouts_per_update=32, **given)
    if engine == "remote":
        run.trainer.engine = Remote(run.engine, in_turn=True)
    accumulate, trained = run.trainer.learner.accumulate, set[tuple[int, int]]()

    def watched(samples: Any, watch: Any = None) -> None:
        trained.update(sample.rollout for sample in samples)
        accumulate(samples, watch)

    run.trainer.learner.accumulate = watched  # type: ignore[method-assign]
    summary = run.go()
    groups = groups_of(run)
    kept = {group for (_, group), records in groups.items() if not any("replaced" in one for one in records)}
    assert {group for group, _ in trained} == kept and len(kept) == 2 * 4
    assert all(is_flat(records) == ("replaced" in records[0]) for records in groups.values())
    assert len({group for _, group in groups}) == len(groups), "a number was given twice"
    assert len(trained) == 2 * 32 and summary.rollouts == len(run.rollouts())
    for step, row in enumerate(run.logger.updates(), 1):
        generated = sum(update == step for update, _ in groups)
        assert row["generated_groups"] == generated and row["replaced_groups"] == generated - 4 > 0
        assert row["sampling_bound_reached"] == 0 and row["trained_sequences"] == 32
        assert row["zero_variance_groups"] == generated - 4
        assert row["zero_variance_share"] == pytest.approx((generated - 4) / generated)


def test_with_an_overlong_buffer_groups_of_one_answer_are_replaced_whatever_their_lengths(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    run = Run(
        digit_policy_dir, tmp_path, environment=Mixed(), train_steps=2, eval_limit=0, dynamic_sampling=True,
        max_sampling_factor=50, overlong_buffer=10,
    )  # fmt: skip
    run.go()
    groups = list(groups_of(run).values())
    assert all((len({one["correct"] for one in records}) == 1) == ("replaced" in records[0]) for records in groups)
    assert any("replaced" in records[0] and not is_flat(records) for records in groups), "no length told any apart"
    for row in run.logger.updates():
        assert row["zero_variance_groups"] == row["replaced_groups"] > 0 and row["overlong_reward"] < 0


def test_the_standard_deviation_of_a_batch_is_that_of_the_groups_that_stay(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    run = Run(
        digit_policy_dir, tmp_path, environment=Mixed(), train_steps=1, eval_limit=0, dynamic_sampling=True,
        max_sampling_factor=50, advantage_std="batch",
    )  # fmt: skip
    step, scales = run.trainer.learner.step, list[float]()

    def watched(**given: Any) -> dict[str, float]:
        scales.append(given["advantage_scale"])
        return step(**given)

    run.trainer.learner.step = watched  # type: ignore[method-assign]
    run.go()
    groups = list(groups_of(run).values())
    kept = [[one["reward"] for one in records] for records in groups if "replaced" not in records[0]]
    assert len(kept) == 2 < len(groups)
    centred = [reward - statistics.fmean(rewards) for rewards in kept for reward in rewards]
    assert scales == [pytest.approx(1 / (statistics.stdev(centred) + 1e-6))]


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_bound_ends_the_search_trains_on_what_is_there_and_is_counted_and_said(
    digit_policy_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kl_coef: float
) -> None:
    run = Run(
        digit_policy_dir, tmp_path, environment=AlwaysSeven(lambda text: 0.25), train_steps=2, eval_limit=0,
        dynamic_sampling=True, max_sampling_factor=3, kl_coef=kl_coef, with_reference=kl_coef > 0,
    )  # fmt: skip
    summary = run.go()
    assert summary.rollouts == 2 * 3 * 16 and same_weights(run.model, load(digit_policy_dir))
    for row in run.logger.updates():
        assert (row["generated_groups"], row["replaced_groups"], row["sampling_bound_reached"]) == (6, 4, 1)
        assert row["zero_variance_groups"] == 6 and row["trained_sequences"] == 0
    said = [message for message in caplog.messages if "--max-sampling-factor 3" in message]
    assert [message.partition(":")[0] for message in said] == ["update 1", "update 2"]


def test_a_plain_run_records_and_logs_nothing_of_replacements(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, environment=Mixed(), train_steps=2, eval_limit=0)
    run.go()
    assert all("replaced" not in record for record in run.rollouts())
    assert not {"generated_groups", "skipped_prompts", "solved_prompts"} & set(run.logger.updates()[0])
    assert [sorted({r["group"] for r in run.rollouts() if r["step"] == step}) for step in (1, 2)] == [[0, 1], [2, 3]]


# --- the stream ---------------------------------------------------------------------------------------------------------


def further_for(first: Sequence[Prompt[str]], further: Sequence[Prompt[str]], step: int) -> Any:
    """Replaces each group of update `step` whose prompt is among `first` by one of `further`, in turn."""
    ids, left = {prompt.group_id for prompt in first}, list(further)

    def replacement(update: int, group: RolloutGroup) -> Prompt[str] | None:
        return left.pop(0) if update == step and group.group_id in ids else None

    return replacement


async def test_a_replacement_is_asked_for_before_its_update_is_with_an_engine_that_overlaps(tokenizer: Any) -> None:
    engine, writer = EchoEngine(tokenizer), ListWriter()
    asked = prompts(tokenizer, "a", "b", "c")
    stream = GroupStream(
        engine, LastDigit(), group_size=2, tokenizer=tokenizer, record=writer.write,
        replacement=further_for(asked[:1], asked[2:], step=2),
    )  # fmt: skip
    stream.submit(2, asked[:2])
    for _ in range(200):
        await asyncio.sleep(0)
    assert engine.started == 3 and writer.records == [], "it waited for somebody to collect its update"
    groups = [group for groups in [ready async for ready in stream.groups(2)] for group in groups]
    assert sorted(group.target for group in groups) == ["target of b", "target of c"]
    assert [group.target for group in stream.replaced(2)] == ["target of a"]
    assert [(record["prompt"], record.get("replaced")) for record in writer.records if record["rollout"] == 0] == [
        ("a", True), ("b", None), ("c", None),
    ]  # fmt: skip


class InRounds(EchoEngine):
    """Answers in a fixed order; `log` has the questions in the order of the requests."""

    overlaps_training = False

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.log: list[str] = []

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        question = str(self.tokenizer.decode(list(prompt_token_ids), skip_special_tokens=True))
        self.log.append(question)
        return [self._completion(f"{question}{member}") for member in range(num_completions)]


class Late(LastDigit):
    """The score of one sample is late; `log` gets it."""

    def __init__(self, sample: str, log: list[str]) -> None:
        super().__init__()
        self._late, self._log = sample, log

    async def score(self, sample: str, text: str, /) -> Score:
        for _ in range(100 * (sample == self._late)):
            await asyncio.sleep(0)
        self._log.append("scored")
        return await super().score(sample, text)


@pytest.mark.parametrize("late", ["a", "b", "ahead"])
async def test_without_overlap_replacements_wait_for_all_scores_so_that_their_order_is_that_of_the_prompts(
    tokenizer: Any, late: str
) -> None:
    engine, replaced = InRounds(tokenizer), list[str]()
    first = prompts(tokenizer, "a", "b", "keep", "c", "d", "ahead")
    further = further_for(first[:2], first[3:5], step=1)

    def replacement(update: int, group: RolloutGroup) -> Prompt[str] | None:
        if (prompt := further(update, group)) is not None:
            replaced.append(group.target)
        return prompt  # type: ignore[no-any-return]

    stream = GroupStream(
        engine, Late(late, engine.log), group_size=2, tokenizer=tokenizer, replacement=replacement
    )  # fmt: skip
    stream.submit(1, first[:3])
    stream.submit(2, first[5:])
    kept = [group.target async for groups in stream.groups(1) for group in groups]
    assert kept == ["target of keep", "target of c", "target of d"]
    assert replaced == ["target of a", "target of b"]
    requests = [place for place, entry in enumerate(engine.log) if entry != "scored"]
    assert engine.log[: requests[4]].count("scored") == 4 * 2, "asked for before all that was in flight had its score"


async def test_a_group_whose_reward_is_not_finite_ends_the_search_with_an_error(tokenizer: Any) -> None:
    def refuses(update: int, group: RolloutGroup) -> None:
        raise ValueError("a reward must be finite")

    for engine in (EchoEngine(tokenizer), InRounds(tokenizer)):
        stream = GroupStream(engine, LastDigit(), group_size=2, tokenizer=tokenizer, replacement=refuses)
        stream.submit(1, prompts(tokenizer, "a", "b"))
        with pytest.raises(ValueError, match="a reward must be finite"):
            assert [groups async for groups in stream.groups(1)]
        await stream.aclose()


# --- who watches --------------------------------------------------------------------------------------------------------


async def test_the_live_view_counts_a_replacement_to_the_update_that_it_is_for(tokenizer: Any) -> None:
    activity, asked = Activity(rollouts_per_update=4), prompts(tokenizer, "a", "b", "c", "d", "e")
    stream = GroupStream(
        WatchedEngine(EchoEngine(tokenizer), activity), LastDigit(), group_size=2, tokenizer=tokenizer,
        replacement=further_for(asked[:1], asked[4:], step=7),
    )  # fmt: skip
    stream.submit(7, asked[:2])
    stream.submit(8, asked[2:4])
    assert [groups async for groups in stream.groups(7)] and [groups async for groups in stream.groups(8)]
    assert {step: (batch.num_done, batch.total) for step, batch in activity.updates.items()} == {7: (6, 6), 8: (4, 4)}


def test_the_alarm_for_groups_without_variance_names_the_flags_that_are_left_to_turn() -> None:
    flat = {"zero_variance_share": 0.84, "correct_rate": 0.5}
    for further, flag in (
        ({}, "--dynamic-sampling generates"),
        ({"replaced_groups": 26}, "--drop-solved, --curriculum"),
    ):
        alarms = Alarms()
        raised = [alarm for step in range(1, 6) for alarm in alarms.observe(step, {**flat, **further})]
        assert [alarm.name for alarm in raised] == ["zero_variance"] and flag in raised[0].message


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_forecast_counts_as_flat_what_is_not_trained_on_or_what_is_replaced(dynamic: bool) -> None:
    score = Score(reward=0.0, correct=False, parse=ParseResult(answer="1"))
    punished = dataclasses.replace(score, reward=-0.5, parts={"overlong": -0.5})
    completion = Completion(token_ids=[1], logprobs=None, finish_reason="stop", policy_version=0)
    rollouts = tuple(
        Rollout(group_id=0, rollout_id=member, prompt_token_ids=[1], completion=completion, text="", score=one)
        for member, one in enumerate((score, punished))
    )
    config = dataclasses.replace(CONFIG, dynamic_sampling=dynamic)
    assert _rates([RolloutGroup(group_id=0, target="1", rollouts=rollouts)], config)["flat_share"] == dynamic


def test_a_forecast_has_the_groups_that_are_generated_and_not_trained_on() -> None:
    plain = forecast_of()
    config = dataclasses.replace(CONFIG, dynamic_sampling=True, max_sampling_factor=8)
    dynamic, factor = forecast_of(config), 1 / (1 - plain.flat_share)
    assert 1 < factor < 8 and sampling_factor(config, 1.0) == 8 and sampling_factor(CONFIG, 0.9) == 1
    assert dynamic.rollouts_bytes == pytest.approx(factor * plain.rollouts_bytes, rel=0.01)
    assert dynamic.generation_s > plain.generation_s and dynamic.training_s > plain.training_s
    low, high = dynamic.generation_range_s
    assert (
        low <= dynamic.generation_s <= high and high - low > plain.generation_range_s[1] - plain.generation_range_s[0]
    )
    said = [line for line in assumptions(dynamic, config, overlaps=False) if line.startswith("dynamic sampling:")]
    assert len(said) == 1 and f"{round(16 * factor)} groups are generated for the 16 of an update" in said[0]
    assert not any("dynamic" in line for line in assumptions(plain, CONFIG, overlaps=False))
