"""Parts of a benchmark: child processes that print JSON lines, answer them, or take turns with others.

A host's speed drifts from minute to minute by more than most differences that a table shows, so what is compared takes turns
within one run. A trainer compiles and warms up once: it stays alive, with its weights on the GPU, while the others are measured.
A part that is told `--pause-after 4,7` prints {"paused": 4} after update 4 and waits for a line on standard input (`Pauses`);
its next record has `resumed`: its seconds have the pause in them, and it found what it needs made ready.
"""

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from benchmarks.harness import Record, emit, say
from benchmarks.processes import END_GRACE_S, PartError, last_words, process_group

T = TypeVar("T")


class JSONLines:
    """The JSON objects that a process writes to its standard output, as they come; other lines are passed over."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self._stdout = process.stdout
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self._stdout:  # closed here and nowhere else: closing a pipe that a thread reads from waits for the thread
            for line in self._stdout:
                self._lines.put(line)
        self._lines.put(None)

    def next(self, timeout_s: float) -> Record | None:
        """The next object, or None when there will be none.

        Raises:
            TimeoutError: none came within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty as error:
                raise TimeoutError(f"no line within {timeout_s:.0f} s") from error
            if line is None or line.startswith("{"):
                return None if line is None else json.loads(line)


class Worker:
    """A process that answers each JSON line with one: `ask`. Its first line says that it is ready."""

    def __init__(self, process: "subprocess.Popen[str]", log_path: Path) -> None:
        self._process = process
        self._log_path = log_path
        self._lines = JSONLines(process)

    def ready(self, deadline_s: float) -> None:
        self._answer(deadline_s)

    def ask(self, request: Record, *, deadline_s: float = 120.0) -> Record:
        """Raises PartError where the process ended, or gave no answer in time."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer(deadline_s)

    def _answer(self, deadline_s: float) -> Record:
        try:
            record = self._lines.next(deadline_s)
        except TimeoutError as error:
            raise PartError(f"{error}; the log is {self._log_path}") from error
        if record is None:
            raise PartError(f"the process ended: {last_words(self._log_path)}")
        return record


class Prepared:
    """A process that loads what it needs, prints one JSON line, and does its part once it is told: `records`."""

    def __init__(self, stack: contextlib.ExitStack, command: Sequence[str], *, log_path: Path, gpu: int | None) -> None:
        self._process = stack.enter_context(process_group(command, log_path=log_path, gpu=gpu, pipes=True))
        self._log_path = log_path
        self._lines = JSONLines(self._process)

    def records(self, word: str, *, deadline_s: float) -> list[Record]:
        """Tell it the word, and wait for its end: what it prints, with a last record {"cut_off": why} where it failed or was
        not done in time.

        Raises:
            PartError: it printed nothing more than its first line.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which is said below
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        records, deadline = list[Record](), time.monotonic() + deadline_s
        try:
            while (record := self._lines.next(deadline - time.monotonic())) is not None:
                records.append(record)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=END_GRACE_S)
            problem = f"ended with code {self._process.returncode}" if self._process.returncode else ""
        except TimeoutError:
            problem = f"was not done after {deadline_s:.0f} s"
        if len(records) < 2:
            raise PartError(f"it {problem or 'measured nothing'}: {last_words(self._log_path)}")
        return [*records[1:], *([{"cut_off": problem}] if problem else [])]


