"""Checkpoints that are whole or not there, and that a run continues from exactly.

`step_N/` is an ordinary transformers folder (fp32 masters in safetensors, config, tokenizer: `from_pretrained` loads it
and the server serves it) with two files of ours beside it: `trainer_state.json` (step, policy version, settings, what was
measured so far) and `optimizer.pt` (AdamW's state and the random generators). config.json names the dtype that the model
came in, so that others load it in that; the masters in the file stay fp32 and resume takes them as they are.

A checkpoint is written into a hidden folder, synced to disk, and renamed: a kill or a full disk at any moment leaves the
earlier ones as they were.
"""

import json
import logging
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_STATE_FILE = "trainer_state.json"
_OPTIMIZER_FILE = "optimizer.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """What a run is at the end of an update, beside its tensors. The data cursor follows from `step`."""

    step: int
    """Updates done; the next one trains on prompts `step * groups_per_update` and on."""
    policy_version: int
    model: str
    """What the run was started from."""
    config: dict[str, Any]
    rollouts: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)


class CheckpointError(OSError):
    """A checkpoint could not be written or read; one line with the path and the reason."""


def save_checkpoint(
    folder: Path,
    *,
    model: "PreTrainedModel",
    weights: dict[str, torch.Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    model_dtype: torch.dtype,
    keep: int,
) -> Path:
    """Write `folder/step_N` atomically and remove all but the last `keep`; returns the new checkpoint's path.

    `weights` is the model's state dict with its float32 masters; the model itself may compute in less.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    final = folder / f"step_{state.step}"
    partial = folder / f".step_{state.step}.partial"
    replaced = folder / f".step_{state.step}.replaced"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(partial, model, weights, tokenizer, optimizer, state, model_dtype)
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():  # the same step again, after a resume: the new one takes its place
            os.rename(final, replaced)
        os.rename(partial, final)
        _sync_folder(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        kept = latest_checkpoint(folder)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({error}); "
            + (f"the last good one is {kept}" if kept else "there is no earlier one")
        ) from error
    shutil.rmtree(replaced, ignore_errors=True)
    checkpoints = list_checkpoints(folder)
    # Those after this one are of another attempt, which a resume from an earlier step left behind: they do not count.
    for old in checkpoints[: checkpoints.index(final) + 1][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(
    partial: Path,
    model: "PreTrainedModel",
    weights: dict[str, torch.Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    model_dtype: torch.dtype,
) -> None:
    model.save_pretrained(partial, state_dict=weights)  # the fp32 masters, not what the model computes with
    tokenizer.save_pretrained(partial)
    config_path = partial / "config.json"
    config = json.loads(config_path.read_text())
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(model_dtype).removeprefix("torch.")
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generators: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    torch.save({"optimizer": optimizer.state_dict(), "generators": generators}, partial / _OPTIMIZER_FILE)
    (partial / _STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(partial)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return [path for _, path in sorted(found) if (path / _STATE_FILE).is_file()]


def latest_checkpoint(folder: Path) -> Path | None:
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def read_state(checkpoint: Path) -> TrainerState:
    """The state of a checkpoint, before anything heavy is loaded.

    Raises:
        CheckpointError: it is not a checkpoint of ours, or it is damaged.
    """
    path = checkpoint / _STATE_FILE
    try:
        return TrainerState(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no {_STATE_FILE}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Restore AdamW's state and the random generators.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another model.
    """
    path = checkpoint / _OPTIMIZER_FILE
    try:
        stored = torch.load(path, map_location=device, weights_only=True)
        generators = stored["generators"]
        optimizer.load_state_dict(stored["optimizer"])
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged or does not fit this model: {error!r}") from error
    torch.set_rng_state(generators["cpu"].cpu())
    if "cuda" in generators and device.type == "cuda":
        torch.cuda.set_rng_state(generators["cuda"].cpu())
