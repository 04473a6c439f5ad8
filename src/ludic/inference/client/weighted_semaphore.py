"""A semaphore for requests of different sizes, in the order in which they came; asyncio's own hands out one permit each."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class WeightedSemaphore:
    """A first-come-first-served semaphore that hands out several permits at once."""

    def __init__(self, permits: int) -> None:
        self._free = permits
        self._turn = asyncio.Lock()  # fair: whoever has it waits for enough permits, and all others behind it
        self._released = asyncio.Event()

    @contextlib.asynccontextmanager
    async def hold(self, count: int) -> AsyncIterator[None]:
        async with self._turn:
            while self._free < count:
                self._released.clear()
                await self._released.wait()
            self._free -= count
        try:
            yield
        finally:
            self._free += count
            self._released.set()
