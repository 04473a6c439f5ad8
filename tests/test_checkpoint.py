"""Checkpoints: whole or not there, loadable by others, and exact."""

import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from ludic.config import GRPOConfig
from ludic.storage.manifest import write_manifest
from ludic.survival.changed_settings import _HARMLESS, changed_settings
from ludic.task.pretrained import load_model, serving_files
from ludic.train import checkpoint as checkpoint_module
from ludic.train import optimizer_state
from ludic.train.checkpoint import (
    CheckpointError,
    TrainerState,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_optimizer,
    masters_folder,
    read_state,
    recover_folder,
    save_checkpoint,
    training_folder,
    verify_checkpoint,
)
from ludic.train.model_folder import _name_dtype
from ludic.train.optimizer_state import save_optimizer
from tests.vllm_helpers import make_tiny_model, make_tiny_tokenizer


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
    state: TrainerState | None = None,
    source_files: dict[str, bytes] | None = None,
) -> Path:
    return save_checkpoint(
        folder,
        model=model,
        weights=model.state_dict(),
        tokenizer=make_tiny_tokenizer(),
        optimizer=adamw(model) if optimizer is None else optimizer,
        state=state or state_at(step),
        model_dtype=dtype,
        source_files=source_files or {},
        keep=keep,
    )


