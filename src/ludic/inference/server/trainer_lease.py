"""Which trainer has the server: the lease that `server_guard` keeps, without a word of HTTP.

A trainer replaces the server's weights, so a server has one at a time. A lease ends when it was not kept for `LEASE_S`
seconds; the trainer still has the server then if no other client has claimed or changed it meanwhile. A trainer that
another one has replaced never gets this start of the server back: the weights are no longer its own, and it may be the last
to notice. Left out: the wall clock, and whether a trainer is who it says it is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ludic.inference.wire import LEASE_S
from ludic.storage.identity import Identity, describe

MAX_LOST = 1024
"""Trainers that lost the server, and are remembered for it."""
IDENTITY_FIELDS = ("host", "pid", "pid_started", "user", "out_dir", "since")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The trainer that has, or had, the server.

    Example:
        >>> holder = Holder(trainer="5eed5eed", identity={"user": "ann", "host": "node-3", "pid": 812}, seen=7.5)
    """

    trainer: str
    identity: Identity
    seen: float
    """When it last kept its lease, in seconds of the lease's clock."""


class NotHolderError(Exception):
    """The server is not this trainer's: why, and whose it is."""

    def __init__(self, message: str, holder: Holder | None, *, lost: bool = False) -> None:
        super().__init__(message)
        self.holder = holder
        self.lost = lost
        """Whether this trainer held it and lost it for good."""


class TrainerLease:
    """Which trainer has the server.

    Args:
        clock: seconds that only go forward, at one pace.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: Holder | None = None
        """The last holder, while no other client has changed the server since."""
        self._lost: dict[str, Holder | None] = {}
        """Of each trainer that did not notice it yet: the client that changed the server, None for one without a name."""

    def holder(self) -> Holder | None:
        """Who has the server now."""
        last = self._last
        return last if last is not None and self._clock() - last.seen < LEASE_S else None

    def claim(self, trainer: str, identity: Identity, *, takes_over: str | None = None) -> bool:
        """Take the server, or keep it; whether it was this trainer's already, all the time since it took it.

        `takes_over` is the holder that the caller knows to be dead, and need not be waited for.

        Raises:
            NotHolderError: another has it, or has changed it since this one had it.
        """
        self._check(trainer, takes_over)
        return not self._give_to(Holder(trainer=trainer, identity=identity, seen=self._clock()))

    def keep(self, trainer: str, *, changes: bool) -> None:
        """Note a request of `trainer`, which `changes` the server or only generates.

        It need not come in time: if no other client has changed the server since, it is this trainer's again. A trainer that
        never claimed the server does not get it by this, and may use it as long as no trainer holds it.

        Raises:
            NotHolderError: another has it, or has changed it since this one had it.
        """
        self._check(trainer, None)
        if self._last is not None and self._last.trainer == trainer:
            self._last = Holder(trainer=trainer, identity=self._last.identity, seen=self._clock())
        elif changes:
            self._lose_to(Holder(trainer=trainer, identity={}, seen=self._clock()))

    def change_unnamed(self) -> None:
        """Note a request that names no trainer and may change the server.

        Raises:
            NotHolderError: a trainer has it.
        """
        self._check(None, None)
        self._lose_to(None)

    def release(self, trainer: str) -> None:
        """Give the server back.

        Raises:
            NotHolderError: another has it.
        """
        self._check(trainer, None)
        if self._last is not None and self._last.trainer == trainer:
            self._last = None

    def seconds_since_seen(self, holder: Holder) -> float:
        return self._clock() - holder.seen

    def _check(self, trainer: str | None, takes_over: str | None) -> None:
        living = self.holder()
        if trainer is not None and trainer in self._lost:
            raise NotHolderError(
                f"this trainer lost the server to {self._told(self._lost[trainer])}, and with it the weights: "
                "stop this one, and resume it on a server of its own",
                living,
                lost=True,
            )
        if living is not None and living.trainer not in (trainer, takes_over):
            raise NotHolderError(f"this server belongs to {self._told(living)}: give each trainer its own", living)

    def _give_to(self, holder: Holder) -> bool:
        """Make `holder` the last one; whether that is another than before."""
        if self._last is not None and self._last.trainer == holder.trainer:
            self._last = holder
            return False
        self._lose_to(holder)
        self._last = holder
        return True

    def _lose_to(self, successor: Holder | None) -> None:
        if self._last is not None:
            self._lost[self._last.trainer] = successor
            while len(self._lost) > MAX_LOST:
                del self._lost[next(iter(self._lost))]
        self._last = None

    def _told(self, holder: Holder | None) -> str:
        if holder is None:
            return "a client that named no trainer"
        now = self._last if self._last is not None and self._last.trainer == holder.trainer else holder
        return f"the trainer {describe(now.identity)} (last seen {self.seconds_since_seen(now):.0f} s ago)"
