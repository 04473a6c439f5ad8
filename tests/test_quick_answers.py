"""What a user is told at once: help, wrong flags, a missing server, a hub out of reach; and Ctrl-C before a run has begun.

No clock is read where a slow machine would change the answer: what was imported says what an answer has cost.
"""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from ludic.rollout.errors import ServerUnreachableError
from ludic.run.engine import require_server
from ludic.task import hub

REPOSITORY = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "numpy",
    "matplotlib",
    "vllm",
    "requests",
    "huggingface_hub",
    "scipy",
    "bokeh",
    "aiohttp",
    "wandb",
    "tensorboard",
    "plotext",
    "math_verify",
    "shtab",
}
PROGRAMS = {
    "train": str(REPOSITORY / "examples" / "gsm8k" / "train_gsm8k.py"),
    "eval": str(REPOSITORY / "examples" / "gsm8k" / "eval_gsm8k_vllm.py"),
    "own task": str(REPOSITORY / "examples" / "sums.py"),
    "own evaluation": str(REPOSITORY / "examples" / "eval_sums.py"),
    "other tasks": str(REPOSITORY / "examples" / "evaluate.py"),
    "files of the harness": str(REPOSITORY / "examples" / "lm_eval_files.py"),
    "doctor": "ludic.doctor",
    "server": "ludic.inference.vllm_server",
    "report": "ludic.report",
    "compare": "ludic.compare",
    "capacity": "ludic.capacity",
}
RUN_AND_LIST_IMPORTS = """
import json, runpy, sys
program, *flags = sys.argv[1:]
sys.argv = [program, *flags]
if program.endswith(".py"):
    sys.path.insert(0, program.rpartition("/")[0])
code = 0
try:
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__", **({} if program.endswith(".py") else {"alter_sys": True}))
except SystemExit as end:
    code = end.code
print(json.dumps({"code": code, "imported": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def answer(program: str, *flags: str, **env: str) -> tuple[int, set[str], list[str]]:
    """The program's exit code, the heavy packages that it had imported by then, and its lines on standard error."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST_IMPORTS, PROGRAMS[program], *flags],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **env},
    )
    assert done.stdout, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    return last["code"] or 0, HEAVY & set(last["imported"]), done.stderr.splitlines()


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_there_before_any_heavy_library(program: str) -> None:
    assert answer(program, "--help") == (0, set(), [])


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_version_is_there_before_any_heavy_library(program: str) -> None:
    assert answer(program, "--version") == (0, set(), [])


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("train", ["--no-such-flag"]),
        ("train", ["--engine", "local", "--start-server"]),
        ("train", ["--group-size", "1"]),
        ("train", ["--logger", "rich,print"]),
        ("train", ["--demo", "--model", "x"]),
        ("train", ["--demo", "--rollouts-per-update", "12"]),
        ("eval", ["--no-such-flag"]),
        ("eval", ["--samples", "4"]),
        ("eval", ["--top-p", "0"]),
        ("eval", ["--engine", "local", "--start-server"]),
        ("doctor", ["--no-such-flag"]),
        ("doctor", ["--lr", "0"]),
        ("doctor", ["--engine", "local", "--start-server"]),
        ("capacity", ["--no-such-flag"]),
        ("capacity", ["--training-gpus", "0"]),
        ("capacity", ["--model", "no/such-folder"]),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_any_heavy_library(program: str, flags: list[str]) -> None:
    code, imported, said = answer(program, *flags)
    assert (code, imported) == (2, set()) and "error: " in said[-1]


def test_arithmetic_for_larger_models_needs_no_heavy_library() -> None:
    assert answer("capacity", "measured") == (0, set(), [])
    assert answer("capacity", "--model", "70B") == (0, set(), [])


