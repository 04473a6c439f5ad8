"""What a script does about signals, dead terminals and closed streams: small real processes, each with one fault."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from ludic.cli import run_script
from ludic.inference.cleanup import exists, group_members
from ludic.survival.signals import SIGNALS, keep_standard_streams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PREFACE = """\
import asyncio, os, signal, subprocess, sys, threading, time
from pathlib import Path
from ludic.survival import signals
from ludic.cli import run_script

def child(**options):
    with open(os.devnull, "w") as nowhere:
        sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
        return subprocess.Popen(sleeping, stdout=nowhere, stderr=nowhere, **options).pid

def ready(*words):
    print("ready", *words, flush=True)

"""


class Script:
    """A script of `run_script` whose main coroutine is given as text; killed at the end of the block."""

    def __init__(
        self, folder: Path, main: str, *, top: str = "", command: tuple[str, ...] = (), **options: object
    ) -> None:
        path = folder / "script.py"
        body = textwrap.indent(textwrap.dedent(main), "    ")
        path.write_text(f"{PREFACE}{textwrap.dedent(top)}\nasync def main():\n{body}\nrun_script('script.py', main)\n")
        given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [*command, sys.executable, str(path)], cwd=folder, text=True, start_new_session=True, **given
        )

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in group_members(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def wait_until_ready(self) -> list[int]:
        word, *numbers = first_line(self.process.stdout).split() or [""]
        assert word == "ready", self.process.communicate()
        return [int(number) for number in numbers]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said on standard error."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"still not after 30 s: {what}"
        time.sleep(0.02)


def first_line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


# --- the first signal ---------------------------------------------------------------------------------------------------

SAVES = """
    try:
        ready()
        await asyncio.sleep(600)
    finally:
        Path("saved").write_text("saved")
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_ends_the_script_in_good_order_and_shows_in_its_exit_code(
    tmp_path: Path, number: signal.Signals
) -> None:
    with Script(tmp_path, SAVES) as script:
        script.wait_until_ready()
        script.send(number)
        code, said = script.end()
    assert code == 128 + number
    assert (tmp_path / "saved").read_text() == "saved"
    assert said.startswith(f"script.py: caught {number.name}: stopping in good order")
    assert "a second signal leaves at once" in said and "Traceback" not in said


