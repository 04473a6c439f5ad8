"""AdamW's state on disk, without pickle: nothing that is loaded can run.

`optimizer.safetensors` holds `exp_avg.<parameter>`, `exp_avg_sq.<parameter>` and `step.<parameter>` under the model's own
names, so that a parameter can never be given another one's moments, and in its metadata the names of all parameters in
the optimizer's order. Learning rate, betas and weight decay are not here: they are the run's settings.
"""

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ludic.storage.manifest import CheckpointError

OPTIMIZER_FILE = "optimizer.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_PARTS = (*_MOMENTS, "step")
_FORMAT = "1"


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, names: Sequence[str]) -> None:
    """Write AdamW's state into `folder`.

    Args:
        names: of the optimizer's parameters, in their order.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    stepped = []
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        state = optimizer.state.get(parameter)
        if state:  # none before the first step, and never for a frozen parameter
            assert set(state) == set(_PARTS), sorted(state)
            stepped.append(name)
            tensors |= {f"{part}.{name}": state[part].detach().cpu().contiguous() for part in _PARTS}
    metadata = {"format": _FORMAT, "parameters": json.dumps(list(names)), "stepped": json.dumps(stepped)}
    save_file(tensors, folder / OPTIMIZER_FILE, metadata=metadata)


def load_optimizer(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    *,
    model: torch.nn.Module,
    parts: Sequence[tuple[torch.Size, slice]] | None = None,
) -> None:
    """Restore AdamW's state.

    Args:
        folder: that `save_optimizer` wrote into, of a checkpoint that was verified.
        optimizer: its learning rate, betas and weight decay stay as they are.
        model: whose parameters the optimizer has, in their order; names, shapes and dtypes are compared.
        parts: for an optimizer that has only a part of each parameter: the whole one's shape, and which rows it has, or where
            its part has one dimension, which of all weights.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another model.
    """
    path = folder / OPTIMIZER_FILE
    names = [name for name, _ in model.named_parameters()]
    try:
        state = _read_optimizer(path, _parameters(optimizer), names, parts)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or does not fit this model: {error}") from error
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _read_optimizer(
    path: Path,
    parameters: Sequence[torch.Tensor],
    names: Sequence[str],
    parts: Sequence[tuple[torch.Size, slice]] | None,
) -> dict[int, dict[str, torch.Tensor]]:
    """The state by the place of its parameter, each tensor copied out of the file."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"it is of format {metadata.get('format')!r}, this version reads {_FORMAT}")
        stored_names = json.loads(metadata["parameters"])
        for place, (theirs, ours) in enumerate(zip_longest(stored_names, names, fillvalue="missing")):
            if theirs != ours:
                raise ValueError(f"parameter {place} is {theirs}, in the model it is {ours}")
        stepped = set(json.loads(metadata["stepped"]))
        for place, (name, like) in enumerate(zip(names, parameters, strict=True)):
            shape, part_of_it = parts[place] if parts is not None else (like.shape, slice(None))
            if name not in stepped or (parts is not None and like.numel() == 0):
                continue
            moments = {}
            for part in _MOMENTS:
                stored = file.get_slice(f"{part}.{name}")
                found = torch.Size(stored.get_shape())
                by_row = len(found) == like.dim() > 0
                tensor = stored[part_of_it] if by_row else file.get_tensor(f"{part}.{name}").flatten()[part_of_it]
                if (found, tensor.dtype) != (shape, like.dtype):
                    found_words = f"{tensor.dtype} {list(found)}"
                    raise ValueError(f"{part}.{name} is {found_words}, in the model it is {like.dtype} {list(shape)}")
                moments[part] = tensor.view(like.shape).to(like.device, copy=True)
            # A count of steps stays on the CPU unless AdamW is fused, and `load_state_dict` moves it then.
            state[place] = {**moments, "step": file.get_tensor(f"step.{name}").clone()}
    return state