def embeddings(model: PreTrainedModel) -> torch.Tensor:
    return model.get_parameter("model.embed_tokens.weight")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> set[str]:
    """The names of all files below `folder`, with their folders."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_a_model_folder_that_transformers_loads(folder: Path, model: PreTrainedModel) -> None:
    checkpoint = save(folder, model, 3)
    assert checkpoint == folder / "step_3"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.encode("12 + 7") == make_tiny_tokenizer().encode("12 + 7")
    assert tokenizer.chat_template == make_tiny_tokenizer().chat_template


@pytest.mark.parametrize(
    ("loaded", "written"),
    [("QWEN2forCausalLM", "QWEN2forCausalLM"), ("Qwen2Model", "Qwen2ForCausalLM"), (None, "Qwen2ForCausalLM")],
)
def test_every_checkpoint_names_the_architecture_in_the_spelling_that_it_was_loaded_with(
    folder: Path, model: PreTrainedModel, loaded: str | None, written: str
) -> None:
    model.config.architectures = None if loaded is None else [loaded]
    for step in (1, 2):
        config = json.loads((save(folder, model, step) / "config.json").read_text())
        assert config["architectures"] == [written]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_model_is_stored_in_the_dtype_that_its_config_names_and_the_masters_exactly(
    folder: Path, model: PreTrainedModel, dtype: torch.dtype
) -> None:
    with torch.no_grad():
        embeddings(model).add_(1e-5)  # what bf16 and fp16 round away
    checkpoint = save(folder, model, 1, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == name
    served = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    for key, tensor in load_file(checkpoint / "model.safetensors").items():
        assert tensor.dtype == dtype, key
        assert torch.equal(served.state_dict()[key], model.state_dict()[key].to(dtype)), key
    masters = AutoModelForCausalLM.from_pretrained(masters_folder(checkpoint), dtype="auto")
    assert masters.dtype == torch.float32
    for key, tensor in model.state_dict().items():
        assert torch.equal(masters.state_dict()[key], tensor), key


def test_weights_in_float32_are_not_stored_twice(folder: Path, model: PreTrainedModel) -> None:
    checkpoint = save(folder, model, 1, dtype=torch.float32)
    assert masters_folder(checkpoint) == checkpoint
    assert {name for name in files(checkpoint) if name.endswith(".safetensors")} == {
        "model.safetensors",
        "training/optimizer.safetensors",
    }


def test_no_loader_meets_what_is_not_the_model(folder: Path, model: PreTrainedModel) -> None:
    checkpoint = save(folder, model, 1, dtype=torch.bfloat16)
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"model.safetensors"}  # what vLLM reads
    training = {"trainer_state.json", "optimizer.safetensors", "masters"}
    assert set(names(checkpoint / "training")) == training
    assert not training & set(names(checkpoint))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_tied_head_is_stored_once_and_an_untied_one_too_and_both_in_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, dtype: torch.dtype
) -> None:
    model = make_tiny_model(tmp_path / "source", tie_word_embeddings=tied)
    monkeypatch.setattr(model, "save_pretrained", functools.partial(model.save_pretrained, max_shard_size="100KB"))
    checkpoint = save(folder, model, 1, dtype=dtype)
    verify_checkpoint(checkpoint)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and set(index.values()) == {p.name for p in checkpoint.glob("*.safetensors")}
    assert ("lm_head.weight" in index) is not tied
    masters = AutoModelForCausalLM.from_pretrained(masters_folder(checkpoint))
    served = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert (masters.dtype, served.dtype) == (torch.float32, dtype)
    for key, tensor in model.state_dict().items():
        assert torch.equal(masters.state_dict()[key], tensor), key
        assert torch.equal(served.state_dict()[key], tensor.to(dtype)), key


def test_nested_configurations_name_the_dtype_too(folder: Path) -> None:
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    text |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "dtype": "float32"}
    vision: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    vision |= {"image_size": 32, "patch_size": 16, "dtype": "float32"}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, dtype="float32")
    model = Gemma3ForConditionalGeneration(config)
    checkpoint = save(folder, model, 1, dtype=torch.bfloat16)
    stored = json.loads((checkpoint / "config.json").read_text())
    named = [part["dtype"] for part in (stored, stored["text_config"], stored["vision_config"])]
    assert named == ["bfloat16"] * 3
    loaded = Gemma3ForConditionalGeneration.from_pretrained(checkpoint, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    masters = Gemma3ForConditionalGeneration.from_pretrained(masters_folder(checkpoint), dtype="auto")
    for key, tensor in model.state_dict().items():
        assert torch.equal(masters.state_dict()[key], tensor), key


def test_a_word_of_a_table_that_is_spelt_dtype_is_left_alone() -> None:
    config = {
        "dtype": "float32",
        "vocabulary": {"dtype": 7},
        "text_config": {"model_type": "t", "torch_dtype": "float32"},
    }
    _name_dtype(config, "bfloat16")
    assert config == {
        "dtype": "bfloat16",
        "vocabulary": {"dtype": 7},
        "text_config": {"model_type": "t", "torch_dtype": "bfloat16"},
    }


def test_what_the_source_has_for_serving_is_in_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tiny_model(source, tie_word_embeddings=True)
    generation = {"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True, "top_k": 20}
    (source / "generation_config.json").write_text(json.dumps(generation))
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (source / name).write_text(json.dumps({"image_size": 32, "of": name}))
    (source / "modeling_tiny.py").write_text("raise RuntimeError('read, never run')\n")
    (source / "pytorch_model.bin").write_text("weights of another form")
    checkpoint = save(folder, load_model(source), 1, source_files=serving_files(source))
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "modeling_tiny.py",
    ):
        assert (checkpoint / name).read_bytes() == (source / name).read_bytes()
    stored = json.loads((checkpoint / "generation_config.json").read_text())
    assert {name: stored[name] for name in generation} == generation
    assert (checkpoint / "chat_template.jinja").read_text() == make_tiny_tokenizer().chat_template
    assert "pytorch_model.bin" not in names(checkpoint)
    verify_checkpoint(checkpoint)


def test_a_file_of_the_source_never_takes_the_place_of_what_was_trained_with(
    folder: Path, model: PreTrainedModel
) -> None:
    checkpoint = save(folder, model, 1, source_files={"config.json": b"{}", "chat_template.jinja": b"another"})
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.hidden_size == 64
    assert (checkpoint / "chat_template.jinja").read_text() == make_tiny_tokenizer().chat_template


def test_a_name_that_is_no_folder_and_not_on_the_hub_has_no_files_for_serving() -> None:
    assert serving_files("nobody/of-this-name") == {}


def test_a_model_that_brings_its_code_is_loaded_from_its_checkpoint_and_from_its_masters(
    folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    make_tiny_model(source, tie_word_embeddings=True)
    (source / "helper_of_own.py").write_text("FACTOR = 1\n")
    (source / "modeling_own.py").write_text(
        "from transformers import Qwen2Config, Qwen2ForCausalLM\nfrom .helper_of_own import FACTOR\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n    factor: int = FACTOR\n"
        "class OwnModel(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((source / "config.json").read_text())
    names_of_code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config |= {"model_type": "own", "auto_map": names_of_code}
    (source / "config.json").write_text(json.dumps(config))
    model = load_model(source, trust_remote_code=True, dtype=torch.float32)
    checkpoint = save(folder, model, 1, dtype=torch.bfloat16, source_files=serving_files(source))
    for place in (checkpoint, masters_folder(checkpoint)):
        loaded = load_model(place, trust_remote_code=True, dtype=torch.float32)
        assert type(loaded).__name__ == "OwnModel"
    assert torch.equal(embeddings(loaded), embeddings(model))
    with pytest.raises(ValueError, match="--trust-remote-code"):
        load_model(checkpoint)


def save_in_the_old_form(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> Path:
    """A checkpoint as earlier versions wrote it: float32 masters under the model's dtype, everything side by side."""
    checkpoint = folder / "step_1"
    model.save_pretrained(checkpoint)
    make_tiny_tokenizer().save_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    save_optimizer(checkpoint, optimizer, [name for name, _ in model.named_parameters()])
    (checkpoint / "generators.json").write_text('{"torch_cpu": "00"}')  # which nothing reads any more
    (checkpoint / "trainer_state.json").write_text(json.dumps(asdict(state_at(1))))
    content = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()}
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}))
    return checkpoint


