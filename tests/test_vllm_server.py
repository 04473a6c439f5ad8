"""The vLLM server: settings, key, life cycle as a child, weights over shared memory.

What is marked `vllm` needs vLLM on the CPU (scripts/make_vllm_cpu_env.sh); the rest runs with a stand-in server that
answers /health, or without any.
"""

import argparse
import functools
import hmac
import importlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import save_file

from ludic.config import DEFAULT_MODEL
from ludic.inference import vllm_server
from ludic.inference.client import server_process
from ludic.inference.client.handshake import server_state
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.server_process import ServerProcess, ServerStartError, start_server
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.inference.server.server_defaults import ADAPTER_ROUTE, GENERATE_ROUTE, REQUIRE_API_KEY, SERVER_GUARD
from ludic.inference.vllm_server import RequireApiKey
from ludic.inference.weights.digest import digest_hex, tensor_digest
from ludic.inference.wire import PATH, PROTOCOL
from ludic.rollout.errors import ServerLostError, ServerMismatchError, ServerUnreachableError
from ludic.storage.keys import KEY_VARIABLES, take_api_keys
from ludic.types import SamplingParams
from tests.printed import printed_command
from tests.vllm_helpers import (
    CHAT_TEMPLATE,
    CPU_SERVER_ENV,
    cpu_server,
    make_tiny_model,
    make_tiny_tokenizer,
    prompt_logprobs,
    randomize_weights,
    tiny_server,
)

PROMPT = list(range(20, 60))
ROOT = Path(__file__).parents[1]
SCRIPT_ENVIRONMENT = {**os.environ, **CPU_SERVER_ENV}
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- settings ---------------------------------------------------------------------------------------------------------


def arguments(**given: object) -> argparse.Namespace:
    defaults: dict[str, object] = {
        "host": "127.0.0.1",
        "port": 8000,
        "api_key": None,
        "uds": None,
        "headless": False,
        "grpc": False,
        "data_parallel_size": 1,
        "api_server_count": None,
        "no_training": False,
        "weight_transfer_config": None,
        "server_engines": 1,
        "ssl_certfile": None,
    }
    return argparse.Namespace(**(defaults | given))


def test_several_engines_behind_one_server_are_refused_for_only_one_could_be_proven() -> None:
    assert "--data-parallel-size 2" in vllm_server.unsafe_setting(arguments(data_parallel_size=2), [])
    assert vllm_server.unsafe_setting(arguments(), []) == ""


def test_several_front_ends_are_refused_for_each_would_have_a_lease_of_its_own() -> None:
    assert "--api-server-count 2" in vllm_server.unsafe_setting(arguments(api_server_count=2), [])
    assert vllm_server.unsafe_setting(arguments(api_server_count=1), []) == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_host_needs_no_key(host: str) -> None:
    assert vllm_server.unsafe_setting(arguments(host=host), []) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", None, "192.168.1.7", "no-such-host.invalid"])
def test_any_other_host_is_refused_without_a_key_and_served_with_one(host: str | None) -> None:
    problem = vllm_server.unsafe_setting(arguments(host=host), [])
    assert "not loopback" in problem and "--api-key-file" in problem and "\n" not in problem
    assert vllm_server.unsafe_setting(arguments(host=host), ["secret"]) == ""


def test_without_training_several_engines_and_front_ends_are_served_and_another_host_is_only_warned_of() -> None:
    several = arguments(no_training=True, data_parallel_size=4, api_server_count=4)
    assert vllm_server.unsafe_setting(several, []) == "" and vllm_server.key_warning(several, []) == ""
    open_to_all = arguments(no_training=True, host="0.0.0.0")
    assert vllm_server.unsafe_setting(open_to_all, []) == ""
    warning = vllm_server.key_warning(open_to_all, [])
    assert "no API key" in warning and "0.0.0.0" in warning and "--api-key-file" in warning
    assert vllm_server.key_warning(open_to_all, ["secret"]) == "" and vllm_server.key_warning(arguments(), []) == ""


def test_without_training_a_way_for_weights_or_a_front_end_that_checks_no_key_is_refused() -> None:
    transfer = arguments(no_training=True, weight_transfer_config='{"backend": "ludic_shm"}')
    assert "--weight-transfer-config" in vllm_server.unsafe_setting(transfer, [])
    assert "--grpc" in vllm_server.unsafe_setting(arguments(no_training=True, grpc=True), ["secret"])


def test_a_unix_socket_needs_no_key() -> None:
    assert vllm_server.unsafe_setting(arguments(host=None, uds="/tmp/socket"), []) == ""


def test_a_front_end_without_rl_routes_is_refused() -> None:
    assert "--grpc" in vllm_server.unsafe_setting(arguments(grpc=True), [])


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_keys")
def test_keys_come_from_the_file_before_the_environment_and_empty_ones_do_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert take_api_keys(None) == []
    monkeypatch.setenv("VLLM_API_KEY", "of-vllm")
    monkeypatch.setenv("LUDIC_API_KEY", " ")
    assert take_api_keys(None) == ["of-vllm"]
    monkeypatch.setenv("VLLM_API_KEY", "of-vllm")
    monkeypatch.setenv("LUDIC_API_KEY", "of-ludic")
    assert take_api_keys(None) == ["of-ludic", "of-vllm"]
    monkeypatch.setenv("VLLM_API_KEY", "of-vllm")
    keys = tmp_path / "keys"
    keys.write_text("first-key\r\n\n  second-key \nfirst-key")
    keys.chmod(0o600)
    assert take_api_keys(str(keys)) == ["first-key", "second-key"]


