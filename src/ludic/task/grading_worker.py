r"""The child process of `ludic.task.grading.Grader`: asks math-verify whether two answers are equal, in forks of its own.

It is run as a file, `python -P grading_worker.py FD SETTINGS`, not as `ludic.task.grading_worker` and not by multiprocessing:
that way it imports math-verify and nothing else (no torch, not the caller's main module), needs no
`if __name__ == "__main__"` in the caller's script, and starts as fast as math-verify allows. It must therefore import
nothing from ludic.

    Grader --job--> keeper --job--> child (a fork that has math-verify and its tables): true, false, or what ran out
                      \--job--> another child ...

The keeper does no algebra, so that it always answers, and a child that hangs costs its killing and a fork of some
milliseconds, not another import. Answers that hang must not hold up those that do not:
- Jobs wait in order of their `cost`, the shortest and plainest first.
- A child that has worked `quick_s` on one answer leaves the quick lane: it goes on, at a lower priority, among at most
  `MAX_SLOW` slow ones, and a fresh fork takes its place. Where those are taken, it is killed, and its job waits for one
  of them, for at most twice `timeout_s`: then it is given up as a time-out.
- `timeout_s` ends an answer for good. Both limits are seconds of the child's own CPU time, where the system tells them
  (Linux): other load on the machine makes no answer wrong. Twice `timeout_s` by the clock ends it in any case.
- A child's address space is limited, and the system's out-of-memory killer is asked to take it before anything else.

FD is one end of a socket pair, SETTINGS is JSON: {"num_workers", "timeout_s", "quick_s"}. First it sends "ready"; then
each job `{"id": int, "cost": float, "predictions": [...], "target": str}` is answered, in any order, with `[id, reply]`:
true, false, "timeout" or "crash". All messages are JSON in ASCII, so that lone surrogates and null bytes pass.
"""

import gc
import heapq
import json
import logging
import os
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

MAX_MEMORY_BYTES = 2**30
"""Address space that one child may take, on Linux. math-verify itself needs a tenth."""
MAX_SLOW = 2
MAX_JOBS_PER_CHILD = 1_000
"""After that many answers a child is replaced, so that what sympy remembers of them cannot pile up."""
TICK_S = 0.02
"""How often the keeper looks at the time that its children took."""
TYPICAL = (r"\sqrt{4}", "(9*2)", "18x", "17 or 18", r"2\pi + 1", "(1, 2)")
"""Parsed and compared before the first fork: math-verify builds its tables as it goes, and forks inherit them."""


