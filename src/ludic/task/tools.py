"""A function that the model calls with text of its own making, in a process that can be killed.

The grader (`ludic.task.grading`) has one question for its processes, whether two answers are equal, and forks for each that
hangs. A tool is any function of a file from text to text, and is called far less often: a process each, ended where it is late.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ludic.storage.keys import without_secrets

logger = logging.getLogger(__name__)

START_LIMIT_S = 60.0
"""For a worker's first reply, beside the deadline of the call: it has to start Python, on a machine that may be busy."""
MAX_REPLY_BYTES = 2**16

Failure = Literal["timeout", "crash"]
"""`timeout`: the call met its deadline. `crash`: it raised, ran out of memory, died, or replied at too great a length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolReply:
    """What a call returned; `text` is "" where `failure` is set."""

    text: str = ""
    failure: Failure | None = None


class Tool:
    """Calls `function` of the file `path` in processes of its own, `num_workers` at a time, each call under `timeout_s`.

    The file is loaded by itself: it may import what is installed, but nothing relative to it. A process that is late is killed
    with all that it started. Use it from one event loop; close it before the loop ends.

    Example:
        >>> async with contextlib.aclosing(Tool(Path(calculator.__file__), "calculate")) as tool:
        ...     await tool("3 * 4")
        ToolReply(text='12', failure=None)
    """

    def __init__(self, path: Path, function: str, *, num_workers: int = 1, timeout_s: float = 1.0) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {num_workers}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be more than 0 seconds, not {timeout_s}")
        worker = Path(__file__).with_name("tool_worker.py")
        self._command = (sys.executable, "-P", str(worker), str(path), function, str(2 * timeout_s))
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(num_workers)
        self._idle: list[asyncio.subprocess.Process] = []
        self.failures = Counter[Failure]()

    async def __call__(self, text: str) -> ToolReply:
        """The function's result for `text`."""
        async with self._places:
            worker = self._take_idle()
            reply = None if worker is None else await self._call(worker, text, self._timeout_s)
            if reply is None:
                reply = await self._call(await self._start(), text, self._timeout_s + START_LIMIT_S)
            if reply is None:
                reply = ToolReply(failure="crash")
        if reply.failure:
            self.failures[reply.failure] += 1
            logger.warning(
                "a tool gave up on a call (%s, number %d): %.80r", reply.failure, self.failures.total(), text
            )
        return reply

    def _take_idle(self) -> asyncio.subprocess.Process | None:
        """An idle process that still runs; one may have been killed since its last call."""
        while self._idle:
            worker = self._idle.pop()
            if worker.returncode is None:
                return worker
        return None

    async def _call(self, worker: asyncio.subprocess.Process, text: str, limit_s: float) -> ToolReply | None:
        """The process's reply, after which it is idle or ended; None where it ended without one.

        An idle process may have died before it was asked, which looks the same: the call then has another one.
        """
        reply: ToolReply | None = None
        try:
            reply = await self._ask(worker, text, limit_s)
        finally:  # also where the caller is cancelled in the middle of a call
            if reply is None or reply.failure:
                await _end(worker)
            else:
                self._idle.append(worker)
        return reply

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=MAX_REPLY_BYTES,
            process_group=0,  # what it starts is killed with it, and a Ctrl-C in the terminal is the parent's
            env=without_secrets(os.environ),
        )

    async def _ask(self, worker: asyncio.subprocess.Process, text: str, limit_s: float) -> ToolReply | None:
        """The process's reply; None where it ended without one, before its deadline."""
        assert worker.stdin is not None and worker.stdout is not None
        try:
            async with asyncio.timeout(limit_s):
                worker.stdin.write(json.dumps(text).encode() + b"\n")
                await worker.stdin.drain()
                line = await worker.stdout.readline()
        except TimeoutError:
            return ToolReply(failure="timeout")
        except ConnectionError:
            return None
        except ValueError:  # a line longer than MAX_REPLY_BYTES
            return ToolReply(failure="crash")
        if not line:
            return ToolReply(failure="timeout") if await worker.wait() == -signal.SIGALRM else None
        return ToolReply(text=json.loads(line))

    async def aclose(self) -> None:
        """End the processes. Safe to call twice."""
        idle, self._idle = self._idle, []
        for worker in idle:
            await _end(worker)


async def _end(worker: asyncio.subprocess.Process) -> None:
    assert worker.stdin is not None
    worker.stdin.close()
    if worker.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
    await worker.wait()
