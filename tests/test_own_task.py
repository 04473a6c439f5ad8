"""A second task needs an environment and a few lines: it is trained by one call, from flags or from Python."""

import asyncio
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ludic import GRPOConfig, GRPOTrainer, LocalEngine
from ludic.config import RunPaths, from_arguments
from ludic.run import preparation
from ludic.task import prompts
from ludic.train import inputs

SCRIPT = Path(__file__).parents[1] / "examples" / "sums.py"
FLAGS = [
    *(
        "--engine",
        "local",
        "--rollouts-per-update",
        "16",
        "--group-size",
        "8",
        "--max-seq-len",
        "96",
        "--max-tokens",
        "12",
    ),
    *("--micro-token-budget", "640", "--lr", "3e-3", "--warmup-steps", "0", "--eval-limit", "4", "--largest", "4"),
    *("--logger", "none"),
]
SHORT = GRPOConfig(
    rollouts_per_update=8, group_size=4, max_seq_len=96, max_completion_len=12, micro_token_budget=640, train_steps=1
)


@pytest.fixture(scope="module")
def sums() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def train(policy: Path, home: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, str(SCRIPT), "--model", str(policy), "--out-dir=~/out", *FLAGS, *more]
    env = {"HOME": str(home), "PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=200, env=env)


# --- from flags ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(digit_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The home folder of a run of two updates, and what the run printed."""
    home = tmp_path_factory.mktemp("sums")
    done = train(digit_policy_dir, home, "--train-steps", "2")
    assert done.returncode == 0, done.stderr
    return home, done.stdout


def test_a_second_task_leaves_the_same_files_under_a_name_of_its_own(finished: tuple[Path, str]) -> None:
    out_dir = finished[0] / "out"
    kinds = (
        "config.toml",
        "metrics.jsonl",
        "prompt.json",
        "report.html",
        "reward.png",
        "rollouts.jsonl",
        "start.json",
        "summary.json",
    )
    assert {path.name for path in out_dir.iterdir()} == {
        "checkpoints_sums", "run.lock", *(f"sums_train_{kind}" for kind in kinds)
    }  # fmt: skip
    summary = json.loads((out_dir / "sums_train_summary.json").read_text())
    assert (summary["updates"], summary["rollouts"], summary["eval_problems"]) == (2, 32, 3)
    assert (out_dir / "sums_train_reward.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_task_ends_with_the_picture_and_the_table_of_before_and_after(finished: tuple[Path, str]) -> None:
    said = finished[1]
    assert "3 held-out problems, temperature 0" in said and "  accuracy  " in said
    assert "strict" not in said and "qwen" not in said  # the rules of another task
    assert "2 updates, 32 rollouts" in said and "sums_train_reward.png" in said
    block = said[said.index("GRPO of ") :]  # what a person pastes into a message
    facts = dict(re.findall(r"^  (settings|machine|engine|command|seconds): +(.+)$", block, flags=re.MULTILINE))
    assert facts["settings"].startswith("16 rollouts an update, dapo, lr ") and "CPU core" in facts["machine"]
    assert re.match(r"local; python [\d.]+, torch [\w.+]+, transformers [\d.]+$", facts["engine"])
    assert "sums.py" in facts["command"]
    assert re.match(r"generation [\d.]+s, training [\d.]+s, syncs [\d.]+s, evaluation [\d.]+s$", facts["seconds"])
    long = [line for line in block.splitlines() if len(line) > 80 and str(finished[0]) not in line]
    assert [line for line in long if not line.startswith(("  command:", "GRPO of"))] == [] and "\x1b" not in block
    assert "the first prompt, as it is rendered: '<|user|>What is " in said


def test_a_second_task_is_resumed_and_its_own_settings_are_compared(
    finished: tuple[Path, str], digit_policy_dir: Path
) -> None:
    resumed = train(digit_policy_dir, finished[0], "--train-steps", "3", "--resume", "--no-checks", "--largest=5")
    assert resumed.returncode == 2
    assert (
        "changed since the checkpoint, so this is not the run that was interrupted: --largest was 4, is 5"
        in resumed.stdout
    )
    resumed = train(digit_policy_dir, finished[0], "--train-steps", "3", "--resume", "--no-checks")
    assert resumed.returncode == 0, resumed.stderr
    assert "changed since" not in resumed.stdout and "the whole run: 3 updates, 48 rollouts" in resumed.stdout


def test_the_checks_of_a_resumed_run_count_the_checkpoints_of_its_own_name(
    sums: SimpleNamespace, finished: tuple[Path, str], digit_policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def quick_checks(*given: Any, num_checkpoints: int) -> list[Any]:
        counted.append(num_checkpoints)
        return []

    monkeypatch.setattr(preparation, "quick_checks", quick_checks)
    out_dir = finished[0] / "out"
    for more in ([], ["--resume"]):
        words = ["--model", str(digit_policy_dir), "--out-dir", str(out_dir), *FLAGS, *more]
        args = sums.build_parser().parse_args(words)
        preparation.prepare(args, from_arguments(args), RunPaths(out_dir=out_dir, name=sums.TASK.file_name), sums.TASK)
    assert counted == [0, len(list((out_dir / "checkpoints_sums").iterdir()))] and counted[1] > 0


def test_a_task_without_samples_is_refused_in_one_line(digit_policy_dir: Path, tmp_path: Path) -> None:
    refused = train(digit_policy_dir, tmp_path, "--largest", "0")
    assert (refused.returncode, refused.stderr) == (2, "sums.py: error: there are no samples to train on\n")


def test_every_training_prompt_is_tokenised_once(
    sums: SimpleNamespace, digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []

    def encode(tokenizer: Any, messages: Any, **more: Any) -> list[int]:
        encoded.append(messages[-1]["content"])
        return prompts.encode_prompt(tokenizer, messages, **more)

    def encode_all(tokenizer: Any, chats: Any) -> list[list[int]]:
        chats = list(chats)
        encoded.extend(messages[-1]["content"] for messages in chats)
        return prompts.encode_prompts(tokenizer, chats)

    monkeypatch.setattr(preparation, "encode_prompts", encode_all)
    monkeypatch.setattr(inputs, "encode_prompt", encode)
    words = ["--model", str(digit_policy_dir), "--out-dir", str(tmp_path), *FLAGS, "--train-steps", "1", "--no-checks"]
    args = sums.build_parser().parse_args([*words, "--eval-limit", "0"])
    asyncio.run(sums.train_from_flags(args, sums.TASK))
    train_samples = sums.load_samples(args).train
    asked = [sums.Sums().messages(sample)[0]["content"] for sample in train_samples]
    assert len(asked) > 10 and [encoded.count(text) for text in asked] == [1] * len(asked)


def test_a_second_task_is_evaluated_by_one_call_and_resumed_on_the_same_problems_only(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    def evaluate(*more: str) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, str(SCRIPT.with_name("eval_sums.py")), "--model", str(digit_policy_dir), *more]
        words += ["--out-dir=~/out", "--engine", "local", "--max-tokens", "12"]
        env = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(words, capture_output=True, text=True, timeout=200, env=env)

    first = evaluate("--largest", "4", "--limit", "2")
    assert first.returncode == 0, first.stderr
    assert f"Sums: {digit_policy_dir.name}" in first.stdout and "strict" not in first.stdout
    others = evaluate("--largest", "5", "--resume-eval")
    assert others.returncode == 2 and "made with other settings: largest 4, now 5; use another --out" in others.stderr
    finished = evaluate("--largest", "4", "--resume-eval")
    assert finished.returncode == 0, finished.stderr
    summary = json.loads((tmp_path / "out" / "sums_eval.jsonl.summary.json").read_text())
    assert (summary["num_problems"], summary["num_taken_over"], summary["settings"]["largest"]) == (3, 2, 4)


# --- from Python --------------------------------------------------------------------------------------------------------


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def test_a_run_from_python_needs_a_model_an_engine_an_environment_and_samples(
    sums: SimpleNamespace, digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = LocalEngine.from_pretrained(digit_policy_dir)
    samples = [sums.Sum(a, 2) for a in range(5)]
    trainer: GRPOTrainer[Any] = GRPOTrainer(
        config=SHORT, model=load(digit_policy_dir), engine=engine, environment=sums.Sums(), train_samples=samples
    )

    async def go() -> Any:
        try:
            return await trainer.run()
        finally:
            await engine.aclose()

    summary = asyncio.run(go())
    assert (summary.updates, summary.evaluations) == (1, [])
    rows = [json.loads(line) for line in (tmp_path / "sums_train_metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] and "reward_mean" in rows[0]
    checkpoint = tmp_path / "checkpoints_sums" / "step_1"
    assert summary.last_checkpoint == str(checkpoint.relative_to(tmp_path))
    assert (checkpoint / "tokenizer.json").is_file()
    assert trainer.state.model == str(digit_policy_dir)


def test_a_model_that_was_made_in_code_has_to_be_named(sums: SimpleNamespace, digit_policy_dir: Path) -> None:
    model = load(digit_policy_dir)
    model.name_or_path = ""
    engine = LocalEngine.from_pretrained(digit_policy_dir)
    with pytest.raises(ValueError, match="give model_name"):
        GRPOTrainer(config=SHORT, model=model, engine=engine, environment=sums.Sums(), train_samples=[sums.Sum(1, 2)])
    asyncio.run(engine.aclose())


def test_prompts_of_other_samples_are_refused(sums: SimpleNamespace, digit_policy_dir: Path) -> None:
    engine = LocalEngine.from_pretrained(digit_policy_dir)
    with pytest.raises(ValueError, match="train_prompts holds 2 prompts, train_samples 1 samples"):
        GRPOTrainer(
            config=SHORT,
            model=load(digit_policy_dir),
            engine=engine,
            environment=sums.Sums(),
            train_samples=[sums.Sum(1, 2)],
            train_prompts=[[1], [2]],
        )
    asyncio.run(engine.aclose())
