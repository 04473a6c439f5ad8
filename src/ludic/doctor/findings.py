"""What a check found: one line each, with what to do about it."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from ludic.storage.inert import inert
from ludic.task.pretrained import UnusableModelError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found.

    Example:
        >>> print(Finding(name="port", status="failed", found="8000 is taken", fix="choose another --port"))
        failed   port: 8000 is taken; choose another --port
    """

    name: str
    status: Literal["ok", "warning", "failed"]
    found: str
    fix: str = ""
    """What to do; empty for what is ok."""

    def __str__(self) -> str:
        return inert(f"{self.status:<8} {self.name}: {self.found}" + (f"; {self.fix}" if self.fix else ""))


Check = Callable[[], "Finding | list[Finding]"]
"""Looks at one thing. It may raise what a user can mend (`FAILURES`): that is a finding too."""

FAILURES = (OSError, ValueError, RuntimeError, ImportError, MemoryError)


def ok(name: str, found: str) -> Finding:
    return Finding(name=name, status="ok", found=found)


def warning(name: str, found: str, fix: str) -> Finding:
    return Finding(name=name, status="warning", found=found, fix=fix)


def failed(name: str, found: str, fix: str) -> Finding:
    return Finding(name=name, status="failed", found=found, fix=fix)


def run_checks(checks: Sequence[tuple[str, Check]]) -> Iterator[Finding]:
    """The findings of named checks, each as soon as it is there. One that raises has failed, with its own words.

    Raises:
        UnusableModelError: --model is no model that could be trained, so that no other finding matters.
    """
    for name, check in checks:
        started = time.perf_counter()
        try:
            found = check()
        except UnusableModelError:
            raise
        except FAILURES as error:
            found = failed(name, " ".join(str(error).split()) or type(error).__name__, "")
        seconds = time.perf_counter() - started
        took = f" ({seconds:.0f} s)" if seconds >= 2 else ""
        for finding in found if isinstance(found, list) else [found]:
            yield dataclasses.replace(finding, found=finding.found + took)
