"""The two ways in which weights go from the trainer's GPU to a vLLM server's, within vLLM's own weight-transfer API.

- `BucketTransport` (`ludic_nccl`): a few broadcasts of flat buckets whose layout was agreed at the start. The first send is
  applied by vLLM's own reload; once the digests show that every tensor lies where `vllm_model.checkpoint_views` finds it,
  and nothing in the server's model speaks against it, later ones are copied there directly.
- `NCCLTransport` (`nccl`): vLLM's packed broadcast, for a server that was started with vLLM's own backend. Its
  trainer-side API changed at vLLM 0.28 and 0.33; all are used here.

vLLM is imported when a transport opens: this module can be imported where it is not installed.
"""

import socket
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import torch

from ludic.inference.client.server_control import TRANSFER_TIMEOUT_S, ServerControl
from ludic.inference.client.server_process import free_port
from ludic.inference.weights.background import BackgroundCall
from ludic.inference.weights.bucket_broadcast import BUCKET_BYTES, BucketSender
from ludic.inference.weights.nccl_link import NcclLink, NoNCCLError
from ludic.inference.weights.weight_transport import WireWeights
from ludic.rollout.errors import WeightSyncError


class BucketTransport:
    """Flat buckets over NCCL to every worker of the server. The server's half is `vllm_nccl.BucketWeightTransferEngine`."""

    name = "ludic_nccl"

    def __init__(self, control: ServerControl, *, deadline_s: float = TRANSFER_TIMEOUT_S) -> None:
        self._control = control
        self._deadline_s = deadline_s
        self._link = NcclLink()
        self._sender: BucketSender | None = None
        self._problem = ""
        self._confirmed = False
        self._path = ""
        self.touched = False

    def open(self, weights: WireWeights, *, in_place_problem: str) -> None:
        self._problem, self._confirmed = in_place_problem, False
        world_size = int(self._control.request("GET", "/get_world_size")["world_size"]) + 1
        address, port = _rendezvous(self._control.base_url)
        layout = weights.layout(BUCKET_BYTES)
        init_info = {
            "master_address": address,
            "master_port": port,
            "rank_offset": 1,
            "world_size": world_size,
            "names": list(layout.names),
            "shapes": [list(shape) for shape in layout.shapes],
            "dtype": str(layout.dtype).removeprefix("torch."),
            "bucket_bytes": BUCKET_BYTES,
            "deadline_s": self._deadline_s,
        }
        with BackgroundCall(lambda: self._control.init_weight_transfer_engine(init_info)):
            self._connect(address, port, world_size)
        self._sender = BucketSender(layout, self._link, weights.model.device)

    def _connect(self, address: str, port: int, world_size: int) -> None:
        try:
            self._link.join(address, port, rank=0, world_size=world_size, timeout_s=self._deadline_s)
        except NoNCCLError as error:
            raise WeightSyncError(f"{error}, the trainer's, so weights cannot go from GPU to GPU") from error

    @property
    def one_step(self) -> bool:
        return self._confirmed and not self._problem

    def send(self, weights: WireWeights, *, weight_version: str) -> list[int] | None:
        assert self._sender is not None
        self.touched = False
        self._control.start_weight_update()
        in_place = self.one_step
        update_info = {"apply": "copy" if in_place else "load", "deadline_s": self._deadline_s}
        why = self._problem or "the first time, to see where it puts each tensor"
        self._path = "written in place" if in_place else f"reloaded by vLLM ({why})"
        self.touched = True
        with BackgroundCall(lambda: self._control.update_weights(update_info)):
            sent = self._sender.send(weights.masters())
            self._link.check()
        self._control.finish_weight_update()
        return sent

    def path(self) -> str:
        return self._path

    def confirm(self) -> None:
        self._confirmed = True

    def abort(self) -> None:
        self._link.leave()

    def close(self) -> None:
        self._sender = None
        self._link.leave()
        self._link = NcclLink()


