"""The training loop with the in-process engine: it learns, repeats, resumes, and counts what it leaves out."""

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ludic.config import GRPOConfig, RunPaths
from ludic.rollout.engine import Policy, WeightSyncReport
from ludic.rollout.errors import WeightSyncError
from ludic.rollout.local import LocalEngine
from ludic.task.prompts import load_tokenizer
from ludic.train.checkpoint import (
    CheckpointError,
    TrainerState,
    latest_checkpoint,
    list_checkpoints,
    masters_folder,
    read_state,
)
from ludic.train.losses import LOSSES
from ludic.train.schedule import schedule_factor
from ludic.train.summary import TrainingSummary
from ludic.train.trainer import GRPOTrainer
from ludic.types import ChatMessage, Completion, ParseResult, SamplingParams, Score

SMALL = GRPOConfig(
    rollouts_per_update=16,
    group_size=8,
    max_seq_len=64,
    max_completion_len=12,
    micro_token_budget=256,
    train_steps=2,
    learning_rate=3e-3,
    warmup_steps=0,
    eval_limit=4,
    save_every=0,
)
LOGGED_EVERY_STEP = {
    "loss", "reward_mean", "reward_std", "correct_rate", "parse_err_rate", "truncation_rate", "zero_variance_groups",
    "avg_completion_length", "total_completion_tokens", "prompt_tokens", "entropy", "clip_fraction", "kl", "logprob_gap",
    "grad_norm", "learning_rate", "policy_version", "staleness", "generation_s", "grading_s", "train_s", "sync_s",
    "tokens_per_s",
}  # fmt: skip


class AlwaysSeven:
    """Right is a 7, whatever was asked. `score_with` replaces the rule."""

    def __init__(self, score_with: Callable[[str], float] | None = None) -> None:
        self._score_with = score_with or (lambda text: float("7" in text))

    def messages(self, sample: int, /) -> list[ChatMessage]:
        return [{"role": "user", "content": f"Q{sample}"}]

    def target(self, sample: int, /) -> str:
        return "7"

    async def score(self, sample: int, text: str, /) -> Score:
        reward = self._score_with(text)
        return Score(reward=reward, correct=reward == 1.0, parse=ParseResult(answer=text or " "))


class ListLogger:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        self.rows.append({"step": step, **metrics})

    def event(self, step: int, message: str, /) -> None: ...

    def close(self) -> None: ...

    def updates(self) -> list[dict[str, float]]:
        """The rows of updates, without what a clock has measured."""
        return [
            {name: value for name, value in row.items() if not name.endswith("_s")}
            for row in self.rows
            if "reward_mean" in row
        ]


class Run:
    """A trainer with its engine, model and log, from a policy's folder."""

    read_state = staticmethod(read_state)

    def __init__(
        self,
        policy: Path,
        out_dir: Path,
        *,
        environment: AlwaysSeven | None = None,
        samples: Sequence[int] = range(5),
        resume: bool = False,
        with_reference: bool = False,
        model_dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        self.out_dir, self.logger = out_dir, ListLogger()
        self.config = dataclasses.replace(SMALL, **settings)
        self.paths = RunPaths(out_dir=out_dir, name="gsm8k")
        checkpoint = latest_checkpoint(self.paths.checkpoints) if resume else None
        self.model = load(masters_folder(checkpoint) if checkpoint else policy)
        self.engine = LocalEngine.from_pretrained(policy)  # always the initial weights, as a server that was restarted
        try:
            self.trainer = GRPOTrainer(
                config=self.config,
                model=self.model,
                model_name="digits",
                tokenizer=load_tokenizer(policy),
                engine=self.engine,
                environment=environment or AlwaysSeven(),
                train_samples=samples,
                eval_samples=range(100, 106),
                metric_logger=self.logger,
                paths=self.paths,
                model_dtype=model_dtype,
                reference_model=load(policy) if with_reference else None,
                resume_from=(checkpoint, self.read_state(checkpoint)) if checkpoint else None,
            )
        except ValueError:
            asyncio.run(self.engine.aclose())
            raise

    def go(self) -> TrainingSummary:
        async def train() -> TrainingSummary:
            try:
                return await self.trainer.run()
            finally:
                await self.engine.aclose()

        return asyncio.run(train())

    def rollouts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.paths.rollouts.read_text().splitlines()]


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    others = other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in one.state_dict().items())


# --- what a run does --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ten_updates(digit_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, TrainingSummary]:
    run = Run(
        digit_policy_dir, tmp_path_factory.mktemp("ten"), train_steps=10, rollouts_per_update=32, logprob_share=1.0
    )
    return run, run.go()


def test_the_policy_learns_what_is_rewarded(ten_updates: tuple[Run, TrainingSummary]) -> None:
    rewards = [row["reward_mean"] for row in ten_updates[0].logger.updates()]
    assert len(rewards) == 10
    assert rewards[0] < 0.35 and rewards[-1] > 0.8, rewards


