"""Writes a model as the folder that `from_pretrained` and vLLM load, in the dtype that its config.json names.

transformers writes what it is given and names the dtype that the model computes in; here the weights are cast on the way,
and config.json names the dtype of the file, nested configurations (of a text or vision part) included. The architecture keeps
the spelling that it was loaded with: vLLM knows PhiMoEForCausalLM, which transformers would write as PhimoeForCausalLM.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_model(folder: Path, model: "PreTrainedModel", weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write `weights` in `dtype` with the configurations of `model`; `weights` itself is left alone."""
    spelling = {name.lower(): name for name in model.config.architectures or ()}
    model.save_pretrained(folder, state_dict=_cast(model, weights, dtype))  # sets `architectures` to the class's name
    name = type(model).__name__
    model.config.architectures = [spelling.get(name.lower(), name)]
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"architectures": model.config.architectures}
    _name_dtype(config, str(dtype).removeprefix("torch."))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _cast(model: "PreTrainedModel", weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters in `dtype`, on the CPU where they have to be cast; buffers keep theirs, as in training.

    Tied names keep sharing one tensor, by which transformers knows that they are tied.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state = dict(weights)
    for name, tensor in weights.items():
        if name in parameters and tensor.dtype != dtype:
            key = tensor.data_ptr(), tensor.shape
            if key not in cast:
                cast[key] = tensor.detach().to("cpu", dtype)  # the GPU may be full
            state[name] = cast[key]
    return state


def _name_dtype(config: dict[str, Any], dtype: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    for part in config.values():
        if isinstance(part, dict) and "model_type" in part:  # a nested configuration, and no table that has such a key
            _name_dtype(part, dtype)
