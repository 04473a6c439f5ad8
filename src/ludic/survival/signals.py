"""What a script does about SIGINT, SIGTERM and SIGHUP, and about a terminal that is gone.

The first of the three cancels the main task, which ends in good order: a training run writes a checkpoint of its last
finished update, servers and workers are ended, and the exit code is 128 plus the signal's number. A second one leaves at
once and takes the child processes along. One that was ignored when the script started stays so: that is `nohup`'s way.

Left out: C code that keeps the interpreter to itself and looks at no signals (Ctrl-\\ or SIGKILL end that), and Windows.
"""

import asyncio
import contextlib
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TextIO

from ludic.inference import cleanup

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_S = 1.0
"""Signals within this time of the first are the same one: `uv run`, `timeout` and clusters hand on what they get, so that
it comes twice."""
EXIT_LIMIT_S = 10.0
"""How long a thread that does not end may hold up the exit of an interrupted script."""

_SHOW_CURSOR = "\x1b[?25h"
_CLEAR_BELOW = "\x1b[J"
"""Takes off the terminal what a live view has below the cursor; where there is none it does nothing."""


class Interrupts:
    """Catches the signals for the length of a `with` block, in which `run` runs the main coroutine.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Example:
        >>> async def main() -> int:
        ...     return 0
        >>> with Interrupts("script.py") as interrupts:
        ...     asyncio.run(interrupts.run(main))
        0
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.raises = False
        """Within a block of `at_once`."""
        self._seen: list[tuple[float, signal.Signals]] = []
        self._cancel: Callable[[], object] | None = None
        self._raised = False
        self._obeying = threading.RLock()  # a handler may be interrupted by another one in the same thread
        self._handlers: dict[signal.Signals, Any] = {}
        self._read, self._write, self._wakeup = -1, -1, -1

    @property
    def caught(self) -> signal.Signals | None:
        """The first signal that came."""
        return self._seen[0][1] if self._seen else None

    @property
    def exit_code(self) -> int:
        """What a process that ended because of the signal exits with: 130 after SIGINT, 143, 129."""
        return 128 + (self.caught or signal.SIGINT)

    async def run(self, main: Callable[[], Coroutine[Any, Any, int]]) -> int:
        """The result of `main`, which is cancelled by the first signal.

        Raises:
            asyncio.CancelledError: it was; see `caught`.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            return await main()
        finally:
            self._cancel = None
            if self.caught is not None:  # a thread that hangs, in a driver for example, would hold up the exit for ever
                said = f"{self.name}: a thread did not end within {EXIT_LIMIT_S:.0f} s: leaving without it\n"
                timer = threading.Timer(EXIT_LIMIT_S, leave, (self.exit_code, said))
                timer.daemon = True
                timer.start()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is not threading.main_thread():
            return self
        # Not `loop.add_signal_handler`: the event loop comes to its handlers between two steps of tasks, so that no signal, and
        # no second one, would end a script whose loop is blocked, by a load or a save that hangs. Here the system's own
        # handler writes each signal into a pipe, which two readers empty: Python's handler in the main thread, which runs even
        # where C code holds the interpreter but looks at signals (a regular expression), and a thread, for C code and system
        # calls that give the interpreter away and do not return (a driver, a network file system).
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._handle)
        threading.Thread(target=self._watch, args=(self._read,), daemon=True, name="ludic-signals").start()
        _catching.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to who had them before."""
        if self._write < 0:
            return
        _catching.remove(self)
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            # An interrupted script is on its way out, where another signal is to end it without a trace. None: a handler
            # that was not installed from Python, which cannot be put back.
            default = handler is None or self.caught is not None
            signal.signal(number, signal.SIG_DFL if default else handler)
        os.close(self._write)  # the thread then reads the end of the pipe, and closes its own side
        self._write = -1

    def raise_if_caught(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self.caught is not None:
            self._raised = True
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two steps of the interpreter; the pipe has the signal already."""
        self._obey_pending(self._read)
        # No task to cancel, before or after `run`; or one that blocks its event loop and has nothing to put in order.
        if (self._cancel is None or self.raises) and not self._raised:
            self.raise_if_caught()

    def _watch(self, read: int) -> None:
        while select.select([read], [], []) and self._obey_pending(read):
            pass
        os.close(read)

    def _obey_pending(self, read: int) -> bool:
        """Obey the signals in the pipe; False at its end."""
        # Who comes second waits until the other is done: after `_handle` C code may hold the interpreter again.
        with self._obeying:
            try:
                numbers = os.read(read, 64)
            except BlockingIOError:
                return True
            for number in numbers:
                if number in self._handlers:
                    self._obey(signal.Signals(number))
            return bool(numbers)

    def _obey(self, number: signal.Signals) -> None:
        mine = (time.monotonic(), number)
        self._seen.append(mine)  # in one step: the handler of another signal may interrupt this one anywhere
        first = self._seen[0]
        if first is not mine:
            if mine[0] - first[0] > ECHO_S:
                leave(128 + number, f"{self.name}: caught {number.name} again: leaving at once\n")
        elif self.raises:
            tell(f"{self.name}: caught {number.name}: stopping\n")
        else:
            tell(
                f"{self.name}: caught {number.name}: stopping in good order, what is finished is saved first; "
                "a second signal leaves at once\n"
            )
            if (cancel := self._cancel) is not None:
                with contextlib.suppress(RuntimeError):  # the loop was closed in this moment
                    cancel()


