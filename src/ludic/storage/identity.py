"""Who a process is: for people to read, and for others to tell whether it still runs."""

import getpass
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from ludic.storage.inert import inert

Identity = Mapping[str, str | int | float | None]
"""host, pid, pid_started, user, out_dir, since (UTC)."""


def describe(identity: Mapping[str, object]) -> str:
    """A process in words, on one line, whatever it says of itself.

    Example:
        >>> describe({"user": "ann", "host": "node-3", "pid": 812, "since": "12:00", "command": "train_gsm8k.py"})
        'ann@node-3, process 812, since 12:00: train_gsm8k.py'
    """

    said = {name: inert(str(value), 200) for name, value in identity.items() if value}
    words = (
        f"{said.get('user', 'somebody')}@{said.get('host', 'an unknown host')}, process {said.get('pid', 'unknown')}"
    )
    if "since" in said:
        words += f", since {said['since']}"
    if "command" in said:
        return f"{words}: {said['command']}"
    return f"{words}, writing {said['out_dir']}" if "out_dir" in said else words


def identity(out_dir: Path) -> Identity:
    """This process, for people and for `is_alive`: host, pid, pid_started, user, out_dir, since (UTC)."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": process_started(os.getpid()),
        "user": _user(),
        "out_dir": str(out_dir.absolute()),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def is_alive(identity: Mapping[str, object]) -> bool | None:
    """Whether that process still runs; None where that cannot be told from here (another host or container)."""
    pid, started = identity.get("pid"), identity.get("pid_started")
    if identity.get("host") != socket.gethostname() or type(pid) is not int or not 0 < pid < 2**31:
        return None
    here, found = process_started(os.getpid()), process_started(pid)
    if here is not None and str(started).rpartition(":")[0] != here.rpartition(":")[0]:
        return None  # another boot, or other process numbers: hosts may share a name
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        pass
    if here is None:  # a system without /proc: that a process has this number is all that can be seen
        return True
    return None if found is None else found == started


def process_started(pid: int) -> str | None:
    """When a process started, as `boot:namespace:ticks`, which no clock change moves; None where it is not known.

    Of a process that has ended and was not waited for, an empty text.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        # The name in parentheses may hold anything; the fields that follow it do not.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else f"{boot}:{namespace}:{fields[19]}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return f"user {os.getuid()}"
