"""What a killed process would leave behind, and who removes it: a server's process group, and folders in shared memory.

Run as a file, `python -I -S cleanup.py PARENT_PID GROUP GRACE_S`, it is the reaper of a server that a trainer started: a
process outside the server's group that waits until the trainer has ended, however it ended, and then ends the group. It
is a process and not a thread of the server because a server that is stopped, or hangs in C code, has no thread that runs.

Standard library only, and nothing of ludic: it starts in a few hundredths of a second and holds no GPU. Left out: the
sockets of a killed server under the temporary folder, which are empty files.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

POLL_S = 0.1
TRACKER_WAIT_S = 3.0
FOLDER_PREFIX = "ludic-weights-"
_LOCK_NAME = "owner.lock"
_SHARED_MEMORY = Path("/dev/shm")


# --- process groups -------------------------------------------------------------------------------------------------


def end_group_politely(group: int) -> None:
    """Ask the leader of a process group to end: SIGTERM, and SIGCONT to all, since a stopped process would not see it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(group, signal.SIGTERM)
        os.killpg(group, signal.SIGCONT)


def kill_group(group: int) -> None:
    """End a process group by force, and let Python's resource trackers in it remove the shared memory of the others."""
    for _ in range(2):  # again, for what was started while we looked
        trackers = []
        for pid in group_members(group):
            if _is_resource_tracker(pid):
                trackers.append(pid)
            else:
                _kill(pid)
    deadline = time.monotonic() + TRACKER_WAIT_S
    while any(_runs(pid) for pid in trackers) and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says EPERM of a group of zombies
        os.killpg(group, signal.SIGKILL)


def group_members(group: int) -> list[int]:
    """The processes of a group that still run, zombies left out; [] where there is no /proc."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat(entry)
        if fields is not None and int(fields[2]) == group and fields[0] not in "ZX":
            members.append(int(entry.parent.name))
    return members


def children() -> list[int]:
    """The processes that this one started and that still run; [] where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat(entry)
        if fields is not None and int(fields[1]) == os.getpid() and fields[0] not in "ZX":
            found.append(int(entry.parent.name))
    return found


def kill_child(pid: int) -> None:
    """End a child by force, with its process group if it leads one. A resource tracker ends by itself, after its work."""
    if _is_resource_tracker(pid):
        return
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            kill_group(pid)
        else:
            _kill(pid)


def _stat(path: Path) -> list[str] | None:
    """The fields of /proc/PID/stat after the name: state, parent, group and so on; None if the process is gone."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _runs(pid: int) -> bool:
    fields = _stat(Path(f"/proc/{pid}/stat"))
    return fields is not None and fields[0] not in "ZX"


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


# --- folders in shared memory ---------------------------------------------------------------------------------------


class WeightsFolder:
    """A new folder `ludic-weights-*` that belongs to this process.

    A lock on a file in it says so. The system takes the lock back when the process ends, however it ends: so
    `remove_orphaned_folders` knows, in another container too, whose owner is gone.

    Args:
        parent: None takes the temporary folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        import fcntl

        # Under another name until the lock is held: a folder of the right name that is not locked has lost its owner.
        making = Path(tempfile.mkdtemp(prefix=f".{FOLDER_PREFIX}", dir=parent))
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
    import fcntl

    removed = []
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        try:
            descriptor = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another user's, or not one of these
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its owner lives
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
        finally:
            os.close(descriptor)
    return removed


# --- the reaper of a server -----------------------------------------------------------------------------------------


def reap(parent_pid: int, group: int, grace_s: float) -> None:
    """Wait for the end of `parent_pid`, then end the process group; returns earlier if the group ends before."""
    if _parent_ends_first(parent_pid, group):
        end_group_politely(group)
        deadline = time.monotonic() + grace_s
        while group_members(group) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        kill_group(group)
        remove_orphaned_folders()


def _parent_ends_first(parent_pid: int, group: int) -> bool:
    """Block until the parent or the whole group has ended; whether it was the parent."""
    watched = [_pidfd(pid) for pid in (parent_pid, group)]
    while exists(parent_pid):
        if not _group_exists(group):
            return False
        # Linux: readable at the end of a process, even before it is reaped.
        descriptors = [descriptor for descriptor in watched if descriptor is not None]
        ended, _, _ = select.select(descriptors, [], [], 1.0 if len(descriptors) == 2 else POLL_S)
        if watched[0] in ended:
            return True
        if ended:  # the leader: the rest of its group may stay a little, and its parent may start another server
            watched[1] = None
    return True


def _pidfd(pid: int) -> int | None:
    """A descriptor of a process that need not be a child of this one; None where the system has no such descriptors."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # another system, a sandbox without this call, or the process is gone
        return None


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it has to outlive what it is there for
        signal.signal(number, signal.SIG_IGN)
    reap(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