@pytest.mark.usefixtures("no_keys")
def test_the_keys_variables_are_gone_once_they_were_read_so_that_no_other_process_inherits_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("of-the-file")
    for key_file in (None, str(tmp_path / "key")):
        for name in KEY_VARIABLES:
            monkeypatch.setenv(name, "secret")
        take_api_keys(key_file)
        assert not any(name in os.environ for name in KEY_VARIABLES)


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize(
    "content", [b"", b" \n\n", b"two words", "schlüssel".encode(), b"\xff\xfe", b"a\x00b", b"a\tb"]
)
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        take_api_keys(str(tmp_path / "file"))
    message = str(refusal.value)
    assert "--api-key-file" in message and "\n" not in message
    assert "two words" not in message and "schl" not in message
    with pytest.raises(ValueError, match="no-such-file cannot be read"):
        take_api_keys(str(tmp_path / "no-such-file"))


@pytest.mark.parametrize(
    "flags", [["--api-key", "s3cret"], ["--api_key=s3cret"], ["--port", "8001", "--api-key", "s3cret", "b"]]
)
def test_a_key_on_the_command_line_is_refused_before_anything_is_imported_and_is_not_repeated(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_server, "check_vllm_version", lambda: pytest.fail("vLLM was imported"))
    with pytest.raises(SystemExit) as stop:
        vllm_server.main(flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "s3cret" not in line
    assert all(way in line for way in ("--api-key-file", "LUDIC_API_KEY", "VLLM_API_KEY"))


def test_a_key_in_a_file_of_settings_is_refused_too() -> None:
    problem = vllm_server.unsafe_setting(arguments(api_key=["s3cret"]), [])
    assert "--api-key-file" in problem and "s3cret" not in problem


def test_without_vllm_the_error_is_one_line_that_names_the_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(name: str, *_: object) -> None:
        if name == "vllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [type("NoVLLM", (), {"find_spec": staticmethod(find)}), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        vllm_server.check_vllm_version()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "uv sync --extra examples" in message and message.count("\n") == 1


@pytest.mark.parametrize("version", ["0.26", "0.33"])
@pytest.mark.parametrize(("given", "used"), [(None, "spawn"), ("fork", "fork")])
def test_serving_does_what_vllm_serve_does_before_it(
    monkeypatch: pytest.MonkeyPatch, version: str, given: str | None, used: str
) -> None:
    calls: list[str] = []

    class ServeSubcommand:
        def validate(self, args: argparse.Namespace) -> None:
            calls.append("validate")

        def cmd(self, args: argparse.Namespace) -> None:
            calls.append(os.environ["VLLM_WORKER_MULTIPROC_METHOD"])

    modules = {name: type(sys)(name) for name in ("vllm", "vllm.logger", "vllm.entrypoints.cli.serve")}
    for name in ("vllm.entrypoints", "vllm.entrypoints.cli"):
        modules[name] = type(sys)(name)
    modules["vllm"].logger = modules["vllm.logger"]  # type: ignore[attr-defined]
    modules["vllm.entrypoints.cli.serve"].ServeSubcommand = ServeSubcommand  # type: ignore[attr-defined]
    if version != "0.26":
        modules["vllm.logger"].configure_logging_from_args = lambda args: calls.append("log")  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", given or "")  # so that it is put back
    if given is None:
        monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    vllm_server._serve(argparse.Namespace())
    assert calls == [*(["log"] if version != "0.26" else []), "validate", used]


@pytest.mark.parametrize(
    ("version", "supported"), [("0.25.1", False), ("0.26.0", True), ("0.33.1+cpu", True), ("0.34.0", False)]
)
def test_only_a_supported_vllm_is_accepted(monkeypatch: pytest.MonkeyPatch, version: str, supported: bool) -> None:
    module = type(sys)("vllm")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    if supported:
        vllm_server.check_vllm_version()
    else:
        with pytest.raises(SystemExit):
            vllm_server.check_vllm_version()


# --- the key ----------------------------------------------------------------------------------------------------------


async def status_of(method: str, path: str, *headers: tuple[bytes, bytes], kind: str = "http", root: str = "") -> int:
    """What a request gets through the middleware: 200 from the app behind it, else the middleware's own status."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "headers": list(headers), "root_path": root}
    await RequireApiKey(app)(scope, receive, send)
    return int(sent[0].get("status", sent[0].get("code", 0)))


def set_keys(monkeypatch: pytest.MonkeyPatch, *keys: str) -> None:
    """As main() hands them to the middleware."""
    hashes = [vllm_server._fingerprint(key.encode()).hex() for key in keys]
    monkeypatch.setenv(vllm_server.KEY_HASHES_VARIABLE, json.dumps(hashes))


def bearer(key: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {key}".encode()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    set_keys(monkeypatch, "first-key", "second-key")


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("path", ["/collective_rpc", "/update_weights", "/v1/completions", "/metrics", "/", "/healthy"])
async def test_every_route_needs_one_of_the_keys(path: str) -> None:
    assert await status_of("POST", path) == 401
    assert await status_of("POST", path, bearer("wrong")) == 401
    assert await status_of("POST", path, bearer("first-key")) == 200
    assert await status_of("POST", path, bearer("second-key")) == 200


@pytest.mark.usefixtures("keys")
async def test_health_alone_is_open_and_only_to_get() -> None:
    assert await status_of("GET", "/health") == 200
    assert await status_of("GET", "/prefix/health", root="/prefix") == 200
    assert await status_of("POST", "/health") == 401
    assert await status_of("OPTIONS", "/collective_rpc") == 401


@pytest.mark.usefixtures("keys")
async def test_the_key_must_come_once_and_as_a_bearer_token() -> None:
    assert await status_of("POST", "/pause", (b"authorization", b"Basic first-key")) == 401
    assert await status_of("POST", "/pause", (b"authorization", b"first-key")) == 401
    assert await status_of("POST", "/pause", bearer("wrong"), bearer("first-key")) == 401
    assert await status_of("POST", "/pause", bearer("first-key second-key")) == 401


@pytest.mark.usefixtures("keys")
async def test_a_websocket_without_the_key_is_closed() -> None:
    assert await status_of("GET", "/v1/realtime", kind="websocket") == 1008


async def test_without_keys_every_request_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_keys(monkeypatch)
    assert await status_of("POST", "/pause") == 200


def test_a_server_that_was_told_nothing_of_keys_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_server.KEY_HASHES_VARIABLE, raising=False)
    with pytest.raises(KeyError):
        RequireApiKey(lambda *_: pytest.fail("it was asked"))


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    "headers",
    [
        [bearer("first-key"), bearer("first-key")],
        [bearer("first-key"), bearer("wrong")],
        [(b"authorization", b"Bearer wrong"), (b"Authorization", b"Bearer first-key")],
        [(b"authorization", b"Basic first-key")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"first-key")],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer first-key\xff")],
        [(b"authorization", b"Bearer \xff\xfe\x00")],
        [(b"authorization", "Bearer fïrst-key".encode())],
        [(b"authorization", "Bearer fïrst-key".encode("latin-1"))],
        [(b"authorization", b"Bearer first-key, Bearer second-key")],
        [(b"authorization", b"Bearer " + b"x" * 100_000)],
        [(b"x-api-key", b"first-key")],
        [(b"cookie", b"authorization=Bearer first-key")],
    ],
    ids=lambda headers: repr(headers)[:60],
)
async def test_no_other_header_than_one_with_a_key_opens(headers: list[tuple[bytes, bytes]]) -> None:
    assert await status_of("POST", "/pause", *headers) == 401
    assert await status_of("GET", "/v1/realtime", *headers, kind="websocket") == 1008
    assert await status_of("POST", "/pause", (b"AUTHORIZATION", b"bearer  first-key ")) == 200


@pytest.mark.usefixtures("keys")
async def test_all_keys_are_compared_in_constant_time_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(given: bytes, expected: bytes) -> bool:
        compared.append((len(given), len(expected)))
        return given == expected

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in ("first-key", "second-key", "x", "x" * 5000, ""):
        compared.clear()
        await status_of("POST", "/pause", bearer(key))
        assert compared == [(32, 32), (32, 32)]


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    "path", ["/health/", "//health", "/health/../pause", "/HEALTH", "health", "/prefix/health", ""]
)
async def test_no_other_path_passes_for_health(path: str) -> None:
    assert await status_of("GET", path) == 401
    assert await status_of("GET", path, root="/pre") == 401
    assert await status_of("HEAD", "/health") == 401


# --- the child process, with a stand-in for vLLM ----------------------------------------------------------------------

STAND_IN = """\
#!{python}
import http.server, os, subprocess, sys, threading, time
sys.path.insert(0, {source!r})
from ludic.inference.client import server_process
server_process.ORPHAN_GRACE_S = 0.5
server_process.end_with_parent()
print("loading", os.environ.get("VLLM_API_KEY"), os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if "--fail" in sys.argv:
    print("Traceback (most recent call last):\\n  File x, line 1, in f\\nValueError: no such model", flush=True)
    sys.exit(3)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if "--hang" in sys.argv:
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
time.sleep(1.5)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """An interpreter that runs the stand-in whatever it is asked to run."""
    path = tmp_path / "python"
    source = str(Path(server_process.__file__).parents[2])
    path.write_text(STAND_IN.format(python=sys.executable, source=source))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def group_members(process_group: int) -> list[str]:
    """The processes of a group that are not zombies."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().rpartition(")")
        except OSError:  # it ended while we looked
            continue
        state, _, group, *_ = rest.split()
        if int(group) == process_group and state != "Z":
            members.append(name)
    return members


def wait_for(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not after {timeout_s} s: {what}"
        time.sleep(0.1)


@linux_only
def test_leaving_the_block_ends_the_server_and_its_children(stand_in: str, tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    log_path = tmp_path / "server.log"
    with start_server(
        "model",
        python=stand_in,
        log_path=log_path,
        gpu=1,
        api_key="k",
        on_progress=lambda s, line: seen.append((s, line)),
    ) as server:
        assert requests.get(f"{server.base_url}/health", timeout=5).status_code == 200
        assert len(group_members(server.pid)) == 2
        assert server.process.poll() is None
    wait_for(lambda: group_members(server.pid) == [], timeout_s=5, what="the group is gone")
    assert log_path.read_text() == "loading k 1\n"
    assert seen and seen[-1][1] == "loading k 1" and seen[-1][0] >= 1.0


@linux_only
def test_an_error_in_the_block_ends_the_server_and_its_children(stand_in: str, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        start_server("model", python=stand_in, log_path=tmp_path / "log") as server,
    ):
        raise KeyboardInterrupt
    wait_for(lambda: group_members(server.pid) == [], timeout_s=5, what="the group is gone")


def start_in_another_process(python: str, log_path: Path, *options: str) -> "subprocess.Popen[str]":
    """A parent that starts a server and prints its process id as soon as it runs."""
    script = f"""\
        import subprocess, time
        from ludic.inference.client import server_process
        real = subprocess.Popen
        def tell(*args, **kwargs):
            process = real(*args, **kwargs)
            print(process.pid, flush=True)
            return process
        server_process.subprocess.Popen = tell
        with server_process.start_server(*{options[:1]!r}, python={python!r}, log_path={str(log_path)!r},
                                         extra_args={options[1:]!r}):
            time.sleep(600)
        """
    environment = {**os.environ, **CPU_SERVER_ENV}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, env=environment
    )


@linux_only
@pytest.mark.parametrize("options", [("model", "--hang"), ("model",)])
def test_a_parent_killed_outright_leaves_no_orphan(stand_in: str, tmp_path: Path, options: tuple[str, ...]) -> None:
    with start_in_another_process(stand_in, tmp_path / "log", *options) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        wait_for(lambda: len(group_members(group)) == 2, timeout_s=20, what="the server has its child")
        parent.kill()  # and nobody has waited for it yet: a zombie is gone too
        wait_for(lambda: group_members(group) == [], timeout_s=20, what=f"nothing of {group} is left")


def test_a_server_that_ends_is_an_error_with_its_own_words_and_its_log(stand_in: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ServerStartError, match="ended with code 3") as error,
        start_server("model", python=stand_in, log_path=tmp_path / "log", extra_args=["--fail"]),
    ):
        pass
    text = str(error.value)
    assert "\nValueError: no such model\n" in text and str(tmp_path / "log") in text and "Traceback" not in text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_what_is_lost_in_the_block_is_told_with_the_servers_end_and_other_errors_are_left_alone(
    stand_in: str, tmp_path: Path, number: signal.Signals
) -> None:
    opened = functools.partial(start_server, "model", python=stand_in, log_path=tmp_path / "log")
    with (
        pytest.raises(ServerUnreachableError, match=f"was ended by {number.name}.*loading.*/log\\)$") as lost,
        opened() as server,
    ):
        server.process.send_signal(number)
        raise ServerUnreachableError("nothing answers")
    assert str(lost.value.__cause__) == "nothing answers"
    with pytest.raises(ValueError, match=r"^another matter$"), opened() as server:
        server.process.kill()
        raise ValueError("another matter")


def test_a_loss_in_the_block_of_a_server_that_still_runs_is_left_as_it_is(
    stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_process, "ENDING_WAIT_S", 0.1)
    with (
        pytest.raises(ServerLostError, match=r"^no answer within 9 s$"),
        start_server("model", python=stand_in, log_path=tmp_path / "log") as server,
    ):
        assert server.ending() is None
        raise ServerLostError("no answer within 9 s")


def test_a_server_that_does_not_come_up_in_time_is_an_error(stand_in: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ServerStartError, match="not healthy after 1 s"),
        start_server("model", python=stand_in, log_path=tmp_path / "log", extra_args=["--hang"], timeout_s=1),
    ):
        pass


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with (
            pytest.raises(ServerStartError, match=f"cannot listen on 127.0.0.1:{port}"),
            start_server("model", port=port, python="/nowhere/python", log_path=tmp_path / "log"),
        ):
            pass


def test_gpu_numbers_are_those_of_this_process() -> None:
    assert server_process._visible_gpu(1, None) == "1"
    assert server_process._visible_gpu(1, "4,7") == "7"
    with pytest.raises(ValueError, match="gpu 2 does not exist here"):
        server_process._visible_gpu(2, "4,7")


def test_the_child_gets_no_rank_of_the_trainer_and_no_proxy_for_loopback() -> None:
    environment = server_process.child_environment(
        {"RANK": "1", "WORLD_SIZE": "2", "NO_PROXY": "intranet", "HOME": "/home/me"},
        host="127.0.0.1",
        gpu=None,
        api_key=None,
    )
    assert "RANK" not in environment and "WORLD_SIZE" not in environment and environment["HOME"] == "/home/me"
    assert environment["NO_PROXY"].split(",")[:2] == ["intranet", "127.0.0.1"]
    assert "VLLM_API_KEY" not in environment


def test_the_error_lines_of_a_log_are_the_exceptions_with_their_cause_first() -> None:
    log = """\
(APIServer pid=1) INFO 11-22 20:58:38 [entry.py:1] starting
(EngineCore pid=2) ERROR 11-22 20:58:39 [core.py:1150] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-22 20:58:39 [core.py:1150]   File "core.py", line 9, in run
(EngineCore pid=2) ERROR 11-22 20:58:39 [core.py:1150]     raise error
(EngineCore pid=2) ERROR 11-22 20:58:39 [core.py:1150] torch.OutOfMemoryError: CUDA out of memory. Tried 20 GiB
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)   File "api.py", line 3, in main
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, not a folder [type=value_error]
    For further information visit
"""
    assert server_process.last_error_lines(log).splitlines() == [
        "torch.OutOfMemoryError: CUDA out of memory. Tried 20 GiB",
        "RuntimeError: Engine core initialization failed. See root cause above.",
        "pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, not a folder [type=value_error]",
        "    For further information visit",
    ]
    assert server_process.last_error_lines("a\nb\n\nc\n", limit=2) == "b\nc"


def test_what_is_indented_behind_an_empty_line_is_not_of_the_error_before_it() -> None:
    prefix = "INFO 11-22 20:58:38 [utils.py:299] "
    log = (
        f"ImportError: no such plugin\n{prefix}\n{prefix}       a banner, drawn in blocks\nValueError: no such model\n"
    )
    assert server_process.last_error_lines(log) == "ImportError: no such plugin\nValueError: no such model"


# --- vLLM's own parser ------------------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_the_defaults_of_ludic_hold_until_the_user_says_otherwise(tmp_path: Path) -> None:
    args = vllm_server.parse_arguments([])
    assert (args.model, args.host, args.port) == (DEFAULT_MODEL, "127.0.0.1", 8000)
    assert (args.logprobs_mode, args.generation_config) == ("processed_logprobs", "vllm")
    assert args.weight_transfer_config.backend == "ludic_shm"
    assert args.middleware == [GENERATE_ROUTE, ADAPTER_ROUTE, SERVER_GUARD, REQUIRE_API_KEY]
    assert args.trust_remote_code is False and args.allowed_origins == [] and args.api_key is None
    assert (args.disable_log_stats, args.disable_uvicorn_access_log) == (True, True)

    config = tmp_path / "config.yaml"
    config.write_text("model: from-config\nport: 8101\nlogprobs-mode: raw_logprobs\nenable-log-stats: true\n")
    for flags in (["--config", str(config)], [f"--config={config}"]):
        args = vllm_server.parse_arguments([*flags, "--port", "8102"])
        assert (args.model, args.port, args.logprobs_mode) == ("from-config", 8102, "raw_logprobs")
        assert args.disable_log_stats is False


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_every_form_of_a_vllm_flag_arrives() -> None:
    args = vllm_server.parse_arguments(
        [
            *("--gpu_memory_utilization", "0.5", "--max-num-seqs=7", "--no-enable_prefix_caching", "-tp", "2", "-O3"),
            *("--weight_transfer_config", '{"backend": "ipc"}', "--served_model_name", "a", "b"),
            *("--compilation-config.cudagraph_capture_sizes+", "1,2", "--middleware", "mine.Middleware", "org/model"),
            *("--enable_log_stats", "--no-disable-uvicorn-access-log"),
        ]
    )
    assert (args.gpu_memory_utilization, args.max_num_seqs, args.enable_prefix_caching) == (0.5, 7, False)
    assert (args.tensor_parallel_size, args.weight_transfer_config.backend) == (2, "ipc")
    assert args.served_model_name == ["a", "b", "org/model"] or args.model == "org/model"
    assert args.middleware == [GENERATE_ROUTE, "mine.Middleware", ADAPTER_ROUTE, SERVER_GUARD, REQUIRE_API_KEY]
    assert (args.disable_log_stats, args.disable_uvicorn_access_log) == (False, False)


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_no_request_passes_a_middleware_before_its_key_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    args = vllm_server.parse_arguments(["--middleware", "tests.test_vllm_server.AnswersEverything"])
    set_keys(monkeypatch, "first-key")
    app = FastAPI()
    for name in args.middleware:  # as vLLM does
        module, _, attribute = name.rpartition(".")
        app.add_middleware(getattr(importlib.import_module(module), attribute))
    client, key = TestClient(app), {"Authorization": "Bearer first-key"}
    for path in (PATH, "/elsewhere"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers=key).status_code == 204


class AnswersEverything:
    """A middleware of the user's that lets nothing through."""

    def __init__(self, app: Any) -> None: ...

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--host", "0.0.0.0"], "not loopback"),
        (["--port", "{taken}"], "cannot listen on"),
        (["--port", "many"], "--port"),
        (["--api_server_count=2"], "--api-server-count 2"),
        (["model", "-dp", "2"], "--data-parallel-size 2"),
        (["--grpc"], "--grpc"),
        (["--no-training", "--weight-transfer-config", "{{}}"], "--no-training"),
        (["--api-key-file", "/no/such/file"], "/no/such/file"),
        (["--api_key_file"], "--api-key-file"),
    ],
)
def test_a_bad_setting_ends_with_one_line_and_code_2_before_vllm_is_imported(
    flags: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_server, "check_vllm_version", lambda: pytest.fail("vLLM was imported"))
    for name in KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(SystemExit) as stop:
            vllm_server.main([flag.format(taken=sock.getsockname()[1]) for flag in flags])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


