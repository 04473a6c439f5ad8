"""How weights go to a server on the trainer's own GPU: copied from memory that both processes see (CUDA IPC).

The server's half is `vllm_ipc`, called by vLLM's `/collective_rpc`; one call copies all weights and answers with the digests of
what the model then holds, so a sync is a pause, that call and a resume. As over NCCL, only a server that can be written in
place gets them so, and not before a reload (here from shared memory) has shown by digests where each tensor lies. Where the
two processes cannot share the GPU's memory, every sync goes over shared memory, and a warning says why.
"""

import contextlib
import json
import logging

import torch

from ludic.inference.client.server_control import TRANSFER_TIMEOUT_S, ServerControl
from ludic.inference.weights.background import BackgroundCall
from ludic.inference.weights.bucket_broadcast import WireLayout
from ludic.inference.weights.ipc_link import BUCKET_BYTES, IpcLink, LinkBrokenError
from ludic.inference.weights.ipc_memory import NoIpcError
from ludic.inference.weights.weight_transport import Sent, SharedMemoryTransport, WireWeights
from ludic.rollout.errors import WeightSyncError

logger = logging.getLogger(__name__)

ANSWER_S = 5.0
"""For the server to say why it broke a transfer off."""


class IpcTransport(SharedMemoryTransport):
    """`SharedMemoryTransport` that goes over the GPU's own memory where it can.

    Args:
        server_gpu: UUID of the GPU that the server computes on.
    """

    def __init__(self, control: ServerControl, *, server_gpu: str, deadline_s: float = TRANSFER_TIMEOUT_S) -> None:
        super().__init__(control, deadline_s=deadline_s)
        self._server_gpu = server_gpu
        self._deadline_s = deadline_s
        self._link: IpcLink | None = None

    def open(self, weights: WireWeights, *, in_place_problem: str) -> None:
        super().open(weights, in_place_problem=in_place_problem)
        # An adapter is small, and the server writes it elsewhere than its model's weights.
        if weights.applied or gpu_of(weights.model.device) != self._server_gpu:
            return
        problem = in_place_problem or self._open_link(weights)
        if problem:
            logger.warning(
                "server and trainer share a GPU, but weights go through the host's memory, which is slower: %s", problem
            )

    def _open_link(self, weights: WireWeights) -> str:
        """Share a buffer with the server; why that cannot be, "" where it can."""
        assert self._folder is not None
        shapes = weights.shapes()
        layout = WireLayout.of(list(shapes), list(shapes.values()), weights.dtype, BUCKET_BYTES)
        try:
            link = IpcLink(layout, weights.model.device, self._folder.path / "turns", deadline_s=self._deadline_s)
        except NoIpcError as error:
            return str(error)
        except OSError as error:
            return f"no socket in {self._folder.path} ({error.strerror or error})"
        try:
            problem = self._control.ipc_problem(self._request(link, token=link.mark()))
        except BaseException:
            link.leave()
            raise
        if problem:
            link.leave()
        else:
            self._link = link
        return problem

    def _request(self, link: IpcLink, **more: str) -> str:
        return json.dumps(
            {
                "handle": link.handle,
                "num_bytes": link.num_bytes,
                "bucket_bytes": BUCKET_BYTES,
                "socket": str(link.path),
                "deadline_s": self._deadline_s,
                **more,
            }
        )

    @property
    def one_step(self) -> bool:
        return self.confirmed and self._link is not None

    def send(self, weights: WireWeights, *, weight_version: str) -> Sent:
        link = self._link
        if link is None or not self.confirmed:
            self.path = SharedMemoryTransport.path
            return super().send(weights, weight_version=weight_version)
        self.path = "written in place over CUDA IPC"
        self.touched = True
        asked = BackgroundCall(lambda: self._control.receive_over_ipc(self._request(link)))
        try:
            digests = link.send(weights.masters(), ended=asked.done)
        except LinkBrokenError as error:
            with contextlib.suppress(TimeoutError):  # the server's own words say more
                self.touched = asked.result(ANSWER_S).touched
                raise WeightSyncError(
                    f"the server broke the transfer off: {asked.result().problem or error}"
                ) from error
            raise WeightSyncError(str(error)) from error
        held = asked.result()
        self.touched = held.touched
        if held.problem:
            raise WeightSyncError(f"the server did not take the weights: {held.problem}")
        return Sent(digests, list(held.workers))

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.leave()
        super().close()


def gpu_of(device: torch.device) -> str:
    """The UUID of a GPU, whatever number this process gives it; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
