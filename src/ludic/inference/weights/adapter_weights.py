"""An adapter as it goes over the wire, and the proof that the server has the base below it.

What is sent are A, and B times the scale alpha / r, as peft names them. The server's half is `vllm_lora`. The base is not sent:
before the first version, the digests of all its tensors that the server holds are compared with those of the trainer's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ludic.inference.client.server_control import ServerControl
from ludic.inference.weights.weight_transport import WireWeights
from ludic.train.lora import adapter_tensors, base_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights(WireWeights):
    """The adapter of a model whose layers have one, under peft's names, as it is when this is made: for one sync."""

    # Made once: to walk through thousands of modules takes longer than to send what is in them.
    _adapter: dict[str, torch.Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_adapter", adapter_tensors(self.model))

    @property
    def applied(self) -> str:
        """Until the first update with a gradient B is 0, and log-probs that agree say nothing of the adapter."""
        largest = torch.stack([one.abs().max() for name, one in self._tensors().items() if ".lora_B." in name])
        return "adapter written in place" if largest.any() else "adapter written in place, which adds nothing yet"

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in self._tensors().items()}

    def num_bytes(self) -> int:
        return sum(tensor.numel() for tensor in self._tensors().values()) * self.dtype.itemsize

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._adapter

    def start(self, control: ServerControl) -> None:
        """Nothing: at the end of its own updates vLLM drops all adapters."""

    def hand_over(self, control: ServerControl, update_info: dict[str, Any]) -> None:
        control.update_adapter(update_info)

    def finish(self, control: ServerControl) -> None:
        """Nothing, as above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseWeights(WireWeights):
    """What lies below the adapter of a model, under the names that it has without one."""

    def _named(self) -> Mapping[str, torch.Tensor]:
        return base_parameters(self.model)
