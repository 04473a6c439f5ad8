"""Where the server's key is read from, what is refused, and that it is nowhere afterwards."""

import asyncio
import importlib.util
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.server_process import ServerStartError, start_server
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.rollout.errors import EngineError, ServerUnauthorizedError
from ludic.storage.keys import MAX_KEY_CHARS, read_api_key, read_key_file, take_api_keys, without_secrets
from ludic.task.prompts import load_tokenizer
from ludic.types import SamplingParams
from tests.conftest import write_digit_problems
from tests.fake_vllm import FakeServer, serving

KEY = "sk-marker-5f2c81e7"
EXAMPLES = Path(__file__).parents[1] / "examples" / "gsm8k"


@pytest.fixture(autouse=True)
def no_key_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LUDIC_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def key_file(folder: Path, content: bytes | str = KEY, mode: int = 0o600) -> str:
    path = folder / "key"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return str(path)


# --- reading ------------------------------------------------------------------------------------------------------------


def test_the_file_comes_before_ludics_variable_and_that_before_vllms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_api_key(None) is None
    monkeypatch.setenv("VLLM_API_KEY", "of-vllm")
    assert read_api_key(None) == "of-vllm"
    monkeypatch.setenv("LUDIC_API_KEY", "of-ludic")
    assert read_api_key(None) == "of-ludic"
    assert read_api_key(key_file(tmp_path)) == KEY


@pytest.mark.parametrize(
    "content", [KEY, KEY + "\n", KEY + "\r\n", f"\n {KEY} \r\n\n", f"{KEY}\nsecond-key", f"{KEY}\n{KEY}\n"]
)
def test_a_client_sends_the_first_key_of_any_file_that_the_server_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
    path = key_file(tmp_path, content)
    assert read_api_key(path) == KEY
    assert take_api_keys(path) == read_key_file(path) == [KEY] + ["second-key"] * ("second" in content)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700, 0o640])
def test_a_file_of_its_owner_and_group_is_read(tmp_path: Path, mode: int) -> None:
    assert read_api_key(key_file(tmp_path, mode=mode)) == KEY


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o444])
def test_a_file_that_every_user_can_read_is_warned_of_and_taken(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = key_file(tmp_path, mode=mode)
    assert read_api_key(path) == KEY
    assert f"can read {path}: chmod 600 it" in caplog.text and KEY not in caplog.text


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused_with_the_command_that_mends_it(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, mode=mode)
    for read in (read_api_key, take_api_keys):
        with pytest.raises(ValueError, match=rf"may be written by others \(mode {mode:04o}\): chmod 600 ") as caught:
            read(path)
        assert str(caught.value).endswith(f"chmod 600 {path}") and KEY not in str(caught.value)


def test_a_key_that_comes_through_a_pipe_is_read(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, KEY.encode() + b"\n")
    os.close(write_end)
    for _ in range(2):  # by the client and by the server that it starts
        assert read_api_key(f"/dev/fd/{read_end}") == KEY
    os.close(read_end)


BAD_KEYS = [
    (KEY + "\rx", "holds spaces or characters outside ASCII"),
    ("schlüssel-" + KEY, "holds spaces or characters outside ASCII"),
    ("Bearer " + KEY, "holds spaces or characters outside ASCII"),
    (KEY + "\t", "holds spaces or characters outside ASCII"),
    (KEY + "\x1b[2J", "holds spaces or characters outside ASCII"),
    ("k" * (MAX_KEY_CHARS + 1), f"holds more than {MAX_KEY_CHARS} characters"),
]
IN_A_FILE = [
    ("", "holds no key"),
    ("\n", "holds no key"),
    (" \r\n\n", "holds no key"),
    (KEY + "\n# a comment", "holds spaces"),
    (KEY.encode() + b"\xff\0", "outside ASCII"),
]


@pytest.mark.parametrize(("content", "reason"), [*BAD_KEYS, *IN_A_FILE])
def test_a_bad_key_in_a_file_is_refused_in_one_line_that_does_not_show_it(
    tmp_path: Path, content: bytes | str, reason: str
) -> None:
    for read in (read_api_key, take_api_keys):
        with pytest.raises(ValueError, match=reason) as caught:
            read(key_file(tmp_path, content))
        _says_nothing(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"), [*BAD_KEYS, ("", "is empty"), ("\n", "holds several"), (KEY + "\n" + KEY, "holds several")]
)
def test_a_bad_key_in_the_environment_is_refused_in_one_line_that_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, content: str, reason: str
) -> None:
    monkeypatch.setenv("LUDIC_API_KEY", content)
    with pytest.raises(ValueError, match="LUDIC_API_KEY " + reason) as caught:
        read_api_key(None)
    _says_nothing(caught.value)


def _says_nothing(error: BaseException) -> None:
    assert "\n" not in str(error) and str(error).isprintable()
    seen: BaseException | None = error
    while seen is not None:
        assert KEY not in str(seen) and KEY not in repr(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.symlink_to(path)])
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "key"
    make(path)
    with pytest.raises(ValueError, match=r"--api-key-file .*key cannot be read \(.+\): give a file with the key"):
        read_api_key(str(path))


def test_a_file_without_an_end_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="holds more than"):
        read_api_key("/dev/zero")


