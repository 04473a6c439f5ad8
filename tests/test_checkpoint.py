"""Checkpoints: whole or not there, loadable by others, and exact."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ludic.training.checkpoint import (
    CheckpointError,
    TrainerState,
    latest_checkpoint,
    list_checkpoints,
    load_optimizer,
    read_state,
    save_checkpoint,
)
from tests.vllm_helpers import make_tiny_model, make_tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return make_tiny_model(tmp_path / "initial", tie_word_embeddings=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def adamw(model: PreTrainedModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_one_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.randint(5, 200, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def state_at(step: int) -> TrainerState:
    return TrainerState(step=step, policy_version=step + 1, model="tiny", config={"group_size": 2}, rollouts=8 * step)


def save(
    folder: Path,
    model: PreTrainedModel,
    step: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    keep: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Path:
    return save_checkpoint(
        folder,
        model=model,
        weights=model.state_dict(),
        tokenizer=make_tiny_tokenizer(),
        optimizer=adamw(model) if optimizer is None else optimizer,
        state=state_at(step),
        model_dtype=dtype,
        keep=keep,
    )


def embeddings(model: PreTrainedModel) -> torch.Tensor:
    return model.get_parameter("model.embed_tokens.weight")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_a_model_folder_that_transformers_loads(folder: Path, model: PreTrainedModel) -> None:
    checkpoint = save(folder, model, 3)
    assert checkpoint == folder / "step_3"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.encode("12 + 7") == make_tiny_tokenizer().encode("12 + 7")
    assert tokenizer.chat_template == make_tiny_tokenizer().chat_template


def test_config_json_names_the_dtype_that_the_model_came_in_and_the_masters_stay_fp32(
    folder: Path, model: PreTrainedModel
) -> None:
    with torch.no_grad():
        embeddings(model).add_(1e-4)  # what bf16 would round away
    checkpoint = save(folder, model, 1, dtype=torch.bfloat16)
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").dtype == torch.bfloat16
    masters = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert torch.equal(embeddings(masters), embeddings(model))


def test_the_state_is_read_back_as_it_was_written(folder: Path, model: PreTrainedModel) -> None:
    assert read_state(save(folder, model, 5)) == state_at(5)


def test_training_that_goes_on_from_a_checkpoint_takes_the_very_same_step(folder: Path, model: PreTrainedModel) -> None:
    optimizer = adamw(model)
    train_one_step(model, optimizer)
    checkpoint = save(folder, model, 1, optimizer=optimizer)
    train_one_step(model, optimizer)  # draws its data from the global generator, which is restored too

    again = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(12345)
    restored = torch.optim.AdamW(again.parameters(), lr=9.0)
    load_optimizer(checkpoint, restored, CPU)
    train_one_step(again, restored)

    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    first, second = optimizer.state_dict(), restored.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for index, moments in first["state"].items():
        for name, value in moments.items():
            assert torch.equal(second["state"][index][name], value)


def test_the_last_few_stay_in_the_order_of_their_numbers(folder: Path, model: PreTrainedModel) -> None:
    for step in (9, 10, 11):
        save(folder, model, step, keep=2)
    assert [path.name for path in list_checkpoints(folder)] == ["step_10", "step_11"]
    assert names(folder / "step_11") == names(folder / "step_10")


def test_the_checkpoint_just_written_stays_even_where_later_ones_of_another_attempt_lie(
    folder: Path, model: PreTrainedModel
) -> None:
    save(folder, model, 8)
    written = save(folder, model, 3, keep=1)
    assert written.is_dir()


def test_what_is_not_a_finished_checkpoint_is_not_listed(folder: Path, model: PreTrainedModel) -> None:
    assert latest_checkpoint(folder / "nowhere") is None
    whole = save(folder, model, 2)
    (folder / ".step_3.partial").mkdir()
    (folder / ".step_3.partial" / "trainer_state.json").write_text("{}")
    (folder / "step_4").mkdir()  # without a state: not ours
    (folder / "step_5.backup").mkdir()
    (folder / "step_6").write_text("a file")
    assert list_checkpoints(folder) == [whole]
    assert latest_checkpoint(folder) == whole


class Killed(BaseException):
    """Stands for the end of the process: nothing may run after it but what the operating system does."""


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_a_kill_between_writing_and_renaming_leaves_the_earlier_checkpoint(
    folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    save(folder, model, 1)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "rename", killed)
        save(folder, model, step)
    assert [path.name for path in list_checkpoints(folder)] == ["step_1"]
    assert read_state(folder / "step_1") == state_at(1)

    save(folder, model, step)  # what the kill left in the folder is no obstacle
    assert names(folder) == sorted({"step_1", f"step_{step}"})


@pytest.mark.parametrize("fails", ["model.save_pretrained", "torch.save", "os.fsync"])
def test_a_full_disk_is_an_error_that_names_the_last_good_checkpoint(
    folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    save(folder, model, 1)

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner: dict[str, Any] = {"model.save_pretrained": model, "torch.save": torch, "os.fsync": os}
    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as refusal:
        patch.setattr(owner[fails], fails.partition(".")[2], no_space)
        save(folder, model, 2)
    message = str(refusal.value)
    assert "step_2 could not be written" in message and "No space left on device" in message
    assert message.endswith(f"the last good one is {folder / 'step_1'}") and "\n" not in message
    assert names(folder) == ["step_1"]
    assert read_state(folder / "step_1") == state_at(1)


def test_the_first_checkpoint_that_fails_says_that_there_is_none(folder: Path, model: PreTrainedModel) -> None:
    (folder / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="there is no earlier one"):
        save(folder / "file" / "checkpoints", model, 1)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_noise(path: Path) -> None:
    path.write_bytes(b"\x93noise" * 40)


def empty_the_object(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize("damage", [remove, empty, cut_short, fill_with_noise, empty_the_object])
def test_a_damaged_state_is_an_error_in_one_line_with_the_path(
    folder: Path, model: PreTrainedModel, damage: Callable[[Path], None]
) -> None:
    checkpoint = save(folder, model, 1)
    damage(checkpoint / "trainer_state.json")
    with pytest.raises(CheckpointError) as refusal:
        read_state(checkpoint)
    assert str(checkpoint) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", [remove, empty, cut_short, fill_with_noise])
def test_a_damaged_optimizer_file_is_an_error_with_the_path(
    folder: Path, model: PreTrainedModel, damage: Callable[[Path], None]
) -> None:
    checkpoint = save(folder, model, 1)
    damage(checkpoint / "optimizer.pt")
    with pytest.raises(CheckpointError) as refusal:
        load_optimizer(checkpoint, adamw(model), CPU)
    assert str(checkpoint / "optimizer.pt") in str(refusal.value)


def test_an_optimizer_file_without_the_generators_is_an_error_too(folder: Path, model: PreTrainedModel) -> None:
    checkpoint = save(folder, model, 1)
    torch.save({"optimizer": adamw(model).state_dict()}, checkpoint / "optimizer.pt")
    with pytest.raises(CheckpointError, match="generators"):
        load_optimizer(checkpoint, adamw(model), CPU)


def test_the_optimizer_of_another_model_is_refused(folder: Path, model: PreTrainedModel) -> None:
    checkpoint = save(folder, model, 1)
    other = make_tiny_model(folder.parent / "other", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_optimizer(checkpoint, adamw(other), CPU)