_catching: list[Interrupts] = []


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """A block in which a signal raises KeyboardInterrupt where the main thread stands, as it does without `Interrupts`.

    For what blocks the event loop before there is anything to save: loading, tokenising, a warm start. A cancelled task would
    go on to the end of it. No `await` inside: another task would not be told of the signal.
    """
    if not _catching or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = _catching[-1]
    interrupts.raises = True
    try:
        interrupts.raise_if_caught()  # the event loop has not come to it yet
        yield
        interrupts.raise_if_caught()  # raised in a destructor, where Python drops it
    finally:
        interrupts.raises = False


def _release_in_child() -> None:
    """A forked child must not tell its parent, through the pipe that both have, of signals that were the child's."""
    for interrupts in list(_catching):
        interrupts.restore()


os.register_at_fork(after_in_child=_release_in_child)


def leave(code: int, message: str) -> None:
    """End this process now, with its children and their process groups; nothing is flushed, saved or waited for."""
    try:
        for pid in cleanup.children():
            cleanup.kill_child(pid)
        cleanup.remove_own_folders()
        if os.isatty(1):
            _write(1, _SHOW_CURSOR)  # a live view hides it
        tell(message)
    finally:
        os._exit(code)


def tell(message: str) -> None:
    """Write a line to standard error, if that is possible at once: a terminal may be stopped, or gone."""
    _write(2, f"\n{_CLEAR_BELOW}{message}" if os.isatty(2) else message)  # on a terminal after its own ^C


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [descriptor], [], 0.2)[1]:
            os.write(descriptor, text.encode(errors="replace"))


# --- standard streams -----------------------------------------------------------------------------------------------


class _Forgiving(io.FileIO):
    """A descriptor for writing whose failures are not the writer's: what cannot be written is dropped."""

    failure: OSError | None = None
    """The last one."""

    def write(self, data: Any) -> int:
        """Write all of `data`, as far as it can be written, and call it written."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                written = super().write(left)
            except OSError as error:  # the terminal or the pipe was closed, the disk is full
                self.failure = error
                break
            if written is None:  # the descriptor was made non-blocking, and takes nothing now
                select.select([], [self], [])
            else:
                left = left[written:]
        return size


class _KeptStream(io.TextIOWrapper):
    """A standard stream that `keep_standard_streams` made."""

    forgiving: _Forgiving


def write_failure(stream: TextIO) -> OSError | None:
    """Why text written to `stream` was dropped, where `keep_standard_streams` made it and a write failed; else None."""
    return stream.forgiving.failure if isinstance(stream, _KeptStream) else None


def keep_standard_streams() -> None:
    """Let no write to standard output or error end the script, whatever becomes of the terminal, the pipe or the disk.

    Streams that were closed are opened on /dev/null, so that no file of ours takes their numbers. Characters that the
    locale's encoding lacks are escaped. Streams that replace Python's own are left alone.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        if descriptor > 2:
            os.close(descriptor)
            break
        os.set_inheritable(descriptor, True)
    sys.stdout = _kept(sys.stdout, sys.__stdout__)
    sys.stderr = _kept(sys.stderr, sys.__stderr__)


def _kept(stream: TextIO | None, pythons_own: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if stream is not pythons_own or not isinstance(stream, io.TextIOWrapper):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    forgiving = _Forgiving(stream.fileno(), "w", closefd=False)
    unbuffered = isinstance(stream.buffer, io.FileIO)  # by PYTHONUNBUFFERED
    kept = _KeptStream(
        forgiving if unbuffered else io.BufferedWriter(forgiving),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    kept.forgiving = forgiving
    return kept
