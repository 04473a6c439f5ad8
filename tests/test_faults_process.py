"""Processes that are killed, stopped and started again, and what stays of them: a stand-in server, and short real runs."""

import importlib
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ludic.inference import cleanup
from ludic.inference.cleanup import WeightsFolder, group_members, remove_orphaned_folders
from ludic.inference.client.server_process import ServerProcess, ServerStartError, free_port

if TYPE_CHECKING:
    from benchmarks.faults.trainer_killed import PlainRun

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# Answers /health with its process id, and has a child with a segment of shared memory. A file "broken" keeps it from coming up.
STAND_IN = """\
#!{python}
import http.server, multiprocessing.shared_memory, os, signal, subprocess, sys, time
sys.path.insert(0, {source!r})
from pathlib import Path
from ludic.inference.client import server_process
server_process.ORPHAN_GRACE_S = 0.5
server_process.end_with_parent()
print("started with", *sys.argv[3:], flush=True)
folder = Path({folder!r})
if (folder / "broken").exists():
    print("ValueError: broken", flush=True)
    sys.exit(3)
if (folder / "hangs").exists():
    time.sleep(600)
if (folder / "deaf").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
segment = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
(folder / "segment").write_text(segment.name)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *args): pass
class Server(http.server.HTTPServer):
    allow_reuse_address = True
Server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that runs the stand-in whatever it is asked to run."""
    path = tmp_path / "python"
    source = str(Path(cleanup.__file__).parents[2])
    path.write_text(STAND_IN.format(python=sys.executable, source=source, folder=str(tmp_path)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def server(tmp_path: Path, python: str) -> Iterator[ServerProcess]:
    made = ServerProcess("model", python=python, log_path=tmp_path / "log", timeout_s=30)
    yield made
    made.close()


def answers(server: ServerProcess) -> int:
    """The process id that the server answers with."""
    with urllib.request.urlopen(f"{server.base_url}/health", timeout=5) as reply:
        return int(reply.read())


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"still not after 30 s: {what}"
        time.sleep(0.02)


def segment_of(folder: Path) -> Path:
    return Path("/dev/shm") / (folder / "segment").read_text()


# --- starting again -----------------------------------------------------------------------------------------------------


@linux_only
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_was_killed_or_stopped_is_started_again_where_it_was(
    server: ServerProcess, fault: signal.Signals, tmp_path: Path
) -> None:
    server.start()
    first, url = server.pid, server.base_url
    assert answers(server) == first and server.is_running
    os.kill(first, fault)
    server.restart("it was\nlost")
    assert server.pid != first and answers(server) == server.pid
    assert (server.base_url, server.num_restarts) == (url, 1)
    assert group_members(first) == []
    lines = server.log_path.read_text().splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("--- ")]
    assert lines[at].endswith(" UTC: start 2 of this server, it was lost ---")
    assert lines[0] == lines[at + 1] and lines[0].endswith(f"--host 127.0.0.1 --port {server.port}")


@linux_only
def test_a_server_that_is_deaf_to_sigterm_is_ended_by_force(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ludic.inference.client.server_process.SHUTDOWN_GRACE_S", 0.3)
    (tmp_path / "deaf").touch()
    server.start()
    server.stop()
    assert not server.is_running and server.process.returncode == -9 and group_members(server.pid) == []
    wait_for(lambda: not segment_of(tmp_path).exists(), "its shared memory is gone")


def test_a_restart_that_fails_says_why_with_the_words_of_that_start_alone(
    server: ServerProcess, tmp_path: Path
) -> None:
    server.log_path.write_text("RuntimeError: of an earlier run\n")
    server.start()
    (tmp_path / "broken").touch()
    with pytest.raises(ServerStartError, match="ended with code 3; it said:\nValueError: broken\n"):
        server.restart("it was lost")
    assert server.last_words() == "ValueError: broken" and not server.is_running and server.process.returncode == 3


def test_a_start_that_hangs_ends_when_the_server_is_closed_and_there_is_no_other(
    server: ServerProcess, tmp_path: Path
) -> None:
    (tmp_path / "hangs").touch()
    raised: list[BaseException] = []

    def start() -> None:
        try:
            server.start()
        except ServerStartError as error:
            raised.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    wait_for(lambda: server.is_running, "it is there")
    server.close()
    thread.join(30)
    assert "was interrupted" in str(raised[0]) or "ended with code" in str(raised[0])
    with pytest.raises(ServerStartError, match="this run is ending"):
        server.restart("again")
    assert not server.is_running


def test_a_restart_waits_for_its_port_and_says_who_cannot_have_it(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ludic.inference.client.server_process.PORT_WAIT_S", 0.3)
    server.start()
    server.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", server.port))
        other.listen()
        with pytest.raises(ServerStartError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            server.restart("it was lost")
        threading.Timer(0.1, other.close).start()
        monkeypatch.setattr("ludic.inference.client.server_process.PORT_WAIT_S", 20.0)
        server.restart("it was lost")
    assert answers(server) == server.pid


def test_a_server_has_no_words_before_it_was_started(tmp_path: Path) -> None:
    server = ServerProcess("model", port=free_port("127.0.0.1"), log_path=tmp_path / "none" / "log")
    assert not server.is_running and "No such file" in server.last_words()
    server.stop()
    with pytest.raises(RuntimeError, match="not started yet"):
        _ = server.pid


# --- what a killed trainer leaves -----------------------------------------------------------------------------------------

PARENT = """\
import signal, sys, time
from pathlib import Path
from ludic.inference.cleanup import WeightsFolder
from ludic.inference.client.server_process import ServerProcess
folder = WeightsFolder(Path("/dev/shm")).path
(folder / "weights.safetensors").write_bytes(bytes(4096))
server = ServerProcess("model", python={python!r}, log_path={log!r})
server.start()
print(server.pid, server.port, folder, flush=True)
time.sleep(600)
"""


@linux_only
@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_trainer_leaves_no_server_no_port_and_no_shared_memory(
    python: str, tmp_path: Path, stopped: bool
) -> None:
    script = PARENT.format(python=python, log=str(tmp_path / "log"))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, port, folder = parent.stdout.readline().split()
        segment = segment_of(tmp_path)
        assert segment.exists() and Path(folder).is_dir()
        if stopped:
            os.kill(int(pid), signal.SIGSTOP)
        parent.kill()
    wait_for(lambda: group_members(int(pid)) == [], "the server is gone")
    wait_for(lambda: not segment.exists() and not Path(folder).exists(), "the shared memory is free")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", int(port)))


@linux_only
def test_a_folder_of_weights_is_removed_once_its_owner_is_gone_and_not_before(tmp_path: Path) -> None:
    mine = WeightsFolder(tmp_path)
    script = """
        import os, signal
        from pathlib import Path
        from ludic.inference.cleanup import WeightsFolder
        folder = WeightsFolder(Path(".")).path
        (folder / "weights.safetensors").write_bytes(bytes(4096))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path)
    assert killed.returncode == -9
    other = tmp_path / "ludic-weights-of-an-older-version"  # without a lock nobody can tell whose it is
    other.mkdir()
    (orphan,) = set(tmp_path.iterdir()) - {mine.path, other}
    assert remove_orphaned_folders(tmp_path) == [orphan]
    assert set(tmp_path.iterdir()) == {mine.path, other}
    cleanup.remove_own_folders()
    assert list(tmp_path.iterdir()) == [other]
    mine.remove()  # what is gone already is no error


# --- runs that are killed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, digit_policy_dir: Path, digit_problems: Path
) -> "Iterator[PlainRun]":
    from benchmarks.faults.trainer_killed import plain_run

    with plain_run(tmp_path_factory.mktemp("plain"), digit_policy_dir, digit_problems) as made:
        yield made


@linux_only
@pytest.mark.parametrize(("row", "count"), [("trainer_killed", 4), ("signals", 2), ("environment", 1)])
def test_a_run_that_is_killed_interrupted_or_in_odd_surroundings_ends_as_one_that_is_not(
    plain: "PlainRun", row: str, count: int, tmp_path: Path, digit_policy_dir: Path, digit_problems: Path
) -> None:
    inject = importlib.import_module(f"benchmarks.faults.{row}").inject
    injections = inject(
        count, seed=1, folder=tmp_path / "runs", policy=digit_policy_dir, problems=digit_problems, plain=plain
    )
    assert [each for each in injections if not each.ok] == []
    assert len(injections) == count
