"""Ask math-verify from any thread: one process (`ludic.task.grading_worker`) that forks workers, and the socket to it.

What it leaves out: which answers are worth asking about (`ludic.task.grading`), and which is tried when, for how long and in
how much memory (`ludic.task.grading_worker`). This side only starts that process when the first question comes, tells replies
apart, and starts another one where it ends or falls silent: a question that was open twice when that happened is a
crash, all others are asked again.
"""

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Literal

from ludic.storage.keys import without_secrets

START_LIMIT_S = 180.0
MAX_STARTS_PER_QUESTION = 2

_CLOSED = "this Grader is closed; make a new one"

Reply = bool | Literal["timeout", "crash"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Does each of `predictions` equal `target`? `cost` is from `ludic.task.answer_cost.cost`: the cheapest go first."""

    predictions: tuple[str, ...]
    target: str
    cost: float = field(default=0.0, compare=False)


@dataclass(slots=True, kw_only=True)
class _Open:
    question: Question
    message: bytes
    futures: list[Future[Reply]]
    num_starts: int = 0
    """How many processes it was handed to."""
    since: float = 0.0
    """When it was handed to the last one, by the monotonic clock."""

    def hand_over(self, outbox: "queue.SimpleQueue[bytes | None]") -> None:
        self.num_starts += 1
        self.since = time.monotonic()
        outbox.put(self.message)


class _Process:
    """The child process, and its end of a socket pair. It leads a process group, in which its forks are too."""

    def __init__(self, settings: dict[str, float]) -> None:
        self.connection, child = Pipe()
        # Otherwise what sympy does would depend on the order of its sets, which may differ from run to run.
        environment = {**without_secrets(os.environ), "PYTHONHASHSEED": "0"}
        with child:
            self.popen = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    str(Path(__file__).with_name("grading_worker.py")),
                    str(child.fileno()),
                    json.dumps(settings),
                ],
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
                env=environment,
            )

    def wait_until_ready(self) -> None:
        """Raises RuntimeError, with what to do, where it does not get ready."""
        if not self.connection.poll(START_LIMIT_S):
            raise RuntimeError(f"the math-verify worker was not up after {START_LIMIT_S:.0f} s")
        try:
            self.connection.recv_bytes()
        except (EOFError, ConnectionError):
            raise RuntimeError(
                f"the math-verify worker ended while starting, with status {self.popen.wait()}; "
                "see why with: python -c \"import math_verify; math_verify.parse('1')\""
            ) from None

    def kill(self) -> None:
        """Its forks too. Safe to call again, from any thread."""
        if self.popen.returncode is None:  # Until it is reaped, no other process or group can have its id.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        self.popen.wait()
        self.connection.close()


class GradingPool:
    """Puts questions to math-verify, `num_workers` at a time (and a few slow ones besides).

    Example:
        >>> pool = GradingPool(num_workers=2, timeout_s=5.0, quick_s=0.25)
        >>> pool.ask(Question(predictions=("9*2",), target="18")).result()
        True
        >>> pool.close()
    """

    def __init__(self, *, num_workers: int, timeout_s: float, quick_s: float) -> None:
        self._settings = {"num_workers": num_workers, "timeout_s": timeout_s, "quick_s": quick_s}
        # Some reply is due at least as often, while there are questions: then the oldest running one is given up.
        self._silence_limit_s = 2 * timeout_s + 10.0
        self._lock = threading.Lock()
        self._closed = False
        self._ids = itertools.count()
        self._open: dict[int, _Open] = {}
        self._ids_by_question: dict[Question, int] = {}
        self._process: _Process | None = None
        self._outbox: queue.SimpleQueue[bytes | None] | None = None
        """For the process that is up; None while there is none."""
        self._reader: threading.Thread | None = None

    def ask(self, question: Question) -> Future[Reply]:
        """The reply, later. Questions that are open already are not asked twice.

        Raises RuntimeError after `close`; the future raises it where no process can be started, and at `close`.
        """
        future: Future[Reply] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(_CLOSED)
            if question in self._ids_by_question:
                self._open[self._ids_by_question[question]].futures.append(future)
                return future
            number = next(self._ids)
            self._ids_by_question[question] = number
            job = {"id": number, "cost": question.cost, "predictions": question.predictions, "target": question.target}
            self._open[number] = asked = _Open(question=question, message=json.dumps(job).encode(), futures=[future])
            if self._outbox is not None:  # Else the reader hands over all that is open, once the process is up.
                asked.hand_over(self._outbox)
            if self._reader is None:
                # Daemons, so that an exit does not wait for them: the process is ended then, and they with it.
                self._reader = threading.Thread(target=self._read, name="ludic-grader", daemon=True)
                self._reader.start()
        return future

    def close(self) -> None:
        """End the processes now. Questions that are open raise RuntimeError. Safe to call twice."""
        with self._lock:
            self._closed = True
            reader = self._reader
            if self._process is not None:
                self._process.kill()  # The reader sees the socket close.
        if reader is not None and reader is not threading.current_thread():
            reader.join()

    def _read(self) -> None:
        """The reader's thread: one process after another, until there is nothing to ask or all is closed."""
        while True:
            with self._lock:
                if self._closed or not self._open:
                    self._reader = None
                    break
            try:
                self._run_a_process()
            except (RuntimeError, OSError) as error:
                self._fail_all(f"math-verify cannot be asked: {error}")
        self._fail_all(_CLOSED)

    def _run_a_process(self) -> None:
        """Until it ends. Raises RuntimeError or OSError where it cannot be started."""
        with self._lock:
            if self._closed:
                return
            process = self._process = _Process(self._settings)
        try:
            process.wait_until_ready()
            self._talk(process)
        finally:
            with self._lock:
                self._process = None
            process.end()

    def _talk(self, process: _Process) -> None:
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # A thread of its own: neither the caller nor the reader of replies must wait for a full socket.
        writer = threading.Thread(target=_write, args=(process, outbox), name="ludic-grader-out", daemon=True)
        with self._lock:
            crashed = [number for number, asked in self._open.items() if asked.num_starts >= MAX_STARTS_PER_QUESTION]
            for number, asked in self._open.items():
                if number not in crashed:
                    asked.hand_over(outbox)
            self._outbox = outbox
        writer.start()
        for number in crashed:
            self._resolve(number, "crash")
        try:
            while True:
                if process.connection.poll(self._silence_limit_s):
                    self._resolve(*json.loads(process.connection.recv_bytes()))
                elif self._is_overdue():
                    return
        except (EOFError, ConnectionError):
            return
        finally:
            with self._lock:
                self._outbox = None
            outbox.put(None)
            process.kill()
            writer.join()

    def _is_overdue(self) -> bool:
        with self._lock:
            return any(asked.since < time.monotonic() - self._silence_limit_s for asked in self._open.values())

    def _resolve(self, number: int, reply: Reply) -> None:
        with self._lock:
            asked = self._open.pop(number)
            del self._ids_by_question[asked.question]
        for future in asked.futures:
            if future.set_running_or_notify_cancel():
                future.set_result(reply)

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            failed = list(self._open.values())
            self._open.clear()
            self._ids_by_question.clear()
            reason = _CLOSED if self._closed else reason
        for asked in failed:
            for future in asked.futures:
                if future.set_running_or_notify_cancel():
                    future.set_exception(RuntimeError(reason))


def _write(process: _Process, outbox: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(ConnectionError):  # Its end is the reader's business.
        while (message := outbox.get()) is not None:
            process.connection.send_bytes(message)