class NCCLTransport:
    """vLLM's packed NCCL broadcast from the trainer's GPU (rank 0) to every worker of the server.

    The server's half is vLLM's own and has no deadline: where the trainer breaks a transfer off, the server must be restarted.
    """

    name = "nccl"
    one_step = False

    def __init__(self, control: ServerControl, *, deadline_s: float = TRANSFER_TIMEOUT_S) -> None:
        self._control = control
        self._send: Callable[[WireWeights], None] | None = None
        self._group: Any = None
        """vLLM's trainer-side engine, or before 0.28 its communicator."""
        self._aborted = False
        self.touched = False

    def open(self, weights: WireWeights, *, in_place_problem: str) -> None:
        world = self._control.request("GET", "/get_world_size")["world_size"]
        address, port = _rendezvous(self._control.base_url)
        self._group, self._send = _open_nccl(self._control, weights, address, port, int(world) + 1)
        if self._aborted:
            self.close()

    def send(self, weights: WireWeights, *, weight_version: str) -> list[int] | None:
        assert self._send is not None
        self.touched = True
        self._send(weights)
        return None

    def path(self) -> str:
        return "reloaded by vLLM"

    def confirm(self) -> None:
        """Nothing changes: vLLM's backend always reloads."""

    def abort(self) -> None:
        self._aborted = True
        self.close()

    def close(self) -> None:
        group, self._group, self._send = self._group, None, None
        if group is not None:
            leave = group.shutdown if hasattr(group, "shutdown") else group.destroy  # vLLM 0.28 and later, or before
            leave()


def _open_nccl(
    control: ServerControl,
    weights: WireWeights,
    master_address: str,
    master_port: int,
    world_size: int,
) -> tuple[Any, Callable[[WireWeights], None]]:
    """Join the server's workers in one NCCL group, by the trainer-side API that the installed vLLM has; how to send."""
    from vllm.distributed.weight_transfer import nccl_engine

    if hasattr(nccl_engine, "NCCLTrainerInitInfo"):  # vLLM 0.28 and later: the engine drives the whole round
        engine = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
            nccl_engine.NCCLTrainerInitInfo(
                master_address=master_address, master_port=master_port, world_size=world_size, rank=0
            ),
            client=control,
            source=_weight_source(weights),
        )
        return engine, lambda _weights: engine.send_weights()

    static = nccl_engine.NCCLWeightTransferEngine  # vLLM 0.26 and 0.27: static functions, the caller drives the round
    init_info = {
        "master_address": master_address,
        "master_port": master_port,
        "rank_offset": 1,
        "world_size": world_size,
    }
    with BackgroundCall(lambda: control.init_weight_transfer_engine(init_info)):
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
        with BackgroundCall(lambda: control.update_weights(update_info)):
            static.trainer_send_weights(iter(current), {"group": group, "packed": True})
            torch.cuda.current_stream().synchronize()
        control.finish_weight_update()

    return group, send


def _weight_source(weights: WireWeights) -> Any:
    """`weights` as the trainer-side engine of vLLM 0.28 and later wants them: names, dtypes and shapes, and the tensors."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    def described(_source: Any) -> list[Any]:
        return [ParamMeta(name, weights.dtype, tuple(shape)) for name, shape in weights.shapes().items()]

    class Source(WeightSource):  # type: ignore[misc, unused-ignore]
        # vLLM 0.33 reads `metadata` and calls `iter_full`; before, it called `metadata` and iterated.
        metadata = cached_property(described) if hasattr(WeightSource, "iter_full") else described

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(weights)

        iter_full = __iter__

    return Source()


def _rendezvous(base_url: str) -> tuple[str, int]:
    """This machine's address as the server sees it, and a free port there."""
    address = _address_towards(urlsplit(base_url).hostname or "127.0.0.1")
    return address, free_port(address)


def _address_towards(host: str) -> str:
    """This machine's address as `host` sees it; loopback stays loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))  # a datagram socket: nothing is sent
        return str(sock.getsockname()[0])
