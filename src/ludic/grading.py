r"""Is an answer right? Exact arithmetic where both sides are numbers, math-verify in a killable process where not.

    prediction, target --(a) same text--> right
                       --(b) both numbers: exact, with Fraction--> right or wrong
                       --(c) one cannot be what the other is--> wrong
                       --(d) math-verify, in a worker process under a hard deadline--> right, wrong, or a failure

What counts as a number, and as the same one (these rules are ours, not math-verify's):
- `18`, `+18`, `18.`, `18.00`, `1.8e1`, `1.8 \times 10^1`, `36/2`, `\frac{36}{2}` and `17 2/2` are 18; `.5` is `1/2`.
  Values are compared exactly: `0.333` is not `1/3`.
- Wrappings do not matter: `$18$`, `\(18\)`, `{18}`, `\text{18}`, `\boxed{18}`, `**18**`.
- Commas and spaces group thousands only by exactly three digits: `1,000`, `1{,}000`, `1 000`. `1,00` and `17 18` are no
  numbers, and never equal to one.
- A currency sign (`$18`, `\$18`, `-$5`, `18 €`) is dropped. `18%` is 18/100: equal to `0.18`, never to `18`.
- `18 hundred` to `18 trillion` are multiplied out. Any other words behind a number are a unit (`18 dollars`,
  `18 apples per day`, `18\text{ cm}^2`), and so is `dozen`. Units matter only if both sides have one: then they have to
  agree, but for case and a plural s. A single bare letter is a variable, not a unit: math-verify judges `18x`.
- A name before `=` or `:` is dropped (`x = 18`, `Total: 18`), again unless both sides have one and they differ. In a
  chain like `9 \times 2 = 18` every side has to equal the target.

What it leaves out: partial credit, and judging prose (`I think 18` is wrong). A failure of the grader is never a mere
False: it is in the `Verdict`, in the counters and in the log.
"""

import asyncio
import json
import logging
import re
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Literal

from ludic.numbers import Number, clean_answer, is_broken_number, read_number, same_number
from ludic.parsers import closing_brace

logger = logging.getLogger(__name__)

MAX_ANSWER_CHARS = 2_000
"""A longer prediction or target (after stripping) is refused at once, as `too_long`."""
WORKER_START_LIMIT_S = 180.0