class Part:
    """A command that prints JSON lines, a turn at a time: it runs until it pauses or ends, and then the others may.

    `records` holds its lines so far, each with `at_s`, the seconds of its own turns until then; the deadline counts those
    alone. `problem` says why it ended early.

    Example:
        >>> with Part(command, log_path=Path("a.log"), deadline_s=60) as part:
        ...     while part.turn():
        ...         pass
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_path: Path,
        deadline_s: float,
        gpu: int | None = None,
        env: Mapping[str, str] | None = None,
        on_record: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.command, self.records, self.problem = command, list[Record](), ""
        self._log_path, self._deadline_s, self._on_record = log_path, deadline_s, on_record
        self._group = process_group(command, log_path=log_path, gpu=gpu, env=env, pipes=True)
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._spent_s = 0.0

    def __enter__(self) -> "Part":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def turn(self) -> bool:
        """Run it, from its start or from where it paused: True where it pauses again, False where it has ended."""
        began, resumed = time.monotonic(), self._process is not None
        if self._process is None:
            self._process = self._stack.enter_context(self._group)
            self._lines = JSONLines(self._process)
        else:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended in its pause, which its lines tell
                self._process.stdin.write("\n")
                self._process.stdin.flush()
        try:
            return self._read_until_pause(began, resumed=resumed)
        finally:
            self._spent_s += time.monotonic() - began

    def _read_until_pause(self, began: float, *, resumed: bool) -> bool:
        while True:
            spent_s = self._spent_s + time.monotonic() - began
            try:
                record = self._lines.next(self._deadline_s - spent_s)
            except TimeoutError:
                return self._ended(f"was not done after {self._deadline_s:.0f} s")
            if record is None:
                assert self._process is not None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=END_GRACE_S)
                code = self._process.returncode
                return self._ended(f"ended with code {code}" if code else "")
            if "paused" in record:
                return True
            at_s = self._spent_s + time.monotonic() - began
            self.records.append({"at_s": at_s, **record, **({"resumed": True} if resumed else {})})
            self._on_record(self.records[-1])
            resumed = False

    def _ended(self, why: str) -> bool:
        """False, with its processes gone."""
        self._stack.close()
        if why:
            words = last_words(self._log_path)
            say(f"it {why}, after {len(self.records)} records: {words}")
            self.problem = why if self.records else f"it {why}: {words}"
        return False


class Pauses:
    """The other end of `Part.turn`, in the process that takes turns.

    Args:
        after: updates after which it lets the others go first.
    """

    def __init__(self, after: Iterable[int] = ()) -> None:
        self._after = set(after)

    def due(self, step: int) -> bool:
        return step in self._after

    def wait(self, step: int) -> None:
        """Say that it pauses, and return when it may go on.

        Raises:
            EOFError: whoever started it is gone.
        """
        self._after.discard(step)  # what is done on the way out does not pause again
        emit({"paused": step})
        if not sys.stdin.readline():
            raise EOFError(f"paused after update {step}, and whoever was to say when to go on is gone")


def pauses_after(updates: int, *, turns: int, skip: int) -> list[int]:
    """After which updates a row pauses, so that it takes `turns` turns.

    The first `skip` updates warm up and the first one after a pause is left out; the others are dealt out in pairs, since
    where generation runs ahead a long update and a short one alternate.

    Raises:
        ValueError: a turn would have no update that counts.

    Example:
        >>> pauses_after(10, turns=3, skip=2)
        [4, 7]
    """
    counted = updates - skip - (turns - 1)
    if counted < turns:
        least = skip + 2 * turns - 1
        raise ValueError(f"--turns {turns} of {updates} updates: {least} are the least where the first {skip} warm up")
    pairs = counted // 2
    shares = [2 * (pairs // turns + (turn < pairs % turns)) for turn in range(turns)]
    shares = shares if min(shares) else [counted // turns + (turn < counted % turns) for turn in range(turns)]
    ends, end = [], skip
    for share in shares[:-1]:
        end += share
        ends.append(end)
        end += 1
    return ends


def in_turns(lanes: Iterable[Sequence[T]], turn: Callable[[T], bool], *, between: Callable[[], object] = int) -> None:
    """Let the first of each lane take a turn, lane by lane, again and again; one that is done makes way for the next.

    Args:
        lanes: what stands in one lane needs the same server or GPU, and comes one after the other.
        turn: whether there is another turn to come.
        between: called before each round.
    """
    waiting = [list(lane) for lane in lanes]
    while any(waiting):
        between()
        for lane in filter(None, waiting):
            if not turn(lane[0]):
                lane.pop(0)


def run_part(
    command: Sequence[str],
    *,
    log_path: Path,
    deadline_s: float,
    gpu: int | None = None,
    env: Mapping[str, str] | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """The records of a part that runs alone, from its start to its end.

    A command that fails, or is not done after `deadline_s`, is an error unless it had printed something by then: what it
    had is returned, with a last record {"cut_off": why}.

    Raises:
        PartError: it printed no record at all.
    """
    with Part(command, log_path=log_path, deadline_s=deadline_s, gpu=gpu, env=env, on_record=on_record) as part:
        while part.turn():
            pass
    if part.problem and not part.records:
        raise PartError(part.problem)
    return [*part.records, *([{"cut_off": part.problem}] if part.problem else [])]