# --- inside the worker, without a server ------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_checkpoint_tensors_are_found_in_fused_and_padded_parameters() -> None:
    from ludic.inference.worker.vllm_model import checkpoint_views

    model = torch.nn.Module()
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # type: ignore[assignment]
    model.attn, model.embed = torch.nn.Module(), torch.nn.Embedding(64, 4)
    model.attn.qkv_proj = torch.nn.Linear(4, 8)
    model.head = torch.nn.Linear(4, 64, bias=False)
    model.head.weight = model.embed.weight
    shapes = {"attn.q_proj.weight": [4, 4], "attn.k_proj.weight": [2, 4], "attn.v_proj.weight": [2, 4]}
    rest = {"embed.weight": [61, 4], "head.weight": [61, 4], "attn.q_proj.bias": [4], "nowhere.weight": [1]}
    views = checkpoint_views(model, shapes | rest)
    fused = model.attn.qkv_proj.weight
    assert torch.equal(views["attn.q_proj.weight"], fused[:4])
    assert torch.equal(views["attn.k_proj.weight"], fused[4:6])
    assert torch.equal(views["attn.v_proj.weight"], fused[6:])
    assert torch.equal(views["embed.weight"], model.embed.weight[:61])
    assert torch.equal(views["head.weight"], model.embed.weight[:61])
    assert views.keys() == shapes.keys() | {"embed.weight", "head.weight"}  # the biases of k and v were not named
    # A tensor-parallel shard holds fewer rows than the checkpoint.
    assert checkpoint_views(model, {name: [rows * 2, 4] for name, (rows, _) in shapes.items()}) == {}
    assert checkpoint_views(model, {"embed.weight": [128, 4]}) == {}


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_modules_that_gpt2_turns_over_are_seen_as_the_checkpoint_holds_them_square_or_not() -> None:
    from ludic.inference.worker.vllm_model import checkpoint_views

    class GPT2Model(torch.nn.Module):
        """As vLLM's: linear layers, where the checkpoint has weights of [inputs, outputs]."""

        def __init__(self) -> None:
            super().__init__()
            self.c_attn, self.c_proj, self.other = torch.nn.Linear(4, 12), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    model = GPT2Model()
    shapes = {"c_attn.weight": [4, 12], "c_proj.weight": [4, 4], "other.weight": [4, 4], "c_proj.bias": [4]}
    views = checkpoint_views(model, shapes)
    assert torch.equal(views["c_attn.weight"], model.c_attn.weight.t())
    assert torch.equal(views["c_proj.weight"], model.c_proj.weight.t())
    assert torch.equal(views["other.weight"], model.other.weight)
    assert torch.equal(views["c_proj.bias"], model.c_proj.bias)


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("sent", "missing"),
    [
        (["gate_up_proj.weight", "qkv_proj.weight"], ""),  # both fused in the checkpoint already
        (["gate_proj.weight", "up_proj.weight", "qkv_proj.weight"], ""),
        (["gate_up_proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight"], ""),
        (["gate_up_proj.weight", "q_proj.weight", "v_proj.weight"], "k_proj"),
        (["gate_up_proj.weight"], "k_proj"),
        (["gate_proj.weight", "qkv_proj.weight"], "up_proj"),
    ],
    ids=str,
)
def test_a_module_may_come_fused_or_in_parts_but_not_in_some_of_them(sent: list[str], missing: str) -> None:
    from ludic.inference.worker.vllm_model import check_complete

    model = torch.nn.Module()
    model.packed_modules_mapping = {  # type: ignore[assignment]
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    model.mlp = torch.nn.Module()
    model.mlp.qkv_proj = torch.nn.Linear(4, 8, bias=False)
    model.mlp.gate_up_proj = torch.nn.Linear(4, 8, bias=False)
    update = {f"mlp.{name}": torch.zeros(1) for name in sent}
    if not missing:
        check_complete(model, update)
        return
    with pytest.raises(ValueError, match=rf"partial: tensor 'mlp\.{missing}\.weight' is missing"):
        check_complete(model, update)


# --- a real server on the CPU -----------------------------------------------------------------------------------------


class Client:
    """Just enough of a trainer to send weights and to ask for log-probs."""

    def __init__(self, server: ServerProcess, model: Path, key: str | None) -> None:
        self.url, self.model, self.key = server.base_url, str(model), key
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def request(self, method: str, path: str, body: object = None) -> requests.Response:
        with requests.Session() as session:  # a new connection each time: the server drops one after an error
            session.trust_env = False
            return session.request(method, f"{self.url}{path}", json=body, headers=self.headers, timeout=120)

    def post(self, path: str, body: object = None) -> requests.Response:
        return self.request("POST", path, body)

    def logprobs(self) -> torch.Tensor:
        body = {"model": self.model, "prompt": PROMPT, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        entries = self.post("/v1/completions", body).json()["choices"][0]["prompt_logprobs"]
        return torch.tensor(
            [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], PROMPT[1:], strict=True)]
        )

    def gap(self, model: Any) -> float:
        """Mean difference between the server's log-probs and transformers', in nats."""
        return (self.logprobs() - torch.tensor(prompt_logprobs(model, PROMPT))).abs().mean().item()

    def send(self, tensors: dict[str, torch.Tensor], path: Path, *, directory: Path | None = None) -> requests.Response:
        """One update; the server's answer to its last step, or to the step that it refused."""
        digests = {name: digest_hex(tensor_digest(tensor)) for name, tensor in tensors.items()}
        self.post(
            "/init_weight_transfer_engine", {"init_info": {"directory": str(directory or path.parent)}}
        ).raise_for_status()
        self.post("/pause?mode=wait").raise_for_status()
        self.post("/start_weight_update").raise_for_status()
        update_info = {"path": str(path), "names": list(tensors), "digests": digests}
        answer = self.post("/update_weights", {"update_info": update_info})
        if answer.ok:
            answer = self.post("/finish_weight_update")
        self.post("/resume").raise_for_status()
        return answer

    def held(self, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        control = ServerControl(self.url, api_key=self.key)
        control.expect_weights(
            {name: {"dtype": "float32", "shape": list(tensor.shape)} for name, tensor in tensors.items()}
        )
        (worker,) = control.held_digests()
        return dict(zip(tensors, worker.in_memory, strict=True))


def new_weights(model: Any, seed: int) -> dict[str, torch.Tensor]:
    randomize_weights(model, seed=seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_update(client: Client, folder: Path, tied: bool, tmp_path: Path) -> None:
    """A policy that the server was not started with is served after one update, by log-probs and by digests."""
    policy = make_tiny_model(tmp_path / "copy", tie_word_embeddings=tied)
    assert client.gap(policy) < 1e-4
    for seed in (5, 6):
        tensors = new_weights(policy, seed)
        assert client.gap(policy) > 0.5  # or the next comparison would prove nothing
        save_file(tensors, tmp_path / f"{seed}.safetensors")
        assert client.send(tensors, tmp_path / f"{seed}.safetensors").ok
        assert client.gap(policy) < 1e-4
        held = client.held(tensors)
        assert held.keys() == tensors.keys()
        compared = {name: digest for name, digest in held.items() if digest}
        assert compared == {name: digest_hex(tensor_digest(tensors[name])) for name in compared}
        assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.bias"} <= set(
            compared
        )


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    with tiny_server(tmp_path_factory, tied=True, api_key="the-key") as running:
        yield running


@pytest.mark.vllm
@pytest.mark.timeout(420)
def test_with_a_key_health_is_open_and_every_control_request_without_it_is_refused(
    tied: tuple[ServerProcess, Path],
) -> None:
    server, folder = tied
    stranger = Client(server, folder, None)
    assert stranger.request("GET", "/health").status_code == 200
    for path in (
        "/collective_rpc",
        "/pause",
        "/update_weights",
        "/v1/completions",
        "/reset_prefix_cache",
        "/tokenize",
        PATH,
    ):
        assert stranger.post(path, {}).status_code == 401
        assert Client(server, folder, "another").post(path, {}).status_code == 401
    models = Client(server, folder, "the-key").request("GET", "/v1/models").json()
    assert models["data"][0]["id"] == str(folder) and models["data"][0]["max_model_len"] == 512


@pytest.mark.vllm
@pytest.mark.timeout(420)
def test_the_key_is_in_no_log_no_command_line_and_no_process_but_the_one_that_checks_it(
    tied: tuple[ServerProcess, Path],
) -> None:
    server, _ = tied
    assert "non-default args" in server.log_path.read_text(), "vLLM logs its settings"
    assert "the-key" not in server.log_path.read_text()
    group = [
        entry.parent
        for entry in Path("/proc").glob("[0-9]*/stat")
        if int(entry.read_text().rpartition(")")[2].split()[2]) == server.pid
    ]
    assert len(group) >= 3
    for process in group:
        assert "the-key" not in (process / "cmdline").read_text()
        # What the parent handed to the server itself stays readable there, to its own user.
        if process.name != str(server.pid):
            assert "the-key" not in (process / "environ").read_text()


@pytest.mark.vllm
def test_the_workers_tell_what_a_trainer_must_know(tied: tuple[ServerProcess, Path]) -> None:
    server, folder = tied
    (info,) = (
        Client(server, folder, "the-key").post("/collective_rpc", {"method": "ludic_server_info"}).json()["results"]
    )
    assert (
        info["dtype"] == info["head_dtype"] == "float32"
        and info["device"] == "cpu"
        and info["transfer_backend"] == "ludic_shm"
    )
    assert info["logprobs_mode"] == "processed_logprobs" and info["generation_config"] == "vllm"
    assert info["tp_size"] == 1 and info["device_uuid"] == ""


def evaluate(*flags: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "examples/gsm8k/eval_gsm8k_vllm.py", *flags]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT, env=SCRIPT_ENVIRONMENT)


