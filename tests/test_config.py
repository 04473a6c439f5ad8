"""The settings: every bad one is refused in one line that names its flag, and the flags are the fields."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from ludic.config import LOSS_NAMES, GRPOConfig, RunPaths, add_arguments, from_arguments
from ludic.train.losses import LOSSES

FIELDS = dataclasses.fields(GRPOConfig)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_arguments(made)
    return made


def parse(*flags: str) -> GRPOConfig:
    return from_arguments(parser().parse_args(flags))


@pytest.mark.parametrize(
    ("flags", "named", "said"),
    [
        (["--rollouts-per-update", "0"], "--rollouts-per-update", "at least 1"),
        (["--rollouts-per-update", "12"], "--rollouts-per-update 12", "--group-size 8"),
        (["--group-size", "1"], "--group-size", "at least 2"),
        (["--group-size", "-2"], "--group-size", "at least 2"),
        (["--max-seq-len", "0"], "--max-seq-len", "at least 1"),
        (["--train-steps", "0"], "--train-steps", "at least 1"),
        (["--epochs-per-update", "0"], "--epochs-per-update", "at least 1"),
        (["--micro-token-budget", "0"], "--micro-token-budget", "at least 1"),
        (["--micro-token-budget", "1023"], "--micro-token-budget 1023", "--max-seq-len 1024"),
        (["--logprob-chunk", "0"], "--logprob-chunk", "at least 1"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints", "at least 1"),
        (["--temperature", "0"], "--temperature", "above 0"),
        (["--temperature", "-1"], "--temperature", "above 0"),
        (["--lr", "0"], "--learning-rate", "above 0"),
        (["--lr", "-0.1"], "--learning-rate", "above 0"),
        (["--max-tokens", "1024"], "--max-completion-len 1024", "--max-seq-len 1024"),
        (["--max-tokens", "-1"], "--max-completion-len", "negative"),
        (["--warmup-steps", "-1"], "--warmup-steps", "negative"),
        (["--weight-decay", "-0.1"], "--weight-decay", "negative"),
        (["--max-grad-norm", "-1"], "--max-grad-norm", "negative"),
        (["--kl-coef", "-0.1"], "--kl-coef", "negative"),
        (["--tis-cap", "-1"], "--tis-cap", "negative"),
        (["--max-staleness", "-1"], "--max-staleness", "negative"),
        (["--logprob-share", "1.5"], "--logprob-share", "0 to 1"),
        (["--eval-every", "-1"], "--eval-every", "negative"),
        (["--eval-limit", "-1"], "--eval-limit", "negative"),
        (["--eval-temperature", "-1"], "--eval-temperature", "negative"),
        (["--save-every", "-1"], "--save-every", "negative"),
        (["--clip-low", "1.5"], "--clip-low", "1"),
        (["--clip-low", "-0.1"], "--clip-low", "0"),
        (["--clip-high", "-0.1"], "--clip-high", "negative"),
        (["--adam-beta1", "1"], "--adam-beta1", "below 1"),
        (["--adam-beta2", "-0.1"], "--adam-beta2", "0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_out_of_range_is_one_line_with_its_flag(flags: list[str], named: str, said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse(*flags)
    message = str(refusal.value)
    assert named in message and said in message and "\n" not in message


@pytest.mark.parametrize("name", [setting.name for setting in FIELDS if "float" in str(setting.type)])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_is_refused_everywhere(name: str, value: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=flag):
        parse(flag, value)


def test_an_unknown_loss_is_refused_by_the_dataclass_and_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--loss ppo is not one of grpo, dr_grpo, dapo, gspo, cispo"):
        GRPOConfig(loss="ppo")
    with pytest.raises(SystemExit) as stop:
        parse("--loss", "ppo")
    assert stop.value.code == 2 and "--loss" in capsys.readouterr().err


def test_the_names_of_the_losses_are_those_of_the_losses() -> None:
    assert tuple(LOSSES) == LOSS_NAMES


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="--lr-schedule"):
        GRPOConfig(lr_schedule="sawtooth")  # type: ignore[arg-type]


def test_without_flags_the_settings_are_the_defaults_of_the_dataclass() -> None:
    assert parse() == GRPOConfig()


def test_every_field_has_a_flag_that_sets_it() -> None:
    other = {"loss": "gspo", "lr_schedule": "cosine", "group_size": "4", "max_seq_len": "512", "ratio_to": "sampler",
             "normalisation": "prompt_mean", "baseline": "leave_one_out", "advantage_std": "batch", "dual_clip": "3.0",
             "importance_mask": "token", "lora_sync": "adapter"}  # fmt: skip
    needs = {
        "lora_sync": ("--lora-rank", "8"),
        "mask_low": ("--importance-mask", "token"),
        "mask_high": ("--importance-mask", "geometric", "--mask-low", "0"),
        "overlong_buffer": ("--max-tokens", "16"),
    }
    for setting in FIELDS:
        flag = "--" + setting.name.replace("_", "-")
        if "bool" in str(setting.type):
            assert getattr(parse(flag), setting.name) is True
            assert getattr(parse(flag.replace("--", "--no-", 1)), setting.name) is False
            continue
        if setting.name in other:
            text = other[setting.name]
        elif "int" in str(setting.type):
            text = str(getattr(GRPOConfig(), setting.name) + 8)
        else:
            text = "0.5"
        value = getattr(parse(flag, text, *needs.get(setting.name, ())), setting.name)
        assert str(value) == text and value != setting.default


def test_help_shows_every_field_in_its_group_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # so that no help text is broken into lines
    group, flag, shown = "", "", dict[str, tuple[str, str]]()
    for line in parser().format_help().splitlines():
        if line.endswith(":"):
            group = line.removesuffix(":")
        elif line.startswith("  --"):
            flag = line.split()[0].rstrip(",")
            shown[flag] = (group, line)
        elif flag and line:
            shown[flag] = (group, f"{shown[flag][1]} {line.strip()}")
    for setting in FIELDS:
        in_group, line = shown["--" + setting.name.replace("_", "-")]
        assert in_group == setting.metadata["group"]
        assert setting.metadata["help"] in line
        if setting.default is not None:
            assert f"(default: {setting.default})" in line


def test_the_short_names_are_the_long_ones() -> None:
    assert parse("--lr", "3e-5").learning_rate == 3e-5
    assert parse("--max-tokens", "77").max_completion_len == 77


def test_flags_of_others_are_left_alone() -> None:
    made = parser()
    made.add_argument("--model")
    config = from_arguments(made.parse_args(["--model", "x", "--seed", "3"]))
    assert config == GRPOConfig(seed=3)


def test_a_completion_is_capped_by_what_the_prompt_leaves_and_by_its_own_limit() -> None:
    free = GRPOConfig(max_seq_len=100)
    assert free.max_prompt_len == 99
    assert [free.completion_cap(length) for length in (1, 60, 99)] == [99, 40, 1]
    capped = GRPOConfig(max_seq_len=100, max_completion_len=30)
    assert [capped.completion_cap(length) for length in (1, 60, 71, 99)] == [30, 30, 29, 1]


def test_an_update_has_as_many_groups_as_fit_its_rollouts() -> None:
    assert GRPOConfig(rollouts_per_update=24, group_size=6).groups_per_update == 4


def test_a_run_writes_the_files_that_the_readme_names(tmp_path: Path) -> None:
    paths = RunPaths(out_dir=tmp_path, name="gsm8k")
    names = [path.name for path in (paths.rollouts, paths.metrics, paths.summary, paths.checkpoints, paths.curve)]
    assert names == [
        "gsm8k_train_rollouts.jsonl",
        "gsm8k_train_metrics.jsonl",
        "gsm8k_train_summary.json",
        "checkpoints_gsm8k",
        "gsm8k_train_reward.png",
    ]
    assert all(path.parent == tmp_path for path in (paths.rollouts, paths.checkpoints))


def test_a_budget_of_auto_is_left_to_the_trial() -> None:
    assert parse("--micro-token-budget", "auto").micro_token_budget is None
    assert parse().micro_token_budget == 16384


def test_stale_rollouts_are_corrected_unless_it_is_switched_off_and_on_policy_ones_are_not() -> None:
    assert parse().importance_cap is None
    assert parse("--max-staleness", "1").importance_cap == 2.0
    assert parse("--max-staleness", "1", "--tis-cap", "0").importance_cap is None
    assert parse("--tis-cap", "3").importance_cap == 3.0


def test_the_share_of_groups_with_log_probs_is_the_same_in_every_update() -> None:
    config = parse("--logprob-share", "0.1", "--rollouts-per-update", "256")
    chosen = [config.wants_logprobs(group_id) for group_id in range(96)]
    assert [sum(chosen[first : first + 32]) for first in (0, 32, 64)] == [4, 4, 4]
    assert not any(parse("--logprob-share", "0").wants_logprobs(group_id) for group_id in range(64))
    assert all(parse("--logprob-share", "1").wants_logprobs(group_id) for group_id in range(64))
