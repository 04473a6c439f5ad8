"""TRL's side of a record, as far as it goes without TRL: it is given ludic's settings, and the picture shows both sides."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import record_trl

SETTINGS = {
    "rollouts_per_update": 64, "group_size": 16, "train_steps": 40, "seed": 3, "learning_rate": 8e-5, "lr_schedule": "linear",
    "warmup_steps": 2, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.99, "max_grad_norm": 1.0, "kl_coef": 0.0,
    "max_completion_len": 256, "max_seq_len": 512, "temperature": 0.8, "loss": "dapo",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A record with one seed, of which ludic and TRL were scored."""

    def scored(path: Path, accuracy: float) -> None:
        summary = {"strict_accuracy": accuracy, "strict_accuracy_ci95": [accuracy - 0.01, accuracy + 0.01]}
        path.with_name(f"{path.name}.summary.json").write_text(json.dumps(summary))
        path.write_text("")

    for name in ("seed_3", "trl_seed_3"):
        (tmp_path / name).mkdir()
    (tmp_path / "seed_3" / "gsm8k_train_start.json").write_text(json.dumps({"settings": SETTINGS}))
    curve = [
        {"rollouts": 64 * n, "seconds": 2.0 * n, "correct_rate": 0.1 * n, "greedy_strict_ci95": taken}
        for n, taken in ((1, None), (2, [0.08, 0.07, 0.09]), (3, None))
    ]
    (tmp_path / "seed_3" / "entry.json").write_text(json.dumps({"curve": curve}))
    lines = [{"step": n, "rollouts": 64 * n, "seconds": 5.0 * n, "correct_rate": 0.1 * n} for n in (1, 2)]
    (tmp_path / "trl_seed_3" / "trl.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored(tmp_path / "score_warm_up.jsonl", 0.06)
    scored(tmp_path / "seed_3" / "score_grpo.jsonl", 0.11)
    scored(tmp_path / "trl_seed_3" / "score_checkpoint-2.jsonl", 0.09)
    return tmp_path


def parse(folder: Path, *words: str) -> argparse.Namespace:
    return record_trl.build_parser().parse_args(["--record", str(folder), "--seed", "3", *words])


def test_trl_is_given_the_settings_of_the_record(folder: Path) -> None:
    args = parse(folder, "--batch-size", "32")
    given = record_trl.trl_settings(args, record_trl.settings_of(args))
    assert given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] == 64
    assert (given["num_generations"], given["learning_rate"], given["max_steps"]) == (16, 8e-5, 40)
    assert (given["temperature"], given["max_completion_length"], given["seed"]) == (0.8, 256, 3)
    with pytest.raises(ValueError, match="64 rollouts are no multiple"):
        record_trl.trl_settings(parse(folder, "--batch-size", "48"), SETTINGS)


def test_both_sides_begin_with_the_warm_up_and_end_with_their_last_checkpoint(folder: Path) -> None:
    sides = record_trl.sides(parse(folder))
    assert [one[:3] for one in sides["ludic"]["scored"]] == [(0, 0.0, 0.06), (128, 4.0, 0.08), (192, 6.0, 0.11)]
    assert [one[:3] for one in sides["TRL"]["scored"]] == [(0, 0.0, 0.06), (128, 10.0, 0.09)]
    assert record_trl.draw(parse(folder)).read_bytes().startswith(b"\x89PNG")