@pytest.mark.vllm
@pytest.mark.timeout(420)
def test_the_commands_that_an_evaluation_prints_work_as_printed_against_its_server(
    tied: tuple[ServerProcess, Path], digit_problems: Path, tmp_path: Path
) -> None:
    server, folder = tied
    state = server_state(ServerControl(server.base_url, api_key="the-key"))
    assert state.weights is None, "this test comes before those that hand weights to the server"
    template, key, out = tmp_path / "chat.jinja", tmp_path / "keys", tmp_path / "eval.jsonl"
    template.write_text(CHAT_TEMPLATE)
    key.write_text("the-key\n\nanother-key\n")
    flags = ["--model", str(folder), "--base-url", server.base_url, "--dataset", str(digit_problems)]
    flags += ["--max-tokens", "8", "--system-prompt", "Answer: 'yes' or \\boxed{...}", "--api-key-file", str(key)]
    flags += ["--chat-template", str(template), "--out-dir", str(tmp_path), "--out", out.name]
    first = evaluate(*flags, "--limit", "8")
    assert first.returncode == 0, first.stderr
    summary = Path(f"{out}.summary.json").read_bytes()

    refused = evaluate(*flags, "--limit", "3", "--resume-eval")
    assert refused.returncode == 2 and Path(f"{out}.summary.json").read_bytes() == summary
    words = printed_command(re.findall("`(.*)`", refused.stderr)[0])
    finished = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT, env=SCRIPT_ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    assert len(out.read_text().splitlines()) == 8
    assert f"weights: those of {folder}, as the server loaded them" in finished.stdout

    words = printed_command(finished.stdout.splitlines()[-1])
    assert "--start-server" not in words and words[words.index("--base-url") + 1] == server.base_url
    metrics = Path(words[words.index("--out-dir") + 1]) / "gsm8k_train_metrics.jsonl"
    with (tmp_path / "training.txt").open("w") as log:
        training = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=SCRIPT_ENVIRONMENT)
    deadline = time.monotonic() + 240
    while not (metrics.exists() and '"reward_mean"' in metrics.read_text()):  # until the first update
        assert training.poll() is None and time.monotonic() < deadline, (tmp_path / "training.txt").read_text()
        time.sleep(0.5)
    training.send_signal(signal.SIGINT)
    assert training.wait(timeout=60) == 130