Failure = Literal["timeout", "crash", "too_long"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What grading one answer came to. `matched` is False wherever `failure` is set.

    Example:
        >>> Verdict(matched=False, failure="timeout")
        Verdict(matched=False, failure='timeout')
    """

    matched: bool
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """For math-verify: does each of `predictions` equal `target`?"""

    predictions: tuple[str, ...]
    target: str


# --- Exact rules, in this process -----------------------------------------------------------------------------------

_INTEGER = re.compile(r"-?[1-9][0-9]{0,17}")
_WORDS_ONLY = re.compile(r"[A-Za-z\s.,:;?!'\"_]*")
# Two plain words before a digit. math-verify would multiply out their letters, for 50 ms, and never reach a number.
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+ [A-Za-z]{2,}[^0-9]*[0-9]")
_RELATION = re.compile(r"[<>≤≥≠≈]|!=|\\(?:leq?|geq?|neq?|lt|gt|approx|sim|equiv)(?![A-Za-z])")


def _decide(prediction: str, target: str) -> Verdict | _Question:
    """The verdict as far as it takes no algebra, else the question for math-verify."""
    prediction, target = prediction.strip(), target.strip()
    if max(len(prediction), len(target)) > MAX_ANSWER_CHARS:
        return Verdict(matched=False, failure="too_long")
    if not prediction or not target:
        return Verdict(matched=False)
    if prediction == target:
        return Verdict(matched=True)
    if _INTEGER.fullmatch(prediction) and _INTEGER.fullmatch(target):
        return Verdict(matched=False)  # Without leading zeros, another text is another number.
    prediction, target = clean_answer(prediction), clean_answer(target)
    if prediction == target:
        return Verdict(matched=True)
    expected = read_number(target)
    given = read_number(prediction)
    if expected is not None and given is not None:
        return Verdict(matched=same_number(given, expected))
    # A box of our own is put around the answer for math-verify: what closes it early, or never, is no answer.
    if closing_brace("{" + prediction + "}", 0) != len(prediction) + 1 or ("%" in prediction) != ("%" in target):
        return Verdict(matched=False)
    if expected is None or expected.value is None:
        return _Question(predictions=(prediction,), target=target)
    return _compare_with_number(prediction, expected)


def _compare_with_number(prediction: str, expected: Number) -> Verdict | _Question:
    """`prediction` is no number by itself; may it still be equal to one?"""
    if _RELATION.search(prediction) or _PROSE.search(prediction):
        return Verdict(matched=False)
    sides = [part.strip() for part in prediction.split("=")]
    values = [side for side in sides if not _WORDS_ONLY.fullmatch(side)]
    questions = []
    for side in values:
        number = read_number(side)
        if number is None and not is_broken_number(side):
            questions.append(side)
        elif number is None or not same_number(number, expected):
            return Verdict(matched=False)
    if questions:
        return _Question(predictions=tuple(questions), target=str(expected.value))
    return Verdict(matched=bool(values))


# --- math-verify, in other processes --------------------------------------------------------------------------------


class _Worker:
    """One child process and the socket to it. Used by one thread at a time, except for `process.kill`."""

    def __init__(self) -> None:
        self.connection, child = Pipe()
        self.ready = False
        with child:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("grading_worker.py")), str(child.fileno())],
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def wait_until_ready(self) -> None:
        if self.ready:
            return
        if not self.connection.poll(WORKER_START_LIMIT_S):
            raise RuntimeError(f"the math-verify worker was not up after {WORKER_START_LIMIT_S:.0f} s")
        try:
            self.connection.recv_bytes()
        except (EOFError, ConnectionError):
            raise RuntimeError(
                f"the math-verify worker ended while starting, with status {self.process.wait()}; "
                "see why with: python -c \"import math_verify; math_verify.parse('1')\""
            ) from None
        self.ready = True

    def ask(self, question: _Question, timeout_s: float) -> Verdict:
        """Anything but a failure leaves the worker fit for the next question."""
        job = {"predictions": question.predictions, "target": question.target, "limit_s": timeout_s + 1.0}
        start = time.monotonic()
        try:
            self.connection.send_bytes(json.dumps(job).encode())
            if not self.connection.poll(timeout_s):
                return Verdict(matched=False, failure="timeout")
            reply = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            late = time.monotonic() - start >= timeout_s
            return Verdict(matched=False, failure="timeout" if late else "crash")
        return Verdict(matched=reply) if isinstance(reply, bool) else Verdict(matched=False, failure="crash")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def _close_all(workers: set[_Worker]) -> None:
    while workers:
        workers.pop().close()


class Grader:
    """Grades answers, with `num_workers` math-verify processes that start when the first answer needs one.

    An answer that takes longer than `timeout_s` seconds (from when a worker takes it; starting up does not count) has
    its worker killed and replaced. Use it from any thread and any event loop, also from several. Close it when done;
    what is left open is closed at exit, and workers whose parent was killed end within `timeout_s` + 1 seconds.

    Raises RuntimeError where workers cannot start, and after `close`.
    """

    def __init__(self, num_workers: int = 2, timeout_s: float = 5.0) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {num_workers}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be more than 0 seconds, not {timeout_s}")
        self.num_workers = num_workers
        self.timeout_s = timeout_s
        self.num_graded = 0
        """All verdicts, failures included."""
        self.num_timeouts = 0
        self.num_crashes = 0
        self.num_too_long = 0
        self._lock = threading.Lock()
        self._closed = False
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        # A thread for each worker waits for it, so nothing is bound to an event loop and none is ever blocked.
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="ludic-grader")
        self._finalizer = weakref.finalize(self, _close_all, self._workers)

    async def match(self, prediction: str, target: str) -> Verdict:
        """Whether `prediction` is as good as `target`, by the rules at the top of this module."""
        decision = _decide(prediction, target)
        if isinstance(decision, _Question):
            decision = await asyncio.wrap_future(self._submit(decision))
        return self._count(decision, prediction)

    def match_sync(self, prediction: str, target: str) -> Verdict:
        """`match` for callers without an event loop; blocks."""
        decision = _decide(prediction, target)
        if isinstance(decision, _Question):
            decision = self._submit(decision).result()
        return self._count(decision, prediction)

    async def aclose(self) -> None:
        """`close`, without holding up the event loop."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End the workers now. Answers that are still waiting raise RuntimeError. Safe to call twice."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.process.kill()  # Its thread, if it waits for it, sees the socket close.
        self._threads.shutdown(wait=True)
        self._finalizer()

    def _submit(self, question: _Question) -> Future[Verdict]:
        with self._lock:
            self._refuse_if_closed()
            return self._threads.submit(self._ask_a_worker, question)

    def _ask_a_worker(self, question: _Question) -> Verdict:
        worker = self._take_worker()
        try:
            worker.wait_until_ready()
            verdict = worker.ask(question, self.timeout_s)
        except RuntimeError:
            self._discard(worker)
            with self._lock:
                self._refuse_if_closed()
            raise
        if verdict.failure is None:
            self._give_back(worker)
            return verdict
        self._discard(worker)
        with self._lock:
            self._refuse_if_closed()
            self._idle.append(self._start_worker())  # It gets ready while the threads are busy elsewhere.
        return verdict

    def _take_worker(self) -> _Worker:
        with self._lock:
            self._refuse_if_closed()
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                self._workers.discard(worker)  # It died with nothing to do: no answer's fault.
                worker.close()
            return self._start_worker()

    def _start_worker(self) -> _Worker:
        worker = _Worker()
        self._workers.add(worker)
        return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            self._idle.append(worker)

    def _discard(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this Grader is closed; make a new one")

    def _count(self, verdict: Verdict, prediction: str) -> Verdict:
        with self._lock:
            self.num_graded += 1
            self.num_timeouts += verdict.failure == "timeout"
            self.num_crashes += verdict.failure == "crash"
            self.num_too_long += verdict.failure == "too_long"
        if verdict.failure is not None:
            logger.warning("the grader gave up on an answer (%s): %.80r", verdict.failure, prediction[:80])
        return verdict


@cache
def _default_grader() -> Grader:
    return Grader()


def answers_match(prediction: str, target: str) -> bool:
    r"""Whether `prediction` is as good as `target`, by the rules at the top of this module. Blocks up to 5 s.

    For scripts and tests: it shares one `Grader`, which is closed at exit. A failure is False, and logged as a warning.

    Example:
        >>> answers_match(r"\$1,000.00", "1000"), answers_match("18%", "18")
        (True, False)
    """
    return _default_grader().match_sync(prediction, target).matched