def all_match(predictions: list[str], target: str) -> bool:
    """Whether math-verify finds every prediction equal to `target`.

    Both are parsed inside a box, as LaTeX only: on raw strings math-verify 0.9 rates `18.0` unequal to `18`, and its
    plain-text extraction picks numbers out of prose. Its own time limits are off: they need SIGALRM in the main thread.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    # Its list of units has `th`, `d` and `am`, and whatever text stands at the end: ludic compares and drops units itself.
    extraction = LatexExtractionConfig()
    extraction = replace(extraction, normalization_config=replace(extraction.normalization_config, units=False))

    def parsed(answer: str) -> list[object]:
        result: list[object] = parse(
            rf"\boxed{{{answer}}}",
            extraction_config=[extraction],
            fallback_mode="no_fallback",
            parsing_timeout=None,
            raise_on_error=True,
        )
        return result

    _compare_exactly()
    try:
        gold = parsed(target)
        return all(verify(gold, parsed(answer), timeout_seconds=None, raise_on_error=True) for answer in predictions)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # What math-verify cannot read or compare is not equal; it raises anything, from sympy's depths.
        return False


@cache
def _compare_exactly() -> None:
    """math-verify rounds a difference, whatever the values' size: to it `1/2^{81}` is `1/2^{80}`. Look again where it agrees.

    Its comparisons of sets, tuples, matrices and equations all come down to this one function.
    """
    from math_verify import grader

    rounded = grader.sympy_numeric_eq

    def exact(a: object, b: object, *precision: int) -> bool:
        return rounded(a, b, *precision) and not _differ(a, b)

    grader.sympy_numeric_eq = exact


def _differ(a: Any, b: Any) -> bool:
    """Whether two sympy expressions are not equal: exact for rationals, else by 50 digits, relative to their size.

    A decimal of the answer may be rounded to its fourth digit. What cannot be told is False.
    """
    import sympy  # type: ignore[import-untyped]

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False  # Matrices come again, by their elements.
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    # Any numbers do: two expressions that agree there by chance do not agree to 50 digits.
    point = {symbol: sympy.Rational(1009 + 2 * i, 1013) for i, symbol in enumerate(symbols)}
    left, right = (side.doit().subs(point) for side in (a, b))
    if left.is_Rational and right.is_Rational:
        return bool(left != right)
    tolerance = 1e-4 if left.has(sympy.Float) or right.has(sympy.Float) else 1e-40
    left, right = left.evalf(50), right.evalf(50)
    parts = [part for side in (left, right) for part in side.as_real_imag()]
    # Precision 1 is sympy's way to say that all digits were cancelled: it may be zero.
    if any(not part.is_Number or getattr(part, "_prec", 2) == 1 for part in parts):
        return False
    return bool(abs(left - right) > tolerance * max(abs(left), abs(right)))


# --- A child: one answer after another ------------------------------------------------------------------------------


def _answer_jobs(connection: Connection, limit_s: float) -> None:
    # The default action of SIGALRM ends the process even inside one long C call: no orphan outlives its answer by much.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    while True:
        job = json.loads(connection.recv_bytes())
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        reply: bool | str
        try:
            reply = all_match(job["predictions"], job["target"])
        except (MemoryError, RecursionError):
            reply = "crash"
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(reply).encode())


# --- The keeper -----------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, order=True)
class _Job:
    cost: float
    id: int
    message: bytes = field(compare=False)


@dataclass(slots=True, kw_only=True)
class _Child:
    pid: int
    connection: Connection
    num_jobs: int = 0
    job: _Job | None = None
    slow: bool = False
    started: float = 0.0
    """When it took its job, by the monotonic clock."""
    cpu_before: float | None = None
    """CPU seconds that it had used by then, where the system tells."""


def _cpu_seconds(pid: int) -> float | None:
    if sys.platform != "linux":
        return None
    return time.clock_gettime((~pid << 3) | 2)  # Linux's number for the CPU clock of a process, as in its headers.


class _Keeper:
    def __init__(self, parent: Connection, num_workers: int, timeout_s: float, quick_s: float) -> None:
        self.parent = parent
        self.num_workers = num_workers
        self.timeout_s = timeout_s
        self.quick_s = quick_s
        self.children: dict[Connection, _Child] = {}
        self.waiting: list[_Job] = []
        """A heap, the cheapest first."""
        self.slow_waiting: deque[tuple[float, _Job]] = deque()
        """(since when by the monotonic clock, job)"""

    def run(self) -> None:
        """Until the parent is gone."""
        try:
            while True:
                busy = any(child.job is not None for child in self.children.values())
                for ready in wait([self.parent, *self.children], TICK_S if busy else None):
                    if ready is self.parent:
                        self._take_jobs()
                    elif isinstance(ready, Connection) and ready in self.children:
                        self._take_reply(self.children[ready])
                for child in list(self.children.values()):
                    self._check_limits(child)
                self._hand_out()
        except (EOFError, ConnectionError):
            pass
        finally:
            for child in list(self.children.values()):
                self._end(child)

    def _take_jobs(self) -> None:
        while self.parent.poll():
            message = self.parent.recv_bytes()
            job = json.loads(message)
            heapq.heappush(self.waiting, _Job(cost=job["cost"], id=job["id"], message=message))

    def _take_reply(self, child: _Child) -> None:
        job = child.job
        try:
            reply = json.loads(child.connection.recv_bytes())
        except (EOFError, ConnectionError):
            reply = "crash"
        child.job = None
        if reply == "crash" or child.slow or child.num_jobs >= MAX_JOBS_PER_CHILD:
            self._end(child)
        if job is not None:  # Without one it died with nothing to do: no answer's fault.
            self._reply(job, reply)

    def _check_limits(self, child: _Child) -> None:
        job = child.job
        if job is None:
            return
        clock = time.monotonic() - child.started
        cpu = clock if child.cpu_before is None else (_cpu_seconds(child.pid) or 0.0) - child.cpu_before
        if cpu >= self.timeout_s or clock >= 2 * self.timeout_s:
            self._end(child)
            self._reply(job, "timeout")
        elif not child.slow and cpu >= self.quick_s:
            if self._num_slow() < MAX_SLOW:
                child.slow = True
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, child.pid, os.getpriority(os.PRIO_PROCESS, child.pid) + 5)
                return
            self._end(child)
            self.slow_waiting.append((time.monotonic(), job))

    def _hand_out(self) -> None:
        while self.slow_waiting and self.slow_waiting[0][0] < time.monotonic() - 2 * self.timeout_s:
            self._reply(self.slow_waiting.popleft()[1], "timeout")
        while self.slow_waiting and self._num_slow() < MAX_SLOW:
            child = self._fork()
            child.slow = True
            self._give(child, self.slow_waiting.popleft()[1])
        quick = [child for child in self.children.values() if not child.slow]
        idle = [child for child in quick if child.job is None]
        while self.waiting and (idle or len(quick) < self.num_workers):
            if not idle:
                idle.append(self._fork())
                quick.append(idle[0])
            self._give(idle.pop(), heapq.heappop(self.waiting))

    def _give(self, child: _Child, job: _Job) -> None:
        child.job = job
        child.num_jobs += 1
        child.started = time.monotonic()
        child.cpu_before = _cpu_seconds(child.pid)
        with suppress(ConnectionError):  # A child that died: its closed connection is read next.
            child.connection.send_bytes(job.message)

    def _reply(self, job: _Job, reply: bool | str) -> None:
        self.parent.send_bytes(json.dumps([job.id, reply]).encode())

    def _num_slow(self) -> int:
        return sum(child.slow for child in self.children.values())

    def _fork(self) -> _Child:
        mine, its = Pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                mine.close()
                self.parent.close()
                for other in self.children:
                    other.close()
                with suppress(EOFError, ConnectionError):  # The keeper is gone.
                    _answer_jobs(its, 2 * self.timeout_s + 1.0)
                status = 0
            finally:
                os._exit(status)
        its.close()
        child = _Child(pid=pid, connection=mine)
        self.children[mine] = child
        return child

    def _end(self, child: _Child) -> None:
        """Kill it and reap it: until then no other process can have its id."""
        del self.children[child.connection]
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        child.connection.close()


def main(connection: Connection, num_workers: int, timeout_s: float, quick_s: float) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they may reach the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    for answer in TYPICAL:
        all_match([answer], "2")
        all_match([answer], answer)
    gc.collect()
    gc.freeze()  # What is there now is never garbage, and stays shared with the forks.
    connection.send_bytes(b'"ready"')
    _Keeper(connection, num_workers, timeout_s, quick_s).run()


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), **json.loads(sys.argv[2]))