def test_the_summary_counts_the_run_and_compares_before_with_after(ten_updates: tuple[Run, TrainingSummary]) -> None:
    run, summary = ten_updates
    assert summary.accuracy_before == 0.0 and summary.accuracy_after == 1.0
    assert summary.eval_problems == 4 and summary.updates == 10 and summary.rollouts == 320
    assert summary.completion_tokens == sum(row["completion_tokens"] for row in run.rollouts())
    assert [evaluation["step"] for evaluation in summary.evaluations] == [0, 10]
    assert summary.last_checkpoint == str(run.paths.checkpoints / "step_10")
    assert 0 < summary.seconds < 300


def test_every_step_logs_all_that_a_reader_of_the_run_needs(ten_updates: tuple[Run, TrainingSummary]) -> None:
    rows = [row for row in ten_updates[0].logger.rows if "reward_mean" in row]
    for row in rows:
        if row["zero_variance_groups"] < 4:
            assert row.keys() >= LOGGED_EVERY_STEP
    evaluations = [row for row in ten_updates[0].logger.rows if "eval/accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, 10]


def test_no_completion_claims_weights_that_it_was_not_sampled_with(ten_updates: tuple[Run, TrainingSummary]) -> None:
    run, _ = ten_updates
    assert all(row["policy_version"] == row["step"] - 1 for row in run.rollouts())
    assert [row["policy_version"] for row in run.logger.updates()] == list(range(1, 11))
    assert all(row["staleness"] == 0.0 for row in run.logger.updates())
    assert run.engine.policy_version == 10


def test_sampler_and_trainer_describe_one_distribution(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, temperature=0.7, rollouts_per_update=64, learning_rate=1e-3)
    run.go()
    for row in run.logger.updates():
        assert row["logprob_gap"] < 1e-5 and row["logprob_gap_max"] < 1e-4
        assert row["entropy"] > 0.01


def test_each_epoch_meets_every_sample_once_and_the_next_begins_where_it_ends(
    ten_updates: tuple[Run, TrainingSummary],
) -> None:
    asked = {row["group"]: row["prompt"] for row in ten_updates[0].rollouts()}
    order = [asked[group] for group in range(40)]
    epochs = [order[start : start + 5] for start in range(0, 40, 5)]
    assert all(sorted(epoch) == [f"Q{i}" for i in range(5)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "no epoch was shuffled"


def test_prompt_and_completion_stay_within_the_sequence_length(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, max_seq_len=12, max_completion_len=0, train_steps=1, eval_limit=0)
    run.go()
    assert {row["prompt_tokens"] + row["completion_tokens"] for row in run.rollouts()} == {12}
    assert {row["finish_reason"] for row in run.rollouts()} == {"length"}


def test_a_run_repeats_bit_for_bit_and_another_seed_does_not(digit_policy_dir: Path, tmp_path: Path) -> None:
    runs = [
        Run(digit_policy_dir, tmp_path / name, seed=seed, train_steps=3)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    ]
    for run in runs:
        run.go()
    one, again, other = runs
    assert one.logger.updates() == again.logger.updates()
    assert one.rollouts() == again.rollouts()
    assert same_weights(one.model, again.model)
    assert not same_weights(one.model, other.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_updates_and_two_after_a_resume_are_four_updates(
    digit_policy_dir: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    whole = Run(digit_policy_dir, tmp_path / "whole", train_steps=4, eval_every=2, model_dtype=dtype)
    summary = whole.go()
    first = Run(digit_policy_dir, tmp_path / "parts", train_steps=2, eval_every=2, model_dtype=dtype)
    first.go()
    torch.manual_seed(999)
    second = Run(digit_policy_dir, tmp_path / "parts", train_steps=4, eval_every=2, resume=True, model_dtype=dtype)
    resumed = second.go()

    assert second.logger.updates() == whole.logger.updates()[2:]
    assert second.rollouts() == whole.rollouts()  # one file, appended to
    assert same_weights(second.model, whole.model)
    moments, wanted = (run.trainer.learner.optimizer.state_dict()["state"] for run in (second, whole))
    assert all(torch.equal(moments[index]["exp_avg_sq"], wanted[index]["exp_avg_sq"]) for index in wanted)
    counted = ("updates", "rollouts", "completion_tokens", "accuracy_before", "accuracy_after", "eval_problems")
    assert [getattr(resumed, name) for name in counted] == [getattr(summary, name) for name in counted]
    assert [evaluation["step"] for evaluation in resumed.evaluations] == [0, 2, 4]
    assert resumed.seconds > read_state(tmp_path / "parts" / "checkpoints_gsm8k" / "step_2").seconds


class AskedOtherwise(AlwaysSeven):
    """The same problems with another prompt."""

    def messages(self, sample: int) -> list[ChatMessage]:
        return [{"role": "system", "content": "Be brief."}, *super().messages(sample)]


@pytest.mark.parametrize(
    ("changed", "environment"),
    [({}, AskedOtherwise()), ({"eval_temperature": 0.5}, None), ({"eval_limit": 3}, None)],
    ids=["prompt", "temperature", "problems"],
)
def test_a_resumed_run_that_evaluates_otherwise_measures_anew_and_is_compared_with_that(
    digit_policy_dir: Path, tmp_path: Path, changed: dict[str, Any], environment: AlwaysSeven | None
) -> None:
    settings: dict[str, Any] = {"train_steps": 2, "max_seq_len": 64, "micro_token_budget": 640}
    before = Run(digit_policy_dir, tmp_path, **settings).go()
    assert before.compared == before.evaluations and before.accuracy_before is not None
    settings |= {"train_steps": 3, **changed}
    summary = Run(digit_policy_dir, tmp_path, resume=True, environment=environment, **settings).go()
    assert [evaluation["step"] for evaluation in summary.evaluations] == [0, 2, 2, 3]
    assert summary.compared == summary.evaluations[2:]
    assert summary.accuracy_before is None and summary.accuracy_after is not None
    assert summary.eval_problems == changed.get("eval_limit", before.eval_problems)


def test_evaluations_that_do_not_say_how_they_were_made_are_measured_anew(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(digit_policy_dir, tmp_path, train_steps=1).go()

    def as_earlier_versions_wrote_it(checkpoint: Path) -> TrainerState:
        state = read_state(checkpoint)
        return dataclasses.replace(state, evaluations=[{**one, "settings": {}} for one in state.evaluations])

    monkeypatch.setattr(Run, "read_state", staticmethod(as_earlier_versions_wrote_it))
    summary = Run(digit_policy_dir, tmp_path, train_steps=2, resume=True).go()
    assert [one["step"] for one in summary.evaluations] == [0, 1, 1, 2]
    assert [one["step"] for one in summary.compared] == [1, 2] and summary.accuracy_before is None


def test_a_resumed_run_gives_the_engine_its_weights_before_the_first_rollout(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    Run(digit_policy_dir, tmp_path, train_steps=2, eval_limit=0, rollouts_per_update=64).go()
    run = Run(digit_policy_dir, tmp_path, train_steps=3, eval_limit=0, rollouts_per_update=64, resume=True)
    handed_over: list[tuple[int, bool]] = []
    original, checkpoint = run.engine.update_weights, load(tmp_path / "checkpoints_gsm8k" / "step_2")

    def look(model: torch.nn.Module, policy_version: int) -> None:
        assert isinstance(model, PreTrainedModel)
        handed_over.append((policy_version, same_weights(checkpoint, model)))

    async def update_weights(policy: Policy) -> WeightSyncReport:
        await policy.read(look)
        return await original(policy)

    run.engine.update_weights = update_weights  # type: ignore[method-assign]
    run.go()
    assert handed_over == [(2, True), (3, False)]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"data": Path("x")}, "the task's setting 'data' cannot be kept in a checkpoint: .*PosixPath"),
        ({"temperature": 2.0}, "the task has a setting 'temperature', and so has GRPOConfig"),
    ],
)
def test_a_setting_of_a_task_that_no_checkpoint_could_keep_is_refused_at_once(
    digit_policy_dir: Path, tmp_path: Path, task: dict[str, Any], message: str
) -> None:
    run = Run(digit_policy_dir, tmp_path)
    with pytest.raises(ValueError, match=message):
        GRPOTrainer(
            config=run.config,
            model=run.model,
            engine=run.engine,
            environment=AlwaysSeven(),
            train_samples=range(5),
            task=task,
        )
    asyncio.run(run.engine.aclose())


def test_a_run_that_is_done_already_trains_no_more(digit_policy_dir: Path, tmp_path: Path) -> None:
    first = Run(digit_policy_dir, tmp_path, train_steps=2)
    summary = first.go()
    again = Run(digit_policy_dir, tmp_path, train_steps=2, resume=True)
    assert dataclasses.replace(again.go(), seconds=summary.seconds) == summary
    assert again.logger.updates() == [] and same_weights(first.model, again.model)


def test_checkpoints_are_written_at_their_steps_and_the_last_few_stay(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=5, save_every=2, keep_checkpoints=2, eval_limit=0)
    run.go()
    assert [path.name for path in list_checkpoints(run.paths.checkpoints)] == ["step_4", "step_5"]
    assert same_weights(load(run.paths.checkpoints / "step_5"), run.model)


# --- updates that teach nothing ---------------------------------------------------------------------------------------


def test_an_update_without_any_variance_takes_no_step_but_counts(
    digit_policy_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(digit_policy_dir, tmp_path, environment=AlwaysSeven(lambda text: 0.25), weight_decay=0.1)
    summary = run.go()
    assert same_weights(run.model, load(digit_policy_dir))
    assert run.trainer.learner.optimizer.state_dict()["state"] == {}
    assert summary.updates == 2 and summary.rollouts == 32
    for row in run.logger.updates():
        assert row["zero_variance_groups"] == 2 and row["zero_variance_share"] == 1.0
        assert row["trained_sequences"] == 0 and row["reward_mean"] == 0.25 and "loss" not in row
    assert caplog.text.count("nothing to learn from") == 2


def test_groups_without_variance_are_left_out_and_the_others_trained_on(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, rollouts_per_update=64, train_steps=1, eval_limit=0)
    run.go()
    rewards: dict[int, set[float]] = {}
    for row in run.rollouts():
        rewards.setdefault(row["group"], set()).add(row["reward"])
    flat = sum(len(values) == 1 for values in rewards.values())
    (metrics,) = run.logger.updates()
    assert 0 < flat < 8
    assert metrics["zero_variance_groups"] == flat and metrics["trained_sequences"] == (8 - flat) * 8
    assert not same_weights(run.model, load(digit_policy_dir))


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_truncated_completions_are_masked_or_kept_as_the_flag_says(
    digit_policy_dir: Path, tmp_path: Path, mask_truncated: bool
) -> None:
    turns = iter(range(10_000))
    environment = AlwaysSeven(lambda text: float(next(turns) % 2))
    run = Run(
        digit_policy_dir,
        tmp_path,
        environment=environment,
        max_completion_len=3,
        train_steps=1,
        eval_limit=0,
        mask_truncated=mask_truncated,
    )
    run.go()
    (metrics,) = run.logger.updates()
    assert metrics["truncation_rate"] == 1.0
    assert metrics["truncated_masked"] == (16 if mask_truncated else 0)
    assert same_weights(run.model, load(digit_policy_dir)) == mask_truncated


# --- settings of the update -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_moves_the_policy_to_the_reward(digit_policy_dir: Path, tmp_path: Path, loss: str) -> None:
    run = Run(digit_policy_dir, tmp_path, loss=loss, train_steps=6, rollouts_per_update=32, eval_limit=0)
    run.go()
    rewards = [row["reward_mean"] for row in run.logger.updates()]
    assert rewards[-1] > rewards[0] + 0.2, rewards


def test_one_epoch_is_strictly_on_policy_and_two_are_not(digit_policy_dir: Path, tmp_path: Path) -> None:
    figures = []
    for epochs in (1, 2):
        run = Run(
            digit_policy_dir, tmp_path / str(epochs), epochs_per_update=epochs, train_steps=1, eval_limit=0,
            learning_rate=1e-2,
        )  # fmt: skip
        run.go()
        figures += run.logger.updates()
    once, twice = figures
    assert once["ratio_mean"] == 1.0 and once["clip_fraction"] == 0.0 and once["kl_old"] == 0.0
    assert twice["ratio_mean"] != 1.0 and twice["clip_fraction"] > 0.0 and twice["kl_old"] > 0.0


def test_the_gradient_does_not_depend_on_how_an_update_is_cut_or_recomputed(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    settings: dict[str, dict[str, Any]] = {
        "whole": {"micro_token_budget": 4096},
        "cut": {"micro_token_budget": 64, "logprob_chunk": 5},
        "recomputed": {"gradient_checkpointing": True},
    }
    runs = {
        name: Run(digit_policy_dir, tmp_path / name, train_steps=1, eval_limit=0, rollouts_per_update=64, **setting)
        for name, setting in settings.items()
    }
    for run in runs.values():
        run.go()
    figures = {name: run.logger.updates()[0] for name, run in runs.items()}
    assert figures["whole"]["micro_batches"] == 1 and figures["cut"]["micro_batches"] > 4
    for name in ("cut", "recomputed"):
        assert figures[name]["grad_norm"] == pytest.approx(figures["whole"]["grad_norm"], rel=1e-5)
        assert figures[name]["loss"] == pytest.approx(figures["whole"]["loss"], abs=1e-6)


def test_gradients_are_clipped_to_their_norm(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, max_grad_norm=1e-3, train_steps=1, eval_limit=0)
    seen: list[float] = []
    step = run.trainer.learner.optimizer.step

    def look(*arguments: Any, **options: Any) -> Any:
        squares = [parameter.grad.square().sum() for parameter in run.model.parameters() if parameter.grad is not None]
        seen.append(float(torch.stack(squares).sum().sqrt()))
        return step(*arguments, **options)

    run.trainer.learner.optimizer.step = look  # type: ignore[method-assign]
    run.go()
    (metrics,) = run.logger.updates()
    assert seen == [pytest.approx(1e-3, rel=1e-2)] and metrics["grad_norm"] > 1e-2


def test_the_penalty_to_the_reference_needs_a_reference_and_is_logged(digit_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a reference model is needed if, and only if, kl_coef is above 0"):
        Run(digit_policy_dir, tmp_path, kl_coef=0.1)
    with pytest.raises(ValueError, match="reference model"):
        Run(digit_policy_dir, tmp_path, kl_coef=0.0, with_reference=True)
    run = Run(digit_policy_dir, tmp_path, kl_coef=0.1, with_reference=True, eval_limit=0, train_steps=2)
    run.go()
    first, second = run.logger.updates()
    assert first["kl"] == pytest.approx(0.0, abs=1e-9) and second["kl"] > 1e-5


@pytest.mark.parametrize(("kl_coef", "trained"), [(0.0, 0), (0.1, 16)])
def test_an_update_of_groups_without_variance_trains_on_the_penalty_alone(
    digit_policy_dir: Path, tmp_path: Path, kl_coef: float, trained: int
) -> None:
    run = Run(
        digit_policy_dir, tmp_path, environment=AlwaysSeven(lambda _: 1.0), kl_coef=kl_coef, with_reference=kl_coef > 0,
        rollouts_per_update=16, group_size=4, train_steps=1, eval_limit=0,
    )  # fmt: skip
    run.go()
    (figures,) = run.logger.updates()
    assert figures["zero_variance_groups"] == 4 and figures["trained_sequences"] == trained
    assert ("kl_ref" in figures) == (kl_coef > 0)


def test_the_learner_is_told_how_many_sequences_have_no_loss(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=1, eval_limit=0, loss="grpo")
    seen: list[int] = []
    step = run.trainer.learner.step

    def look(**settings: Any) -> dict[str, float]:
        seen.append(settings["num_without_loss"])
        return step(**settings)

    run.trainer.learner.step = look  # type: ignore[method-assign]
    run.go()
    (figures,) = run.logger.updates()
    assert figures["zero_variance_groups"] > 0
    assert seen == [figures["zero_variance_groups"] * run.config.group_size]


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"warmup_steps": 0}, [1.0, 1.0, 1.0, 1.0]),
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1.0]),
        ({"warmup_steps": 0, "lr_schedule": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"warmup_steps": 2, "lr_schedule": "linear"}, [1 / 3, 2 / 3, 1.0, 0.5]),
        ({"warmup_steps": 0, "lr_schedule": "cosine"}, [1.0, 0.8535534, 0.5, 0.1464466]),
        ({"warmup_steps": 9, "lr_schedule": "cosine"}, [0.1, 0.2, 0.3, 0.4]),
    ],
    ids=str,
)
def test_the_learning_rate_rises_and_then_follows_its_schedule(settings: dict[str, Any], factors: list[float]) -> None:
    config = GRPOConfig(train_steps=4, **settings)
    assert [schedule_factor(config, step) for step in range(4)] == pytest.approx(factors)
    assert 0.0 <= schedule_factor(config, 40) <= 1.0


