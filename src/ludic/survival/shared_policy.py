"""A policy that several engines read at the same time, so that their weight syncs overlap.

The thread that owns the model calls one reader at a time. Here the first reader holds that thread until the last one has
ended, and each reader runs on a thread of its own meanwhile: the model stays as it is, and no engine waits for another one's
transfer or proof.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ludic.inference.weights.background import BackgroundCall
from ludic.rollout.engine import Policy, Result
from ludic.train.learner_thread import to_its_end

if TYPE_CHECKING:
    import torch


class SharedPolicy:
    """`Policy` over another one, whose readers may overlap. For readers of one event loop."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._hold: _Hold | None = None

    async def read(self, reader: "Callable[[torch.nn.Module, int], Result]") -> Result:
        """The result of `reader(model, policy_version)`, beside the readers that are under way; waited for to its end."""
        hold = self._hold
        if hold is None or not hold.enter():
            hold = self._hold = _Hold(self._policy)
        try:
            model, version = await asyncio.shield(hold.opened)
        except BaseException:
            hold.leave()
            raise
        return await to_its_end(asyncio.wrap_future(BackgroundCall(lambda: hold.call(reader, model, version))))


class _Hold:
    """The owner's thread, held for readers. It begins with one."""

    def __init__(self, policy: Policy) -> None:
        self._loop = asyncio.get_running_loop()
        self._num_readers = 1
        self._counting = threading.Lock()
        self._over = threading.Event()
        self.opened: asyncio.Future[tuple[torch.nn.Module, int]] = self._loop.create_future()
        self._held = asyncio.create_task(policy.read(self._wait))
        self._held.add_done_callback(self._ended)

    def enter(self) -> bool:
        """One more reader; False where the last one has left."""
        with self._counting:
            self._num_readers += bool(self._num_readers)
            return bool(self._num_readers)

    def leave(self) -> None:
        with self._counting:
            self._num_readers -= 1
            if not self._num_readers:
                self._over.set()

    def call(
        self, reader: "Callable[[torch.nn.Module, int], Result]", model: "torch.nn.Module", version: int
    ) -> Result:
        try:
            return reader(model, version)
        finally:
            self.leave()

    def _wait(self, model: "torch.nn.Module", version: int) -> None:
        """On the thread that owns the model."""
        self._loop.call_soon_threadsafe(self._open, model, version)
        self._over.wait()

    def _open(self, model: "torch.nn.Module", version: int) -> None:
        if not self.opened.done():
            self.opened.set_result((model, version))

    def _ended(self, held: "asyncio.Task[None]") -> None:
        """The policy could not be read, or its read was cancelled before it began: so it is for all readers."""
        error = None if held.cancelled() else held.exception()
        if self.opened.done():
            return
        if error is not None:
            self.opened.set_exception(error)
        else:
            self.opened.cancel()
