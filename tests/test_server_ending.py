"""A server that ends in the middle of a run: what the error says of it, where it is ours and where it is not."""

import argparse
import functools
import socket
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ludic.cli import add_engine_arguments
from ludic.inference.client import vllm_client
from ludic.inference.client.server_process import ServerProcess, free_port, is_healthy, start_server
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.rollout.errors import EngineError, ServerLostError, ServerUnreachableError
from ludic.run import engine as run
from ludic.survival import recovery
from ludic.types import SamplingParams
from tests.vllm_helpers import make_tiny_tokenizer

PROMPT = [3, 40, 41, 42, 4]
FOUR_TOKENS = SamplingParams(max_tokens=4)
STAND_IN = """\
    #!{python}
    import asyncio, os, secrets, signal, sys
    sys.path[:0] = {path!r}
    from aiohttp import web
    from ludic.inference.client.server_process import end_with_parent
    from tests.fake_vllm import FakeServer
    from tests.vllm_helpers import make_tiny_tokenizer
    end_with_parent()
    value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
    print("INFO: serving", value("--model"), flush=True)
    class DyingServer(FakeServer):
        def completions(self, body):
            {dies_by}
    start = secrets.token_hex(16)  # as each start of a server has its own
    server = DyingServer(tokenizer=make_tiny_tokenizer(), model=value("--model"), start=start)
    web.run_app(server.app(), host="127.0.0.1", port=int(value("--port")), print=None, access_log=None)
"""
FAILS = "print('ValueError: Unsupported head size: 16', flush=True); os._exit(1)"
ENDING = "the vLLM server ended with code 1; it said: ValueError: Unsupported head size: 16 (its whole log: "
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(autouse=True)
def little_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "LOOK_S", 0.01)
    monkeypatch.setattr(vllm_client, "MAX_ATTEMPTS", 4)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.1)  # 0.7 s in all, in which a process that ends is gone


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str], str]:
    """Makes an interpreter that runs a server of its own, whatever it is asked to run, which dies at a completion."""

    def make(dies_by: str) -> str:
        path = tmp_path / "python"
        root = Path(__file__).parent.parent
        text = STAND_IN.format(python=sys.executable, path=[str(root), str(root / "src")], dies_by=dies_by)
        path.write_text(textwrap.dedent(text))
        path.chmod(0o755)
        return str(path)

    return make


def engine_arguments(model: Path, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    add_engine_arguments(parser)
    return parser.parse_args(["--model", str(model), "--start-server", *flags])


async def generate_once(
    args: argparse.Namespace, out_dir: Path, *, probe: list[int] | None = None, said: list[str]
) -> None:
    tokenizer = make_tiny_tokenizer()
    async with run.open_engine(
        args, tokenizer, out_dir=out_dir, max_seq_len=64, say=said.append, probe=probe
    ) as engine:
        await engine.generate(PROMPT, num_completions=1, sampling=FOUR_TOKENS)


async def test_an_evaluation_whose_own_server_ends_says_how_with_its_last_words_and_its_log(
    tiny_model_dir: Path, tmp_path: Path, stand_in: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ServerProcess", functools.partial(ServerProcess, python=stand_in(FAILS)))
    args = engine_arguments(tiny_model_dir, "--port", str(free_port("127.0.0.1")))
    with pytest.raises(ServerLostError) as lost:
        await generate_once(args, tmp_path, said=[])
    assert str(lost.value) == f"{ENDING}{tmp_path / 'vllm_server.log'})"


async def test_a_run_that_starts_its_own_server_again_says_how_the_one_before_ended_and_so_does_its_last_error(
    tiny_model_dir: Path, tmp_path: Path, stand_in: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ServerProcess", functools.partial(ServerProcess, python=stand_in(FAILS)))
    args = engine_arguments(tiny_model_dir, "--port", str(free_port("127.0.0.1")))
    said: list[str] = []
    with pytest.raises(EngineError) as given_up:
        await generate_once(args, tmp_path, probe=PROMPT, said=said)
    assert [line for line in said if line.startswith("the server was lost: ")] == [
        f"the server was lost: {ENDING}{tmp_path / 'vllm_server.log'})"
    ] * 2
    assert ENDING in str(given_up.value)


async def test_of_anothers_server_that_goes_in_the_middle_of_a_request_no_more_is_said_than_is_known(
    tiny_model_dir: Path, tmp_path: Path, stand_in: Callable[[str], str]
) -> None:
    with start_server(str(tiny_model_dir), python=stand_in(KILLED), log_path=tmp_path / "server.log") as server:
        client = VLLMEngine(server.base_url, model=str(tiny_model_dir))
        await client.connect(make_tiny_tokenizer())
        with pytest.raises(ServerUnreachableError) as first:
            await client.generate(PROMPT, num_completions=1, sampling=FOUR_TOKENS)
        with pytest.raises(ServerUnreachableError) as second:
            await client.generate(PROMPT, num_completions=1, sampling=FOUR_TOKENS)
        await client.aclose()
        ending = server.ending()
    assert ending is not None and "was ended by SIGKILL" in ending and f"INFO: serving {tiny_model_dir} (its" in ending
    where = f"the server at {server.base_url}"
    assert str(first.value).startswith(f"{where} stopped answering in the middle of a request (ServerDisconnectedError")
    assert str(second.value).startswith(f"{where} does not answer (ClientConnectorError")
    for refusal in (first, second):
        assert "its log says why" in str(refusal.value) and f"--port {server.port}` starts it again" in str(
            refusal.value
        )


def test_a_port_that_answers_with_the_request_itself_is_no_healthy_server() -> None:
    """As a connection that the kernel has joined to itself does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def echo() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(connection.recv(4096))

        thread = threading.Thread(target=echo)
        thread.start()
        assert not is_healthy(f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()
