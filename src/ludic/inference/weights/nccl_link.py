"""One rank of an NCCL group between a trainer and a server's workers, which can be torn down while it is stuck.

A broadcast whose other side has stopped spins on the GPU for ever, and everything that this process then asks of the GPU
waits behind it. `ncclCommAbort` ends it, from another thread: `NcclLink.leave`. `Watch` calls that by itself at a deadline, or
when the other side is seen to have gone: the TCP connection over which the group was formed stays open as long as the group,
and ends with the trainer's process or its half of the group.

Left out: a deadline for `ncclCommInitRank`, which blocks in the host until every rank has come. It holds no GPU; whoever
waits for the thread that it blocks needs a deadline of its own, and the link leaves as soon as that call ends.
"""

import ctypes
import math
import threading
from typing import Any

import torch

LOOK_S = 0.5
"""How often a `Watch` looks whether the other side is still there."""
_LOCK_S = 2.0
_ID_KEY = "ludic/nccl-unique-id"


class LinkLeftError(RuntimeError):
    """The group was torn down during a call."""


class NoNCCLError(RuntimeError):
    """vLLM finds no NCCL in this process's environment."""


class NcclLink:
    """A group that is joined at most once. `broadcast` is for one thread, `leave` for any."""

    def __init__(self) -> None:
        self._communicator: Any = None
        self._store: Any = None
        self.left = False
        self._calling = threading.Lock()
        """Held while NCCL launches: an abort frees what a launch uses."""

    def join(self, address: str, port: int, *, rank: int, world_size: int, timeout_s: float) -> None:
        """Form the group; rank 0 listens on the port. Blocks until all ranks have come, on the current CUDA device.

        Raises:
            NoNCCLError: there is no NCCL.
            LinkLeftError: the link was left meanwhile.
            RuntimeError: rank 0 was not found within `timeout_s`, or NCCL failed.
        """
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        group = StatelessProcessGroup.create(
            host=address, port=port, rank=rank, world_size=world_size, store_timeout=math.ceil(timeout_s)
        )
        self._store = group.store
        # vLLM's own way would unpickle whatever lies under the key, on a port without authentication.
        group.broadcast_obj = lambda unique_id, src: share_unique_id(group.store, unique_id, is_source=rank == src)
        # Made in two steps: what its constructor gets stuck in, the first all-reduce, can then be aborted.
        communicator = PyNcclCommunicator.__new__(PyNcclCommunicator)
        self._communicator = communicator
        PyNcclCommunicator.__init__(communicator, group, device=torch.accelerator.current_device_index())
        if self.left:
            self.leave()  # it came too early for a communicator that was not there yet
            raise LinkLeftError("the NCCL group was given up while it was formed")
        if communicator.disabled:
            raise NoNCCLError("vLLM found no NCCL in this process's environment")

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        """Launch an in-place broadcast from rank `src`. Raises LinkLeftError once the link was left."""
        with self._calling:
            self.check()
            self._communicator.broadcast(tensor, src=src, stream=stream)

    def check(self) -> None:
        """Raise LinkLeftError if the link was left, so that what its last broadcasts carried is not what was sent."""
        if self.left:
            raise LinkLeftError("the NCCL group was torn down in the middle of a transfer")

    def leave(self) -> None:
        """End all broadcasts that are under way, whatever the other side does, and free the group; some seconds at most."""
        self.left = True
        calling = self._calling.acquire(timeout=_LOCK_S)  # a launch that is itself stuck is ended by the abort
        try:
            communicator = self._communicator
            # Not yet there: NCCL is still waiting for the other ranks, with nothing on the GPU.
            if communicator is not None and "comm" in vars(communicator) and not communicator.disabled:
                communicator.destroy()
                communicator.group = None
                self._communicator = None
            self._store = None  # closes the connection by which the other side sees that we are gone
        finally:
            if calling:
                self._calling.release()

    def peer_is_gone(self) -> bool:
        """Ask over the connection to rank 0. Blocks where that neither answers nor has ended."""
        store = self._store
        try:
            if store is not None:
                store.check(["ludic"])
        except RuntimeError:  # torch's DistNetworkError: closed, by the other process or with it
            return True
        return False


def share_unique_id(store: Any, unique_id: Any, *, is_source: bool) -> Any:
    """NCCL's id, a ctypes structure, from one rank to the others through torch's store, as the bytes that it is."""
    if is_source:
        store.set(_ID_KEY, bytes(unique_id))
        return unique_id
    content = bytes(store.get(_ID_KEY))
    if len(content) != ctypes.sizeof(unique_id):
        raise ValueError(f"NCCL's id has {ctypes.sizeof(unique_id)} bytes, the trainer's store holds {len(content)}")
    ctypes.memmove(ctypes.byref(unique_id), content, len(content))
    return unique_id


class Watch:
    """For the length of a block, leaves the link after `deadline_s` seconds or when its other side has gone."""

    def __init__(self, link: NcclLink, *, deadline_s: float) -> None:
        self._link = link
        self._deadline_s = deadline_s
        self._over = threading.Event()
        self._gone = threading.Event()
        self._reason = ""
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="ludic-nccl-watch")

    def __enter__(self) -> "Watch":
        threading.Thread(target=self._look, daemon=True, name="ludic-nccl-look").start()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._gone.set()
        self._watcher.join()

    def check(self) -> None:
        """Raise ValueError if the link was left: what was received since then is not what was sent."""
        if self._reason:
            raise ValueError(f"the transfer was broken off: {self._reason}")

    def _look(self) -> None:
        """On a thread of its own, because a request over a connection that hangs blocks."""
        while not self._over.wait(LOOK_S):
            if self._link.peer_is_gone():
                self._gone.set()
                return

    def _watch(self) -> None:
        gone = self._gone.wait(self._deadline_s)
        if self._over.is_set():
            return
        self._reason = "the trainer is gone" if gone else f"it was not over after {self._deadline_s:g} s"
        self._link.leave()
