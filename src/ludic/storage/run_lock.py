"""One run at a time in an --out-dir.

The lock is the kernel's (`flock` on `run.lock`, by filelock), so it ends with the process, however that ends; what the file
says is for people. It is not handed to child processes, neither forked nor started. Evaluations write files of their own and
need none.

Left out: runs on two hosts that share a folder through a file system whose `flock` is local to each host. Where there is no
`flock` at all, the run goes on with a warning.
"""

import contextlib
import errno
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from ludic.storage.identity import describe
from ludic.storage.inert import inert

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_SECRETS = ("key", "token", "secret", "password")


class FolderInUseError(ValueError):
    """Another run has the folder; one line that says which."""


@contextlib.contextmanager
def run_lock(out_dir: Path, identity: Mapping[str, str | int | float | None]) -> Iterator[None]:
    """Holds `out_dir`, an existing folder, for one run, which `identity` describes to others.

    Raises:
        FolderInUseError: another run has it.
        OSError: the lock file cannot be made; one line with the path.
    """
    path = out_dir / LOCK_FILE
    # filelock's fallback is a file that means "locked" as long as it is there: a killed run would leave it.
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(
            f"{out_dir} is in use by another run ({describe(_read_record(path))}): wait for it, stop it, "
            "or choose another --out-dir"
        ) from None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise OSError(error.errno, f"cannot open {path}: {error.strerror}") from error
        logger.warning(
            "%s: this file system has no locks (%s); see to it yourself that no other run writes to this folder",
            path,
            error.strerror,
        )
    try:
        path.write_text(json.dumps({**identity, "command": _command()}) + "\n")
    except OSError as error:  # the lock holds without it
        logger.warning("cannot write to %s who has this folder: %s", path, error.strerror)
    try:
        yield
    finally:
        # The file stays: were it removed, a third run could lock a new one while a second waits for this. What it says is
        # taken back; where the folder is gone or its disk fails, it does not matter.
        with contextlib.suppress(OSError):
            os.truncate(path, 0)
        lock.release()


def _read_record(path: Path) -> Mapping[str, object]:
    """What the holder wrote; empty if it did not, or not yet."""
    for _ in range(5):  # between taking the lock and having written lies a moment
        with contextlib.suppress(ValueError, OSError):
            record = json.loads(path.read_text())
            return record if isinstance(record, dict) else {}
        time.sleep(0.02)
    return {}


def _command() -> str:
    """The command line, without the values of flags that sound secret."""
    words, hide = [], False
    for word in sys.argv:
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("-") and any(part in flag.lower() for part in _SECRETS)
        words.append("..." if hide else f"{flag}=..." if secret and equals else word)
        hide = secret and not equals
    return inert(shlex.join([os.path.basename(words[0]), *words[1:]]) if words else "", 400)
