"""JSON lines files that stay valid whatever ends the process: one object a line, appended whole.

A line goes out in a single `write` on a descriptor opened with O_APPEND, so a `kill -9` can tear the last line at most, and
the next run that opens the file cuts the torn piece off. It does not compress, rotate or lock: two runs that append to one
file mix their lines, each of them whole.
"""

import contextlib
import errno
import json
import logging
import math
import os
import queue
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def encode_line(record: Mapping[str, object]) -> bytes:
    """`record` as one line of ASCII JSON with its newline. NaN and the infinities, which JSON does not have, become null.

    What is escaped survives, lone surrogates too, splits no line (U+2028), and does not act on the terminal that shows it.
    """
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(record), allow_nan=False)
    return text.encode("ascii").replace(b"\x7f", b"\\u007f") + b"\n"  # DEL, which json lets through


def finite(value: object) -> object:
    """`value` with null, which is None, for every float that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


class JsonlFile:
    """A JSON lines file that is open for appending. Its folder is made if need be, its torn last line mended.

    Raises:
        OSError: the file cannot be opened or written; one line, with the path.
        ValueError: the file is there, but its end is no JSON lines (it is left as it is).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with _naming(self.path, "open"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Read as well as write, because mending needs to look at the last line.
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._is_regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        self._closed = False
        if self._is_regular:
            try:
                with _naming(self.path, "mend"):
                    _mend_last_line(self._descriptor, self.path)
            except BaseException:
                os.close(self._descriptor)
                raise

    def append(self, record: Mapping[str, object]) -> None:
        """Append one line. When this returns, a kill of the process no longer loses it."""
        line = encode_line(record)
        status = os.fstat(self._descriptor)
        if self._is_regular and status.st_nlink == 0:
            raise OSError(errno.ENOENT, f"cannot write {self.path}: it was removed while the run wrote to it")
        with _naming(self.path, "write"):
            try:
                written = os.write(self._descriptor, line)
                while written < len(line):  # a full disk takes a part first and then refuses
                    written += os.write(self._descriptor, line[written:])
            except OSError:
                if self._is_regular:
                    with contextlib.suppress(OSError):  # a torn line is cut off when the file is opened again
                        os.ftruncate(self._descriptor, status.st_size)
                raise

    def sync(self) -> None:
        """Wait until the operating system has the lines on the disk, so that a power cut loses nothing either."""
        if self._is_regular:
            with _naming(self.path, "write"):
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)


class JsonlWriter(contextlib.AbstractContextManager["JsonlWriter"]):
    """Appends objects to a JSON lines file from a background thread, in the order of the calls.

    An error of that thread (a full disk, an object that JSON cannot hold) is raised by the caller's next `write`,
    `flush` or `close`; whatever was written after it is dropped, so `flush` before relying on the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, queue_length: int = 1024) -> None:
        self._file = JsonlFile(path)
        self._queue: queue.Queue[Mapping[str, object] | None] = queue.Queue(queue_length)
        self._error: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"jsonl {self._file.path.name}", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, object]) -> None:
        """Queue one object, which must not be changed afterwards. Waits only when `queue_length` of them are queued."""
        if self._closed:
            raise ValueError(f"{self._file.path} is closed: nothing more can be written to it")
        self._raise_error()
        self._queue.put(record)

    def flush(self) -> None:
        """Wait until everything that was queued is on the disk.

        Raises:
            OSError: a line could not be written, with the path and the reason.
            TypeError: an object could not be turned into JSON.
        """
        self._queue.join()
        self._raise_error()
        self._file.sync()

    def close(self) -> None:
        """Write what is queued, then end the thread and close the file. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._file.close()
        self._raise_error()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            if self._error is None:  # after an error the queue is still emptied, so that no caller waits for ever
                try:
                    self._file.append(record)
                except (OSError, TypeError, ValueError, RecursionError, MemoryError) as error:
                    self._error = error
            self._queue.task_done()
        self._queue.task_done()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, object]]:
    """The objects of a JSON lines file.

    A torn last line, as a killed run leaves it, is left out and logged as a warning.

    Raises:
        OSError: the file cannot be read.
        ValueError: `file:line: reason` for a line that is not one JSON object.
    """
    return [record for _, record in _read_lines(Path(path))]


def end_of_whole_lines(path: str | os.PathLike[str]) -> int:
    """How many bytes of a JSON lines file are whole lines; 0 for one that is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        size = os.fstat(descriptor).st_size
        return size - len(_tail(descriptor, size))
    finally:
        os.close(descriptor)


def drop_steps_after(path: str | os.PathLike[str], step: int) -> int:
    """Take out the lines of a JSON lines file whose `step` is above `step`; returns how many there were.

    The file is replaced as a whole or not at all; a torn last line goes too. One that is not there has nothing to drop.

    Raises:
        OSError: the file cannot be read or replaced.
        ValueError: `file:line: reason` for a line that is not one JSON object.
    """
    path = Path(path)
    if not path.exists():
        return 0

    def goes(record: Mapping[str, object]) -> bool:
        return isinstance(at := record.get("step"), int) and at > step

    # A line at a time: a night's rollouts need not fit into memory. Most often nothing goes, and nothing is written.
    dropped = sum(goes(record) for _, record in _read_lines(path))
    if not dropped:
        return 0
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _naming(path, "replace"):
            with partial.open("wb") as file:
                # As they were written, byte for byte.
                file.writelines(line + b"\n" for line, record in _read_lines(path) if not goes(record))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return dropped


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line without its newline, and the object in it; a torn last line is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text, problem = line.removesuffix(b"\n"), ""
            try:
                record = json.loads(text)
            except ValueError as error:  # UnicodeDecodeError is one as well
                problem = f"not valid JSON: {error}"
            except RecursionError:
                problem = "not valid JSON: nested too deeply"
            else:
                if isinstance(record, dict):
                    yield text, record
                    continue
                problem = f"a JSON object was expected, not {type(record).__name__}"
            if text != line:
                raise ValueError(f"{path}:{number}: {problem}")
            logger.warning("%s:%d: left out a torn last line of %d bytes", path, number, len(text))


def _mend_last_line(descriptor: int, path: Path) -> None:
    """End a last line that lacks only its newline; cut off one that a killed run tore."""
    size = os.fstat(descriptor).st_size
    tail = _tail(descriptor, size)
    if not tail:
        return
    if not tail.lstrip().startswith(b"{"):
        raise ValueError(f"{path} is no JSON lines file (its last line starts with {tail[:20]!r}): name another file")
    try:
        json.loads(tail)
    except (ValueError, RecursionError):
        os.ftruncate(descriptor, size - len(tail))
        logger.warning("%s: cut off a torn last line of %d bytes, left by a run that was killed", path, len(tail))
    else:
        os.write(descriptor, b"\n")


def _tail(descriptor: int, size: int) -> bytes:
    """What follows the last newline; empty where the file is empty or ends with one."""
    length = 1 << 16
    while True:
        block = os.pread(descriptor, length, max(size - length, 0))
        if b"\n" in block or length >= size:
            return block.rpartition(b"\n")[2]
        length *= 2


@contextlib.contextmanager
def _naming(path: Path, verb: str) -> Iterator[None]:
    """Makes an OSError one line that names the file: `[Errno 28] cannot write run.jsonl: No space left on device`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot {verb} {path}: {error.strerror or error}") from error
