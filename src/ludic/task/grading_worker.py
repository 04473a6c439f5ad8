r"""The child process of `ludic.task.grading.Grader`: asks math-verify whether two answers are equal, in forks of its own.

It is run as a file, `python -P grading_worker.py FD SETTINGS`, and not by multiprocessing: that way it imports math-verify
and nothing else (not the caller's main module, and nothing from ludic), and needs no `if __name__ == "__main__"` there.

    Grader --job--> keeper --job--> child (a fork that has math-verify and its tables): true, false, or what ran out
                      \--job--> another child ...

The keeper does no algebra, so that it always answers, and a child that hangs costs its killing and a fork of some
milliseconds, not another import. Answers that hang must not hold up those that do not:
- Jobs wait in order of their `cost`, the shortest and plainest first.
- A child that has worked `quick_s` on one answer is ended, and its job begins anew among at most `MAX_SLOW` slow ones, at a
  lower priority. Where those places are taken it waits for one, for at most twice `timeout_s`: then it is a time-out.
- `timeout_s` ends an answer for good. Both limits are seconds of the child's own CPU time: other load on the machine makes no
  answer wrong. Twice `timeout_s` by the clock ends it in any case.
- A child's address space is limited, and the system's out-of-memory killer is asked to take it before anything else.

FD is one end of a socket pair, SETTINGS is JSON: {"num_workers", "timeout_s", "quick_s"}. First it sends "ready"; then
each job `{"id": int, "cost": float, "predictions": [...], "target": str}` is answered, in any order, with `[id, reply]`:
true, false, "timeout" or "crash". A message is a line of JSON in ASCII, so that lone surrogates and null bytes pass.
"""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

MAX_MEMORY_BYTES = 2**30
"""Address space that one child may take, on Linux. math-verify itself needs a tenth."""
MAX_SLOW = 2
MAX_MESSAGE_BYTES = 2**20
MAX_JOBS_PER_CHILD = 1_000
"""After that many answers a child is replaced, so that what sympy remembers of them cannot pile up."""
TYPICAL = (r"\sqrt{4}", "(9*2)", "18x", "17 or 18", r"2\pi + 1", "(1, 2)")
"""Parsed and compared before the first fork: math-verify builds its tables as it goes, and forks inherit them."""


def all_match(predictions: list[str], target: str) -> bool:
    """Whether math-verify finds every prediction equal to `target`.

    Both are parsed inside a box, as LaTeX only: on raw strings math-verify 0.9 rates `18.0` unequal to `18`, and its
    plain-text extraction picks numbers out of prose. Its own time limits are off: the keeper has better ones.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    # Its list of units has `th`, `d` and `am`, and whatever text stands at the end: ludic compares and drops units itself.
    extraction = LatexExtractionConfig()
    extraction = replace(extraction, normalization_config=replace(extraction.normalization_config, units=False))

    options = {"extraction_config": [extraction], "fallback_mode": "no_fallback", "parsing_timeout": None}

    def parsed(answer: str) -> Any:
        return parse(rf"\boxed{{{answer}}}", raise_on_error=True, **options)

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


def _answer_jobs(connection: socket.socket, cpu_limit_s: float, clock_limit_s: float) -> None:
    # Their default action ends the process, even inside one long C call.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    for line in connection.makefile("rb"):
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        signal.setitimer(signal.ITIMER_REAL, clock_limit_s)  # For an orphan: else the keeper ends it by the clock.
        reply: bool | str
        try:
            reply = all_match(job["predictions"], job["target"])
        except (MemoryError, RecursionError):
            reply = "crash"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(json.dumps(reply).encode() + b"\n")


# --- The keeper -----------------------------------------------------------------------------------------------------


class _Child:
    """A fork, as the keeper sees it."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.reader = reader
        self.writer = writer
        self.num_jobs = 0
        self.died_of: int | None = None
        """The signal, once it is reaped."""

    async def answer(self, message: bytes, clock_limit_s: float) -> bool | str:
        """The reply; `timeout` beyond `clock_limit_s`, `cpu` beyond its limit of CPU time, `crash` where it dies."""
        self.num_jobs += 1
        self.writer.write(message)
        try:
            async with asyncio.timeout(clock_limit_s):
                line = await self.reader.readline()
        except TimeoutError:
            return "timeout"
        except ConnectionError:
            line = b""
        if line:
            reply: bool | str = json.loads(line)
            return reply
        return "cpu" if self.end() == signal.SIGPROF else "crash"

    def end(self) -> int:
        """Kill it and reap it: until then no other process can have its id. Safe to call twice."""
        if self.died_of is None:
            os.kill(self.pid, signal.SIGKILL)
            self.died_of = -os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.writer.close()
        return self.died_of


