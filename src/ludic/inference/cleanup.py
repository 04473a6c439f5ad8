"""What a killed process would leave behind, and who removes it: a server's process group, and folders in shared memory.

Run as a file, `python -I -S cleanup.py PARENT_PID GROUP GRACE_S`, it is the reaper of a server that a trainer started: it
waits until the trainer has ended, however it ended, and then ends the server's process group. Standard library only, and
nothing of ludic: it starts in a few hundredths of a second and holds no GPU. Left out: the sockets of a killed server under
the temporary folder, which are empty files.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.1
TRACKER_WAIT_S = 3.0
FOLDER_PREFIX = "ludic-weights-"
_LOCK_NAME = "owner.lock"
_SHARED_MEMORY = Path("/dev/shm")


# --- process groups -------------------------------------------------------------------------------------------------


def end_group_politely(group: int) -> None:
    """Ask the leader of a process group to end."""
    _send(signal.SIGTERM, group)
    _send(signal.SIGCONT, -group)  # a stopped process would not see it


def kill_group(group: int) -> None:
    """End a process group by force, and let Python's resource trackers in it remove the shared memory of the others."""
    for _ in range(2):  # again, for what was started while we looked
        members = group_members(group)
        trackers = {pid for pid in members if _is_resource_tracker(pid)}
        for pid in set(members) - trackers:
            _send(signal.SIGKILL, pid)
    deadline = time.monotonic() + TRACKER_WAIT_S
    while trackers & set(group_members(group)) and time.monotonic() < deadline:
        time.sleep(0.02)
    _send(signal.SIGKILL, -group)


def group_members(group: int) -> list[int]:
    """The processes of a group that still run, zombies left out; [] where there is no /proc."""
    return [pid for pid, _, its_group in _running() if its_group == group]


def children() -> list[int]:
    """The processes that this one started and that still run; [] where there is no /proc."""
    return [pid for pid, parent, _ in _running() if parent == os.getpid()]


def kill_child(pid: int) -> None:
    """End a child by force, with its process group if it leads one. A resource tracker ends by itself, after its work."""
    if _is_resource_tracker(pid):
        return
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            kill_group(pid)
        else:
            _send(signal.SIGKILL, pid)


def exists(pid: int) -> bool:
    """Whether there is a process, or a group where `pid` is -GROUP; zombies count."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _send(number: signal.Signals, pid: int) -> None:
    """Signal a process, or a group where `pid` is -GROUP, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says EPERM of a group of zombies
        os.kill(pid, number)


def _running() -> Iterator[tuple[int, int, int]]:
    """(id, parent, group) of every process that is no zombie."""
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(entry.name)
        if fields is not None and fields[0] not in "ZX":
            yield int(entry.name), int(fields[1]), int(fields[2])


def _stat(pid: int | str) -> list[str] | None:
    """The fields of /proc/PID/stat after the name: state, parent, group and so on; None if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# --- folders in shared memory ---------------------------------------------------------------------------------------


class WeightsFolder:
    """A new folder `ludic-weights-*` that belongs to this process.

    Args:
        parent: None takes the temporary folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        # Under another name until the lock is held: a folder of the right name that is not locked has lost its owner.
        making = Path(tempfile.mkdtemp(prefix=f".{FOLDER_PREFIX}", dir=parent))
        # The system takes the lock back when this process ends, however it ends, and shows it to other containers too.
        self._descriptor = os.open(making / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self.path = making.with_name(making.name.removeprefix("."))
        os.rename(making, self.path)
        _own_folders.add(self)

    def remove(self) -> None:
        """Remove it with all that is in it. Safe to call twice."""
        if self in _own_folders:
            _own_folders.remove(self)
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)


_own_folders: set[WeightsFolder] = set()


def remove_own_folders() -> None:
    """Remove the folders of this process, which leaves without its usual cleaning."""
    for folder in list(_own_folders):
        folder.remove()


def remove_orphaned_folders(parent: Path = _SHARED_MEMORY) -> list[Path]:
    """Remove the `ludic-weights-*` folders in `parent` whose owner has ended; those that were removed."""
    removed = []
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or not one of these
            descriptor = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its owner lives
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
            finally:
                os.close(descriptor)
    return removed


# --- the reaper of a server -----------------------------------------------------------------------------------------


def reap(parent_pid: int, group: int, grace_s: float) -> None:
    """Wait for the end of `parent_pid`, then end the process group; returns earlier if the group ends before."""
    while not _has_ended(parent_pid):
        if not exists(-group):
            return
        time.sleep(POLL_S)
    end_group_politely(group)
    deadline = time.monotonic() + grace_s
    while group_members(group) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    kill_group(group)
    remove_orphaned_folders()


def _has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie not waited for by its parent; a zombie is not known where there is no /proc."""
    fields = _stat(pid)
    return fields[0] in "ZX" if fields is not None else not exists(pid)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it has to outlive what it is there for
        signal.signal(number, signal.SIG_IGN)
    reap(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
