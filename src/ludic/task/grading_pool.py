"""Ask math-verify from any thread: one process (`ludic.task.grading_worker`) that forks workers, and the socket to it.

This side starts that process when the first question comes, and another one where it ends or falls silent: a question that
was open twice when that happened is a crash, all others are asked again. Which answer is tried when, for how long and in
how much memory, is the other side's.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
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


class _Process:
    """The child process, and its end of a socket pair. It leads a process group, in which its forks are too."""

    def __init__(self, settings: dict[str, float]) -> None:
        self.connection, child = socket.socketpair()
        self.writer: asyncio.StreamWriter | None = None
        self.open: dict[int, tuple[float, asyncio.Future[Reply | None]]] = {}
        """By id of the question: when it was asked, by the loop's clock, and its reply."""
        worker = str(Path(__file__).with_name("grading_worker.py"))
        with child:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", worker, str(child.fileno()), json.dumps(settings)],
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
                # Otherwise what sympy does would depend on the order of its sets, which may differ from run to run.
                env={**without_secrets(os.environ), "PYTHONHASHSEED": "0"},
            )

    async def wait_until_ready(self) -> None:
        """Raises RuntimeError, with what to do, where it does not get ready."""
        self.reader, self.writer = await asyncio.open_connection(sock=self.connection)
        try:
            ready = await asyncio.wait_for(self.reader.readline(), START_LIMIT_S)
        except TimeoutError:
            raise RuntimeError(f"the math-verify worker was not up after {START_LIMIT_S:.0f} s") from None
        if not ready:
            raise RuntimeError(
                f"the math-verify worker ended while starting, with status {self.popen.wait()}; "
                "see why with: python -c \"import math_verify; math_verify.parse('1')\""
            )

    async def ask(self, number: int, question: Question) -> Reply | None:
        """The reply; None where the process ends, or has ended, before it comes."""
        if self.popen.returncode is not None:
            return None
        loop = asyncio.get_running_loop()
        job = {"id": number, "cost": question.cost, "predictions": question.predictions, "target": question.target}
        self.open[number] = loop.time(), loop.create_future()
        assert self.writer is not None
        self.writer.write(json.dumps(job).encode() + b"\n")
        return await self.open[number][1]

    def end(self) -> None:
        """Its forks too. Safe to call again."""
        if self.popen.returncode is None:  # Until it is reaped, no other process or group can have its id.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
        if self.writer is None:
            self.connection.close()
        else:
            self.writer.close()


class GradingPool:
    """Puts questions to math-verify, `num_workers` at a time (and a few slow ones besides)."""

    def __init__(self, *, num_workers: int, timeout_s: float, quick_s: float) -> None:
        self._settings = {"num_workers": num_workers, "timeout_s": timeout_s, "quick_s": quick_s}
        # Some reply is due at least as often, while there are questions: then the oldest running one is given up.
        self._silence_limit_s = 2 * timeout_s + 10.0
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._loop = Future[asyncio.AbstractEventLoop]()
        """The thread's, which starts with the first question. All below is the thread's alone."""
        self._ids = itertools.count()
        self._asked: dict[Question, asyncio.Task[Reply]] = {}
        self._process: _Process | None = None
        self._starting: asyncio.Task[_Process] | None = None
        """Of the process that is up, or will be."""
        self._listening: asyncio.Task[None] | None = None

    def ask(self, question: Question) -> Future[Reply]:
        """The reply, later. Questions that are open already are not asked twice.

        Raises RuntimeError after `close`; the future raises it where no process can be started, and at `close`.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError(_CLOSED)
            if self._thread is None:
                # A daemon, so that an exit does not wait for it: `close` is called then.
                thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="ludic-grader", daemon=True)
                thread.start()  # RuntimeError where the system has no more threads: the next question tries again
                self._thread = thread
            return asyncio.run_coroutine_threadsafe(self._answer_once(question), self._loop.result())

    def close(self) -> None:
        """End the processes now. Questions that are open raise RuntimeError. Safe to call twice."""
        with self._lock:
            closed, self._closed = self._closed, True  # Before the loop cancels what is open, which then says why.
            if self._thread is not None and not closed:
                self._loop.result().call_soon_threadsafe(self._closing.set)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    async def _serve(self) -> None:
        """The thread's work: what `ask` gives its loop, until `close`."""
        self._closing = asyncio.Event()
        self._loop.set_result(asyncio.get_running_loop())
        await self._closing.wait()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in (*self._asked.values(), self._starting, self._listening):
            if task is not None:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._process is not None:
            self._process.end()

    async def _answer_once(self, question: Question) -> Reply:
        if self._closed:
            raise RuntimeError(_CLOSED)
        if question not in self._asked:
            self._asked[question] = asyncio.create_task(self._answer(question))
            self._asked[question].add_done_callback(lambda _: self._asked.pop(question))
        answer = self._asked[question]
        try:
            return await asyncio.shield(answer)  # A caller that is cancelled cancels no other's answer.
        except asyncio.CancelledError:
            if answer.cancelled():
                raise RuntimeError(_CLOSED) from None
            raise

    async def _answer(self, question: Question) -> Reply:
        for _ in range(MAX_STARTS_PER_QUESTION):
            if self._starting is None:
                self._starting = asyncio.create_task(self._start())
            process = await asyncio.shield(self._starting)
            reply = await process.ask(next(self._ids), question)
            if reply is not None:
                return reply
        return "crash"

    async def _start(self) -> _Process:
        try:
            self._process = _Process(self._settings)
            await self._process.wait_until_ready()
        except (RuntimeError, OSError) as error:
            self._starting = None  # The next question tries again.
            if self._process is not None:
                self._process.end()
            raise RuntimeError(f"math-verify cannot be asked: {error}") from error
        self._listening = asyncio.create_task(self._listen(self._process))
        return self._process

    async def _listen(self, process: _Process) -> None:
        """Pass on the replies, until the process ends or falls silent."""
        try:
            while line := await self._next_line(process):
                number, reply = json.loads(line)
                process.open.pop(number)[1].set_result(reply)
        except ConnectionError:
            pass
        finally:
            self._starting = None
            process.end()
            for _, lost in process.open.values():
                if not lost.done():
                    lost.set_result(None)

    async def _next_line(self, process: _Process) -> bytes:
        """Empty where none comes, although it is due."""
        while True:
            try:
                async with asyncio.timeout(self._silence_limit_s):
                    return await process.reader.readline()
            except TimeoutError:
                asked = [since for since, _ in process.open.values()]
                if asked and min(asked) < asyncio.get_running_loop().time() - self._silence_limit_s:
                    return b""
