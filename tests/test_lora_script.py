"""train_gsm8k.py --lora-rank as a user runs it: a run, its resume, its documented commands, and what it refuses."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ludic.cli import run_script
from tests.test_docs_commands import RUN_BY, run
from tests.vllm_helpers import make_tiny_model

SCRIPT = Path(__file__).parent.parent / "examples" / "gsm8k" / "train_gsm8k.py"
SMALL = [
    *("--engine", "local", "--rollouts-per-update", "8", "--group-size", "4", "--max-seq-len", "160"),
    *("--micro-token-budget", "640", "--max-tokens", "6", "--eval-limit", "4", "--logger", "none", "--no-checks"),
]
LORA = ["--lora-rank", "4", "--lora-target", "q_proj,v_proj", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def begun(digit_policy_dir: Path, digit_problems: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run of one update in `out` on the model in `base`; what it printed."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(digit_policy_dir, folder / "base")
    words = [*SMALL, *LORA, "--train-steps", "1", "--dataset", str(digit_problems)]
    words += ["--model", str(folder / "base"), "--out-dir", str(folder / "out")]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_a_run_says_how_much_it_trains_and_leaves_an_adapter(begun: tuple[Path, str]) -> None:
    folder, said = begun
    line = next(line for line in said.splitlines() if "LoRA of rank 4" in line)
    assert re.search(r"in 4 layers \(q_proj, v_proj\): [\d,]+ weights are trained, [\d.]+% of the base's [\d,]+$", line)
    settings = json.loads((folder / "out/checkpoints_gsm8k/step_1/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "base")


@pytest.fixture
def error(
    begun: tuple[Path, str],
    digit_problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Calls the script in this process on a copy of that run; the one line that it refuses with."""
    shutil.copytree(begun[0] / "out", tmp_path / "out")
    spec = importlib.util.spec_from_file_location("train_gsm8k_of_lora", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*flags: str, model: Path = begun[0] / "base") -> str:
        words = [*SMALL, "--dataset", str(digit_problems), "--model", str(model), "--out-dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words, *flags])
        with pytest.raises(SystemExit) as stop:
            run_script("train_gsm8k.py", script.main)
        assert stop.value.code == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_gsm8k.py: ")]
        assert len(said) == 1, said
        return said[0].removeprefix("train_gsm8k.py: error: ")

    return call


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--lora-rank", "4", "--lora-target", "query"],
            "--lora-target query: Qwen2ForCausalLM has no linear layers called",
        ),
        (["--resume"], r"step_1 is of a training with an adapter: pass --lora-rank 4$"),
        (["--resume", *LORA, "--lora-rank", "8"], r"--lora-rank is 8, and \S+ was made with 4: pass --lora-rank 4$"),
        (
            ["--resume", *LORA, "--lora-target", "k_proj", "--train-steps", "2"],
            r"--lora-target is k_proj, and \S+ has an adapter of q_proj,v_proj: pass --lora-target q_proj,v_proj$",
        ),
    ],
)
def test_an_adapter_that_cannot_be_trained_is_refused_in_one_line(
    error: Callable[..., str], flags: list[str], said: str
) -> None:
    assert re.search(said, error(*flags))


def test_without_its_base_an_adapter_is_not_resumed(
    error: Callable[..., str], begun: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (begun[0] / "base").rename(begun[0] / "moved")
    try:
        said = error("--resume", *LORA, "--train-steps", "2")
    finally:
        (begun[0] / "moved").rename(begun[0] / "base")
    assert re.match(
        r"--lora-rank 4 trains an adapter over the model that the run began with, \S+, which is not there", said
    )


def test_over_another_base_under_the_same_name_an_adapter_is_not_resumed(
    error: Callable[..., str], begun: tuple[Path, str]
) -> None:
    (begun[0] / "base").rename(begun[0] / "moved")
    try:
        make_tiny_model(begun[0] / "base", tie_word_embeddings=True, seed=5)
        said = error("--resume", *LORA, "--train-steps", "2")
    finally:
        shutil.rmtree(begun[0] / "base")
        (begun[0] / "moved").rename(begun[0] / "base")
    assert re.match(
        r"\S+adapter was trained over other weights than those of \S+ \(fingerprint \w+, here \w+\): put", said
    )


def test_a_base_that_was_moved_is_named_with_model_and_the_fingerprint_tells_it_from_another(
    error: Callable[..., str], begun: tuple[Path, str], digit_problems: Path, tmp_path: Path
) -> None:
    base, moved, other = (begun[0] / name for name in ("base", "moved", "other"))
    base.rename(moved)
    try:
        shutil.copytree(moved, other)
        file = other / "model.safetensors"
        weights = load_file(file)
        weights["model.norm.weight"] += 1
        save_file(weights, file, metadata={"format": "pt"})
        refused = error("--resume", *LORA, "--train-steps", "2", model=other)
        words = [
            *SMALL,
            *LORA,
            "--dataset",
            str(digit_problems),
            "--model",
            str(moved),
            "--out-dir",
            str(tmp_path / "out"),
        ]
        words += ["--resume", "--train-steps", "2"]
        done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=200)
    finally:
        moved.rename(base)
    assert "trained over other weights than those of" in refused
    assert done.returncode == 0, done.stderr
    assert f"{moved} is taken if its weights are the same" in done.stdout
    assert (tmp_path / "out/checkpoints_gsm8k/step_2/adapter").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_page_on_lora_train_resume_and_evaluate(
    tmp_path: Path, digit_policy_dir: Path, digit_problems: Path
) -> None:
    for name in ("examples", "environments"):
        (tmp_path / name).symlink_to(SCRIPT.parents[2] / name)
    (tmp_path / "PATH_OF_A_SMALL_MODEL").symlink_to(digit_policy_dir)
    (tmp_path / "FOLDER").symlink_to(digit_problems)
    place = "tests/test_lora_script.py::test_the_commands_of_the_page_on_lora_train_resume_and_evaluate"
    train, resume, evaluate = (text for text, by in RUN_BY.items() if by == place)
    assert "LoRA of rank 16" in run(train, tmp_path)
    assert "continuing from" in run(resume, tmp_path)
    assert "accuracy" in run(evaluate, tmp_path)
    assert (tmp_path / "checkpoints_gsm8k" / "step_4" / "adapter" / "adapter_model.safetensors").is_file()
