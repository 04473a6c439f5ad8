"""The policy as it goes over the wire, and the way to a server without NCCL on the same machine: a file in shared memory.

The server's half is `vllm_worker.SharedMemoryWeightTransferEngine`. `nccl_transport` is the way between GPUs. Whether what
was sent arrived is decided in `weight_sync`.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.core_model_loading import revert_weight_conversion

from ludic.inference.cleanup import WeightsFolder, remove_orphaned_folders
from ludic.inference.client.server_control import TRANSFER_TIMEOUT_S, HeldDigests, ServerControl
from ludic.inference.weights.digest import canonical, digest_hex, tensor_digest, tensor_digests
from ludic.inference.wire import UNTOUCHED
from ludic.rollout.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class WireWeights:
    """The parameters of a model as they go over the wire: checkpoint names, in the server's dtype, tied ones once.

    The names and shapes are those that `save_pretrained` writes, by transformers' own reverse mapping: in memory some models
    stack their experts or call a module otherwise. What the mapping cuts or moves is a copy for as long as it is in use, in
    the server's dtype.

    It can be iterated again and again, and sees the masters as they are then.
    """

    model: "PreTrainedModel"
    dtype: torch.dtype

    @property
    def applied(self) -> str:
        """How the server applies them, in a few words; "" where that is the transport's business."""
        return ""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors().items():
            yield name, tensor.to(self.dtype).contiguous()

    def masters(self) -> list[torch.Tensor]:
        """The tensors, each contiguous: the parameters themselves, not cast, but for those that the mapping copies."""
        return [tensor.contiguous() for tensor in self._tensors().values()]

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in self._reverted(lambda master: master.to("meta")).items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        copies = self.shapes().keys() != self._named().keys()
        return self._reverted(lambda master: master.to(self.dtype) if copies else master)

    @torch.no_grad()
    def _reverted(self, take: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        named = {name: take(parameter.detach()) for name, parameter in self._named().items()}
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(self.model, named)
        return reverted

    def _named(self) -> Mapping[str, torch.Tensor]:
        return dict(self.model.named_parameters())

    def start(self, control: ServerControl) -> None:
        """Before a transport sends them, in the calls of vLLM's weight-transfer API."""
        control.start_weight_update()

    def hand_over(self, control: ServerControl, update_info: dict[str, Any]) -> None:
        """Tell the server what it is sent, and by which way; returns when it has taken it."""
        control.update_weights(update_info)

    def finish(self, control: ServerControl) -> None:
        control.finish_weight_update()

    def num_bytes(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters()) * self.dtype.itemsize

    def digests(self) -> list[int]:
        """The digest of each tensor in the wire's dtype, cast a bucket at a time."""
        return tensor_digests(self.masters(), self.dtype)

    def canonical_digests(self, numbers: Iterable[int], *, flush: bool) -> dict[int, int]:
        """Of the tensors of these numbers, the digests of their `digest.canonical` form in the wire's dtype."""
        masters = self.masters()
        return {number: tensor_digest(canonical(masters[number].to(self.dtype), flush=flush)) for number in numbers}


class Sent(NamedTuple):
    """What a transport knows of the weights that it has sent."""

    digests: list[int] | None = None
    """As they went out, where they were computed on the way"""
    held: list[HeldDigests] | None = None
    """What the server says that it holds now, where its answer to the transfer says so"""


class SharedMemoryTransport:
    """Writes the weights as safetensors into shared memory and tells the server where; same machine only."""

    name = "ludic_shm"
    path = "reloaded from shared memory, digests of all tensors checked on receipt"
    """How the last send was applied, in a few words."""

    def __init__(self, control: ServerControl, *, deadline_s: float = TRANSFER_TIMEOUT_S) -> None:
        self._control = control
        self._folder: WeightsFolder | None = None
        self.touched = False
        """Whether the server's weights may no longer be those from before the last `send`."""
        self.confirmed = False
        """Whether the server was found to hold all tensors of a send, each where `checkpoint_views` looks for it."""

    @property
    def one_step(self) -> bool:
        """Whether the next `send` replaces all weights between two steps of the model, and so needs no paused server."""
        return False

    def open(self, weights: WireWeights, *, in_place_problem: str) -> None:
        """Agree with the server. `in_place_problem` is why it cannot take weights in place, "" where it can."""
        root = Path("/dev/shm")
        free = shutil.disk_usage(root).free if root.is_dir() else 0
        base = root if free > 2 * weights.num_bytes() and os.access(root, os.W_OK) else None
        remove_orphaned_folders()  # of trainers that were killed: they take the room of ours
        self._folder = WeightsFolder(base)
        self._control.init_weight_transfer_engine({"directory": str(self._folder.path)})

    def send(self, weights: WireWeights, *, weight_version: str) -> Sent:
        """Send. Without digests on the way, they are computed from the policy itself: a file of another model is found out."""
        from safetensors.torch import save_file

        assert self._folder is not None
        self.touched = False
        tensors = {name: tensor.cpu() for name, tensor in weights}
        path = self._folder.path / f"weights-{weight_version}-{time.monotonic_ns()}.safetensors"
        try:
            save_file(tensors, path)
            digests = dict(zip(tensors, map(digest_hex, tensor_digests(list(tensors.values()))), strict=True))
            self.path = weights.applied or SharedMemoryTransport.path
            weights.start(self._control)
            self.touched = True
            weights.hand_over(self._control, {"path": str(path), "names": list(tensors), "digests": digests})
            weights.finish(self._control)
        except EngineError as error:
            self.touched &= UNTOUCHED not in str(error)
            raise
        finally:
            path.unlink(missing_ok=True)
        return Sent()

    def abort(self) -> None:
        """From another thread than the one that is stuck in `open` or `send`: let go of everything, never to be used again.

        What that thread holds of the GPU comes free; it may itself stay in a call that cannot be interrupted.
        """
        self.close()  # a server that comes to it later finds no file, and refuses

    def close(self) -> None:
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