def test_a_child_that_works_on_what_others_wrote_gets_no_variable_that_is_named_like_a_secret() -> None:
    secrets = {"LUDIC_API_KEY", "LUDIC_SERVER_API_KEYS", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"}
    secrets |= {
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "PGPASSWORD",
        "DB_PASSWORD",
        "GOOGLE_APPLICATION_CREDENTIALS",
    }
    harmless = {"PATH", "HOME", "TOKENIZERS_PARALLELISM", "LANG", "PYTHONHASHSEED", "KEYBOARD", "OMP_NUM_THREADS"}
    assert set(without_secrets(dict.fromkeys(secrets | harmless, "x"))) == harmless


# --- and nowhere else ---------------------------------------------------------------------------------------------------


def assert_not_written(folder: Path, *texts: str) -> None:
    """The key is in no file below `folder` but the one that it came from, and in none of the texts."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / "key"]
    assert paths
    for path in paths:
        assert KEY.encode() not in path.read_bytes(), path
    for text in texts:
        assert KEY not in text


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as Python does for a script


def script_named(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_an_evaluation_with_a_key_writes_and_prints_it_nowhere(
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    script = script_named("eval_gsm8k_vllm")
    write_digit_problems(tmp_path / "problems.jsonl", 4)
    tokenizer = load_tokenizer(tiny_model_dir)
    server = FakeServer(tokenizer=tokenizer, model=str(tiny_model_dir), api_key=KEY, max_model_len=1024)  # type: ignore[arg-type]
    async with serving(server):
        words = ["--model", str(tiny_model_dir), "--dataset", str(tmp_path / "problems.jsonl"), "--max-tokens", "4"]
        words += ["--out-dir", str(tmp_path), "--port", server.base_url.rpartition(":")[2]]
        with pytest.raises(ServerUnauthorizedError, match="wants an API key") as refused:
            await script.run(script.build_parser().parse_args(words))
        words += ["--api-key-file", key_file(tmp_path)]
        assert await script.run(script.build_parser().parse_args(words)) == 0
    assert len(server.requests) == 4
    printed = capsys.readouterr()
    assert_not_written(tmp_path, printed.out, printed.err, caplog.text, str(refused.value))
    assert "gsm8k_eval.jsonl" in printed.out


async def test_no_error_of_the_client_shows_the_key(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    tokenizer = load_tokenizer(tiny_model_dir)
    errors: list[BaseException] = []
    calls: list[Any]
    async with serving(FakeServer(tokenizer=tokenizer, api_key="another")) as server:  # type: ignore[arg-type]
        for url in (server.base_url, "http://127.0.0.1:9"):
            engine = VLLMEngine(url, model="tiny", api_key=KEY)
            calls = [engine.connect(tokenizer)]
            calls += [asyncio.to_thread(ServerControl(url, api_key=KEY, timeout_s=5).request, "POST", "/pause")]
            if url == server.base_url:  # elsewhere it is tried again for some seconds
                calls += [engine.generate([3, 4], num_completions=1, sampling=SamplingParams(max_tokens=2))]
            for call in calls:
                with pytest.raises(EngineError) as caught:
                    await asyncio.wait_for(call, 120)
                errors.append(caught.value)
            await engine.aclose()
    for error in errors:
        seen: BaseException | None = error
        while seen is not None:
            assert KEY not in str(seen) and KEY not in repr(seen)
            seen = seen.__cause__ or seen.__context__
    assert KEY not in caplog.text and KEY not in repr(engine.__dict__.get("control"))


STUB_PYTHON = """#!/bin/sh
tr '\\0' ' ' < /proc/$$/cmdline > {folder}/child-cmdline
tr '\\0' ' ' < /proc/$PPID/cmdline > {folder}/parent-cmdline
printf '%s' "$VLLM_API_KEY" | wc -c > {folder}/length
echo "ValueError: it does not start"
exit 1
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_started_server_has_the_key_in_its_environment_and_in_no_process_list(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(STUB_PYTHON.format(folder=shlex.quote(str(tmp_path))))
    python.chmod(0o755)
    with (
        pytest.raises(ServerStartError, match="it does not start") as caught,
        start_server("tiny", api_key=KEY, python=str(python), log_path=tmp_path / "server.log"),
    ):
        pytest.fail("the stub does not serve")
    assert int((tmp_path / "length").read_text()) == len(KEY)
    assert "ludic.inference.vllm_server" in (tmp_path / "child-cmdline").read_text()
    assert_not_written(tmp_path, str(caught.value))


async def test_the_training_script_keeps_the_key_out_of_its_files_and_out_of_wandb(
    digit_policy_dir: Path,
    digit_problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    sent: list[str] = []
    wandb = ModuleType("wandb")
    run = type("Run", (), {"id": "abc123", "__getattr__": lambda self, name: lambda *a, **k: sent.append(repr((a, k)))})

    def init(*args: object, **settings: object) -> object:
        sent.append(repr((args, settings, sys.argv)))
        return run()

    options = type("Settings", (), {"model_fields": {}})
    spec = importlib.util.spec_from_loader("wandb", None)
    vars(wandb).update(init=init, Error=RuntimeError, Settings=options, Table=dict, __spec__=spec)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("LUDIC_API_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(name, KEY)
    words = ["--model", str(digit_policy_dir), "--dataset", str(digit_problems), "--out-dir", str(tmp_path / "run")]
    words += ["--engine", "local", "--rollouts-per-update", "8", "--group-size", "8", "--max-seq-len", "160"]
    words += ["--micro-token-budget", "640", "--max-tokens", "12", "--train-steps", "1", "--eval-limit", "2"]
    words += ["--logger", "print,tensorboard,wandb", "--verbose", "--api-key-file", key_file(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_gsm8k.py", *words])
    assert await script_named("train_gsm8k").main() == 0
    assert any("'completion'" in one for one in sent) and any((tmp_path / "run").rglob("trainer_state.json"))
    printed = capsys.readouterr()
    assert_not_written(tmp_path, printed.out, printed.err, caplog.text, *sent)
    assert json.loads((tmp_path / "run" / "gsm8k_train_summary.json").read_text())["updates"] == 1