def test_the_optimizer_takes_the_learning_rate_of_its_step(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, warmup_steps=1, lr_schedule="linear", train_steps=3, eval_limit=0)
    run.go()
    assert [row["learning_rate"] for row in run.logger.updates()] == pytest.approx([1.5e-3, 3e-3, 1.5e-3])


# --- refusals and ends ------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_refused_with_its_place_and_length(digit_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training sample 2 is 10 tokens, more than --max-seq-len 8"):
        Run(digit_policy_dir, tmp_path, samples=[1, 2, 123456], max_seq_len=8, max_completion_len=4)


def test_a_policy_whose_masters_are_not_fp32_is_refused(digit_policy_dir: Path, tmp_path: Path) -> None:
    good = Run(digit_policy_dir, tmp_path)
    asyncio.run(good.engine.aclose())
    model = AutoModelForCausalLM.from_pretrained(digit_policy_dir, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is not float32"):
        GRPOTrainer(
            config=SMALL,
            model=model,
            model_name="digits",
            tokenizer=good.trainer.tokenizer,
            engine=good.engine,
            environment=AlwaysSeven(),
            train_samples=[1],
            eval_samples=[],
            metric_logger=ListLogger(),
            paths=good.paths,
        )


def test_no_samples_are_refused(digit_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no samples to train on"):
        Run(digit_policy_dir, tmp_path, samples=[])


class StopsInUpdate:
    """Hands generation on to an engine until the update that is to be interrupted; then it waits for ever."""

    overlaps_training = False

    def __init__(self, engine: LocalEngine, version: int) -> None:
        self._engine, self._version = engine, version
        self.reached = asyncio.Event()

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        if self.policy_version == self._version:
            self.reached.set()
            await asyncio.Event().wait()
        return await self._engine.generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        return await self._engine.update_weights(policy)

    def counts(self) -> dict[str, float]:
        return self._engine.counts()

    async def aclose(self) -> None:
        await self._engine.aclose()


@pytest.mark.parametrize(("interrupted_in", "saved"), [(0, []), (2, ["step_2"])])
async def test_a_cancelled_run_saves_its_last_finished_update(
    digit_policy_dir: Path, tmp_path: Path, interrupted_in: int, saved: list[str]
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=5, eval_limit=0)
    run.trainer.engine = engine = StopsInUpdate(run.engine, interrupted_in)
    training = asyncio.create_task(run.trainer.run())
    await engine.reached.wait()
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    await engine.aclose()
    assert [path.name for path in list_checkpoints(run.paths.checkpoints)] == saved
    assert all(row["step"] <= len(saved) * 2 for row in run.rollouts())
    if saved:
        checkpoint = run.paths.checkpoints / "step_2"
        state = read_state(checkpoint)
        assert (state.step, state.policy_version, state.rollouts) == (2, 2, 32)
        assert same_weights(load(checkpoint), run.model)


async def test_a_second_cancellation_while_generation_is_ended_does_not_cost_the_checkpoint(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    class EndsSlowly(StopsInUpdate):
        async def generate(
            self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
        ) -> list[Completion]:
            try:
                return await super().generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)
            except asyncio.CancelledError:
                ending.set()
                await asyncio.sleep(0.3)
                raise

    ending = asyncio.Event()
    run = Run(digit_policy_dir, tmp_path, train_steps=5, eval_limit=0)
    run.trainer.engine = engine = EndsSlowly(run.engine, 2)
    training = asyncio.create_task(run.trainer.run())
    await engine.reached.wait()
    training.cancel()
    await ending.wait()
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    await engine.aclose()
    assert [path.name for path in list_checkpoints(run.paths.checkpoints)] == ["step_2"]


async def test_a_checkpoint_that_is_there_already_is_not_written_again_by_a_cancelled_run(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=5, eval_limit=0, save_every=2)
    run.trainer.engine = engine = StopsInUpdate(run.engine, 2)
    training = asyncio.create_task(run.trainer.run())
    await engine.reached.wait()
    state_file = run.paths.checkpoints / "step_2" / "training" / "trainer_state.json"
    written = state_file.stat().st_mtime_ns
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    await engine.aclose()
    assert state_file.stat().st_mtime_ns == written


def test_a_scorer_that_fails_ends_the_run_is_seen_and_costs_no_finished_update(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    calls = iter(range(10_000))

    def breaks_in_the_third_update(text: str) -> float:
        if next(calls) == 40:
            raise RuntimeError("the scorer broke")
        return float("7" in text)

    run = Run(
        digit_policy_dir, tmp_path, environment=AlwaysSeven(breaks_in_the_third_update), train_steps=5, eval_limit=0
    )
    with pytest.raises(RuntimeError, match="the scorer broke"):
        run.go()
    assert same_weights(load(run.paths.checkpoints / "step_2"), run.model)


def test_a_sync_that_fails_ends_the_run_and_the_update_before_it_is_saved(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=5, eval_limit=0)
    original = run.engine.update_weights

    async def update_weights(policy: Policy) -> WeightSyncReport:
        if await policy.read(lambda _, version: version) == 2:
            raise WeightSyncError("the server is gone")
        return await original(policy)

    run.engine.update_weights = update_weights  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="the server is gone"):
        run.go()
    state = read_state(run.paths.checkpoints / "step_2")
    assert (state.step, state.policy_version, state.rollouts) == (2, 2, 32)
    assert same_weights(load(run.paths.checkpoints / "step_2"), run.model)


def test_weights_in_the_middle_of_an_update_are_never_saved(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=5, eval_limit=0, rollouts_per_update=64)
    step = run.trainer.learner.optimizer.step
    calls = iter(range(10))

    def half_a_step(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            with torch.no_grad():
                next(iter(run.model.parameters())).add_(1.0)
            raise RuntimeError("out of memory")
        return step(*arguments, **options)

    run.trainer.learner.optimizer.step = half_a_step  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        run.go()
    assert list_checkpoints(run.paths.checkpoints) == []


def test_a_disk_that_is_full_is_not_tried_twice(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def full(*_: Any, state: TrainerState, **__: Any) -> Path:
        tries.append(state.step)
        raise CheckpointError("No space left on device")

    monkeypatch.setattr("ludic.train.trainer.save_checkpoint", full)
    with pytest.raises(CheckpointError, match="No space left"):
        Run(digit_policy_dir, tmp_path, train_steps=5, save_every=2, eval_limit=0).go()
    assert tries == [2]


def poison_gradients(run: Run, monkeypatch: pytest.MonkeyPatch, updates: Sequence[int]) -> None:
    """Puts a NaN into the gradient of these updates."""
    norm = torch.nn.utils.get_total_norm

    def poisoned(gradients: Any) -> torch.Tensor:
        if run.trainer.state.step + 1 in updates:
            gradients[0][0, 0] = float("nan")
        return norm(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", poisoned)


def test_an_update_that_is_not_finite_is_skipped_and_counted(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=6, save_every=1, keep_checkpoints=9)
    poison_gradients(run, monkeypatch, updates=(2, 3, 5))
    run.go()
    assert [row.get("skipped_update") for row in run.logger.updates()] == [0, 1, 1, 0, 1, 0]
    assert run.trainer.state.skipped_updates == 3 and run.trainer.state.skipped_in_a_row == 0
    saved = [load(path) for path in list_checkpoints(run.paths.checkpoints)]
    changed = [not same_weights(before, after) for before, after in itertools.pairwise(saved)]
    assert changed == [False, False, True, False, True]


def test_three_updates_in_a_row_that_are_not_finite_end_the_run_with_a_diagnosis(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=9)
    poison_gradients(run, monkeypatch, updates=range(2, 9))
    with pytest.raises(FloatingPointError, match=r"updates 2 to 4 were not finite.*embed_tokens"):
        run.go()
    (saved,) = list_checkpoints(run.paths.checkpoints)
    assert read_state(saved).step == 4 and read_state(saved).skipped_in_a_row == 3
    assert all(torch.isfinite(parameter).all() for parameter in load(saved).parameters())
    assert same_weights(load(saved), run.model)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "--seed 0, this run has 1"),
        ({"group_size": 4}, "--group-size 8, this run has 4"),
        ({"samples": range(6)}, "the number of training samples 5, this run has 6"),
    ],
)
def test_a_resume_that_would_lose_its_place_in_the_data_is_refused(
    digit_policy_dir: Path, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    Run(digit_policy_dir, tmp_path, train_steps=1).go()
    with pytest.raises(ValueError, match=named):
        Run(digit_policy_dir, tmp_path, resume=True, **changed)


def test_an_evaluation_that_was_cut_off_is_made_up_for_by_the_resumed_run(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=1)
    evaluate = run.trainer._evaluate

    async def only_the_first() -> None:
        if run.trainer.state.step:
            raise WeightSyncError("gone")
        await evaluate()

    monkeypatch.setattr(run.trainer, "_evaluate", only_the_first)
    with pytest.raises(WeightSyncError):
        run.go()
    summary = Run(digit_policy_dir, tmp_path, train_steps=1, resume=True).go()
    assert [evaluation["step"] for evaluation in summary.evaluations] == [0, 1]
    assert summary.accuracy_before is not None and summary.accuracy_after is not None


# --- rollouts ahead of the policy -------------------------------------------------------------------------------------


class Remote:
    """An engine that stands for a server: it answers at once while the trainer works, and stamps by the request's start.

    `lag` stamps completions with versions older than they are; `in_turn` answers one request after the other.
    """

    overlaps_training = True

    def __init__(self, engine: LocalEngine, lag: int = 0, in_turn: bool = False) -> None:
        self._engine, self._lag, self._in_turn = engine, lag, in_turn
        self.events: list[tuple[str, int]] = []

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        version, place = self.policy_version, len(self.events)
        self.events.append(("request", version))
        done = await self._engine.generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)
        for _ in range(50 * (place % 8) * self._in_turn):
            await asyncio.sleep(0)
        return [dataclasses.replace(completion, policy_version=max(0, version - self._lag)) for completion in done]

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        self.events.append(("weights", await policy.read(lambda _, version: version)))
        return await self._engine.update_weights(policy)

    def counts(self) -> dict[str, float]:
        return self._engine.counts()

    async def aclose(self) -> None:
        await self._engine.aclose()


def test_with_a_staleness_of_one_the_next_update_is_sampled_while_this_one_is_trained(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=4, eval_limit=0, max_staleness=1, logprob_share=0.0)
    run.trainer.engine = engine = Remote(run.engine)
    run.go()
    # Two groups an update: those of updates 1 and 2 with the first weights, those of update n + 2 with weights n.
    requests = [("request", 0)] * 4
    for version in (1, 2):
        requests += [("weights", version)] + [("request", version)] * 2
    assert engine.events == [("weights", 0), *requests, ("weights", 3), ("weights", 4)]
    rows = [row for row in run.logger.rows if "reward_mean" in row]
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    assert all("logprob_gap" in row and row["tis_weight_mean"] > 0 for row in rows if row["trained_sequences"])
    assert {record["step"] for record in run.rollouts()} == {1, 2, 3, 4}


def test_strictly_on_policy_no_request_is_sent_before_the_weights_that_it_trains(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=3, eval_limit=0)
    run.trainer.engine = engine = Remote(run.engine)
    run.go()
    expected = [event for version in range(3) for event in (("weights", version), *[("request", version)] * 2)]
    assert engine.events == [*expected, ("weights", 3)]
    assert all(row["staleness"] == 0 for row in run.logger.updates())


def test_groups_older_than_the_limit_are_dropped_and_counted(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=3, eval_limit=0)
    run.trainer.engine = Remote(run.engine, lag=1)
    run.go()
    rows = run.logger.updates()
    assert [row["dropped_groups"] for row in rows] == [0, 2, 2]
    assert [row["staleness_max"] for row in rows] == [0, 1, 1]
    assert [row["trained_sequences"] for row in rows[1:]] == [0, 0]


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_training_on_groups_as_they_arrive_takes_the_same_step_as_training_on_all(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, epochs: int
) -> None:
    monkeypatch.setattr("ludic.train.learner.ENOUGH_TOKENS", 60)
    figures, models, pieces = [], [], []
    for name in ("waits", "streams"):
        run = Run(
            digit_policy_dir, tmp_path / name, train_steps=1, eval_limit=0, rollouts_per_update=64, loss=loss,
            epochs_per_update=epochs, kl_coef=0.1, with_reference=True, tis_cap=2.0,
        )  # fmt: skip
        if name == "streams":
            run.trainer.engine = Remote(run.engine, in_turn=True)
        accumulate = run.trainer.learner.accumulate
        sizes: list[int] = []

        def counted(samples: Any, watch: Any = None, accumulate: Any = accumulate, sizes: list[int] = sizes) -> None:
            sizes.append(len(samples))
            accumulate(samples, watch)

        run.trainer.learner.accumulate = counted  # type: ignore[method-assign]
        run.go()
        figures += run.logger.updates()
        models.append(run.model)
        pieces.append(sizes)
    waits, streams = figures
    assert len(pieces[0]) == 1 and len(pieces[1]) > 1 and sum(pieces[0]) == sum(pieces[1]) > 8
    assert streams["grad_norm"] == pytest.approx(waits["grad_norm"], rel=1e-3)
    assert streams["loss"] == pytest.approx(waits["loss"], rel=1e-3, abs=1e-5)
    before = torch.cat([parameter.detach().flatten() for parameter in load(digit_policy_dir).parameters()])
    one, other = (torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) for model in models)
    assert float((one - other).norm()) < 1e-3 * float((one - before).norm())


def test_on_policy_rollouts_ask_for_the_log_probs_of_a_share_of_the_groups_only(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    run = Run(digit_policy_dir, tmp_path, rollouts_per_update=64, logprob_share=0.25)
    asked = [[prompt.sampling.logprobs for prompt in run.trainer.prompts.take(update)] for update in (1, 2)]
    assert [flags.count(True) for flags in asked] == [2, 2]
    corrected = Run(digit_policy_dir, tmp_path / "corrected", tis_cap=2.0)
    assert all(prompt.sampling.logprobs for prompt in corrected.trainer.prompts.take(1))
    asyncio.run(run.engine.aclose())
    asyncio.run(corrected.engine.aclose())


def test_with_the_local_engine_a_run_ahead_of_its_policy_repeats_bit_for_bit(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    runs = [Run(digit_policy_dir, tmp_path / str(i), train_steps=4, eval_limit=0, max_staleness=1) for i in range(2)]
    for run in runs:
        run.go()
    assert runs[0].rollouts() == runs[1].rollouts()
    assert same_weights(runs[0].model, runs[1].model)


def test_what_was_generated_ahead_of_a_failure_is_not_recorded(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=6, eval_limit=0, max_staleness=1)
    original = run.trainer.learner.step

    def fails_in_the_third(**settings: Any) -> dict[str, float]:
        if run.trainer.state.step == 2:
            raise RuntimeError("boom")
        return original(**settings)

    run.trainer.learner.step = fails_in_the_third  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="boom"):
        run.go()
    assert {record["step"] for record in run.rollouts()} == {1, 2, 3}


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["accumulate", "step"])
def test_an_out_of_memory_names_the_flag_and_costs_no_finished_update(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=5, eval_limit=0)
    learner = run.trainer.learner
    method = "_backward" if where == "accumulate" else "_apply"
    original = getattr(learner, method)

    def full(*arguments: Any, **settings: Any) -> Any:
        if run.trainer.state.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments, **settings)

    monkeypatch.setattr(learner, method, full)
    with pytest.raises(MemoryError, match=r"ran out of memory in an update: lower --micro-token-budget 256 \(to 128"):
        run.go()
    assert read_state(run.paths.checkpoints / "step_2").step == 2
    assert all(parameter.grad is None for parameter in learner.masters.parameters)


