"""The two ways in which a whole set of weights reaches a vLLM server, both within vLLM's own weight-transfer API.

- `NCCLTransport`: vLLM's packed NCCL broadcast, GPU to GPU. Its trainer-side API changed at vLLM 0.28; both are used here.
- `SharedMemoryTransport`: a safetensors file in shared memory, for a server without NCCL on the same machine. The server's
  half is `vllm_worker.SharedMemoryWeightTransferEngine`.

Whether what was sent arrived is not decided here but in `weight_sync`.
"""

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import torch

from ludic.inference.digest import digest_hex, tensor_digest
from ludic.inference.server_control import ServerControl

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class WireWeights:
    """The parameters of a model as they go over the wire: checkpoint names, in the server's dtype, tied ones once.

    Iterating casts one tensor at a time; it can be iterated again and again, and sees the masters as they are then.
    """

    model: "PreTrainedModel"
    dtype: torch.dtype

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                yield name, parameter.detach().to(self.dtype).contiguous()

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}

    def num_bytes(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) * self.dtype.itemsize

    def digests(self) -> dict[str, str]:
        return {name: digest_hex(tensor_digest(tensor)) for name, tensor in self}


class WeightTransport(Protocol):
    """Carries one whole set of weights to the server: start, update, finish. Opening it may block on the server."""

    name: str

    def open(self, weights: WireWeights) -> None: ...

    def send(self, weights: WireWeights, *, weight_version: str) -> None: ...

    def close(self) -> None: ...


class SharedMemoryTransport:
    """Writes the weights as safetensors into shared memory and tells the server where; same machine only."""

    name = "ludic_shm"

    def __init__(self, control: ServerControl) -> None:
        self._control = control
        self._directory: Path | None = None

    def open(self, weights: WireWeights) -> None:
        root = Path("/dev/shm")
        free = shutil.disk_usage(root).free if root.is_dir() else 0
        base = root if free > 2 * weights.num_bytes() and os.access(root, os.W_OK) else None
        self._directory = Path(tempfile.mkdtemp(prefix="ludic-weights-", dir=base))
        self._control.init_weight_transfer_engine({"directory": str(self._directory)})

    def send(self, weights: WireWeights, *, weight_version: str) -> None:
        from safetensors.torch import save_file

        assert self._directory is not None
        tensors = {name: tensor.cpu() for name, tensor in weights}
        path = self._directory / f"weights-{weight_version}-{time.monotonic_ns()}.safetensors"
        try:
            save_file(tensors, path)
            digests = {name: digest_hex(tensor_digest(tensor)) for name, tensor in tensors.items()}
            self._control.start_weight_update()
            self._control.update_weights({"path": str(path), "names": list(tensors), "digests": digests})
            self._control.finish_weight_update()
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


class NCCLTransport:
    """vLLM's packed NCCL broadcast from the trainer's GPU (rank 0) to every worker of the server."""

    name = "nccl"

    def __init__(self, control: ServerControl) -> None:
        self._control = control
        self._send: Callable[[WireWeights], None] | None = None
        self._engine: Any = None

    def open(self, weights: WireWeights) -> None:
        world = self._control.request("GET", "/get_world_size")["world_size"]
        host = urlsplit(self._control.base_url).hostname or "127.0.0.1"
        master_address = _address_towards(host)
        self._send = _open_nccl(
            self._control, weights, master_address, _free_port(master_address), int(world) + 1, self
        )

    def send(self, weights: WireWeights, *, weight_version: str) -> None:
        assert self._send is not None
        self._send(weights)

    def close(self) -> None:
        if self._engine is not None and hasattr(self._engine, "shutdown"):  # vLLM 0.28 and later
            self._engine.shutdown()
        self._engine = self._send = None


def _open_nccl(
    control: ServerControl,
    weights: WireWeights,
    master_address: str,
    master_port: int,
    world_size: int,
    owner: NCCLTransport,
) -> Callable[[WireWeights], None]:
    """Join the server's workers in one NCCL group, by the trainer-side API that the installed vLLM has."""
    from vllm.distributed.weight_transfer import nccl_engine

    if hasattr(nccl_engine, "NCCLTrainerInitInfo"):  # vLLM 0.28 and later: the engine drives the whole round
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

        class Source(WeightSource):  # type: ignore[misc, unused-ignore]
            def metadata(self) -> list[Any]:
                return [ParamMeta(name, weights.dtype, tuple(shape)) for name, shape in weights.shapes().items()]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return iter(weights)

        engine = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
            nccl_engine.NCCLTrainerInitInfo(
                master_address=master_address, master_port=master_port, world_size=world_size, rank=0
            ),
            client=control,
            source=Source(),
        )
        owner._engine = engine
        return lambda _weights: engine.send_weights()

    static = nccl_engine.NCCLWeightTransferEngine  # vLLM 0.26 and 0.27: static functions, the caller drives the round
    init_info = {
        "master_address": master_address,
        "master_port": master_port,
        "rank_offset": 1,
        "world_size": world_size,
    }
    with _Concurrently(lambda: control.init_weight_transfer_engine(init_info)):
        group = static.trainer_init(init_info)

    def send(current: WireWeights) -> None:
        shapes = current.shapes()
        dtype_name = str(current.dtype).removeprefix("torch.")
        update_info = {
            "names": list(shapes),
            "dtype_names": [dtype_name] * len(shapes),
            "shapes": list(shapes.values()),
            "packed": True,
        }
        control.start_weight_update()
        with _Concurrently(lambda: control.update_weights(update_info)):
            static.trainer_send_weights(iter(current), {"group": group, "packed": True})
            torch.cuda.current_stream().synchronize()
        control.finish_weight_update()

    return send


class _Concurrently:
    """Runs one call beside the body of a `with`, and raises its error at the end: both meet inside the same NCCL call."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="ludic-server-call")

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._thread.join()
        if self._error is not None:
            raise self._error


TRANSPORTS: dict[str, Callable[[ServerControl], WeightTransport]] = {
    "nccl": NCCLTransport,
    "ludic_shm": SharedMemoryTransport,
}


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind((address, 0))
        return int(sock.getsockname()[1])


def _address_towards(host: str) -> str:
    """This machine's address as `host` sees it; loopback stays loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))  # a datagram socket: nothing is sent
        return str(sock.getsockname()[0])