def test_a_checkpoint_of_the_old_form_is_found_verified_and_resumed_exactly(
    folder: Path, model: PreTrainedModel
) -> None:
    optimizer = adamw(model)
    train_one_step(model, optimizer)
    old = save_in_the_old_form(folder, model, optimizer, torch.bfloat16)
    assert find_checkpoint(folder).path == old and read_state(old) == state_at(1)
    again = AutoModelForCausalLM.from_pretrained(masters_folder(old), dtype=torch.float32)
    restored = adamw(again)
    load_optimizer(training_folder(old), restored, model=again)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.manual_seed(3)
    train_one_step(model, optimizer)
    torch.manual_seed(3)
    train_one_step(again, restored)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    verify_checkpoint(save(folder, again, 1, optimizer=restored))  # which takes its place
    assert masters_folder(folder / "step_1") == folder / "step_1" and (folder / "step_1" / "training").is_dir()
    flip_one_bit(save_in_the_old_form(folder / "other", model, optimizer, torch.bfloat16) / "optimizer.safetensors")
    assert "optimizer.safetensors was altered" in find_checkpoint(folder / "other").passed_over[0]


def test_the_state_is_read_back_as_it_was_written(folder: Path, model: PreTrainedModel) -> None:
    assert read_state(save(folder, model, 5)) == state_at(5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_that_goes_on_from_a_checkpoint_takes_the_very_same_step(
    folder: Path, model: PreTrainedModel, dtype: torch.dtype
) -> None:
    optimizer = adamw(model)
    train_one_step(model, optimizer)
    checkpoint = save(folder, model, 1, optimizer=optimizer, dtype=dtype)
    torch.manual_seed(12345)  # which draws the data
    train_one_step(model, optimizer)

    again = AutoModelForCausalLM.from_pretrained(masters_folder(checkpoint), dtype=torch.float32)
    torch.manual_seed(12345)
    restored = adamw(again)
    load_optimizer(training_folder(checkpoint), restored, model=again)
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
    (folder / ".step_3.partial" / "manifest.json").write_text("{}")
    (folder / "step_4").mkdir()  # without a manifest: unfinished
    for odd in ("step_007", "step_٣", "step_" + "9" * 200):
        (folder / odd).mkdir()
        (folder / odd / "manifest.json").write_text("{}")
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


@pytest.mark.parametrize("fails", ["model.save_pretrained", "save_file", "os.fsync", "os.rename"])
def test_a_full_disk_is_an_error_that_names_the_last_good_checkpoint(
    folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    save(folder, model, 1)

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner: dict[str, Any] = {"model": model, "save_file": optimizer_state, "os": os}
    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as refusal:
        patch.setattr(owner[fails.partition(".")[0]], fails.rpartition(".")[2], no_space)
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


def test_a_name_that_may_not_be_on_the_disk_is_taken_back(
    folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    save(folder, model, 1)
    for step in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"the last good one is .*step_1$"):
            patch.setattr(checkpoint_module, "sync_folder", failing)
            save(folder, model, step)
        assert names(folder) == ["step_1"]
        verify_checkpoint(folder / "step_1")


def test_a_folder_that_is_removed_while_a_checkpoint_gets_its_name_is_said_and_the_next_save_succeeds(
    folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def rename_and_remove(source: Path, target: Path) -> None:
        rename(source, target)
        shutil.rmtree(folder)
        folder.mkdir()

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="step_1 was written and is gone again"):
        patch.setattr(os, "rename", rename_and_remove)
        save(folder, model, 1)
    verify_checkpoint(save(folder, model, 2))


def test_a_folder_that_cannot_be_read_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "glob", failing)
    with pytest.raises(CheckpointError, match=f"{folder} cannot be read: .*Input/output error"):
        find_checkpoint(folder)


# -- damage: every file, every way ---------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_noise(path: Path) -> None:
    path.write_bytes(b"\x93noise" * 40)


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty_the_object(path: Path) -> None:
    path.write_text("{}")


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path], None]] = [
    *(remove, empty, cut_short, fill_with_noise, flip_one_bit, empty_the_object, make_a_folder),
]


