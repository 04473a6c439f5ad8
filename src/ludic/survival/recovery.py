"""An engine that survives its server: the one place where a lost server is recovered.

A server is lost when it dies, falls silent, answers only errors, was restarted, or cannot be shown to hold the weights that
it was sent. What then happens is the same each time:

    1. whatever is in flight is given up: a completion of a lost server is not trained on, whichever weights it came from
    2. a server of our own is started again; for another one we wait, with a countdown and the command that starts it
    3. it is checked as at the start of the run, and claimed for this trainer
    4. the current weights are sent with their version, and proven
    5. the groups that were given up are generated again, under the same seeds and the version that is then current

`generate` and `update_weights` do not return before that, or raise when it cannot be done. Each wait has an end: `wait_s` for
a server to come back, `SILENT_S` for one that has gone silent, `MAX_LOSSES` losses without anything achieved in between.

Left out: a server that is slow rather than gone, whose requests have deadlines of their own; several servers are in
`several_servers`.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ludic.inference.client import handshake
from ludic.inference.client.server_process import ServerProcess
from ludic.rollout.engine import Policy, WeightSyncReport
from ludic.rollout.errors import (
    EngineError,
    RouteMissingError,
    ServerInUseError,
    ServerLostError,
    ServerMismatchError,
    ServerRestartedError,
    ServerUnauthorizedError,
    WeightSyncError,
)
from ludic.storage.identity import identity, is_alive
from ludic.types import Completion, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ludic.inference.client.vllm_client import VLLMEngine

logger = logging.getLogger(__name__)

WATCH_S = 5.0
"""How often the server is asked whether it is still there, and its lease kept, which is 60 s long."""
SILENT_S = 60.0
"""A server that has answered nothing for so long, generation or not, is lost."""
MAX_LOSSES = 5
"""So many losses of the server over one request end the run, and more without a successful weight sync in between."""
MAX_LOSSES_AT_START = 1
"""The same before the first weight sync of a run has succeeded: a person still looks, and the settings may be wrong."""
COUNTDOWN_S = 30.0
"""Between two lines that say for how long it is still waited."""
ENDING_LOOK_S = 0.5
"""A process that ends cuts its connections a moment before it is gone."""
LOOK_S = 1.0


class GivenUpError(EngineError):
    """Every attempt to recover the server failed."""


class RecoveringEngine:
    """`InferenceEngine` over a `VLLMEngine`, whose server it recovers after a loss.

    Args:
        engine: not connected yet.
        server: the server's process, where this run started it; None for a server that was launched separately.
        out_dir: of the run, for the identity that a second trainer is shown.
        wait_s: how long, in seconds, a server that is not ours may take to come back.
        say: takes lines for a person to read.
    """

    overlaps_training: bool = True

    def __init__(
        self,
        engine: "VLLMEngine",
        *,
        server: ServerProcess | None = None,
        out_dir: Path = Path(),
        wait_s: float = 1800.0,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self._engine = engine
        self._server = server
        self._identity = {**identity(out_dir), "run": uuid.uuid4().hex}  # by which a claim that is made again is known
        self._wait_s = wait_s
        self._say = say
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._max_seq_len: int | None = None
        self._probe: list[int] | None = None
        self._policy: Policy | None = None
        """The policy whose weights the server must hold."""
        self._syncing = asyncio.Lock()
        """Held while the server may compute with new weights that are not proven yet."""
        self._settled = asyncio.Event()
        """Cleared by a sync until it is proven or the server is lost."""
        self._settled.set()

        # A life of the server is numbered. What was begun in one life counts only if it ends in the same.
        self._life = 0
        self._losses = 0
        """Since the last weight sync that succeeded."""
        self._max_losses = MAX_LOSSES_AT_START
        self._reason: EngineError | None = None
        self._revived_life = 0
        self._synced_life = 0
        self._reviving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._keeping: asyncio.Future[None] | None = None
        self._in_flight: set[asyncio.Task[list[Completion]]] = set()
        self._fatal: EngineError | None = None
        self._num_recoveries = 0
        self._num_discarded = 0

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    @property
    def base_url(self) -> str:
        return self._engine.base_url

    @property
    def is_there(self) -> bool:
        """Whether the server was last seen to answer, whatever weights it has."""
        return self._revived_life == self._life and self._fatal is None

    @property
    def is_ready(self) -> bool:
        """Whether `attempt` would begin at once: the server is there, with the weights that it was last sent."""
        return self._synced_life == self._life and self._fatal is None

    @property
    def failure(self) -> EngineError | None:
        """Why the server is not waited for any more; None while it is there or may come back."""
        return self._fatal

    def counts(self) -> dict[str, float]:
        """`server_recoveries`, `discarded_completions` (asked for again after a loss) and `request_retries`, so far."""
        return self._engine.counts() | {
            "server_recoveries": self._num_recoveries,
            "discarded_completions": self._num_discarded,
        }

    # -- before anything is generated ------------------------------------------------------------------------------

    async def connect(self, tokenizer: "PreTrainedTokenizerBase", *, max_seq_len: int | None = None) -> None:
        """Check the server as `VLLMEngine.connect` does, and claim its lease for this trainer.

        Raises:
            EngineError: it is not there, not the right one, or another trainer has it.
        """
        self._tokenizer, self._max_seq_len = tokenizer, max_seq_len
        await self._connect()
        self._watching = asyncio.create_task(self._watch())

    async def enable_weight_sync(self, probe_token_ids: list[int]) -> None:
        """As `VLLMEngine.enable_weight_sync`; done again by itself with each server that comes back."""
        self._probe = probe_token_ids
        await self._engine.enable_weight_sync(probe_token_ids)

    async def _connect(self) -> None:
        assert self._tokenizer is not None
        await self._engine.connect(self._tokenizer, max_seq_len=self._max_seq_len, will_sync=True)
        await asyncio.to_thread(
            handshake.claim_or_wait, self._engine.control, self._identity, is_alive=is_alive, say=self._say
        )
        if self._probe is not None:
            await self._engine.enable_weight_sync(self._probe)

    # -- the two calls that a loss interrupts ----------------------------------------------------------------------

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        """As `VLLMEngine.generate`, again after each loss of the server.

        Raises:
            EngineError: the server refused the request, or cannot be recovered.
        """
        for _ in range(MAX_LOSSES):
            completions = await self.attempt(prompt_token_ids, num_completions=num_completions, sampling=sampling)
            if completions is not None:
                return completions
        assert self._reason is not None
        raise type(self._reason)(f"a request lost the server {MAX_LOSSES} times, the last time: {self._reason}")

    async def attempt(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion] | None:
        """As `generate`, once: None where the server was lost before the completions were there."""
        await self.recovered()
        life = self._life
        task = asyncio.create_task(
            self._engine.generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)
        )
        completions = await self._outcome(task, life)
        await self._settled.wait()  # what ends in the middle of a sync counts only once that is proven
        if completions is not None and life == self._life:
            return completions
        self._num_discarded += num_completions
        return None

    async def _outcome(self, task: "asyncio.Task[list[Completion]]", life: int) -> list[Completion] | None:
        """The completions; None where the server was lost over them."""
        self._in_flight.add(task)
        try:
            await asyncio.wait([task])
        finally:
            self._in_flight.discard(task)
            task.cancel()  # of no effect on one that has ended
        if task.cancelled():
            return None
        error = task.exception()
        if isinstance(error, ServerLostError):
            self._lost(error, life)
            return None
        return task.result()

    async def recovered(self) -> None:
        """Until the server is there and holds the weights. Whoever comes first brings it about.

        Raises:
            EngineError: it cannot be recovered.
        """
        while self._synced_life != self._life:
            async with self._syncing:
                if self._synced_life == self._life:  # others were first
                    break
                if self._policy is not None:
                    await self._sync(self._policy)
                else:  # no weights were sent yet: the server is as good as the one before
                    await self._revived()
                    self._synced_life = self._life
        if self._fatal is not None:
            raise self._fatal

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        """As `VLLMEngine.update_weights`; a sync that failed is made again, with a server that came back.

        Raises:
            EngineError: it failed more than `MAX_LOSSES` times, or the server cannot be recovered.
        """
        self._policy = policy
        async with self._syncing:
            return await self._sync(policy)

    async def _sync(self, policy: Policy) -> WeightSyncReport:
        try:
            return await self._sync_until_proven(policy)
        finally:
            self._settled.set()

    async def _sync_until_proven(self, policy: Policy) -> WeightSyncReport:
        while True:
            await self._revived()
            life = self._life
            self._settled.clear()
            try:
                report = await self._engine.update_weights(policy)
            except ServerLostError as error:
                self._lost(error, life)
                continue
            if life == self._life:
                if self._losses:
                    self._say(
                        f"the server is back, with the weights of version {report.policy_version}: {report.proof}"
                    )
                self._synced_life, self._losses, self._max_losses = life, 0, MAX_LOSSES
                return report

    # -- a loss ----------------------------------------------------------------------------------------------------

    def _lost(self, error: EngineError, life: int) -> None:
        """The server of `life` is lost: give up what is in flight. Said once, however many notice."""
        if life != self._life:
            return
        self._life += 1
        self._losses += 1
        self._num_recoveries += 1
        if self._server is not None and isinstance(error, ServerLostError):
            # What ours says of its end tells more than what was noticed of it.
            ending = self._server.ending(wait_s=ENDING_LOOK_S)
            error = error if ending is None else type(error)(ending)
        self._reason = type(error)(str(error))  # without its traceback, whose frames keep what the sync held of the GPU
        self._say(f"the server was lost: {error}")
        self._engine.abort_sync(str(error))
        self._settled.set()
        for task in self._in_flight:
            task.cancel()

    async def _revived(self) -> None:
        """Until the server answers again. An attempt goes on where its caller is cancelled; the next one waits for it."""
        while self._revived_life != self._life:
            if self._fatal is not None:
                raise self._fatal
            if self._reviving is None or self._reviving.done():
                self._reviving = asyncio.create_task(self._revive(self._life))
            await asyncio.shield(self._reviving)

    async def _revive(self, life: int) -> None:
        assert self._reason is not None
        try:
            if self._losses > self._max_losses:
                raise GivenUpError(
                    f"the server was lost {self._losses} times without a weight sync in between: {self._reason}"
                )
            if self._losses > 1:
                await asyncio.sleep(min(LOOK_S * 2**self._losses, COUNTDOWN_S))
            if self._server is not None:
                await self._restart(self._server)
            else:
                await self._wait_for_server()
            await self._connect()
        except (GivenUpError, ServerInUseError, ServerUnauthorizedError) as error:
            self._fatal = error
            raise
        except EngineError as error:  # lost again, half dead, or not the right one: another attempt, counted
            self._lost(error, life)
            return
        self._revived_life = life

    async def _restart(self, server: ServerProcess) -> None:
        """Start our server again; one that only refused a weight sync is left running the first time."""
        if isinstance(self._reason, WeightSyncError) and self._losses == 1 and server.is_running:
            return
        self._say(f"starting the server again; its log is {server.log_path}")
        await asyncio.to_thread(server.restart, str(self._reason))
        self._say(f"the server is up again at {server.base_url}")

    async def _wait_for_server(self) -> None:
        """Wait for a server that is not ours, and tell a person how to start it.

        Raises:
            GivenUpError: it did not come back within `wait_s`.
        """
        command = handshake.start_command(self._engine.base_url, self._engine.model)
        deadline, say_at = time.monotonic() + self._wait_s, 0.0
        while not await asyncio.to_thread(self._answers):
            left = deadline - time.monotonic()
            if left <= 0:
                raise GivenUpError(
                    f"the server at {self._engine.base_url} did not come back within --server-wait {self._wait_s:g} s; "
                    f"start it with `{command}`, and continue this run with --resume"
                )
            if time.monotonic() >= say_at:
                say_at = time.monotonic() + COUNTDOWN_S
                self._say(
                    f"no server at {self._engine.base_url}; waiting {left:.0f} s more. Start it again with: {command}"
                )
            await asyncio.sleep(LOOK_S)

    def _answers(self) -> bool:
        """Whether the server answers, its engine included: the front end alone answers the first request."""
        try:
            handshake.server_state(self._engine.control)
            with contextlib.suppress(RouteMissingError):
                self._engine.control.request("GET", "/is_paused", timeout_s=handshake.LOOK_S)
        except (ServerInUseError, ServerMismatchError, ServerUnauthorizedError):
            return True  # and says what `_connect` will say again
        except EngineError:
            return False
        return True

    # -- the watch -------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Keep the lease, and notice when the server is gone, silent, restarted, or leased to another trainer."""
        heard = time.monotonic()
        while self._fatal is None:
            await asyncio.sleep(WATCH_S)
            life = self._life
            if self._revived_life != life:
                heard = time.monotonic()
                continue
            try:
                self._keeping = asyncio.ensure_future(asyncio.to_thread(handshake.keep, self._engine.control))
                await asyncio.shield(self._keeping)
                heard = time.monotonic()
            except ServerRestartedError as error:
                self._lost(error, life)
            except (ServerInUseError, ServerUnauthorizedError) as error:  # no recovery can help
                self._fatal = error
                self._lost(error, life)
            except EngineError as error:  # no answer, or none that makes sense
                ended = self._server is not None and not self._server.is_running
                if ended or time.monotonic() - heard > SILENT_S:
                    self._lost(error, life)

    async def aclose(self) -> None:
        """Let go of the server, for the next trainer, and of the connections. Safe to call twice."""
        tasks = [task for task in (self._watching, self._reviving, *self._in_flight) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._watching is not None:
            self._watching = None
            if self._keeping is not None:  # on a thread, which cannot be cancelled: it must not come after the release
                await asyncio.gather(self._keeping, return_exceptions=True)
            if self._server is None:
                try:
                    await asyncio.to_thread(handshake.release, self._engine.control)
                except EngineError as error:
                    logger.info("the lease of the server was not given back (%s); it ends by itself", error)
        await self._engine.aclose()
