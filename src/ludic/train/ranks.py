"""The processes that train one model together: what they tell each other, and how they end together.

`torchrun` starts them. Weights and gradients travel over the default process group (NCCL on GPUs, gloo on CPUs). Commands of
rank 0 travel over a gloo group of their own, on which the others may wait for hours: a rank that is gone is not noticed by
a deadline of a call, but by its missing sign of life in torchrun's store.

One rank's error ends all. It is written into the store, where the first one stays; every rank looks there twice a second.
Rank 0 says it in one line, the others end without a word.
"""

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

_PrefixStore = torch._C._distributed_c10d.PrefixStore

SIGN_S = 0.5
"""Between two signs of life, and two looks at those of the others."""
LOST_S = 60.0
"""A rank without a sign for so long is lost. A call that keeps the interpreter to itself gives none either."""
GRACE_S = 5.0
"""For rank 0 to end by itself, and for the others to let it speak first."""
_FOREVER = datetime.timedelta(days=365)
_TRANSFER = datetime.timedelta(minutes=30)
"""For one collective: a rank may be loading or writing meanwhile, and one that is lost is found sooner."""
_FAILURE = "failure"
_ENDED = "ended"


class RankError(ConnectionError):
    """Another rank failed, or was lost; the message names it."""


class Ranks:
    """This process among those that torchrun started. Made by all of them at about the same time.

    Args:
        leave: ends this process at once with the line given; called from another thread where the main one is stuck in a
            collective that will not end.
        lost_s: see `LOST_S`.

    Raises:
        ValueError: there are fewer GPUs than ranks on this node.
    """

    def __init__(self, *, leave: Callable[[str], object], lost_s: float = LOST_S) -> None:
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            if self.local_rank >= (gpus := torch.cuda.device_count()):
                raise ValueError(
                    f"rank {self.local_rank} of this node has no GPU, since {gpus} are visible: "
                    f"start torchrun with --nproc_per_node {gpus} at most, or make more visible (CUDA_VISIBLE_DEVICES)"
                )
            torch.cuda.set_device(self.device)
        torchruns, rank, size = next(iter(rendezvous("env://")))
        # torchrun may keep its store through a restart, with the addresses and the failure of the processes before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = _PrefixStore(f"ludic/{attempt}", torchruns)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=_TRANSFER
        )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(self.device.type, (self.size,))
        commands = dist.new_group(backend="gloo", timeout=_FOREVER)
        assert isinstance(commands, dist.ProcessGroup)
        self._commands = commands
        # A connection of its own: the other one is used by process groups, from other threads.
        self._store = _PrefixStore("signs", store.clone())
        self._leave, self._lost_s = leave, lost_s
        self._closed = threading.Event()
        self._seen = dict.fromkeys(range(self.size), (-1, time.monotonic()))
        """Of each rank, its last sign of life and since when that is known."""
        self._watching = threading.Thread(target=self._watch, daemon=True, name="ludic-ranks")
        self._watching.start()

    # -- what they tell each other -----------------------------------------------------------------------------------

    def tell(self, messages: Sequence[Any]) -> Any:
        """Rank 0 gives each rank its own message, [N]; returns rank 0's."""
        received: list[Any] = [None]
        dist.scatter_object_list(received, list(messages), src=0, group=self._commands)
        return received[0]

    def told(self) -> Any:
        """What rank 0 tells this one; waits for it as long as it takes."""
        received: list[Any] = [None]
        dist.scatter_object_list(received, None, src=0, group=self._commands)
        return received[0]

    def share(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order: [N]."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._commands)
        return values

    def total(self, value: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """The sum over all ranks of a tensor on the device; in place."""
        dist.all_reduce(value, op)
        return value

    # -- how they end ------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends with `error`; the first error of all ranks is the one that is told."""
        text = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, (ValueError, OSError, MemoryError, FloatingPointError)):
            text = f"{type(error).__name__}: {text}"
        self._record(f"rank {self.rank}: {text}")

    def explained(self, error: BaseException) -> BaseException:
        """What rank 0 is to raise for `error`: where another rank's came first, that one's."""
        if isinstance(error, RankError):
            return error
        deadline = time.monotonic() + GRACE_S if _is_of_a_connection(error) else 0.0
        while (failure := self.failure()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if failure is None and deadline:
            silent = [rank for rank, (_, since) in self._seen.items() if since < deadline - GRACE_S / 2]
            lost = f"rank {silent[0]}" if silent else "another rank"
            failure = f"{lost} was lost: {' '.join(str(error).split())[:200]}"
            self._record(failure)
        if failure is None:
            self.fail(error)
            return error
        return RankError(failure)

    def failure(self) -> str | None:
        """The first error of any rank."""
        return self._store.get(_FAILURE).decode() if self._store.check([_FAILURE]) else None

    def leave_groups(self) -> None:
        """At an orderly end, which all ranks come to: give back what NCCL holds. After a failure this could wait for ever."""
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

    def close(self) -> None:
        """The end of this rank: no sign of life is expected of it any more."""
        if not self._closed.is_set():
            self._closed.set()
            # Python ends daemon threads as it shuts down, and one that is just in the store's C++ ends the process by SIGABRT.
            if threading.current_thread() is not self._watching:
                self._watching.join(GRACE_S)
            self._try(lambda: self._store.set(f"{_ENDED}/{self.rank}", "1"))

    def await_the_word_of_rank_0(self) -> None:
        """Leave time for rank 0 to end first: torchrun ends all processes once one has failed."""
        deadline = time.monotonic() + 2 * GRACE_S
        while time.monotonic() < deadline and not self._try(lambda: self._store.check([f"{_ENDED}/0"])):
            time.sleep(0.1)

    def _record(self, failure: str) -> None:
        self._try(lambda: self._store.compare_set(_FAILURE, "", failure))

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError:  # the store is gone, and with it torchrun's agent or rank 0
            return True

    def _watch(self) -> None:
        """Give signs of life, look at those of the others, and end this process when one of them has ended."""
        number = 0
        while not self._closed.wait(SIGN_S):
            number += 1
            try:
                self._store.set(f"alive/{self.rank}", str(number))
                failure = self.failure() or self._lost()
            except RuntimeError:
                failure = "torchrun's store is gone, and with it rank 0 or torchrun"
            if failure is not None:
                self._record(failure)
                # Rank 0 may be about to say it by itself.
                if not self._closed.wait(GRACE_S / 2 if self.rank == 0 else GRACE_S):
                    self.close()
                    self._leave(failure)
                return

    def _lost(self) -> str | None:
        now = time.monotonic()
        for rank, (number, since) in list(self._seen.items()):
            if self._store.check([f"{_ENDED}/{rank}"]):
                continue
            key = f"alive/{rank}"
            sign = int(self._store.get(key)) if self._store.check([key]) else -1
            if sign != number:
                self._seen[rank] = (sign, now)
            elif now - since > self._lost_s:
                return f"rank {rank} was lost: no sign of life for {self._lost_s:.0f} s"
        return None


def _is_of_a_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another process: gloo says so in words alone."""
    words = ("gloo", "NCCL", "Connection", "connection", "Broken pipe", "Socket", "socket")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