def test_any_damage_to_any_file_is_found_and_the_file_is_named(folder: Path, model: PreTrainedModel) -> None:
    whole = save(folder, model, 1, dtype=torch.bfloat16)
    verify_checkpoint(whole)
    ours = {"training/optimizer.safetensors", "training/masters/model.safetensors"}
    assert {"model.safetensors", "config.json"} | ours <= files(whole)
    for name in files(whole):
        for damage in DAMAGES:
            copy = folder / "copy"
            shutil.copytree(whole, copy)
            damage(copy / name)
            with pytest.raises(CheckpointError) as refusal:
                verify_checkpoint(copy)
            assert str(copy) in str(refusal.value) and "\n" not in str(refusal.value)
            if name != "manifest.json":
                assert str(copy / name) in str(refusal.value), damage
            shutil.rmtree(copy)


def test_no_bit_of_a_manifest_can_flip_unseen(folder: Path) -> None:
    (folder / "training").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "training" / "optimizer.safetensors").write_bytes(b"state")
    write_manifest(folder)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError) as refusal:
            verify_checkpoint(folder)
        assert str(folder) in str(refusal.value) and str(refusal.value).isprintable()


@pytest.mark.parametrize(
    ("damage", "says"), [(remove, "is missing"), (cut_short, "is truncated"), (flip_one_bit, "was altered")]
)
def test_what_is_wrong_with_a_file_is_said(
    folder: Path, model: PreTrainedModel, damage: Callable[[Path], None], says: str
) -> None:
    checkpoint = save(folder, model, 1)
    damage(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors {says}"):
        verify_checkpoint(checkpoint)


def test_a_file_that_would_change_what_is_loaded_counts_as_damage_and_a_note_does_not(
    folder: Path, model: PreTrainedModel
) -> None:
    checkpoint = save(folder, model, 1)
    (checkpoint / "NOTES.md").write_text("the good one")
    verify_checkpoint(checkpoint)
    (checkpoint / "training" / "masters").mkdir()
    added = checkpoint / "training" / "masters" / "model.safetensors"
    added.write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"training/masters/model\.safetensors was added"):
        verify_checkpoint(checkpoint)
    added.unlink()
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json was added"):
        verify_checkpoint(checkpoint)


