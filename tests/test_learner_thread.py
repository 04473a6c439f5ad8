"""The thread that owns the policy: what it does is done whole, and who reads sees a model with its own version."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ludic.survival.shared_policy import SharedPolicy
from ludic.train.learner_thread import LearnerThread, to_its_end


class StandIn(SimpleNamespace):
    """A learner whose weight is the number of its steps, written in two halves."""

    def __init__(self) -> None:
        super().__init__(model=torch.nn.Linear(2, 1, bias=False), device=torch.device("cpu"), stepped=False)
        self.in_the_middle, self.go_on = threading.Event(), threading.Event()
        self.fails: str | None = None
        self._write(0, 0.0)
        self._write(1, 0.0)

    def whole_model(self) -> contextlib.AbstractContextManager[torch.nn.Module]:
        return contextlib.nullcontext(self.model)

    def _write(self, half: int, value: float) -> None:
        with torch.no_grad():
            self.model.weight[0, half] = value

    def step(self, *, learning_rate: float, num_without_loss: int, advantage_scale: float) -> dict[str, float]:
        self.stepped = False
        if self.fails == "before":
            raise MemoryError("no room")
        value = float(self.model.weight[0, 0].detach()) + 1
        self.stepped = True
        self._write(0, value)
        self.in_the_middle.set()
        assert self.go_on.wait(20)
        if self.fails == "after":
            raise FloatingPointError("damaged")
        self._write(1, value)
        return {"loss": learning_rate}


def look(model: torch.nn.Module, version: int) -> tuple[list[float], int]:
    weight: Any = model.weight
    return weight[0].tolist(), version


async def test_who_reads_during_a_step_waits_and_sees_the_new_weights_with_their_version() -> None:
    learner: Any = StandIn()
    async with LearnerThread(learner, 4) as thread:
        assert await thread.read(look) == ([0.0, 0.0], 4)
        step = asyncio.create_task(thread.step(learning_rate=0.5))
        await asyncio.to_thread(learner.in_the_middle.wait, 20)
        read = asyncio.create_task(thread.read(look))
        await asyncio.sleep(0.1)
        assert not read.done(), "half of the weights are new"
        learner.go_on.set()
        assert await read == ([1.0, 1.0], 5) and await step == {"loss": 0.5}
        await thread.skip_step()
        assert await thread.read(look) == ([1.0, 1.0], 6)
    assert await thread.read(look) == ([1.0, 1.0], 6), "also when the run is over"


@pytest.mark.parametrize(("fails", "version"), [("before", 4), ("after", None)])
async def test_weights_of_an_update_that_failed_half_way_belong_to_no_version(fails: str, version: int | None) -> None:
    learner: Any = StandIn()
    learner.fails = fails
    learner.go_on.set()
    async with LearnerThread(learner, 4) as thread:
        with pytest.raises((MemoryError, FloatingPointError)):
            await thread.step(learning_rate=0.5)
        assert thread.version == version
        if version is None:
            with pytest.raises(RuntimeError, match="belong to no version"):
                await thread.read(look)
        else:
            assert await thread.read(look) == ([0.0, 0.0], 4)


async def test_a_cancelled_step_is_done_whole_before_the_cancellation_is_raised() -> None:
    learner: Any = StandIn()
    async with LearnerThread(learner, 0) as thread:
        step = asyncio.create_task(thread.step(learning_rate=0.5))
        await asyncio.to_thread(learner.in_the_middle.wait, 20)
        step.cancel()
        await asyncio.sleep(0.05)
        step.cancel()  # a second Ctrl-C
        await asyncio.sleep(0.05)
        assert not step.done()
        learner.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert await thread.read(look) == ([1.0, 1.0], 1)


async def test_an_error_of_work_that_is_done_to_its_end_comes_before_the_cancellation() -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        entered.set()
        await go_on.wait()
        raise OSError("the disk is full")

    task = asyncio.create_task(to_its_end(work()))
    await entered.wait()
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(OSError, match="the disk is full"):
        await task


async def test_a_call_that_has_not_begun_is_taken_back_at_once_when_it_is_cancelled() -> None:
    learner: Any = StandIn()
    async with LearnerThread(learner, 0) as thread:
        step = asyncio.create_task(thread.step(learning_rate=0.5))
        await asyncio.to_thread(learner.in_the_middle.wait, 20)
        called: list[int] = []
        queued = asyncio.create_task(thread.call(called.append, 1))
        await asyncio.sleep(0.05)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(queued, 1.0)
        assert not step.done()
        learner.go_on.set()
        await step
    assert called == []


async def test_after_the_end_readers_still_come_one_at_a_time() -> None:
    learner: Any = StandIn()
    inside, most = 0, 0

    @contextlib.contextmanager
    def merged() -> Iterator[torch.nn.Module]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        met.wait(0.2)  # another reader has that long to come in as well
        yield learner.model
        inside -= 1

    met = threading.Event()
    learner.whole_model = merged
    async with LearnerThread(learner, 4) as thread:
        pass
    await asyncio.gather(thread.read(look), thread.read(look), thread.read(look))
    assert most == 1


async def test_the_thread_ends_though_two_policies_of_several_readers_wait_behind_its_last_call() -> None:
    """As where two servers come back, at different updates, while the last checkpoint is written."""
    learner: Any = StandIn()
    async with LearnerThread(learner, 4) as thread:
        saving = asyncio.create_task(thread.call(time.sleep, 0.2))
        reads = [asyncio.create_task(SharedPolicy(thread).read(look)) for _ in range(2)]
        await asyncio.sleep(0.05)
    await saving
    assert [await asyncio.wait_for(read, 20) for read in reads] == [([0.0, 0.0], 4)] * 2
