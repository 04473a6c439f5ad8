"""One thread for all that the learner does, so that the event loop goes on talking to the server meanwhile."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, Self, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class LearnerThread:
    """Runs one call at a time, to its end: a device cannot be interrupted, and neither can a write to disk.

    Args:
        device: that trains; made the thread's current one.
    """

    def __init__(self, device: torch.device) -> None:
        def choose_device() -> None:
            if device.type == "cuda":  # each thread has a current device of its own
                torch.cuda.set_device(device)

        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="ludic-learner", initializer=choose_device
        )

    async def call(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """The result of `function`. A cancellation waits for its end and is raised then."""
        result, cancelled = await self.finish(function, *args, **kwargs)
        if cancelled is not None:
            raise cancelled
        return result

    async def finish(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> tuple[Result, asyncio.CancelledError | None]:
        """The result of `function`, and the cancellation that came meanwhile, for the caller to raise when it can."""
        future = asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
        return future.result(), cancelled

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
