"""JSON lines files that stay valid whatever ends the process: one object a line, appended whole.

`JsonlFile` appends in the caller's thread; `JsonlWriter` does it in a background thread, off the hot path; `read_jsonl`
reads such a file back. A line goes out in a single `write` on a descriptor opened with O_APPEND, so a `kill -9` can
tear the last line at most, and the next run that opens the file cuts the torn piece off. When a disk is full, the half
line that still fitted is taken back. A file that was removed while it is written to is an error, not a silent loss.

It does not compress, rotate or lock: two runs that append to one file mix their lines, each of them whole.
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
from types import TracebackType
from typing import cast

logger = logging.getLogger(__name__)

_QUEUE_LENGTH = 1024
_STEP_BACK = 1 << 16


def encode_line(record: Mapping[str, object]) -> bytes:
    """`record` as one line of ASCII JSON with its newline.

    NaN and the infinities, which JSON does not have, become null. Everything outside ASCII is escaped, so that lone
    surrogates (which a model may well emit) and control characters survive, no reader splits at U+2028, and no text acts
    on the terminal that shows the file.
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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Read as well as write, because mending needs to look at the last line.
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _named(error, self.path, "open") from error
        self._is_regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        self._closed = False
        if self._is_regular:
            try:
                _mend_last_line(self._descriptor, self.path)
            except OSError as error:
                os.close(self._descriptor)
                raise _named(error, self.path, "mend") from error
            except BaseException:
                os.close(self._descriptor)
                raise

    def append(self, record: Mapping[str, object]) -> None:
        """Append one line. When this returns, a kill of the process no longer loses it."""
        line = encode_line(record)
        status = os.fstat(self._descriptor)
        if self._is_regular and status.st_nlink == 0:
            raise OSError(errno.ENOENT, f"cannot write {self.path}: it was removed while the run wrote to it")
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):  # a full disk takes a part first and then refuses
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            if self._is_regular:
                with contextlib.suppress(OSError):  # a torn line is cut off when the file is opened again
                    os.ftruncate(self._descriptor, status.st_size)
            raise _named(error, self.path, "write") from error

    def sync(self) -> None:
        """Wait until the operating system has the lines on the disk, so that a power cut loses nothing either."""
        if not self._is_regular:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _named(error, self.path, "write") from error

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)


class JsonlWriter:
    """Appends objects to a JSON lines file from a background thread, in the order of the calls.

    An error of that thread (a full disk, an object that JSON cannot hold) is raised by the caller's next `write`,
    `flush` or `close`; whatever was written after it is dropped, so `flush` before relying on the file.

    Example:
        >>> with JsonlWriter("rollouts.jsonl") as writer:  # doctest: +SKIP
        ...     writer.write({"step": 0, "reward": 1.0})
        ...     writer.flush()
    """

    def __init__(self, path: str | os.PathLike[str], *, queue_length: int = _QUEUE_LENGTH) -> None:
        self._file = JsonlFile(path)
        self.path = self._file.path
        self._queue: queue.Queue[Mapping[str, object] | None] = queue.Queue(queue_length)
        self._error: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"jsonl {self.path.name}", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, object]) -> None:
        """Queue one object, which must not be changed afterwards. Waits only when `queue_length` of them are queued."""
        if self._closed:
            raise ValueError(f"{self.path} is closed: nothing more can be written to it")
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

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    A torn last line, as a killed run leaves it, is left out and logged as a warning. Everything else must be right.

    Raises:
        OSError: the file cannot be read.
        ValueError: `file:line: reason` for a line that is not one JSON object.
    """
    return [record for _, record in _read_lines(Path(path))]


def drop_steps_after(path: str | os.PathLike[str], step: int) -> int:
    """Take out the lines of a JSON lines file whose `step` is above `step`; returns how many there were.

    A run that continues from a checkpoint makes those updates again. The file is replaced as a whole or not at all; a
    torn last line goes too. A file that is not there has nothing to drop.

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
        with partial.open("wb") as file:
            # As they were written, byte for byte.
            file.writelines(line + b"\n" for line, record in _read_lines(path) if not goes(record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _named(error, path, "replace") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return dropped


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, object]]]:
    """Each line without its newline, and the object in it; a torn last line is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            whole, text = line.endswith(b"\n"), line.removesuffix(b"\n")
            try:
                record = _decode_line(text, path, number)
            except ValueError:
                if whole:
                    raise
                logger.warning("%s:%d: left out a torn last line of %d bytes", path, number, len(text))
            else:
                yield text, record


def _decode_line(line: bytes, path: Path, number: int) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one as well
        raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}:{number}: not valid JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}:{number}: a JSON object was expected, not {type(record).__name__}")
    return cast("dict[str, object]", record)


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
    tail = b""
    start = size
    while start > 0:
        length = min(_STEP_BACK, start)
        start -= length
        block = os.pread(descriptor, length, start)
        newline = block.rfind(b"\n")
        if newline >= 0:
            return block[newline + 1 :] + tail
        tail = block + tail
    return tail


def _named(error: OSError, path: Path, verb: str) -> OSError:
    """`error` as one line that names the file: `[Errno 28] cannot write run.jsonl: No space left on device`."""
    return OSError(error.errno, f"cannot {verb} {path}: {error.strerror or error}")