def test_a_resume_takes_the_newest_whole_checkpoint_and_says_what_it_passed_over(
    folder: Path, model: PreTrainedModel
) -> None:
    for step in (1, 2, 3):
        save(folder, model, step, keep=3)
    assert find_checkpoint(folder).path == folder / "step_3" and not find_checkpoint(folder).passed_over
    flip_one_bit(folder / "step_3" / "model.safetensors")
    cut_short(folder / "step_2" / "training" / "optimizer.safetensors")
    found = find_checkpoint(folder)
    assert found.path == folder / "step_1"
    assert "step_3/model.safetensors was altered" in found.passed_over[0]
    assert "step_2/training/optimizer.safetensors is truncated" in found.passed_over[1]
    remove(folder / "step_1" / "training" / "trainer_state.json")
    assert find_checkpoint(folder).path is None and len(find_checkpoint(folder).passed_over) == 3
    assert find_checkpoint(folder / "nowhere").path is None


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 1, "files": {"config.json": {"size": 1e999, "sha256": "00"}}}',
        '{"format": 1, "files": {"\\u0000": {"size": 1, "sha256": "00"}}}',
        "[" * 100_000,
    ],
    ids=["a size beyond all numbers", "a name that no file can have", "nested without end"],
)
def test_a_checkpoint_with_a_damaged_manifest_is_passed_over(
    folder: Path, model: PreTrainedModel, content: str
) -> None:
    whole, damaged = save(folder, model, 1), save(folder, model, 2)
    (damaged / "manifest.json").write_text(content)
    found = find_checkpoint(folder)
    assert found.path == whole and len(found.passed_over) == 1 and "step_2" in found.passed_over[0]


def test_a_checkpoint_without_a_manifest_is_unfinished(folder: Path, model: PreTrainedModel) -> None:
    checkpoint = save(folder, model, 1)
    remove(checkpoint / "manifest.json")
    assert list_checkpoints(folder) == []
    with pytest.raises(CheckpointError, match=r"has no manifest\.json; --model .* starts a new run with its weights"):
        verify_checkpoint(checkpoint)


# -- a kill between two renames ------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_about_to_be_replaced_is_restored(folder: Path, model: PreTrainedModel) -> None:
    save(folder, model, 1)
    os.rename(folder / "step_1", folder / ".step_1.replaced")  # here the kill comes
    shutil.copytree(folder / ".step_1.replaced", folder / ".step_1.partial")
    shutil.copytree(folder / ".step_1.replaced", folder / ".step_0.removed")
    assert find_checkpoint(folder).path is None
    assert recover_folder(folder) == [f"restored {folder / 'step_1'}, which a killed run was about to replace"]
    assert names(folder) == ["step_1"]
    verify_checkpoint(folder / "step_1")


def test_tidying_up_leaves_alone_what_is_not_ours(folder: Path, model: PreTrainedModel) -> None:
    save(folder, model, 1)
    for name in (".step_1.replaced", ".step_2.partial"):
        (folder / name).mkdir()
    (folder / ".step_2.backup").mkdir()
    (folder / ".notes").write_text("mine")
    assert recover_folder(folder) == []
    assert names(folder) == [".notes", ".step_2.backup", "step_1"]
    assert recover_folder(folder / "nowhere") == []


