"""What came of one injected fault; `survival.py` prints tables of them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """One fault that was injected.

    Example:
        >>> Injection(row="disk", fault="full", outcome="ended, one line", ok=True)
        Injection(row='disk', fault='full', outcome='ended, one line', ok=True, seconds=None)
    """

    row: str
    """The promise that it tries, one row of the table."""
    fault: str
    outcome: str
    """In words; injections of one row with the same words are counted together."""
    ok: bool
    """Whether the promise was kept."""
    seconds: float | None = None
    """How long it took to recover or to refuse, where that means something."""