class _Keeper:
    def __init__(self, *, num_workers: int, timeout_s: float, quick_s: float) -> None:
        self.timeout_s = timeout_s
        self.quick_s = quick_s
        self.waiting = asyncio.PriorityQueue[tuple[float, int, bytes]]()
        """(cost, id, message), the cheapest first."""
        self.quick_places = asyncio.Semaphore(num_workers)
        self.slow_places = asyncio.Semaphore(MAX_SLOW)
        self.idle: list[_Child] = []
        self.sockets: list[socket.socket] = []
        """The keeper's own ends. A child closes its copies of them, so that it sees the keeper's end."""

    async def run(self, connection: socket.socket) -> None:
        """Until the parent is gone: then this process and its children are killed, which are a process group."""
        self.sockets.append(connection)
        reader, self.parent = await asyncio.open_connection(sock=connection, limit=MAX_MESSAGE_BYTES)
        self.parent.write(b'"ready"\n')
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._take_jobs(reader))
                while True:
                    await self.quick_places.acquire()
                    _, number, message = await self.waiting.get()
                    tasks.create_task(self._answer(number, message))
        finally:
            os.killpg(0, signal.SIGKILL)

    async def _take_jobs(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            job = json.loads(line)
            self.waiting.put_nowait((job["cost"], job["id"], line))
        raise EOFError

    async def _answer(self, number: int, message: bytes) -> None:
        while self.idle and self.idle[-1].reader.at_eof():  # It died with nothing to do: no answer's fault.
            self.idle.pop().end()
        child = self.idle.pop() if self.idle else await self._fork(self.quick_s)
        started = time.monotonic()
        reply = await child.answer(message, 2 * self.timeout_s)
        if isinstance(reply, bool) and child.num_jobs < MAX_JOBS_PER_CHILD:
            self.idle.append(child)
        else:
            child.end()
        self.quick_places.release()
        if reply == "cpu":
            reply = await self._answer_slowly(message, time.monotonic() - started)
        self.parent.write(json.dumps([number, reply]).encode() + b"\n")

    async def _answer_slowly(self, message: bytes, seconds_so_far: float) -> bool | str:
        try:
            async with asyncio.timeout(2 * self.timeout_s):
                await self.slow_places.acquire()
        except TimeoutError:
            return "timeout"
        child = await self._fork(self.timeout_s)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, child.pid, os.getpriority(os.PRIO_PROCESS, child.pid) + 5)
        reply = await child.answer(message, 2 * self.timeout_s - seconds_so_far)
        child.end()
        self.slow_places.release()
        return "timeout" if reply == "cpu" else reply

    async def _fork(self, cpu_limit_s: float) -> _Child:
        mine, its = socket.socketpair()
        self.sockets = [one for one in self.sockets if one.fileno() >= 0] + [mine]
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for one in self.sockets:
                    one.close()
                with suppress(ConnectionError):  # The keeper is gone.
                    _answer_jobs(its, cpu_limit_s, 2 * self.timeout_s + 1.0)
                status = 0
            finally:
                os._exit(status)
        its.close()
        return _Child(pid, *await asyncio.open_connection(sock=mine))


def main(connection: socket.socket, settings: dict[str, Any]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they may reach the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    for answer in TYPICAL:
        all_match([answer], "2")
        all_match([answer], answer)
    gc.collect()
    gc.freeze()  # What is there now is never garbage, and stays shared with the forks.
    asyncio.run(_Keeper(**settings).run(connection))


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]))
