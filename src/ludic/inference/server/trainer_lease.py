"""Which trainer has the lease of the server: what `server_guard` asks of each request, without a word of HTTP.

A trainer replaces the server's weights, so one has the server at a time. A lease ends when it was not kept for `LEASE_S`
seconds; its trainer still has the server then if no other client has claimed or changed it meanwhile. A lease that another
client has ended never comes back: the weights are no longer its own, and its trainer may be the last to notice. Left out: the
wall clock, and whether a trainer is who it says it is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ludic.inference.wire import LEASE_S
from ludic.storage.identity import Identity, describe

MAX_LOST = 1024
"""Leases that were lost, and to whom is remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The trainer that has, or had, the lease.

    Example:
        >>> holder = Holder(lease=3, identity={"user": "ann", "host": "node-3", "pid": 812}, seen=7.5)
    """

    lease: int
    """Counts the leases of this start of the server, from 1."""
    identity: Identity
    seen: float
    """When it last kept its lease, in seconds of the lease's clock."""


class NotHolderError(Exception):
    """The lease is not this caller's: why, and whose it is."""

    def __init__(self, message: str, holder: Holder | None) -> None:
        super().__init__(message)
        self.holder = holder


class TrainerLease:
    """Which trainer has the lease.

    Args:
        clock: seconds that only go forward, at one pace.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_leases = 0
        self._last: Holder | None = None
        """The last holder, while no other client has changed the server since."""
        self._lost: dict[int, Holder | None] = {}
        """By lost lease: the trainer that has claimed the server from it, None for a client without a lease."""

    def holder(self) -> Holder | None:
        """Who has the lease now."""
        last = self._last
        return last if last is not None and self._clock() - last.seen < LEASE_S else None

    def claim(self, identity: Identity, *, takes_over: int | None = None) -> Holder:
        """A new lease. `takes_over` is the lease of a trainer that the caller knows to be dead, and need not be waited for.

        Raises:
            NotHolderError: another trainer has the lease.
        """
        living = self.holder()
        if living is not None and living.identity == identity:  # the same claim again: the answer to it was lost
            return self.keep(living.lease)
        if living is None or living.lease != takes_over:
            self._require_free()
        self._num_leases += 1
        successor = Holder(lease=self._num_leases, identity=identity, seen=self._clock())
        self._lose_to(successor)
        self._last = successor
        return successor

    def keep(self, lease: int) -> Holder:
        """Note a request under `lease`. It need not come in time, where no other client has changed the server since.

        Raises:
            NotHolderError: the lease was lost, or given back.
        """
        self._require(lease)
        assert self._last is not None
        self._last = replace(self._last, seen=self._clock())
        return self._last

    def change(self) -> None:
        """Note a request under no lease that may change the server.

        Raises:
            NotHolderError: a trainer has the lease.
        """
        self._require_free()
        self._lose_to(None)

    def release(self, lease: int) -> None:
        """Give the server back.

        Raises:
            NotHolderError: the lease was lost, or given back.
        """
        self._require(lease)
        self._last = None

    def seconds_since_seen(self, holder: Holder) -> float:
        return self._clock() - holder.seen

    def _require(self, lease: int) -> None:
        if self._last is not None and self._last.lease == lease:
            return
        if lease not in self._lost:
            raise NotHolderError(
                "this lease was given back, or lost long ago: stop this trainer, and resume it", self.holder()
            )
        raise NotHolderError(
            f"this trainer lost the server to {self._told(self._lost[lease])}, and with it the weights: "
            "stop this one, and resume it on a server of its own",
            self.holder(),
        )

    def _require_free(self) -> None:
        living = self.holder()
        if living is not None:
            raise NotHolderError(f"this server belongs to {self._told(living)}: give each trainer its own", living)

    def _lose_to(self, successor: Holder | None) -> None:
        if self._last is not None:
            self._lost[self._last.lease] = successor
            while len(self._lost) > MAX_LOST:
                del self._lost[next(iter(self._lost))]
        self._last = None

    def _told(self, holder: Holder | None) -> str:
        if holder is None:
            return "a client without a lease"
        now = self._last if self._last is not None and self._last.lease == holder.lease else holder
        return f"the trainer {describe(now.identity)} (last seen {self.seconds_since_seen(now):.0f} s ago)"
