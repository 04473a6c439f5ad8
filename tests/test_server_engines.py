"""`--server-engines`: flags, the command with stand-in engines, addresses, and what a trainer and an evaluation make of them."""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ludic.cli import add_engine_arguments, check_engine_arguments, server_urls, total_concurrency
from ludic.inference import vllm_engines, vllm_server
from ludic.inference.client.handshake import engines_behind
from ludic.inference.client.least_loaded import LeastLoaded
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.server_process import free_port
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.inference.server.engines_route import ENGINES_VARIABLE, EnginesRoute
from ludic.inference.server.server_defaults import DEFAULTS, ENGINES_ROUTE, Machine, middleware
from ludic.inference.server.server_help import engines_problem, quick_arguments
from ludic.inference.vllm_engines import start_order
from ludic.inference.wire import ENGINES_PATH
from ludic.rollout.engine import PolicyWeights
from ludic.rollout.errors import EngineError, ServerMismatchError
from ludic.run.engine import name_engines
from ludic.run.evaluation import weights_in_use
from ludic.survival.shared_policy import SharedPolicy
from ludic.types import SamplingParams
from tests.fake_vllm import MODEL, FakeServer, serving
from tests.vllm_helpers import make_tiny_tokenizer

PROMPT = [3, 40, 41, 42, 4]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--server-engines", "0"], "at least 1, not 0"),
        (["--server-engines", "-2"], "at least 1, not -2"),
        (["--server-engines", "2", "--uds", "/tmp/s"], "leave out --uds"),
        (["--server-engines", "2", "--headless"], "leave out --headless"),
        (["--server-engines", "2", "--ssl-certfile", "c"], "--ssl-certfile"),
        (["--server-engines=2", "--data-parallel-size", "4"], "contradicts --data-parallel-size 4"),
        (["--server_engines", "2", "--no-training", "-dp", "4"], "contradicts --data-parallel-size 4"),
        (["--server-engines", "3", "--port", "65534"], "in 1 to 65533, not 65534"),
        (["--server-engines", "2", "--port", "0"], "not 0"),
        (["--server-engines", "4"], ""),
        (["--server-engines", "4", "--no-training"], ""),
        (["--server-engines", "1", "--uds", "/tmp/s"], ""),
    ],
)
def test_engines_that_cannot_be_are_refused_in_one_line(flags: list[str], words: str) -> None:
    problem = engines_problem(quick_arguments(flags))
    assert words in problem and "\n" not in problem and bool(problem) is bool(words)


