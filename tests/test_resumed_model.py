"""A run is resumed however its model is spelt, and without it: the checkpoint holds everything. Another model is refused."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from environments.gsm8k import GSM8K
from ludic.config import RunPaths, from_arguments
from ludic.run.preparation import prepare
from ludic.survival.resumed_model import find_resumed_model, keep_model
from ludic.train.checkpoint import read_state
from tests.vllm_helpers import make_tiny_model

SCRIPT = Path(__file__).parent.parent / "examples" / "gsm8k" / "train_gsm8k.py"
FLAGS = [
    *("--engine", "local", "--rollouts-per-update", "8", "--group-size", "4", "--max-seq-len", "160"),
    *("--micro-token-budget", "640", "--max-tokens", "6", "--eval-limit", "4", "--logger", "none", "--no-checks"),
]


def train(folder: Path, problems: Path, model: str, *more: str) -> "subprocess.CompletedProcess[str]":
    """The script, run in `folder`, with its files in `folder/out`."""
    words = [*FLAGS, "--dataset", str(problems), "--model", model, "--out-dir", "out", *more]
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], cwd=folder, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def begun(digit_policy_dir: Path, digit_problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one update in `out`, whose model lay in `models/first` beside it, named from there."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(digit_policy_dir, folder / "models" / "first")
    done = train(folder, digit_problems, "models/first", "--train-steps", "1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """Copies of that run's files; what they name lies where it lay."""
    shutil.copytree(begun / "out", tmp_path / "out")
    return tmp_path


def rollouts(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "out" / "gsm8k_train_rollouts.jsonl").read_text().splitlines()]


def test_the_checkpoint_names_the_folder_so_that_it_is_found_from_any_other(begun: Path) -> None:
    assert read_state(begun / "out" / "checkpoints_gsm8k" / "step_1").model == str(begun / "models" / "first")


