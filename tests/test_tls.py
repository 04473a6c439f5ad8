"""A server behind a proxy with TLS, at a path of its own: whom the clients trust, and what they say where they do not."""

import argparse
import contextlib
import re
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from ludic.cli import add_engine_arguments, check_engine_arguments, server_urls
from ludic.inference.client.handshake import start_command
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.tls import tls_context
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.rollout.errors import ServerMismatchError, ServerUnreachableError
from ludic.types import SamplingParams
from tests.fake_vllm import FakeServer, serving
from tests.vllm_helpers import make_tiny_tokenizer


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1, with its key in the same file."""
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=ludic-test"
    words += " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out certificate.pem"
    subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "certificate.pem").read_text())
    return folder / "certificate.pem"


@contextlib.asynccontextmanager
async def behind_tls(server: FakeServer, certificate: Path) -> AsyncIterator[str]:
    """The address of a proxy that has TLS, and the server below `/vllm`."""

    async def forward(request: web.Request) -> web.Response:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            url = f"{server.base_url}/{request.match_info['path']}"
            headers = {name: value for name, value in request.headers.items() if name != "Host"}
            async with session.request(request.method, url, data=await request.read(), headers=headers) as answer:
                kept = {name: value for name, value in answer.headers.items() if name.lower().startswith("x-ludic")}
                body = await answer.read()
                return web.Response(status=answer.status, body=body, headers=kept, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/vllm/{path:.*}", forward)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.with_name("both.pem"))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield f"https://127.0.0.1:{runner.addresses[0][1]}/vllm"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
async def test_a_server_behind_tls_and_a_path_is_used_like_any_other_once_its_certificate_is_trusted(
    certificate: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv(variable, str(certificate))
    fake = FakeServer(tokenizer=make_tiny_tokenizer(), api_key="k")
    async with serving(fake) as server, behind_tls(server, certificate) as url:
        engine = VLLMEngine(f"{url}/", model=server.model, api_key="k")
        await engine.connect(server.tokenizer, max_seq_len=512)
        completions = await engine.generate([5, 6], num_completions=2, sampling=SamplingParams(max_tokens=4))
        await engine.aclose()
    assert [len(one.token_ids) for one in completions] == [4, 4]
    assert server.paths == ["/ludic/v1/generate"]


async def test_a_certificate_that_is_not_trusted_is_named_with_the_way_to_trust_it(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    async with serving(FakeServer(tokenizer=make_tiny_tokenizer())) as server, behind_tls(server, certificate) as url:
        engine = VLLMEngine(url, model=server.model)
        with pytest.raises(
            ServerMismatchError, match=r"certificate is not trusted \(self-signed.*SSL_CERT_FILE"
        ) as caught:
            await engine.connect(server.tokenizer)
        assert "\n" not in str(caught.value)
        plain = url.replace("https", "http")
        with pytest.raises(ServerUnreachableError):
            await VLLMEngine(plain, model=server.model).connect(server.tokenizer)
        secure = server.base_url.replace("http", "https")
        with pytest.raises(ServerMismatchError, match=r"does not speak TLS as it should.*is it http:// that was meant"):
            await VLLMEngine(secure, model=server.model).connect(server.tokenizer)


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_variable_that_names_no_certificates_is_refused_by_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    (tmp_path / "empty.pem").touch()
    for path in (tmp_path / "nowhere.pem", tmp_path / "empty.pem"):
        monkeypatch.setenv(name, str(path))
        with pytest.raises(ValueError, match=f"{name} names {path}, which cannot be read as certificates") as caught:
            ServerControl("https://127.0.0.1:1")
        assert "\n" not in str(caught.value)
    monkeypatch.setenv(name, str(tmp_path))  # a folder of hashed certificates, of which none may be there
    if name == "REQUESTS_CA_BUNDLE":
        assert tls_context().verify_mode == ssl.CERT_REQUIRED


def arguments(*flags: str) -> str:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="m")
    add_engine_arguments(parser)
    args = parser.parse_args(flags)
    check_engine_arguments(args)
    return server_urls(args)[0]


def test_the_base_url_is_the_address_in_place_of_host_and_port() -> None:
    assert arguments() == "http://127.0.0.1:8000"
    assert arguments("--host", "node-3", "--port", "8001") == "http://node-3:8001"
    assert arguments("--base-url", "https://gpu.example.org/vllm/") == "https://gpu.example.org/vllm"
    assert arguments("--base-url", "http://[::1]:8000") == "http://[::1]:8000"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--port", "8001"], "contradicts --host and --port"),
        (["--host", "node-3"], "contradicts --host and --port"),
        (["--start-server"], "contradicts --start-server"),
        (["--engine", "local"], "contradicts --engine local"),
        (["--base-url", "gpu.example.org"], "give http://HOST:PORT or https://HOST"),
        (["--base-url", "ftp://gpu.example.org"], "give http://HOST:PORT"),
        (["--base-url", "https://:8000"], "give http://HOST:PORT"),
        (["--base-url", "https://h:http"], "give http://HOST:PORT"),
        (["--base-url", "https://h/?a=1"], "give http://HOST:PORT"),
        (["--base-url", "https://user@h"], "give http://HOST:PORT"),
        (["--base-url", "https://h/v1"], "leave out /v1"),
        (["--server", "https://h"], "contradicts --server"),
    ],
)
def test_a_base_url_that_contradicts_or_is_none_is_refused_in_one_line(flags: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        arguments("--base-url", "https://gpu.example.org", *flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--server", "https://a/v1"], "--server https://a/v1: leave out /v1"),
        (["--server", "b"], "--server b: give http://HOST:PORT"),
        (["--server", "https://a/"], "--server https://a is given twice"),
        (["--port", "8001"], "--server https://a is the whole address: it contradicts --host and --port"),
        (["--start-server"], "--server https://a is of a server that runs: it contradicts --start-server"),
    ],
)
def test_each_of_several_servers_has_an_address_of_its_own_that_nothing_contradicts(
    flags: list[str], reason: str
) -> None:
    assert arguments("--server", "https://a/") == "https://a"
    with pytest.raises(ValueError, match=re.escape(reason)):
        arguments("--server", "https://a", *flags)


@pytest.mark.parametrize(
    ("url", "flags"),
    [
        ("http://127.0.0.1:8000", ""),
        ("http://localhost:8001", " --port 8001"),
        ("http://node-3:8000", " --host node-3"),
        ("http://node-3", " --host node-3 --port 80"),
        ("https://gpu.example.org/vllm", ""),
        ("http://gpu.example.org/vllm", ""),
    ],
)
def test_the_command_that_starts_a_server_names_the_address_where_it_is_the_servers_own(url: str, flags: str) -> None:
    assert start_command(url, "m").endswith(f"python -m ludic.inference.vllm_server --model m{flags}")
