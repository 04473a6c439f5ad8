"""AdamW's state on disk, without pickle: nothing that is loaded can run.

`optimizer.safetensors` holds `exp_avg.<parameter>`, `exp_avg_sq.<parameter>` and `step.<parameter>` under the model's own
names, so that a parameter can never be given another one's moments, and in its metadata the names of all parameters in
the optimizer's order. Learning rate, betas and weight decay are not here: they are the run's settings. Nor are the states of
random generators: ludic draws from none that outlives an update (see `schedule` and `local_decoding`). A `generators.json`
of an earlier version is ignored.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ludic.storage.manifest import CheckpointError, open_regular

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
    parameters = _parameters(optimizer)
    tensors: dict[str, torch.Tensor] = {}
    stepped = []
    for name, parameter in zip(names, parameters, strict=True):
        state = optimizer.state.get(parameter)
        if state:  # none before the first step, and never for a frozen parameter
            assert set(state) == set(_PARTS), sorted(state)
            stepped.append(name)
            tensors |= {f"{part}.{name}": state[part].detach().cpu().contiguous() for part in _PARTS}
    metadata = {"format": _FORMAT, "parameters": json.dumps(list(names)), "stepped": json.dumps(stepped)}
    save_file(tensors, folder / OPTIMIZER_FILE, metadata=metadata)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, *, model: torch.nn.Module) -> None:
    """Restore AdamW's state.

    Args:
        folder: that `save_optimizer` wrote into.
        optimizer: its learning rate, betas and weight decay stay as they are.
        model: whose parameters the optimizer has, in their order; the names are compared.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another model.
    """
    path = folder / OPTIMIZER_FILE
    names = [name for name, _ in model.named_parameters()]
    try:
        open_regular(path).close()
        state = _read_optimizer(path, _parameters(optimizer), names)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or does not fit this model: {_reason(error)}") from error


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _read_optimizer(
    path: Path, parameters: Sequence[torch.Tensor], names: Sequence[str]
) -> dict[int, dict[str, torch.Tensor]]:
    """The state by the place of its parameter, each tensor copied out of the file."""
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"it is of format {metadata.get('format')!r}, this version reads {_FORMAT}")
        stored, stepped = _names(metadata["parameters"]), _names(metadata["stepped"])
        if len(stored) != len(parameters):
            raise ValueError(f"it has {len(stored)} parameters, the model {len(parameters)}")
        for place, name in enumerate(names):
            if stored[place] != name:
                raise ValueError(f"parameter {place} is {stored[place]}, in the model it is {name}")
        places = {name: place for place, name in enumerate(stored)}
        expected = {f"{part}.{name}" for name in stepped for part in _PARTS}
        wrong = sorted(expected.symmetric_difference(file.keys()))
        if wrong or not places.keys() >= set(stepped):
            raise ValueError(f"its tensors are not those that it lists: {wrong[:1] or 'a name is unknown'}")
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name in stepped:
            parameter = parameters[places[name]]
            for part in _MOMENTS:
                _check_slice(file.get_slice(f"{part}.{name}"), f"{part}.{name}", parameter)
            _check_slice(file.get_slice(f"step.{name}"), f"step.{name}", torch.empty(()))
            moments = {part: file.get_tensor(f"{part}.{name}").to(parameter.device, copy=True) for part in _MOMENTS}
            # A count of steps stays on the CPU unless AdamW is fused, and `load_state_dict` moves it then.
            state[places[name]] = {**moments, "step": _checked_step(file.get_tensor(f"step.{name}").clone(), name)}
    return state


def _names(text: str) -> list[str]:
    names = json.loads(text)
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("its list of parameters is no list of names")
    if len(set(names)) != len(names):
        raise ValueError("its list of parameters names one twice")
    return names


class _Slice(Protocol):
    """What safetensors tells of a tensor before it is read."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...


_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


def _check_slice(stored: "_Slice", name: str, like: torch.Tensor) -> None:
    shape, dtype = list(stored.get_shape()), stored.get_dtype()
    if shape != list(like.shape) or dtype != _DTYPES[like.dtype]:
        raise ValueError(
            f"{name} is {dtype} {shape}, for this model it has to be {_DTYPES[like.dtype]} {list(like.shape)}"
        )


def _checked_step(step: torch.Tensor, name: str) -> torch.Tensor:
    value = step.item()
    if not (0 <= value < 2**24 and value == int(value)):
        raise ValueError(f"step.{name} is {value}, which is no count of steps")
    return step


def _reason(error: Exception) -> str:
    return str(error)[:300] or type(error).__name__
