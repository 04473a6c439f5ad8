"""The one thread that touches the model, so that the event loop goes on talking to the server meanwhile."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, Self, TypeVar

import torch

from ludic.train.learner import Learner

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


async def to_its_end(work: Awaitable[Result], *, withdraw: Callable[[], bool] = lambda: False) -> Result:
    """The result of `work`. A cancellation of the caller does not reach it, and is raised when it has ended, or at once where
    `withdraw` says that the work had not begun and never will.

    For what cannot be interrupted: a device at work, a write to disk, an update that is counted when it is done.
    """
    task, cancelled = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            if withdraw():
                raise
            cancelled = error
    result = task.result()  # an error of the work's own comes first
    if cancelled is not None:
        raise cancelled
    return result


class LearnerThread:
    """Owns the policy: the model of `learner` and the version of its weights. A `Policy` for engines.

    One call at a time, each to its end, so what reads the model sees no half of an update.

    Args:
        learner: computes here alone from now on.
        version: of its weights.
    """

    def __init__(self, learner: Learner, version: int) -> None:
        self.learner = learner
        self.version: int | None = version
        """Of the model's weights; None where an update failed after it had changed them: they belong to no version."""
        device = learner.device

        def choose_device() -> None:
            if device.type == "cuda":  # each thread has a current device of its own
                torch.cuda.set_device(device)

        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="ludic-learner", initializer=choose_device
        )
        self._closed = False
        self._reading = threading.Lock()

    async def call(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """The result of `function`. A cancellation withdraws a call that has not begun; a running call is waited for."""
        future = self._executor.submit(function, *args, **kwargs)
        return await to_its_end(asyncio.wrap_future(future), withdraw=future.cancel)

    async def read(self, reader: Callable[[torch.nn.Module, int], Result]) -> Result:
        """The result of `reader(model, version)`."""
        if self._closed:  # the model does not change any more
            return await asyncio.to_thread(self._read, reader)
        return await self.call(self._read, reader)

    async def turn(self) -> None:
        """Wait until the thread is free, so that a call that cannot be withdrawn begins at once."""
        await self.call(lambda: None)

    async def step(
        self, *, learning_rate: float, num_without_loss: int = 0, advantage_scale: float = 1.0
    ) -> dict[str, float]:
        """`Learner.step`, which makes the next version, also where it skips the update. Raises what that raises."""
        return await self.call(self._step, learning_rate, num_without_loss, advantage_scale)

    async def skip_step(self) -> None:
        """The next version has the same weights: there was nothing to train on."""
        await self.call(self._next_version)

    def _read(self, reader: Callable[[torch.nn.Module, int], Result]) -> Result:
        if self.version is None:
            raise RuntimeError("the last update failed half way: the weights belong to no version")
        # After the end readers come on threads of their own, several servers at once; an adapter is merged for one at a time.
        with self._reading, self.learner.whole_model() as model:
            return reader(model, self.version)

    def _step(self, learning_rate: float, num_without_loss: int, advantage_scale: float) -> dict[str, float]:
        try:
            figures = self.learner.step(
                learning_rate=learning_rate, num_without_loss=num_without_loss, advantage_scale=advantage_scale
            )
        except BaseException:
            if self.learner.stepped:
                self.version = None
            raise
        self._next_version()
        return figures

    def _next_version(self) -> None:
        assert self.version is not None
        self.version += 1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the thread while the loop goes on: what the thread was given may itself wait for the loop."""
        self._closed = True
        await asyncio.to_thread(self._executor.shutdown)
