"""Several servers as one engine: whole groups go to the least loaded, weights to all, and a lost one costs its share of speed.

A group stays on one server, where its completions share the prompt. A server that is lost, or has not got the newest weights,
gets no groups until `RecoveringEngine` has recovered it; what it was generating is generated again by the others. A run ends
with its last server only.

Left out: moving groups that a slow server has, and servers that join later.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from ludic.rollout.engine import Policy, WeightSyncReport
from ludic.rollout.errors import EngineError, ServerLostError
from ludic.survival.recovery import MAX_LOSSES, RecoveringEngine
from ludic.survival.shared_policy import SharedPolicy
from ludic.types import Completion, SamplingParams

logger = logging.getLogger(__name__)

LOOK_S = 0.2
"""How often a sync that waits looks whether the servers that it waits for are still there."""


class SeveralServers:
    """`InferenceEngine` over `RecoveringEngine`s, one a server, each connected and ready for weight syncs.

    Args:
        say: takes lines for a person to read.
    """

    overlaps_training: bool = True

    def __init__(self, engines: Sequence[RecoveringEngine], *, say: Callable[[str], None] = logger.warning) -> None:
        self._engines = tuple(engines)
        self._say = say
        self._load: Counter[RecoveringEngine] = Counter()
        """Completions that were asked of each and have not come yet."""
        self._policy: Policy | None = None
        self._policy_version = self._num_updates = 0
        self._gone: set[RecoveringEngine] = set()
        """Lost for good."""
        self._syncs: dict[RecoveringEngine, asyncio.Task[WeightSyncReport | None]] = {}
        """The last one of each: it goes on where the server is lost over it."""
        self._num_calls = 0

    @property
    def policy_version(self) -> int:
        return self._policy_version

    def counts(self) -> dict[str, float]:
        """The sums of the servers' counts."""
        total: Counter[str] = Counter()
        for engine in self._engines:
            total.update(engine.counts())
        return dict(total)

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        """As `VLLMEngine.generate`, on the server that has the fewest completions in flight; on another one after a loss.

        Raises:
            EngineError: a server refused the request, or none can be recovered.
        """
        async with self._call():
            return await self._generate(prompt_token_ids, num_completions, sampling)

    async def _generate(
        self, prompt_token_ids: Sequence[int], num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        for _ in range(MAX_LOSSES * len(self._engines)):
            engine = await self._least_loaded()
            self._load[engine] += num_completions
            try:
                completions = await engine.attempt(prompt_token_ids, num_completions=num_completions, sampling=sampling)
            except EngineError as error:
                if not self._is_gone(engine, error):
                    raise  # of the request, not of the server
                continue
            finally:
                self._load[engine] -= num_completions
            if completions is not None:
                return completions
        raise ServerLostError(f"a request lost its server {MAX_LOSSES * len(self._engines)} times")

    async def _least_loaded(self) -> RecoveringEngine:
        while True:
            ready = [one for one in self._engines if one.is_ready and one.policy_version >= self._policy_version]
            recovering = [self._sync(one) for one in self._engines if one not in ready and one.failure is None]
            if ready:
                return min(ready, key=lambda one: self._load[one])
            if not recovering:
                raise self._last_failure()
            await asyncio.wait(recovering, return_when=asyncio.FIRST_COMPLETED)

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        """As `VLLMEngine.update_weights`, to every server at the same time; one that is lost gets the weights when it is back.

        The report has the bytes of all, the longest of each phase, the largest gap, and every proof.

        Raises:
            EngineError: no server could be recovered.
        """
        async with self._call():
            return await self._update(policy)

    async def _update(self, policy: Policy) -> WeightSyncReport:
        started = time.perf_counter()
        self._policy = SharedPolicy(policy)
        self._num_updates += 1
        syncs = {engine: self._sync(engine) for engine in self._engines if engine.failure is None}
        while True:
            here = [task for engine, task in syncs.items() if not task.done() and engine.is_there]
            reports = {engine: report for engine, task in syncs.items() if task.done() and (report := task.result())}
            if not here and reports:
                break
            under_way = here or [task for task in syncs.values() if not task.done()]
            if not under_way:
                raise self._last_failure()
            await asyncio.wait(under_way, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        self._policy_version = max(report.policy_version for report in reports.values())
        seconds = time.perf_counter() - started
        return _merged({engine.base_url: report for engine, report in reports.items()}, seconds)

    @contextlib.asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        """A call of the run. Where the last one is cancelled, the syncs end too: a save would wait for them."""
        self._num_calls += 1
        try:
            yield
        except asyncio.CancelledError:
            if self._num_calls == 1:
                await self._end_syncs()
            raise
        finally:
            self._num_calls -= 1

    async def _end_syncs(self) -> None:
        for task in self._syncs.values():
            task.cancel()
        await asyncio.gather(*self._syncs.values(), return_exceptions=True)

    def _sync(self, engine: RecoveringEngine) -> "asyncio.Task[WeightSyncReport | None]":
        """The sync of the newest weights to a server: the one under way, or one that begins here.

        Raises:
            EngineError: the last one failed for another reason than a loss.
        """
        task = self._syncs.get(engine)
        if task is not None and task.done() and not task.cancelled():
            task.result()
        if task is None or task.done():
            task = self._syncs[engine] = asyncio.create_task(self._bring_up(engine))
        return task

    async def _bring_up(self, engine: RecoveringEngine) -> WeightSyncReport | None:
        """The report; None where no weights were sent yet, or the server is lost for good."""
        try:
            while self._policy is not None:
                update = self._num_updates
                report = await engine.update_weights(self._policy)
                if update == self._num_updates:  # else the policy was trained on while the server came back
                    return report
            await engine.recovered()
        except EngineError as error:
            if not self._is_gone(engine, error):
                raise
        return None

    def _is_gone(self, engine: RecoveringEngine, error: EngineError) -> bool:
        """Whether `error` is of a server that is not waited for any more, which is said once."""
        if engine.failure is None:
            return False
        if engine not in self._gone:
            self._gone.add(engine)
            left = len(self._engines) - len(self._gone)
            self._say(f"the server at {engine.base_url} is given up, {left} of {len(self._engines)} go on: {error}")
        return True

    def _last_failure(self) -> EngineError:
        failure = self._engines[-1].failure
        assert failure is not None
        return type(failure)(f"none of {len(self._engines)} servers is left; of the last one: {failure}")

    async def aclose(self) -> None:
        """Let go of all servers. Safe to call twice."""
        await self._end_syncs()
        await asyncio.gather(*(engine.aclose() for engine in self._engines))


def _merged(reports: dict[str, WeightSyncReport], seconds: float) -> WeightSyncReport:
    every = list(reports.values())
    gaps = [one.logprob_gap for one in every if one.logprob_gap is not None]
    names = dict.fromkeys(name for one in every for name in one.phases_s)
    phases = {name: max(one.phases_s.get(name, 0.0) for one in every) for name in names}
    return WeightSyncReport(
        policy_version=max(one.policy_version for one in every),
        num_tensors=every[0].num_tensors,
        num_bytes=sum(one.num_bytes for one in every),
        seconds=seconds,
        proof="; ".join(f"{url}: {one.proof}" for url, one in reports.items()),
        logprob_gap=max(gaps, default=None),
        phases_s=phases,
    )
