"""What a script does about SIGINT, SIGTERM and SIGHUP, and about a terminal that is gone.

The first of the three cancels the main task, which ends in good order: a training run writes a checkpoint of its last
finished update, servers and workers are ended, and the exit code is 128 plus the signal's number. A second one leaves at
once and takes the child processes along. One that was ignored when the script started stays so: that is `nohup`'s way.

The system's own handler writes each signal into a pipe, and a thread reads it: so a second signal is obeyed while the
event loop is blocked in a save, in C code that gives the interpreter away, or in a system call that does not return.
Nothing here needs `loop.add_signal_handler`.

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
import weakref
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType, TracebackType
from typing import Any, TextIO

from ludic.inference import cleanup

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_S = 1.0
"""Signals within this time of the first are the same one: `uv run`, `timeout` and clusters hand on what they get, so that
it comes twice."""
EXIT_LIMIT_S = 10.0
"""How long a thread that does not end may hold up the exit of an interrupted script."""

_SHOW_CURSOR = "\x1b[?25h"


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
        self._seen: dict[str, tuple[float, signal.Signals]] = {}
        self._cancel: Callable[[], object] | None = None
        self._raised = False
        self._at_once = False
        self._busy = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._read, self._write, self._wakeup = -1, -1, -1

    @property
    def caught(self) -> signal.Signals | None:
        """The first signal that came."""
        first = self._seen.get("first")
        return None if first is None else first[1]

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
            if self.caught is not None:
                self._limit_exit()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is not threading.main_thread():
            return self
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """See `at_once`."""
        self._at_once = True
        try:
            self._raise_if_caught()  # the event loop has not come to it yet
            yield
            self._raise_if_caught()  # raised in a destructor, where Python drops it
        finally:
            self._at_once = False

    def _raise_if_caught(self) -> None:
        if self.caught is not None:
            self._raised = True
            raise KeyboardInterrupt

    # -- what a signal does ----------------------------------------------------------------------------------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two steps of the interpreter; the pipe has the signal already."""
        self._drain(self._read)
        while self._busy:  # the thread has read it: let it finish, since C code may hold the interpreter after this
            time.sleep(0.001)
        # No task to cancel, before or after `run`; or one that blocks its event loop and has nothing to put in order.
        if (self._cancel is None or self._at_once) and not self._raised:
            self._raise_if_caught()

    def _watch(self, read: int) -> None:
        """In a thread: obey signals while the main thread cannot."""
        goes_on = True
        while goes_on:
            select.select([read], [], [])
            self._busy = True
            goes_on = self._drain(read)
            self._busy = False
        os.close(read)

    def _drain(self, read: int) -> bool:
        """Obey the signals in the pipe; False at its end. The main thread and the watching one may both be here."""
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
        first = self._seen.setdefault("first", mine)  # no lock: the thread that holds it may be interrupted right here
        if first is mine and self._at_once:
            tell(f"{self.name}: caught {number.name}: stopping\n")
        elif first is mine:
            tell(
                f"{self.name}: caught {number.name}: stopping in good order, what is finished is saved first; "
                "a second signal leaves at once\n"
            )
            cancel = self._cancel
            if cancel is not None:
                with contextlib.suppress(RuntimeError):  # the loop was closed in this moment
                    cancel()
        elif mine[0] - first[0] > ECHO_S:
            leave(128 + number, f"{self.name}: caught {number.name} again: leaving at once\n")

    def _limit_exit(self) -> None:
        """Leave by force if a thread that hangs, in a driver for example, still holds up the exit after a while."""

        def wait() -> None:
            time.sleep(EXIT_LIMIT_S)
            leave(
                self.exit_code, f"{self.name}: a thread did not end within {EXIT_LIMIT_S:.0f} s: leaving without it\n"
            )

        threading.Thread(target=wait, daemon=True, name="ludic-exit-limit").start()


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
    with _catching[-1].raising():
        yield


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
            _write(1, _SHOW_CURSOR)  # a live display hides it
        tell(message)
    finally:
        os._exit(code)


def tell(message: str) -> None:
    """Write a line to standard error, if that is possible at once: a terminal may be stopped, or gone."""
    _write(2, "\n" + message if os.isatty(2) else message)  # on a terminal after its own ^C


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [descriptor], [], 0.2)[1]:
            os.write(descriptor, text.encode(errors="replace"))


# --- standard streams -----------------------------------------------------------------------------------------------


class _Forgiving(io.RawIOBase):
    """A descriptor for writing whose failures are not the writer's: what cannot be written is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.failure: OSError | None = None
        """The last one."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Write all of `data`, as far as it can be written, and call it written."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # the stream was made non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:  # the terminal or the pipe was closed, the disk is full
                self.failure = error
                break
        return size


_kept_streams: "weakref.WeakKeyDictionary[TextIO, _Forgiving]" = weakref.WeakKeyDictionary()
"""What is under the streams that `keep_standard_streams` made."""


def write_failure(stream: TextIO) -> OSError | None:
    """Why text written to `stream` was dropped, where `keep_standard_streams` made it and a write failed; else None."""
    kept = _kept_streams.get(stream)
    return None if kept is None else kept.failure


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
    sys.stdout = _kept(sys.stdout, 1)
    sys.stderr = _kept(sys.stderr, 2)


def _kept(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if type(stream) is not io.TextIOWrapper or not isinstance(stream.buffer, io.BufferedWriter | io.FileIO):
        return stream
    if stream.fileno() != descriptor:
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    unbuffered = isinstance(stream.buffer, io.FileIO)  # by PYTHONUNBUFFERED
    raw = _Forgiving(descriptor)
    kept = io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    _kept_streams[kept] = raw
    return kept
