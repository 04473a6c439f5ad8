"""Checkpoints that are whole or not there, that a server serves, and that a run continues from exactly.

    step_N/                         a transformers model folder: what is served, evaluated, and `--model` of a new run
        config.json, *.safetensors  the weights in the dtype that config.json names
        ...                         generation config, tokenizer, chat template, processor files
        adapter/                    with --lora-rank: the adapter as peft writes it, in float32; above it lies merged
        manifest.json               size and SHA-256 of all the others (see `manifest`)
        training/                   what only `--resume` reads; vLLM and transformers look at the files above alone
            trainer_state.json      step, policy version, settings, what was measured so far
            prompts.json            the place in the data, and how often each prompt was solved (see `prompt_source`)
            optimizer.safetensors       AdamW's state (see `optimizer_state`)
            masters/                the float32 masters, a model folder too; none if the model is float32, or has an adapter

A checkpoint is written into a hidden folder, synced to disk, and renamed: a kill, a power cut or a full disk at any moment
leaves the earlier ones as they were. `recover_folder` tidies up after a kill. One run at a time may use a folder (`run_lock`).
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ludic.storage.jsonl import finite
from ludic.storage.manifest import (
    MANIFEST_FILE,
    CheckpointError,
    read_json,
    sync_folder,
    verify_checkpoint,
    write_manifest,
)
from ludic.train.lora import Adapter
from ludic.train.model_folder import save_model
from ludic.train.optimizer_state import load_optimizer, save_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CheckpointError",
    "FoundCheckpoint",
    "TrainerState",
    "checkpoint_step",
    "find_checkpoint",
    "latest_checkpoint",
    "list_checkpoints",
    "load_optimizer",
    "masters_folder",
    "read_prompts",
    "read_state",
    "recover_folder",
    "save_checkpoint",
    "training_folder",
    "verify_checkpoint",
]

_TRAINING_FOLDER = "training"
_MASTERS_FOLDER = "masters"
_STATE_FILE = "trainer_state.json"
_PROMPTS_FILE = "prompts.json"
_FOLDER_NAME = re.compile(r"step_(0|[1-9][0-9]{0,11})")
_HIDDEN_NAME = re.compile(r"\.(step_(?:0|[1-9][0-9]{0,11}))\.(partial|replaced|removed)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """What a run is at the end of an update, beside its tensors and the state of its prompts."""

    step: int
    """Updates done."""
    policy_version: int
    model: str
    """What the run was started from."""
    config: dict[str, Any]
    rollouts: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    skipped_in_a_row: int = 0
    """Updates that were skipped, whole or in part, since the last one that was applied in full."""
    skipped_updates: int = 0
    """Updates of the whole run that were skipped because a loss or gradient was not finite."""
    wandb_run_id: str | None = None
    """The run at Weights & Biases that a resumed one goes on with."""
    task: dict[str, Any] = field(default_factory=dict)
    """What the script's own flags said: dataset, system prompt and so on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCheckpoint:
    """The newest checkpoint that is whole, and why newer ones were not taken."""

    path: Path | None
    passed_over: tuple[str, ...] = ()
    """One line for each damaged checkpoint that is newer, with what is wrong."""