# -- the state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [remove, empty, cut_short, fill_with_noise, empty_the_object, make_a_folder])
def test_a_damaged_state_is_an_error_in_one_line_with_the_path(
    folder: Path, model: PreTrainedModel, damage: Callable[[Path], None]
) -> None:
    checkpoint = save(folder, model, 1)
    damage(checkpoint / "training" / "trainer_state.json")
    with pytest.raises(CheckpointError) as refusal:
        read_state(checkpoint)
    assert str(checkpoint) in str(refusal.value) and "\n" not in str(refusal.value)


EVALUATION: dict[str, Any] = {
    **{"step": 0, "num_problems": 8, "accuracy": 0.5, "strict_accuracy": 0.5, "parse_err_rate": 0.0},
    **{"truncation_rate": 0.0, "avg_completion_length": 9.5, "accuracy_ci95": [0.2, 0.8], "model": "tiny"},
}


def test_every_field_of_a_state_is_read_back(folder: Path, model: PreTrainedModel) -> None:
    state = replace(
        state_at(4),
        evaluations=[EVALUATION, {**EVALUATION, "step": 4}],
        skipped_in_a_row=1,
        skipped_updates=2,
        wandb_run_id="a1-b2_c3",
        task={"dataset": None, "system_prompt": "Solve it.\n\x1b[2J", "limit": 7},
    )
    checkpoint = save(folder, model, 4, state=state)
    assert read_state(checkpoint) == state


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 1} trailing',
        "\ufeff{}",
        "[]",
        "null",
        '{"\x1b[2J\\u001b": 1}',
    ],
)
def test_a_state_that_is_no_json_object_is_refused_in_one_line(folder: Path, text: str) -> None:
    (folder / "trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError) as refusal:
        read_state(folder)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 400


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "trainer_state.json").write_bytes(b'{"step": "\xff\xfe"}')
    with pytest.raises(CheckpointError, match="utf-8"):
        read_state(folder)


def test_unknown_and_missing_fields_are_named(folder: Path) -> None:
    record = asdict(state_at(3))
    for wrong, says in (
        ({**record, "sneaky": 1}, "'sneaky'"),
        ({k: record[k] for k in record if k != "task"}, "'task'"),
    ):
        (folder / "trainer_state.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=says):
            read_state(folder)


# -- the optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [remove, empty, cut_short, fill_with_noise, make_a_folder])
def test_a_damaged_optimizer_file_is_an_error_with_the_path(
    folder: Path, model: PreTrainedModel, damage: Callable[[Path], None]
) -> None:
    checkpoint = save(folder, model, 1)
    path = training_folder(checkpoint) / "optimizer.safetensors"
    damage(path)
    with pytest.raises(CheckpointError) as refusal:
        load_optimizer(training_folder(checkpoint), adamw(model), model=model)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def trained(folder: Path, model: PreTrainedModel) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    """A checkpoint after a step, and the tensors and metadata of its optimizer file."""
    optimizer = adamw(model)
    train_one_step(model, optimizer)
    checkpoint = save(folder, model, 1, optimizer=optimizer)
    with safe_open(checkpoint / "training" / "optimizer.safetensors", framework="pt") as file:
        return checkpoint, {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


NAME = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"exp_avg.{NAME}": None}, f"exp_avg.{NAME}"),
        ({f"exp_avg.{NAME}": torch.zeros(63)}, r"float32 \[63\], in the model it is torch.float32 \[64\]"),
        ({f"exp_avg_sq.{NAME}": torch.zeros(64, dtype=torch.float16)}, r"float16 \[64\], in the model it is"),
    ],
)
def test_optimizer_tensors_that_do_not_fit_are_named(
    folder: Path, model: PreTrainedModel, change: dict[str, torch.Tensor | None], says: str
) -> None:
    checkpoint, tensors, metadata = trained(folder, model)
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    save_file(changed, checkpoint / "training" / "optimizer.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=says):
        load_optimizer(training_folder(checkpoint), adamw(model), model=model)


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "2"}, {"format": "1"}, {"format": "1", "parameters": '["a"]', "stepped": "[]"}],
)
def test_an_optimizer_file_of_another_origin_or_version_is_refused(
    folder: Path, model: PreTrainedModel, metadata: dict[str, str] | None
) -> None:
    checkpoint, tensors, _ = trained(folder, model)
    save_file(tensors, checkpoint / "training" / "optimizer.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged"):
        load_optimizer(training_folder(checkpoint), adamw(model), model=model)


