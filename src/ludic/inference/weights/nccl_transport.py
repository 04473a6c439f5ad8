"""How weights go from the trainer's GPU to a vLLM server's, within vLLM's own weight-transfer API.

A few broadcasts of flat buckets whose layout was agreed at the start. The first send is applied by vLLM's own reload; once
the digests show that every tensor lies where `vllm_model.checkpoint_views` finds it, and nothing in the server's model speaks
against it, later ones are copied there directly.

Left out: vLLM's own backend `nccl`, which sends tensor by tensor through a reload, cannot be broken off, and is slower
(`benchmarks/sync.py`).
"""

import socket
from urllib.parse import urlsplit

from ludic.inference.client.server_control import TRANSFER_TIMEOUT_S, ServerControl
from ludic.inference.client.server_process import free_port
from ludic.inference.weights.background import BackgroundCall
from ludic.inference.weights.bucket_broadcast import BUCKET_BYTES, BucketSender, WireLayout
from ludic.inference.weights.nccl_link import NcclLink, NoNCCLError
from ludic.inference.weights.weight_transport import Sent, WireWeights
from ludic.rollout.errors import WeightSyncError


class BucketTransport:
    """Flat buckets over NCCL to every worker of the server. The server's half is `vllm_nccl.BucketWeightTransferEngine`.

    Its methods and attributes are those of `SharedMemoryTransport`.
    """

    name = "ludic_nccl"

    def __init__(self, control: ServerControl, *, deadline_s: float = TRANSFER_TIMEOUT_S) -> None:
        self._control = control
        self._deadline_s = deadline_s
        self._link = NcclLink()
        self._sender: BucketSender | None = None
        self._problem = ""
        self.path = ""
        self.touched = False
        self.confirmed = False

    def open(self, weights: WireWeights, *, in_place_problem: str) -> None:
        self._problem, self.confirmed = in_place_problem, False
        world_size = int(self._control.request("GET", "/get_world_size")["world_size"]) + 1
        address, port = rendezvous(self._control.base_url)
        shapes = weights.shapes()
        init_info = {
            "master_address": address,
            "master_port": port,
            "rank_offset": 1,
            "world_size": world_size,
            "names": list(shapes),
            "shapes": list(shapes.values()),
            "dtype": str(weights.dtype).removeprefix("torch."),
            "bucket_bytes": BUCKET_BYTES,
            "deadline_s": self._deadline_s,
        }
        with BackgroundCall(lambda: self._control.init_weight_transfer_engine(init_info)):
            try:
                self._link.join(address, port, rank=0, world_size=world_size, timeout_s=self._deadline_s)
            except NoNCCLError as error:
                raise WeightSyncError(f"{error}, the trainer's, so weights cannot go from GPU to GPU") from error
        layout = WireLayout.of(list(shapes), list(shapes.values()), weights.dtype, BUCKET_BYTES)
        self._sender = BucketSender(layout, self._link, weights.model.device)

    @property
    def one_step(self) -> bool:
        return self.confirmed and not self._problem

    def send(self, weights: WireWeights, *, weight_version: str) -> Sent:
        assert self._sender is not None
        self.touched = False
        weights.start(self._control)
        why = self._problem or "the first time, to see where it puts each tensor"
        self.path = weights.applied or ("written in place" if self.one_step else f"reloaded by vLLM ({why})")
        update_info = {"apply": "copy" if self.one_step else "load", "deadline_s": self._deadline_s}
        self.touched = True
        with BackgroundCall(lambda: weights.hand_over(self._control, update_info)):
            sent = self._sender.send(weights.masters())
            self._link.check()
        weights.finish(self._control)
        return Sent(sent)

    def abort(self) -> None:
        self._link.leave()

    def close(self) -> None:
        self._sender = None
        self._link.leave()
        self._link = NcclLink()


def rendezvous(base_url: str) -> tuple[str, int]:
    """This machine's address as the server sees it (loopback stays loopback), and a free port there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((urlsplit(base_url).hostname or "127.0.0.1", 9))  # a datagram socket: nothing is sent
        address = str(sock.getsockname()[0])
    return address, free_port(address)