# --- a missing server ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["train", "eval"])
def test_a_missing_server_is_noticed_before_libraries_data_and_tokenizer(program: str, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, and nothing listens
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        flags = ["--model", "no/such-model", "--dataset", "/no/such/data", "--out-dir", str(tmp_path / "out")]
        code, imported, said = answer(program, *flags, "--port", port, http_proxy="http://127.0.0.1:9")
    assert code == 2 and not imported & {"torch", "transformers", "datasets"}
    assert len(said) == 1 and not (tmp_path / "out").exists()
    command = f"python -m ludic.inference.vllm_server --model no/such-model --port {port}"
    assert f"nothing listens at http://127.0.0.1:{port}: start the server with `" in said[0]
    assert f"{command}`, or pass --start-server" in said[0]


def test_no_server_is_looked_for_where_none_is_wanted_and_any_that_listens_is_let_through() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        args = SimpleNamespace(
            base_url=None,
            server=None,
            engine="vllm",
            start_server=False,
            host="127.0.0.1",
            port=listening.getsockname()[1],
            model="m",
        )
        require_server(args)  # type: ignore[arg-type]
    with pytest.raises(ServerUnreachableError):
        require_server(args)  # type: ignore[arg-type]
    for other in ({"start_server": True}, {"engine": "local"}):
        require_server(SimpleNamespace(**{**vars(args), **other}))  # type: ignore[arg-type]


# --- a hub out of reach -------------------------------------------------------------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in hub.OFFLINE_VARIABLES:
        monkeypatch.setenv(name, "0")  # set, so that what the code writes is undone
    hub.why_unreachable.cache_clear()
    yield
    hub.why_unreachable.cache_clear()


@pytest.mark.parametrize(("status", "reason"), [(200, None), (302, None), (404, None), (503, "it answers 503")])
@pytest.mark.usefixtures("asked_anew")
def test_a_hub_that_answers_is_reached_unless_it_is_broken(
    monkeypatch: pytest.MonkeyPatch, status: int, reason: str | None
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"status": status}))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert hub.why_unreachable() == reason
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.usefixtures("asked_anew")
def test_without_the_hub_its_cache_is_used_and_that_is_said_once_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said: list[str] = []
    for _ in range(2):
        hub.cache_without_hub([str(tmp_path)], dataset="openai/gsm8k", say=said.append)
    (line,) = said
    assert "http://127.0.0.1:9 cannot be reached (ConnectionError)" in line and "HF_HUB_OFFLINE=1" in line
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.usefixtures("asked_anew")
def test_a_hub_that_nothing_has_to_come_from_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub.cache_without_hub([str(tmp_path), "/no/such/folder", "./neither"], dataset=None, say=pytest.fail)
    assert os.environ["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize("program", ["train", "eval"])
@pytest.mark.parametrize(("offline", "why"), [("", "cannot be reached"), ("1", "HF_HUB_OFFLINE is set")])
def test_a_model_that_cannot_be_had_is_one_line_without_a_retry(
    tmp_path: Path, program: str, offline: str, why: str
) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": offline}
    flags = ["--engine", "local", "--model", "no/such-model", "--out-dir", str(tmp_path)]
    code, _, said = answer(program, *flags, **env)
    assert code == 2 and len(said) == 1
    assert why in said[0] and "no/such-model is not in the hub's cache" in said[0] and "HF_HUB_OFFLINE=1" in said[0]


# --- Ctrl-C before a run has begun ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at a Linux terminal")
def test_the_warm_start_of_the_demo_shows_its_progress_in_place_and_ctrl_c_ends_it_halfway(tmp_path: Path) -> None:
    words = [sys.executable, PROGRAMS["train"], "--demo", "--out-dir", str(tmp_path)]
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    said, signalled = "", False
    try:
        with contextlib.suppress(OSError):  # how the end of a terminal reads
            while piece := os.read(terminal, 65536):
                said += piece.decode()
                if not signalled and "warm start: step 40 of" in said:
                    signalled = True
                    process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert code == 130 and "interrupted by SIGINT" in said and "Traceback" not in said
    assert "\x1b[2Kwarm start: step 40 of" in said and "\nwarm start: step" not in said
    assert not (tmp_path / "gsm8k_demo" / "model").exists()  # what it would have ended with, in a minute
