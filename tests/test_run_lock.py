"""One run at a time in a folder: the second is told who the first one is, and no death leaves the folder locked."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from ludic.storage.identity import identity, is_alive
from ludic.storage.run_lock import FolderInUseError, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from ludic.storage.identity import identity
from ludic.storage.run_lock import run_lock
folder = Path(sys.argv[1])
with run_lock(folder, identity(folder)):
    sys.stdout.write("held\\n"); sys.stdout.flush()
    time.sleep(600)
"""


def start_holder(folder: Path, *flags: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *flags], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def lock(folder: Path) -> AbstractContextManager[None]:
    return run_lock(folder, identity(folder))


def test_a_second_run_is_refused_in_one_line_that_names_the_first_and_no_kill_leaves_the_folder_locked(
    tmp_path: Path,
) -> None:
    holder = start_holder(tmp_path, "--seed", "7", "--api-token", "s3cret", "--wandb-key=s3cret")
    try:
        with pytest.raises(FolderInUseError) as refusal, lock(tmp_path):
            pass
        message = str(refusal.value)
        assert message.startswith(f"{tmp_path} is in use by another run (") and "\n" not in message
        assert f"process {holder.pid}, since 2" in message and "--seed 7" in message
        assert "s3cret" not in message and "s3cret" not in (tmp_path / "run.lock").read_text()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with lock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run.lock").read_bytes() == b""
    with lock(tmp_path):
        pass


def test_two_locks_of_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    with lock(tmp_path):
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"), lock(tmp_path):
            pass
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()  # the refused one wrote nothing


def test_a_holder_that_has_not_said_who_it_is_is_refused_all_the_same(tmp_path: Path) -> None:
    for said in (b"", b'{"pid": ', b"3", b"\xff", b'{"user": "\\u001b[2J\\n", "pid": [], "host": {}}'):
        (tmp_path / "run.lock").write_bytes(said)
        with (tmp_path / "run.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(FolderInUseError) as refusal, lock(tmp_path):
                pass
        assert str(refusal.value).isprintable()


def _sleep(started: Any) -> None:
    started.set()
    time.sleep(600)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_child_processes_do_not_keep_the_folder(tmp_path: Path, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    started = context.Event()
    with lock(tmp_path):
        child = context.Process(target=_sleep, args=(started,))
        child.start()
        other = subprocess.Popen(["sleep", "600"], close_fds=False)
        assert started.wait(60)
    try:
        with lock(tmp_path):  # while both live
            assert child.is_alive() and other.poll() is None
    finally:
        child.kill()
        child.join()
        other.kill()
        other.wait()


def test_a_folder_that_is_removed_meanwhile_is_no_trouble(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with lock(folder):
        shutil.rmtree(folder)
    folder.mkdir()
    with lock(folder):
        pass


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert "this file system has no locks" in caplog.text


def test_a_full_disk_does_not_keep_a_run_from_locking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        first = lock(tmp_path)
        first.__enter__()
    with pytest.raises(FolderInUseError, match="somebody@an unknown host"), lock(tmp_path):
        pass
    first.__exit__(None, None, None)
    assert "No space left" in caplog.text


def test_a_lock_file_that_cannot_be_opened_is_one_line_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(OSError, match=r"cannot open .*run\.lock: Is a directory"), lock(tmp_path):
        pass


def test_a_process_is_alive_until_it_ends_and_another_with_its_number_is_not_it(tmp_path: Path) -> None:
    me = identity(tmp_path)
    assert is_alive(me) is True
    assert me["out_dir"] == str(tmp_path) and set(me) == {"host", "pid", "pid_started", "user", "out_dir", "since"}
    child = subprocess.Popen(["sleep", "600"])
    other = {**me, "pid": child.pid}
    if me["pid_started"] is not None:
        assert is_alive(other) is False  # that number, but another start
        boot, ticks = str(me["pid_started"]).rsplit(":", 1)
        assert is_alive({**me, "pid_started": f"another-{boot}:{ticks}"}) is None
    child.kill()
    child.wait()
    assert is_alive(other) is False
    assert is_alive({**me, "host": "elsewhere"}) is None


@pytest.mark.parametrize("pid", [None, "1", -1, 0, True, 2**40, 1.5])
def test_an_identity_that_makes_no_sense_is_not_known_to_live(tmp_path: Path, pid: object) -> None:
    assert is_alive({**identity(tmp_path), "pid": pid}) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="zombies are told by /proc")
def test_a_process_that_nobody_waited_for_is_not_alive(tmp_path: Path) -> None:
    from ludic.storage.identity import process_started

    child = subprocess.Popen(["sleep", "600"])
    theirs = {**identity(tmp_path), "pid": child.pid, "pid_started": process_started(child.pid)}
    assert is_alive(theirs) is True
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and left as it is
    assert is_alive(theirs) is False
    child.wait()


def test_a_user_without_a_name_has_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert identity(tmp_path)["user"] == f"user {os.getuid()}"