def test_outside_the_main_thread_where_python_catches_no_signals_a_script_runs_all_the_same() -> None:
    codes: list[object] = []

    async def main() -> int:
        return 3

    def run() -> None:
        with pytest.raises(SystemExit) as stop:
            run_script("script.py", main)
        codes.append(stop.value.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [3]


def test_a_signal_that_comes_twice_at_the_same_time_counts_once(tmp_path: Path) -> None:
    saves_for_a_while = SAVES.replace("finally:\n", "finally:\n        time.sleep(0.5)\n")
    with Script(tmp_path, saves_for_a_while) as script:
        script.wait_until_ready()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            script.send(number)
            time.sleep(0.02)
        code, said = script.end()
    assert (code, said.count("caught")) == (143, 1)
    assert (tmp_path / "saved").exists()


def test_a_script_started_with_nohup_takes_no_notice_of_sighup(tmp_path: Path) -> None:
    with Script(tmp_path, "ready()\nawait asyncio.sleep(0.5)\nreturn 7\n", command=("nohup",)) as script:
        script.wait_until_ready()
        script.send(signal.SIGHUP)
        code, said = script.end()
    assert code == 7 and "caught" not in said


@pytest.mark.parametrize(
    ("top", "main"),
    [
        ("asyncio.run, run = lambda main: (ready(), time.sleep(600)), asyncio.run", "pass"),  # before there is a task
        ("asyncio.run, run = lambda main: (run(main), ready(), time.sleep(600)), asyncio.run", "return 0"),  # after it
    ],
)
def test_a_signal_outside_the_main_task_ends_the_script_too(tmp_path: Path, top: str, main: str) -> None:
    with Script(tmp_path, main, top=top) as script:
        script.wait_until_ready()
        script.send(signal.SIGTERM)
        code, said = script.end()
    assert code == 143 and "interrupted by SIGTERM" in said and "Traceback" not in said


def test_a_signal_at_once_ends_what_blocks_the_event_loop_and_what_encloses_it_is_closed(tmp_path: Path) -> None:
    main = """
        try:
            with signals.at_once():
                ready()
                while True:
                    sum(range(1000))
        finally:
            await asyncio.sleep(0)
            Path("closed").write_text("closed")
    """
    with Script(tmp_path, main) as script:
        script.wait_until_ready()
        script.send(signal.SIGINT)
        code, said = script.end()
    assert code == 130 and (tmp_path / "closed").exists()
    assert said == "script.py: caught SIGINT: stopping\nscript.py: interrupted by SIGINT\n"


def test_a_signal_that_python_drops_in_a_destructor_ends_the_block_all_the_same(tmp_path: Path) -> None:
    main = """
        class Slow:
            def __del__(self):
                ready()
                while not interrupts.caught:
                    sum(range(1000))
                sum(range(1000))
        interrupts = signals._catching[-1]
        with signals.at_once():
            slow = Slow()
            del slow
        Path("went_on").write_text("")
        return 0
    """
    with Script(tmp_path, main) as script:
        script.wait_until_ready()
        script.send(signal.SIGINT)
        code, _ = script.end()
    assert code == 130 and not (tmp_path / "went_on").exists()


def test_after_a_block_of_at_once_a_signal_is_waited_for_in_good_order_again(tmp_path: Path) -> None:
    with Script(tmp_path, "with signals.at_once():\n    pass\n" + textwrap.dedent(SAVES)) as script:
        script.wait_until_ready()
        script.send(signal.SIGTERM)
        code, said = script.end()
    assert code == 143 and (tmp_path / "saved").exists() and "stopping in good order" in said


def test_an_error_while_an_interrupted_script_saves_is_said_and_the_exit_code_stays(tmp_path: Path) -> None:
    main = SAVES.replace('Path("saved").write_text("saved")', 'raise OSError("the disk is full")')
    with Script(tmp_path, main) as script:
        script.wait_until_ready()
        script.send(signal.SIGTERM)
        code, said = script.end()
    assert code == 143 and "script.py: error: the disk is full" in said and "Traceback" not in said


def test_a_thread_that_never_ends_holds_up_the_exit_for_a_while_only(tmp_path: Path) -> None:
    main = """
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, time.sleep, 600)
        ready()
        await asyncio.sleep(600)
    """
    with Script(tmp_path, main, top="signals.EXIT_LIMIT_S = 0.5") as script:
        script.wait_until_ready()
        script.send(signal.SIGTERM)
        code, said = script.end()
    assert code == 143 and "leaving without it" in said


# --- the second -----------------------------------------------------------------------------------------------------------

BLOCKED = {
    "in a system call": "time.sleep(600)",
    "in a save that goes on and on": "while True: sum(range(1000))",
    "in a regular expression": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "in a power of integers": "9 ** 9 ** 9",
    "in C code that gives the interpreter away": "import ctypes; lock = ctypes.create_string_buffer(256)\n"
    "for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(lock)",
}


@pytest.mark.parametrize("blocked", BLOCKED)
def test_a_second_signal_leaves_at_once_with_all_children_while_the_loop_is_blocked(
    tmp_path: Path, blocked: str
) -> None:
    main = f"ready(child(), child(start_new_session=True))\n{BLOCKED[blocked]}\n"
    with Script(tmp_path, main, top="signals.ECHO_S = 0.1") as script:
        children = script.wait_until_ready()
        assert all(map(exists, children))
        script.send(signal.SIGINT)
        time.sleep(0.3)
        script.send(signal.SIGTERM)
        code, said = script.end()
    assert code == 143 and "again: leaving at once" in said
    wait_for(lambda: not any(map(running, children)), "the children are gone")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_signals_to_a_forked_child_are_its_own(tmp_path: Path) -> None:
    main = """
        import multiprocessing
        def child():
            ready(os.getpid())  # not before it is itself: until Python has run its hooks, signals still go to the parent
            time.sleep(600)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        await asyncio.sleep(0.3)
        return 5
    """
    with Script(tmp_path, main) as script:
        (child,) = script.wait_until_ready()
        os.kill(child, signal.SIGTERM)
        code, said = script.end()
    assert code == 5 and "caught" not in said


# --- terminals and streams ------------------------------------------------------------------------------------------------

WRITES = """
    import logging
    logging.basicConfig()
    ready()
    while not Path("gone").exists():
        await asyncio.sleep(0.05)
    for number in range(20):
        print("still here", number, flush=True)
        logging.warning("and here")
        await asyncio.sleep(0.01)
    Path("saved").write_text("saved")
    return 3
"""


TAKE_TERMINAL = """\
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the controlling one: closing it sends SIGHUP, as a lost connection does
if int(sys.argv[1]):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize("ignores_hangup", [True, False])
def test_a_closed_terminal_ends_a_script_only_by_its_sighup(tmp_path: Path, ignores_hangup: bool) -> None:
    ours, theirs = pty.openpty()
    take = tmp_path / "take.py"
    take.write_text(TAKE_TERMINAL)
    shell = (sys.executable, str(take), str(int(ignores_hangup)))
    streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    main = WRITES.replace('Path("saved")', 'await asyncio.sleep(1)\n    Path("saved")')
    with Script(tmp_path, main, command=shell, **streams) as script:
        os.close(theirs)
        shown = b""
        while b"ready" not in shown:
            shown += os.read(ours, 1024)
        os.close(ours)
        (tmp_path / "gone").touch()
        code = script.process.wait(60)
    assert (code, (tmp_path / "saved").exists()) == ((3, True) if ignores_hangup else (129, False))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_script_whose_reader_is_gone_goes_on(tmp_path: Path, unbuffered: str) -> None:
    with Script(tmp_path, WRITES, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}) as script:
        script.wait_until_ready()
        assert script.process.stdout is not None and script.process.stderr is not None
        script.process.stdout.close()
        script.process.stderr.close()
        (tmp_path / "gone").touch()
        assert script.process.wait(60) == 3
    assert (tmp_path / "saved").exists()


def test_a_script_without_standard_streams_runs_and_no_file_of_its_own_takes_their_numbers(tmp_path: Path) -> None:
    main = """
        with open("own", "w") as own:
            os.write(1, b"lost")
            os.write(2, b"lost")
            print("lost")
            own.write(str(own.fileno()))
        return 4
    """
    closed = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    with Script(tmp_path, main, command=closed) as script:
        assert script.process.wait(60) == 4
    assert int((tmp_path / "own").read_text()) > 2


def test_what_the_locale_cannot_write_is_escaped(tmp_path: Path) -> None:
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with Script(tmp_path, "print('7 \\u20ac')\nreturn 0\n", env=ascii_only) as script:
        assert first_line(script.process.stdout) == "7 \\u20ac\n"
        assert script.end()[0] == 0


def test_streams_that_somebody_else_put_there_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    keep_standard_streams()
    assert (sys.stdout, sys.stderr) == before