def save_checkpoint(
    folder: Path,
    *,
    model: "PreTrainedModel",
    weights: dict[str, torch.Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    model_dtype: torch.dtype,
    source_files: Mapping[str, bytes],
    keep: int,
    adapter: Adapter | None = None,
    prompts: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/step_N` atomically and remove all but the last `keep`; returns the new checkpoint's path.

    `weights` is the model's state dict with its float32 masters; the model itself may compute in less, and is served in
    `model_dtype`. `source_files` are those of `pretrained.serving_files`, `prompts` is `PromptSource.state()`. The optimizer's
    parameters are in the order of the model's. With an `adapter`, that is saved, and the model with it merged in, in the place
    of `weights`.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    final = folder / f"step_{state.step}"
    partial = folder / f".step_{state.step}.partial"
    try:
        _make_folder(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(partial, model, weights, tokenizer, optimizer, state, model_dtype, source_files, adapter)
        if prompts is not None:
            (partial / _TRAINING_FOLDER / _PROMPTS_FILE).write_text(json.dumps(prompts, allow_nan=False) + "\n")
        write_manifest(partial)
        _put_in_place(partial, final)
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({_one_line(error)}); {_last_good(folder)}"
        ) from error
    checkpoints = list_checkpoints(folder)
    if final not in checkpoints:
        raise CheckpointError(f"checkpoint {final} was written and is gone again: the folder was removed or replaced")
    # Those after this one are of another attempt, which a resume from an earlier step left behind: they do not count.
    for old in checkpoints[: checkpoints.index(final) + 1][:-keep]:
        _remove(old)
    return final


def _last_good(folder: Path) -> str:
    try:
        kept = latest_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return f"the last good one is {kept}" if kept else "there is no earlier one"


def _make_folder(folder: Path) -> None:
    """Make `folder`, and see to it that a power cut does not take it back."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)


def _write(
    partial: Path,
    model: "PreTrainedModel",
    weights: dict[str, torch.Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    model_dtype: torch.dtype,
    source_files: Mapping[str, bytes],
    adapter: Adapter | None,
) -> None:
    training = partial / _TRAINING_FOLDER
    training.mkdir()
    if adapter is not None:
        with adapter.merged() as merged:
            save_model(partial, merged, merged.state_dict(), model_dtype)
        adapter.save(partial)
    else:
        save_model(partial, model, weights, model_dtype)
        if model_dtype != torch.float32:
            save_model(training / _MASTERS_FOLDER, model, weights, torch.float32)
    tokenizer.save_pretrained(partial)
    for name, content in source_files.items():
        if not (partial / name).exists():  # what was just saved is what was trained with
            (partial / name).write_bytes(content)
    save_optimizer(training, optimizer, [name for name, _ in model.named_parameters()])
    (training / _STATE_FILE).write_text(json.dumps(finite(asdict(state)), indent=2, allow_nan=False) + "\n")


def _put_in_place(partial: Path, final: Path) -> None:
    """Give the finished folder its name; the one that had it, from before a resume, goes once the new one is safe."""
    replaced = _hidden(final, "replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        if final.exists():
            os.rename(final, replaced)
        os.rename(partial, final)
        sync_folder(final.parent)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            if not partial.exists():  # it had its name, and might lose it in a power cut
                os.rename(final, partial)
            if replaced.exists():
                os.rename(replaced, final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Take a checkpoint away; a kill halfway leaves nothing that looks like one."""
    hidden = _hidden(checkpoint, "removed")
    shutil.rmtree(hidden, ignore_errors=True)
    with contextlib.suppress(OSError):  # a disk that fails now will be met by the next checkpoint
        os.rename(checkpoint, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _hidden(checkpoint: Path, what: str) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.{what}")


def recover_folder(folder: Path) -> list[str]:
    """Tidy up after a run that was killed while it wrote; call it before a run, with the folder's lock held.

    A checkpoint that was about to be replaced gets its name back; what was half written or half removed goes.

    Returns:
        One line for each checkpoint that was restored.

    Raises:
        CheckpointError: one cannot be restored.
    """
    restored = []
    try:
        hidden = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in hidden:
            match = _HIDDEN_NAME.fullmatch(path.name)
            if match and match[2] == "replaced" and not (final := folder / match[1]).exists():
                os.rename(path, final)
                sync_folder(folder)
                restored.append(f"restored {final}, which a killed run was about to replace")
            elif match:
                shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be tidied up after a killed run: {_one_line(error)}") from error
    return restored


# -- finding -----------------------------------------------------------------------------------------------------------


def checkpoint_step(checkpoint: Path) -> int | None:
    """The update that a checkpoint folder is named after, None where the name is another."""
    match = _FOLDER_NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first; whether they are still whole is not looked at.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        found = [(step, path) for path in folder.glob("step_*") if (step := checkpoint_step(path)) is not None]
        return [path for _, path in sorted(found) if (path / MANIFEST_FILE).is_file()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {_one_line(error)}") from error


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest finished checkpoint, unverified; `find_checkpoint` is what a resume wants."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def find_checkpoint(folder: Path) -> FoundCheckpoint:
    """The newest checkpoint that verifies and whose state can be read; reads the whole of those that it tries."""
    passed_over = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(checkpoint)
            read_state(checkpoint)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return FoundCheckpoint(path=checkpoint, passed_over=tuple(passed_over))
    return FoundCheckpoint(path=None, passed_over=tuple(passed_over))


def training_folder(checkpoint: Path) -> Path:
    """Where the trainer's state and the optimizer lie: the checkpoint itself in those of the old form."""
    folder = checkpoint / _TRAINING_FOLDER
    return folder if folder.is_dir() else checkpoint


def masters_folder(checkpoint: Path) -> Path:
    """The model folder with the float32 masters: the checkpoint itself where they are the model."""
    folder = training_folder(checkpoint) / _MASTERS_FOLDER
    return folder if folder.is_dir() else checkpoint


def read_state(checkpoint: Path) -> TrainerState:
    """The state of a checkpoint, before anything heavy is loaded.

    Raises:
        CheckpointError: it is not a checkpoint of this version, or the file cannot be read.
    """
    path = training_folder(checkpoint) / _STATE_FILE
    record = read_json(path)
    names = [setting.name for setting in fields(TrainerState)]
    if unknown := [name for name in record if name not in names]:
        raise CheckpointError(f"{path} cannot be read: {unknown[0]!r:.80} is a field that this version does not know")
    if missing := [name for name in names if name not in record]:
        raise CheckpointError(f"{path} cannot be read: the field {missing[0]!r} is missing")
    return TrainerState(**record)


def read_prompts(checkpoint: Path) -> dict[str, Any] | None:
    """What `PromptSource` knew then; None in checkpoints of versions before it.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = training_folder(checkpoint) / _PROMPTS_FILE
    return read_json(path) if path.exists() else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