def test_a_later_epoch_that_is_not_finite_is_left_out_and_the_earlier_ones_stay(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=5, eval_limit=0, epochs_per_update=2, save_every=1)
    norm, calls = torch.nn.utils.get_total_norm, iter(range(100))

    def poisoned(gradients: Any) -> torch.Tensor:
        if next(calls) == 3:  # the second epoch of the second update
            gradients[0][0, 0] = float("nan")
        return norm(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", poisoned)
    run.go()
    rows = run.logger.updates()
    assert sum(row.get("skipped_steps", 0) for row in rows) == 1
    assert not any(row.get("skipped_update") for row in rows), "its first epoch was taken"


def test_a_step_that_is_not_finite_in_every_update_is_said_each_time_and_ends_the_run(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=9, eval_limit=0, epochs_per_update=2)
    norm, calls, said = torch.nn.utils.get_total_norm, iter(range(100)), list[str]()

    def poisoned(gradients: Any) -> torch.Tensor:
        if next(calls) % 2:  # each second epoch
            gradients[0][0, 0] = float("nan")
        return norm(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", poisoned)
    monkeypatch.setattr(run.logger, "event", lambda step, message: said.append(message))
    with pytest.raises(FloatingPointError, match=r"updates 1 to 3 were not finite and were skipped, whole or in part"):
        run.go()
    assert [line.partition(": ")[0] for line in said] == [
        f"update {step} skipped 1 of its 2 optimizer steps" for step in (1, 2, 3)
    ]
    assert all("not finite: the gradient, in 1 of" in line for line in said)
    assert run.trainer.state.skipped_in_a_row == 3 and run.trainer.state.skipped_updates == 0


async def test_a_cancellation_during_the_optimizer_step_counts_logs_and_saves_the_update(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=5, eval_limit=0)
    original = run.trainer.learner.step
    training: asyncio.Task[TrainingSummary]
    loop = asyncio.get_running_loop()

    def cancelled_in_the_second(**settings: Any) -> dict[str, float]:
        if run.trainer.state.step == 1:
            asyncio.run_coroutine_threadsafe(cancel(), loop).result()
        return original(**settings)

    async def cancel() -> None:
        training.cancel()

    run.trainer.learner.step = cancelled_in_the_second  # type: ignore[method-assign]
    training = asyncio.create_task(run.trainer.run())
    with pytest.raises(asyncio.CancelledError):
        await training
    await run.engine.aclose()
    assert [row["step"] for row in run.logger.rows if "reward_mean" in row] == [1, 2]
    checkpoint = run.paths.checkpoints / "step_2"
    assert read_state(checkpoint).step == 2 and same_weights(load(checkpoint), run.model)