def test_parameters_in_another_order_are_not_given_one_anothers_moments(folder: Path, model: PreTrainedModel) -> None:
    checkpoint, tensors, metadata = trained(folder, model)
    order = json.loads(metadata["parameters"])
    metadata["parameters"] = json.dumps(order[::-1])
    save_file(tensors, checkpoint / "training" / "optimizer.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=f"parameter 0 is {order[-1]}, in the model it is {order[0]}"):
        load_optimizer(training_folder(checkpoint), adamw(model), model=model)


def test_the_optimizer_of_another_model_is_refused(folder: Path, model: PreTrainedModel) -> None:
    checkpoint = save(folder, model, 1)
    other = make_tiny_model(folder.parent / "other", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_optimizer(training_folder(checkpoint), adamw(other), model=other)


def test_nothing_of_a_checkpoint_is_pickled(folder: Path, model: PreTrainedModel) -> None:
    checkpoint, _, _ = trained(folder, model)
    assert {Path(name).suffix for name in files(checkpoint)} <= {".json", ".safetensors", ".jinja"}


# -- settings that alter a resumed run -------------------------------------------------------------------------------

STORED = {
    "learning_rate": 1e-6,
    "lr_schedule": "constant",
    "train_steps": 10,
    "warmup_steps": 5,
    "mask_truncated": False,
}


@pytest.mark.parametrize(
    ("change", "step", "lines"),
    [
        ({}, 0, []),
        ({"learning_rate": 2e-6}, 9, ["--learning-rate was 1e-06, is 2e-06"]),
        ({"mask_truncated": True}, 0, ["--mask-truncated was off, is on"]),
        ({"train_steps": 20}, 0, []),
        ({"train_steps": 20, "lr_schedule": "cosine"}, 9,
         ["--lr-schedule was constant, is cosine", "--train-steps was 10, is 20"]),
        ({"warmup_steps": 2}, 5, []),
        ({"warmup_steps": 2}, 4, ["--warmup-steps was 5, is 2"]),
        ({"save_every": 3, "compile": False, "micro_token_budget": None, "eval_every": 1}, 0, []),
        ({"concurrency": 4, "servers": 2}, 0, []),
        ({"new_flag": None}, 0, ["--new-flag is the default, the checkpoint was made without it"]),
        ({"system_prompt": "Be brief.\x1b[2J"}, 0,
         ["--system-prompt is 'Be brief.\\x1b[2J', the checkpoint was made without it"]),
    ],
)  # fmt: skip
def test_a_changed_setting_is_named_if_it_alters_the_run(change: dict[str, Any], step: int, lines: list[str]) -> None:
    assert changed_settings(STORED, {**STORED, **change}, step=step) == lines


def test_a_setting_that_is_gone_is_named_and_of_long_texts_the_difference_is_shown() -> None:
    assert changed_settings({"old": 1}, {}) == ["--old was 1, this version does not have it"]
    prompt = "Solve the problem step by step. " * 9
    (line,) = changed_settings({"system_prompt": prompt + "A"}, {"system_prompt": prompt + "B"})
    assert "step. A'" in line and "step. B'" in line and len(line) < 120


def test_every_setting_is_thought_about_and_a_tuple_is_the_list_that_json_made_of_it() -> None:
    assert _HARMLESS.keys() - {"concurrency", "servers", "out_dir", "logger", "verbose"} <= asdict(GRPOConfig()).keys()
    assert changed_settings({"a": [1, 2]}, {"a": (1, 2)}) == []
    assert changed_settings({"a": 1}, {"a": True}) == ["--a was 1, is on"]