@pytest.mark.vllm
def test_an_update_reaches_the_output_head_of_a_tied_model(tied: tuple[ServerProcess, Path], tmp_path: Path) -> None:
    server, folder = tied
    check_update(Client(server, folder, "the-key"), folder, True, tmp_path)


@pytest.mark.vllm
def test_a_bad_update_is_refused_by_name_and_leaves_the_old_weights(
    tied: tuple[ServerProcess, Path], tmp_path: Path
) -> None:
    server, folder = tied
    client = Client(server, folder, "the-key")
    before = client.logprobs()
    tensors = new_weights(make_tiny_model(tmp_path / "copy", tie_word_embeddings=True), seed=9)
    good = tmp_path / "good.safetensors"
    save_file(tensors, good)
    victim = "model.layers.1.mlp.up_proj.weight"

    corrupted = {name: tensor.clone() for name, tensor in tensors.items()}
    corrupted[victim][3, 3] += 1e-3
    save_file(corrupted, tmp_path / "corrupted.safetensors")
    partial = {name: tensor for name, tensor in tensors.items() if name != victim}
    save_file(partial, tmp_path / "partial.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-1000])
    (tmp_path / "link.safetensors").symlink_to(good)
    (tmp_path / "inside").mkdir()

    def refusal(file: str, sent: dict[str, torch.Tensor] = tensors, directory: str = "") -> str:
        answer = client.send(sent, tmp_path / file, directory=tmp_path / directory)
        assert answer.status_code == 500
        return str(answer.json()["error"]["message"])

    assert f"tensor '{victim}' arrived corrupted" in refusal("corrupted.safetensors")
    assert f"tensor '{victim}' was announced but is missing" in refusal("partial.safetensors")
    assert f"the update is partial: tensor '{victim}' is missing" in refusal("partial.safetensors", partial)
    assert f"tensor '{victim}' is in" in refusal("good.safetensors", partial)
    assert "not a whole safetensors file" in refusal("cut.safetensors")
    assert "is not there" in refusal("absent.safetensors")
    assert "not a regular file" in refusal("link.safetensors")
    assert "is outside" in refusal("good.safetensors", directory="inside")
    assert "is outside" in refusal("inside/../good.safetensors", directory="inside")
    assert torch.equal(client.logprobs(), before)
    # A trainer that died after its start: the next one closes its session with a finish.
    assert client.post("/start_weight_update").ok and client.post("/finish_weight_update").ok
    assert torch.equal(client.logprobs(), before)
    assert client.send(tensors, good).ok
    assert not torch.equal(client.logprobs(), before)


@pytest.mark.vllm
@pytest.mark.timeout(420)
def test_an_update_reaches_an_untied_model_and_flags_may_have_underscores(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    with cpu_server(
        tmp_path / "model", tmp_path / "log", extra_args=["--max_model_len=256", "--gpu_memory_utilization", "0.3"]
    ) as server:
        client = Client(server, tmp_path / "model", None)
        models = client.request("GET", "/v1/models").json()
        assert models["data"][0]["max_model_len"] == 256
        check_update(client, tmp_path / "model", False, tmp_path)
    wait_for(lambda: group_members(server.pid) == [], timeout_s=5, what="the group is gone")


@pytest.fixture(scope="module")
def serving_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    """A server that no trainer can use, with two processes that answer requests."""
    folder = tmp_path_factory.mktemp("serving")
    make_tiny_model(folder / "model", tie_word_embeddings=True)
    flags = ["--no-training", "--api-server-count", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # the flag overrides it
        with cpu_server(folder / "model", folder / "server.log", extra_args=flags) as server:
            yield server, folder / "model"


@pytest.mark.vllm
@pytest.mark.timeout(420)
def test_without_training_no_route_takes_weights_or_a_trainer_and_statistics_are_kept(
    serving_only: tuple[ServerProcess, Path],
) -> None:
    client = Client(*serving_only, None)
    for path in (
        "/pause",
        "/start_weight_update",
        "/update_weights",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/sleep",
    ):
        assert client.post(path, {}).status_code == 404, path
    for method in ("GET", "POST", "DELETE"):
        assert client.request(method, "/ludic/v1/trainer").status_code == 404
    assert client.request("GET", PATH).json() == {"protocol": PROTOCOL}
    assert "vllm:generation_tokens_total" in client.request("GET", "/metrics").text


@pytest.mark.vllm
@pytest.mark.timeout(420)
async def test_an_evaluation_uses_a_server_without_training_and_a_trainer_is_refused_in_one_line(
    serving_only: tuple[ServerProcess, Path],
) -> None:
    server, folder = serving_only
    engine = VLLMEngine(server.base_url, model=str(folder))
    try:
        await engine.connect(make_tiny_tokenizer(), max_seq_len=512)
        sampling = SamplingParams(max_tokens=16, temperature=0.0, logprobs=True)
        # Several requests, each on a connection of its own, so that both processes answer some.
        drawn = [await engine.generate(PROMPT, num_completions=1, sampling=sampling) for _ in range(6)]
        tokens = {tuple(one.token_ids) for group in drawn for one in group}
        assert len(tokens) == 1 and all(one.logprobs for group in drawn for one in group)
        with pytest.raises(ServerMismatchError) as refusal:
            await engine.enable_weight_sync(PROMPT)
    finally:
        await engine.aclose()
    message = str(refusal.value)
    assert "--no-training" in message and f"python -m ludic.inference.vllm_server --model {folder}" in message
    assert "\n" not in message


@pytest.mark.vllm
@pytest.mark.timeout(420)
def test_a_parent_killed_outright_leaves_no_vllm_process(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    with start_in_another_process(
        sys.executable, tmp_path / "log", str(tmp_path / "model"), "--enforce-eager"
    ) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        # The API server, the engine core and its worker, beside multiprocessing's helpers.
        wait_for(lambda: "VllmWorker" in (tmp_path / "log").read_text(), timeout_s=240, what="the worker runs")
        assert len(group_members(group)) >= 3
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: group_members(group) == [], timeout_s=30, what="no process of the server is left")


@pytest.mark.vllm
@pytest.mark.timeout(240)
def test_a_server_that_cannot_start_says_why_in_its_own_words(tmp_path: Path) -> None:
    def why(model: str, *flags: str) -> str:
        with pytest.raises(ServerStartError) as error, cpu_server(Path(model), tmp_path / "log", extra_args=flags):
            pass
        return str(error.value)

    assert "unrecognized arguments: --no-such-flag" in why("/x", "--no-such-flag")
    text = why("/no/such/model")
    assert "/no/such/model" in text and str(tmp_path / "log") in text and len(text.splitlines()) < 15