def test_without_its_model_a_run_goes_on_as_it_would_have_with_it(
    begun: Path, run: Path, digit_problems: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(begun / "out", whole / "out")
    (whole / "link").symlink_to(begun / "models" / "first")
    done = train(whole, digit_problems, "link/", "--train-steps", "2", "--resume")
    assert done.returncode == 0 and "which is not read" not in done.stdout, done.stderr

    first = begun / "models" / "first"
    hidden = first.rename(first.with_name("elsewhere"))
    try:
        resumed = train(run, digit_problems, f"{first}/", "--train-steps", "2", "--resume")
        with_reference = train(run, digit_problems, str(first), "--train-steps", "3", "--resume", "--kl-coef", "0.1")
    finally:
        hidden.rename(first)
    assert resumed.returncode == 0, resumed.stderr
    checkpoint = Path("out", "checkpoints_gsm8k", "step_1")
    assert f"{first}, which is not read: configuration and tokenizer are those of {checkpoint}" in resumed.stdout
    assert "changed since the checkpoint" not in resumed.stdout
    assert len(rollouts(run)) == 16

    def made(folder: Path) -> list[object]:
        return [(row["step"], row["prompt"], row["completion"], row["reward"]) for row in rollouts(folder)]

    assert made(run) == made(whole)
    assert read_state(run / "out" / "checkpoints_gsm8k" / "step_2").model == str(first)
    assert with_reference.returncode == 2
    assert f"compares with the model that the run began with, {first}" in with_reference.stderr
    assert "pass --kl-coef 0" in with_reference.stderr


# --- which model is meant ---------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `first` is the model of the run, `ckpt` its checkpoint, `other` another model, `moved` a copy of the first."""
    monkeypatch.chdir(tmp_path)
    make_tiny_model(tmp_path / "first", tie_word_embeddings=True, seed=1)
    make_tiny_model(tmp_path / "other", tie_word_embeddings=True, vocab_size=640)
    for name in ("ckpt", "moved"):
        shutil.copytree(tmp_path / "first", tmp_path / name)
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    (tmp_path / "ckpt" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    (tmp_path / "symlink").symlink_to("first")
    return tmp_path


@pytest.mark.parametrize("recorded", ["first", "{}/first", "./first/", "symlink"])
@pytest.mark.parametrize("given", ["first", "{}/first", "first/", "../{name}/first", "symlink", "other/../first"])
def test_one_folder_has_many_spellings(folders: Path, given: str, recorded: str) -> None:
    given, recorded = (text.format(folders, name=folders.name) for text in (given, recorded))
    assert find_resumed_model(given, recorded, folders / "ckpt") == (given, True)


@pytest.mark.parametrize("given", ["{}/first", "{}/first/", "{}/other/../first", "first"])
def test_where_it_is_gone_the_checkpoint_stands_in(folders: Path, given: str) -> None:
    shutil.rmtree(folders / "first")
    found = find_resumed_model(given.format(folders), str(folders / "first"), folders / "ckpt")
    assert found == (str(folders / "ckpt"), False)


@pytest.mark.parametrize("recorded", ["/elsewhere/first", "models/first"])
def test_where_it_was_moved_or_spelt_from_another_folder_the_configuration_tells(folders: Path, recorded: str) -> None:
    assert find_resumed_model("moved", recorded, folders / "ckpt") == ("moved", False)
    with pytest.raises(ValueError, match=f"belongs to {recorded}, not to --model other: pass --model {recorded}"):
        find_resumed_model("other", recorded, folders / "ckpt")


@pytest.mark.parametrize("given", ["other", "moved", "nowhere", "/nowhere", "acme/first"])
def test_another_model_is_refused(folders: Path, given: str) -> None:
    with pytest.raises(ValueError, match=f"belongs to {folders / 'first'}, not to --model {given}"):
        find_resumed_model(given, str(folders / "first"), folders / "ckpt", unreachable=True)


def test_a_name_on_the_hub_is_asked_for_there_and_replaced_where_that_cannot_be(folders: Path) -> None:
    name = "acme/first-1b"
    assert find_resumed_model(name, name, folders / "ckpt") == (name, True)
    assert find_resumed_model(name, name, folders / "ckpt", unreachable=True) == (str(folders / "ckpt"), False)


def test_the_checkpoint_itself_may_be_named(folders: Path) -> None:
    assert find_resumed_model("ckpt/", str(folders / "first"), folders / "ckpt") == ("ckpt/", False)


@pytest.mark.parametrize("linked", [True, False])
def test_what_a_server_was_started_with_stays_when_the_checkpoint_goes(
    folders: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    def cannot(*_args: object) -> None:
        raise OSError("another file system")

    if not linked:
        monkeypatch.setattr(os, "link", cannot)
    (folders / "ckpt" / "training").mkdir()
    weights = (folders / "ckpt" / "model.safetensors").read_bytes()
    for _ in range(2):  # a second resume makes it anew
        kept = keep_model(folders / "ckpt", folders / "out" / "kept")
    shutil.rmtree(folders / "ckpt")
    assert (kept / "model.safetensors").read_bytes() == weights
    assert (kept / "tokenizer.json").is_file() and not (kept / "training").exists()


def test_a_server_of_its_own_gets_a_folder_that_stays_and_another_keeps_the_name_that_it_serves(
    begun: Path, run: Path, digit_problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("train_gsm8k", SCRIPT)
    assert spec is not None and spec.loader is not None
    script: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(run)
    first = begun / "models" / "first"
    hidden = first.rename(first.with_name("elsewhere"))
    words = ["--dataset", str(digit_problems), "--model", str(first), "--max-seq-len", "160", "--no-checks", "--resume"]

    def files_and_name(*more: str) -> tuple[str, str]:
        args = script.parse_arguments([*words, *more])
        parts = prepare(
            args, from_arguments(args), RunPaths(out_dir=run / "out", name="gsm8k"), script.task_of(args, GSM8K())
        )
        return args.model, parts.served_as

    try:
        kept = str(run / "out" / "resumed_model")
        assert files_and_name("--start-server") == (kept, kept)
        assert files_and_name() == (str(run / "out" / "checkpoints_gsm8k" / "step_1"), str(first))
    finally:
        hidden.rename(first)
