"""The receiving half of a weight sync over a model in this process, without vLLM: quick enough for thousands of syncs.

It stands in for the control routes (`ServerControl`) and for NCCL; what sends, and what proves, is ludic's own. A file is
checked as the server's worker checks it; buckets are received by ludic's own `BucketReceiver`.
"""

import contextlib
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ludic.inference.client.server_control import HeldDigests, ServerControl
from ludic.inference.weights.bucket_broadcast import BucketReceiver, WireLayout
from ludic.inference.weights.digest import digest_hex, tensor_digests
from ludic.rollout.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL_BUCKETS = 16 * 4096
"""So that the small model here takes several, some of its tensors cut between two."""


class Link:
    """One end of a broadcast within this process, in the place of `NcclLink`."""

    left = False

    def __init__(self, wire: "queue.Queue[torch.Tensor]", rank: int) -> None:
        self._wire, self._rank = wire, rank

    def join(self, *_: object, **options: object) -> None: ...

    def check(self) -> None: ...

    def leave(self) -> None:
        self.left = True

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        if self._rank == src:
            self._wire.put(tensor.clone())
        else:
            tensor.copy_(self._wire.get(timeout=20))


class ModelServer(ServerControl):
    """A server of `model`. What goes wrong is put into `on_bytes` (each bucket, before it is unpacked), `on_file` (before it
    is read) and `on_received` (the model, before it is proven)."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__("http://127.0.0.1:1")
        self.model = model
        self.on_bytes: list[Callable[[torch.Tensor], None]] = []
        self.on_file: list[Callable[[dict[str, Any]], None]] = []
        self.on_received: list[Callable[[PreTrainedModel], None]] = []
        self.paused = [False]
        self._wanted: list[str] = []
        self._wire: queue.Queue[torch.Tensor] = queue.Queue()
        self._receivers: list[BucketReceiver] = []

    @contextlib.contextmanager
    def linked(self) -> Iterator[None]:
        """For the length of the block, what ludic sends over NCCL comes here."""
        place = "ludic.inference.weights.nccl_transport"
        with (
            mock.patch(f"{place}.NcclLink", lambda: Link(self._wire, 0)),
            mock.patch(f"{place}.BUCKET_BYTES", SMALL_BUCKETS),
        ):
            yield

    def request(self, method: str, path: str, **_: Any) -> Any:
        assert (method, path) == ("GET", "/get_world_size")
        return {"world_size": 1}

    def is_paused(self) -> bool:
        return self.paused[-1]

    def pause(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        self.paused.append(True)

    def resume(self, *, timeout_s: float | None = None) -> None:
        self.paused.append(False)

    def expect_weights(self, wanted: dict[str, dict[str, Any]]) -> list[str]:
        self._wanted[:] = wanted
        return [""]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        if "names" in init_info:
            dtype = getattr(torch, init_info["dtype"])
            layout = WireLayout.of(init_info["names"], init_info["shapes"], dtype, init_info["bucket_bytes"])
            while not self._wire.empty():  # of a sync that broke off
                self._wire.get()
            self._receivers[:] = [BucketReceiver(layout, _Damaged(self._wire, self.on_bytes), torch.device("cpu"))]

    def start_weight_update(self) -> None: ...

    def end_open_update(self) -> None: ...

    @torch.no_grad()
    def update_weights(self, update_info: dict[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        if "path" in update_info:
            for damage in self.on_file:
                damage(update_info)
            for name, tensor in _checked(update_info).items():
                parameters[name].copy_(tensor)
        else:
            (receiver,) = self._receivers
            receiver.receive_into([parameters[name] for name in receiver.layout.names])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        for damage in self.on_received:
            damage(self.model)

    def held_digests(self) -> list[HeldDigests]:
        parameters = dict(self.model.named_parameters())
        digests = tensor_digests([parameters[name] for name in self._wanted])
        return [HeldDigests(in_memory=[digest_hex(digest) for digest in digests], packed=[""] * len(digests))]

    @torch.no_grad()
    def prompt_logprobs(self, model: str, token_ids: list[int], *, cache_salt: str) -> list[float]:
        ids = torch.tensor([token_ids])
        logprobs = self.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        values: list[float] = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        return values


class _Damaged(Link):
    def __init__(self, wire: "queue.Queue[torch.Tensor]", on_bytes: list[Callable[[torch.Tensor], None]]) -> None:
        super().__init__(wire, 1)
        self._on_bytes = on_bytes

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        super().broadcast(tensor, src, stream)
        for damage in self._on_bytes:
            damage(tensor)


def _checked(update_info: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The file's tensors, refused as `vllm_worker` refuses them."""
    try:
        tensors = load_file(Path(update_info["path"]))
    except SafetensorError as error:
        raise EngineError(f"not a whole safetensors file: {error}") from error
    if tensors.keys() != set(update_info["names"]):
        raise EngineError("a tensor is missing from the file, or was not announced")
    for name, digest in zip(tensors, tensor_digests(list(tensors.values())), strict=True):
        if digest_hex(digest) != update_info["digests"][name]:
            raise EngineError(f"tensor {name!r} arrived corrupted")
    return tensors