def test_the_ports_of_all_engines_must_be_free_before_the_first_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_server, "serve_engines", lambda *_: pytest.fail("engines were started"))
    monkeypatch.setattr(vllm_server, "missing_gpu", lambda: "")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as stop:
            vllm_server.main(["--server-engines", "2", "--port", str(port - 1)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"127.0.0.1:{port}" in line


def test_engines_start_one_by_one_where_vllm_measures_the_memory_and_together_where_nothing_is_measured_or_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def order(*flags: str, on_cpu: bool = False) -> list[list[int]]:
        monkeypatch.setattr(vllm_engines, "is_cpu_build", lambda: on_cpu)
        return start_order(quick_arguments(["--server-engines", "3", *flags]))

    assert order() == order("--enforce-eager") == [[0], [1], [2]]
    assert order("--kv-cache-memory-bytes", "8G") == [[0], [1, 2]]
    assert order("--kv-cache-memory-bytes", "8G", "--enforce-eager") == [[0, 1, 2]]
    assert order(on_cpu=True) == [[0, 1, 2]]
    assert order("--no-enforce-eager", on_cpu=True) == [[0], [1, 2]]


def test_on_the_cpu_the_engines_share_the_default_kv_cache() -> None:
    (row,) = [row for row in DEFAULTS if row.setting == "--kv-cache-memory-bytes"]
    assert row.value is not None
    sizes = [
        row.value(argparse.Namespace(), Machine(is_cpu=True, free_bytes=12 * 2**30, num_engines=n)) for n in (1, 2, 4)
    ]
    assert sizes == [1536 * 2**20, 768 * 2**20, 384 * 2**20]


# --- the command ------------------------------------------------------------------------------------------------------

STAND_IN = """\
#!{python}
import http.server, json, os, sys
sys.path.insert(0, {source!r})
from ludic.inference.client.server_process import end_with_parent
end_with_parent()
port = int([sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--port"][-1])
variables = ("LUDIC_SERVER_ENGINE", "LUDIC_SERVER_ENGINES", "LUDIC_API_KEY")
print("port", port, json.dumps([os.environ.get(name) for name in variables]), flush=True)
if "--fail" in sys.argv and port != {first}:
    raise ValueError("no room")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Command:
    """`serve_engines` in a process of its own, whose engines are stand-ins."""

    def __init__(self, tmp_path: Path, *flags: str) -> None:
        self.port = free_port("127.0.0.1")
        source = str(Path(vllm_server.__file__).parents[2])
        stand_in = tmp_path / "python"
        stand_in.write_text(STAND_IN.format(python=sys.executable, source=source, first=self.port))
        stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
        argv = [
            "--server-engines",
            "2",
            "--port",
            str(self.port),
            "--enforce-eager",
            "--kv-cache-memory-bytes",
            "1G",
            *flags,
        ]
        program = f"""
from ludic.inference.server.server_help import quick_arguments
from ludic.inference.vllm_engines import serve_engines
serve_engines({argv!r}, quick_arguments({argv!r}), ["of-the-environment"], python={str(stand_in)!r})
"""
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.05)

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def engines(self) -> list[int]:
        """Process ids of the stand-ins."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = entry.read_bytes().split(b"\0")
                if (
                    words[-3:-1]
                    and words[-3] == b"--port"
                    and words[-2] in (b"%d" % self.port, b"%d" % (self.port + 1))
                ):
                    found.append(int(entry.parent.name))
        return found

    def close(self) -> None:
        self._reading.join(timeout=10)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def end(self) -> tuple[int, str]:
        assert self.process.stderr is not None
        errors = self.process.stderr.read()
        code = self.process.wait(timeout=60)
        self._reading.join(timeout=10)
        return code, errors


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(*flags: str) -> Command:
        started.append(Command(tmp_path, *flags))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()  # their reapers end the engines
        one.process.wait()
        one.close()


@linux_only
def test_one_command_starts_all_engines_tells_their_lines_apart_and_ends_them_all(
    command: Callable[..., Command],
) -> None:
    run = command()
    run.until(lambda: run.said("engines are up"))
    urls = [f"http://127.0.0.1:{run.port + index}" for index in (0, 1)]
    assert f"engines  | 2 engines are up; their address is {urls[0]}\n" in run.lines
    first = json.dumps(["1", json.dumps(urls), "of-the-environment"])
    assert f"engine 1 | port {run.port} {first}\n" in run.lines
    assert f'engine 2 | port {run.port + 1} ["1", null, "of-the-environment"]\n' in run.lines
    engines = run.engines()
    assert len(engines) == 2
    run.process.send_signal(signal.SIGTERM)
    code, errors = run.end()
    assert (code, errors) == (128 + signal.SIGTERM, "") and run.engines() == []


@linux_only
def test_an_engine_that_does_not_start_ends_the_command_with_one_line(command: Callable[..., Command]) -> None:
    run = command("--fail")
    code, errors = run.end()
    (line,) = errors.splitlines()
    assert code == 2 and "of 2 engines, engine 2 ended with code 1; it said: ValueError: no room" in line
    assert run.engines() == []


@linux_only
def test_an_engine_that_is_lost_is_said_and_the_command_goes_on_until_the_last(command: Callable[..., Command]) -> None:
    run = command()
    run.until(lambda: run.said("engines are up"))
    for number, pid in enumerate(run.engines(), 1):
        said = f"({2 - number} of 2 engines are left)"
        os.kill(pid, signal.SIGKILL)
        run.until(functools.partial(run.said, said))
        assert sum("was ended by SIGKILL" in line for line in run.lines) == number
    code, errors = run.end()
    assert code == 2 and errors.endswith("error: none of 2 engines is left\n")


@linux_only
def test_the_engines_end_with_a_command_that_was_killed(command: Callable[..., Command]) -> None:
    run = command()
    run.until(lambda: run.said("engines are up"))
    run.process.kill()
    run.until(lambda: run.engines() == [])


# --- the address ------------------------------------------------------------------------------------------------------


async def ask(route: EnginesRoute, path: str, query: str = "") -> tuple[int, Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("no body is read")

    await route({"type": "http", "method": "GET", "path": path, "query_string": query.encode()}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"] or b"null")


async def test_the_address_is_healthy_once_all_engines_were_and_stays_so_without_one(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    port = free_port("127.0.0.1")
    async with serving(FakeServer(tokenizer=tokenizer)) as other:
        other_port = int(other.base_url.rpartition(":")[2])
        urls = ["http://127.0.0.1:8000", other.base_url, f"http://127.0.0.1:{port}"]
        monkeypatch.setenv(ENGINES_VARIABLE, json.dumps(urls))
        route = EnginesRoute(app)
        for path in ("/health", ENGINES_PATH):
            status, answer = await ask(route, path)
            assert status == 503 and "1 of 3 engines still load" in answer["error"]["message"]
        assert (await ask(route, "/health", "alone"))[0] == 200
        assert (await ask(route, "/v1/models"))[0] == 200
        last = await asyncio.start_server(_say_ok, "127.0.0.1", port)
        async with last:
            assert (await ask(route, "/health"))[0] == 200
    assert await ask(route, "/health") == (200, None)
    assert await ask(route, ENGINES_PATH) == (200, {"ports": [8000, other_port, port]})


async def _say_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.0 200 OK\r\n\r\n")
    await writer.drain()
    writer.close()


def test_only_the_first_engine_has_the_route_and_behind_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINES_VARIABLE, raising=False)
    assert ENGINES_ROUTE not in middleware([], training=True)
    monkeypatch.setenv(ENGINES_VARIABLE, "[]")
    names = middleware(["users.own"], training=False)
    assert names.index(ENGINES_ROUTE) < len(names) - 1 and names[-1].endswith("RequireApiKey")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


@pytest.fixture
async def pair(tokenizer: PreTrainedTokenizerFast) -> AsyncIterator[list[FakeServer]]:
    """Two engines, the first of which knows of the second."""
    servers = [FakeServer(tokenizer=tokenizer, engine_ports=[]), FakeServer(tokenizer=tokenizer)]
    async with serving(servers[0]), serving(servers[1]):
        yield servers


def ports(servers: list[FakeServer]) -> list[int]:
    return [int(server.base_url.rpartition(":")[2]) for server in servers]


def behind(url: str) -> list[str]:
    with contextlib.closing(ServerControl(url)) as control:
        return engines_behind(control)


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    args = parser.parse_args(words)
    args.model = MODEL
    check_engine_arguments(args)
    return args


async def test_an_engine_that_is_lost_is_left_out_with_a_warning(
    pair: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = pair
    nobody = free_port("127.0.0.1")
    first.engine_ports = [*ports(pair), nobody]
    assert await asyncio.to_thread(behind, first.base_url) == [server.base_url for server in pair]
    assert f"nothing listens on {nobody}" in caplog.text


async def test_the_first_engine_names_the_others_and_the_flags_then_do(pair: list[FakeServer]) -> None:
    first, second = pair
    with pytest.raises(EngineError, match="503: 1 of 2 engines still load"):
        await asyncio.to_thread(behind, first.base_url)
    first.engine_ports = ports(pair)
    assert await asyncio.to_thread(behind, first.base_url) == [first.base_url, second.base_url]
    assert await asyncio.to_thread(behind, second.base_url) == [second.base_url], "as any server"
    for given in (["--base-url", first.base_url], ["--port", str(ports(pair)[0])]):
        args = flags(*given, "--concurrency", "8")
        await asyncio.to_thread(name_engines, args)
        assert server_urls(args) == [first.base_url, second.base_url] and total_concurrency(args) == 16
    args = flags("--base-url", second.base_url)
    await asyncio.to_thread(name_engines, args)
    assert args.server is None and server_urls(args) == [second.base_url]


async def test_through_another_port_only_the_first_engine_is_used_and_that_is_said(
    pair: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    pair[0].engine_ports = [8000, 8001]  # behind a tunnel
    assert await asyncio.to_thread(behind, pair[0].base_url) == [pair[0].base_url]
    assert "8000, 8001, and only the first is used" in caplog.text and "--server" in caplog.text


def test_a_started_server_has_an_address_for_each_engine() -> None:
    args = flags("--start-server", "--port", "9000", "--server-args=--server-engines 3 --max-num-seqs 64")
    assert server_urls(args) == [f"http://127.0.0.1:{port}" for port in (9000, 9001, 9002)]
    assert server_urls(flags("--start-server")) == ["http://127.0.0.1:8000"]
    with pytest.raises(ValueError, match="--server-args: --server-engines must be at least 1, not 0"):
        flags("--start-server", "--server-args=--server-engines 0")
    with pytest.raises(ValueError, match="must be in 1 to 65534"):
        flags("--start-server", "--port", "65535", "--server-args=--server-engines 2")


# --- what is made of them ---------------------------------------------------------------------------------------------


async def test_an_evaluation_gives_each_group_to_the_least_loaded_engine(
    pair: list[FakeServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    clients = [VLLMEngine(server.base_url, model=MODEL) for server in pair]
    async with contextlib.aclosing(LeastLoaded(clients)) as engine:
        for client in clients:
            await client.connect(tokenizer)
        for server in pair:
            server.hold = asyncio.Event()
        groups = []
        for size in (3, 1, 1, 2):
            sampling = SamplingParams(max_tokens=4)
            asked = engine.generate(PROMPT, num_completions=size, sampling=sampling)
            groups.append(asyncio.create_task(asked))
            async with asyncio.timeout(20):
                while sum(len(server.requests) for server in pair) < len(groups):
                    await asyncio.sleep(0.01)
        assert [[request["n"] for request in server.requests] for server in pair] == [[3], [1, 1, 2]]
        for server in pair:
            assert server.hold is not None
            server.hold.set()
        assert [len(group) for group in await asyncio.gather(*groups)] == [3, 1, 1, 2]
        with pytest.raises(EngineError, match="without weight syncs"):
            await engine.update_weights(PolicyWeights(torch.nn.Linear(1, 1), 1))


async def test_an_evaluation_refuses_engines_with_different_weights(pair: list[FakeServer]) -> None:
    args = flags("--server", pair[0].base_url, "--server", pair[1].base_url)
    args.tokenizer = None
    weights = await asyncio.to_thread(weights_in_use, args)
    assert weights.fingerprint == f"held {pair[0].weights_digest}"
    pair[1].weights_digest = "f" * 16
    with pytest.raises(ServerMismatchError, match="hold different weights") as refusal:
        await asyncio.to_thread(weights_in_use, args)
    assert all(server.base_url in str(refusal.value) for server in pair)


class OneAtATime:
    """A policy whose owner calls one reader at a time, as the learner's thread does."""

    def __init__(self) -> None:
        self.version, self._turn = 1, asyncio.Lock()

    async def read(self, reader: Callable[[torch.nn.Module, int], Any]) -> Any:
        async with self._turn:
            return await asyncio.to_thread(reader, torch.nn.Linear(1, 1), self.version)

    async def step(self) -> None:
        async with self._turn:
            self.version += 1


async def test_syncs_of_one_policy_overlap_and_its_owner_waits_for_the_last() -> None:
    owner = OneAtATime()
    shared, both = SharedPolicy(owner), threading.Barrier(2, timeout=20)
    ended = threading.Event()

    def quick(_: torch.nn.Module, version: int) -> int:
        both.wait()  # neither gets further alone
        return version

    def slow(_: torch.nn.Module, version: int) -> int:
        both.wait()
        assert ended.wait(20)
        return version

    syncs = [asyncio.create_task(shared.read(reader)) for reader in (slow, quick)]
    assert await syncs[1] == 1
    step = asyncio.create_task(owner.step())
    await asyncio.sleep(0.05)
    assert not step.done() and not syncs[0].done()
    ended.set()
    assert await syncs[0] == 1
    await asyncio.wait_for(step, 20)
    assert await shared.read(lambda _, version: version) == 2


async def test_a_reader_that_fails_or_is_cancelled_lets_the_owner_go_on() -> None:
    owner = OneAtATime()
    shared = SharedPolicy(owner)

    def fails(_: torch.nn.Module, version: int) -> None:
        raise EngineError("lost")

    with pytest.raises(EngineError, match="lost"):
        await shared.read(fails)
    async with owner._turn:  # nothing can be read yet
        waiting = asyncio.create_task(shared.read(lambda _, version: version))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await asyncio.wait_for(owner.step(), 20)
    assert await shared.read(lambda _, version: version) == 2


async def test_a_policy_that_cannot_be_read_is_an_error_of_every_reader() -> None:
    class Broken:
        async def read(self, reader: Any) -> Any:
            raise RuntimeError("the weights belong to no version")

    shared = SharedPolicy(Broken())
    outcomes = await asyncio.gather(*(shared.read(lambda *_: None) for _ in range(2)), return_exceptions=True)
    assert [str(one) for one in outcomes] == ["the weights belong to no version"] * 2
