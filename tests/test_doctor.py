"""`python -m ludic.doctor`: each thing that it looks at is broken in turn, and it says so in one line with the fix."""

import argparse
import asyncio
import gzip
import importlib.metadata
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from transformers import Qwen2Config

from ludic.config import from_arguments
from ludic.doctor import dry_run, machine
from ludic.doctor.__main__ import build_parser, main
from ludic.doctor.findings import Finding, failed, ok, run_checks
from ludic.doctor.server import ServerChecks, check_free_port, check_vllm, server_checks
from ludic.inference.client import handshake
from ludic.inference.client.server_control import ServerControl
from ludic.rollout.engine import WeightSyncReport
from ludic.rollout.errors import WeightSyncError
from ludic.task import hub
from ludic.task.grading import Grader, Verdict
from ludic.task.prompts import load_tokenizer
from tests.fake_vllm import FakeServer, serving
from tests.vllm_helpers import CHAT_TEMPLATE, make_tiny_tokenizer


def arguments(*flags: str) -> argparse.Namespace:
    return build_parser().parse_args(list(flags))


@pytest.fixture
def args(tiny_model_dir: Path, digit_problems: Path, tmp_path: Path) -> argparse.Namespace:
    return arguments(
        *("--model", str(tiny_model_dir), "--dataset", str(digit_problems), "--out-dir", str(tmp_path)),
        *("--max-seq-len", "128"),
    )


def only(finding: Finding | list[Finding]) -> Finding:
    if isinstance(finding, list):
        (finding,) = finding
    return finding


# --- this machine -----------------------------------------------------------------------------------------------------


def test_a_machine_with_nothing_wrong_passes_every_local_check(args: argparse.Namespace) -> None:
    args.engine = "local"
    findings = list(run_checks(machine.local_checks(args, from_arguments(args))))
    assert [finding.status for finding in findings] == ["ok"] * len(findings), [str(finding) for finding in findings]
    assert {finding.name for finding in findings} >= {
        "versions",
        "GPUs",
        "memory",
        "disk",
        "architecture",
        "saving",
        "chat template",
        "token ids",
        "hub",
        "data",
        "grader",
    }


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"vllm": "0.25.1"}, "vllm 0.25.1; ludic is made for 0.26 to 0.33"),
        ({"vllm": "0.34.0"}, "vllm 0.34.0"),
        ({"torch": "2.10.0"}, "torch 2.10.0; ludic is made for 2.11 or later"),
        ({"transformers": None}, "transformers is not installed; run uv sync"),
    ],
)
def test_a_version_out_of_range_is_named_with_the_range(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str | None], said: str
) -> None:
    versions = {"torch": "2.13.0", "transformers": "5.19.0", "vllm": "0.32.0"} | installed

    def version(name: str) -> str:
        found = versions.get(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = only(machine.check_versions())
    assert finding.status == "failed" and said in str(finding)


def test_no_gpu_is_a_warning_and_one_gpu_for_both_sides_is_said(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.check_gpus(args).status == "warning"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H200")
    assert machine.check_gpus(args).status == "ok"
    args.start_server = True
    finding = machine.check_gpus(args)
    assert finding.status == "ok" and "share" in finding.found


@pytest.mark.parametrize(("free", "status"), [(1_000, "failed"), (6_000_000, "warning"), (2**40, "ok")])
def test_memory_that_does_not_suffice_is_said_with_what_is_needed(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    monkeypatch.setattr(machine, "_free_memory", lambda: free)
    finding = machine.check_memory(args, from_arguments(args))
    assert finding.status == status and "GiB needed" in finding.found


def test_too_small_a_disk_and_a_folder_that_cannot_be_written_are_found(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_arguments(args)
    assert machine.check_disk(args, config).status == "ok"
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        assert "cannot be written" in machine.check_disk(args, config).found
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    finding = machine.check_disk(args, config)
    assert finding.status == "failed" and "--keep-checkpoints" in finding.fix


def test_a_resumed_run_needs_no_more_room_for_the_checkpoints_that_it_has(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = SimpleNamespace(num_parameters=lambda: 2**30)
    monkeypatch.setattr(dry_run, "model_shape", lambda model, trust: (Qwen2Config(dtype="float32"), empty))
    rooms = [machine.check_disk(args, from_arguments(args), there).found[:8] for there in (0, 1, 2, 9)]
    assert rooms == ["36.0 GiB", "24.0 GiB", "12.0 GiB", "12.0 GiB"]


@pytest.mark.parametrize(
    ("dtype", "said"), [("float32", "36.0 GiB"), ("bfloat16", "42.0 GiB"), ("float16", "42.0 GiB")]
)
def test_a_checkpoint_needs_room_for_the_model_beside_its_masters_where_they_are_not_the_same(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, dtype: str, said: str
) -> None:
    empty = SimpleNamespace(num_parameters=lambda: 2**30)
    monkeypatch.setattr(dry_run, "model_shape", lambda model, trust: (Qwen2Config(dtype=dtype), empty))
    finding = machine.check_disk(args, from_arguments(args))  # two that stay, and the next
    assert finding.found.startswith(said)


@pytest.mark.parametrize(
    ("old", "new", "status", "said"),
    [
        ("in messages", "in messages if message['role'] != 'system'", "warning", "leaves out the system turn 'Answer"),
        ("if add_generation_prompt", "if false", "warning", "no generation prompt"),
        (
            "{% for",
            "{{ raise_exception('no') if messages[0].role == 'system' }}{% for",
            "warning",
            "--system-prompt ''",
        ),
        ("{% for", "{{ raise_exception('no') }}{% for", "failed", "refuses the messages (user)"),
        ("{% for", "{{ 'You are Lud.' if messages[0].role != 'system' }}{% for", "ok", "it adds 'You are Lud.'"),
    ],
)
def test_what_a_chat_template_leaves_out_refuses_or_adds_is_said(old: str, new: str, status: str, said: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(old, new, 1)
    (finding,) = run_checks([("chat template", lambda: machine.check_chat_template(tokenizer))])
    assert finding.status == status and said in finding.found


def forget_the_hub() -> None:
    hub.why_unreachable.cache_clear()
    machine.hub_problem.cache_clear()


@pytest.fixture
def empty_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub, and caches of models and data sets with nothing in them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    forget_the_hub()
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert machine.hub_problem() is not None
    return tmp_path


def put_model_into_cache(cache: Path, *, shards: Sequence[str]) -> None:
    folder = cache / "hub" / "models--somebody--some-model"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("abc")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.json", *shards):
        (snapshot / name).write_text("{}")


def test_a_hub_that_cannot_be_reached_has_failed_unless_the_cache_has_all_that_is_needed(
    args: argparse.Namespace, empty_caches: Path
) -> None:
    assert machine.check_hub(args).status == "ok"  # nothing is needed
    args.model = "somebody/some-model"
    finding = machine.check_hub(args)
    assert finding.status == "failed" and "cannot be reached" in finding.found and "the model" in finding.found
    put_model_into_cache(empty_caches, shards=["model-1.safetensors"])
    assert machine.check_hub(args).status == "failed"  # half of the weights
    put_model_into_cache(empty_caches, shards=["model-1.safetensors", "model-2.safetensors"])
    finding = machine.check_hub(args)
    assert finding.status == "warning" and "in the cache" in finding.found and "HF_HUB_OFFLINE=1" in finding.fix


def test_offline_mode_has_failed_where_the_cache_is_empty(
    args: argparse.Namespace, empty_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget_the_hub()
    args.model = "somebody/some-model"
    finding = machine.check_hub(args)
    assert finding.status == "failed" and "HF_HUB_OFFLINE=1" in finding.found


def test_data_from_the_hub_is_ok_only_where_the_hub_answers_or_the_cache_has_it(
    args: argparse.Namespace, empty_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args.dataset = None
    finding = machine.check_data(args)
    assert finding.status == "failed" and "cannot be reached" in finding.found and "--dataset" in finding.fix
    folder = empty_caches / "datasets" / "openai___gsm8k" / "main" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    (folder / "gsm8k-train.arrow").touch()
    assert machine.check_data(args).status == "failed"  # half of it
    (folder / "gsm8k-test.arrow").touch()
    assert machine.check_data(args).status == "ok" and "in the cache" in machine.check_data(args).found
    shutil.rmtree(folder)
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        forget_the_hub()
        finding = machine.check_data(args)
        thread.join()
    assert finding.status == "ok" and "downloaded when a run starts" in finding.found


def test_a_folder_without_problems_to_train_on_is_not_called_data(args: argparse.Namespace, tmp_path: Path) -> None:
    args.dataset = args.model  # a model's folder: it has files, and no data
    assert "holds no train.jsonl" in machine.check_data(args).found


def test_the_data_that_is_looked_at_is_the_data_that_a_run_reads(args: argparse.Namespace, tmp_path: Path) -> None:
    def lay(name: str, content: bytes = b"question,answer\n1?,#### 1\n") -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    args.dataset = str(tmp_path)
    broken = b'question,answer\n"1?'
    for name in (".cache/train-0.csv", "socratic/train-0.csv", "training_args.csv", "train_log.csv"):
        lay(name, broken)  # no run reads these
    read = lay("main/train-0-of-1.csv")
    assert machine.check_data(args) == ok("data", f"{read} can be read")
    read.write_bytes(broken)
    assert f"{read}: not a csv file" in machine.check_data(args).found
    read.rename(lay("platinum/train.csv"))
    assert "in several folders (platinum/, socratic/)" in machine.check_data(args).found
    args.dataset = str(lay("problems.jsonl.gz", gzip.compress(b'{"question": "1?", "answer": "#### 1"}\n')))
    assert machine.check_data(args) == ok("data", f"{args.dataset} can be read")
    lay("problems.jsonl.gz", gzip.compress(b"18\n"))
    assert "problems.jsonl.gz:1: not a JSON object" in machine.check_data(args).found
    args.dataset = str(lay("train.parquet", b"PAR1"))
    finding = machine.check_data(args)
    assert finding.status == "failed" and "train.parquet: not a parquet file" in finding.found


def test_data_that_cannot_be_read_is_named_with_its_line(args: argparse.Namespace, tmp_path: Path) -> None:
    args.dataset = str(tmp_path / "missing")
    (finding,) = run_checks([("data", lambda: machine.check_data(args))])
    assert finding.status == "failed" and "missing" in finding.found
    folder = tmp_path / "data"
    folder.mkdir()
    args.dataset = str(folder)
    assert machine.check_data(args).status == "failed"
    (folder / "train.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n{"question": \n')
    assert "train.jsonl:2: not JSON" in machine.check_data(args).found
    (folder / "train.jsonl").write_text("[1]\n")
    assert "train.jsonl:1: not a JSON object" in machine.check_data(args).found


@pytest.mark.parametrize("verdict", [Verdict(matched=False), Verdict(matched=False, failure="crash")])
def test_a_grader_that_does_not_work_is_found(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> None:
    monkeypatch.setattr(Grader, "match_sync", lambda self, prediction, target: verdict)
    assert machine.check_grader().status == "failed"


def test_a_port_that_is_taken_is_found_before_a_server_is_started(args: argparse.Namespace) -> None:
    args.start_server = True
    with socket.create_server(("127.0.0.1", 0)) as taken:
        args.port = taken.getsockname()[1]
        (finding,) = run_checks([("port", lambda: check_free_port(args))])
        assert finding.status == "failed" and str(args.port) in finding.found and "--port" in finding.found
    assert check_free_port(args).status == "ok"
    assert [name for name, _ in server_checks(args, from_arguments(args))] == ["port", "vLLM"]


FAKE_VLLM = {
    "starts": ("__version__ = '0.32.0'", "device_type = 'cuda'", "", "ok", "0.32.0 can start here, on cuda"),
    "no device": ("__version__ = '0.32.0'", "device_type = ''", "", "failed", "finds no device"),
    "no library": ("raise ImportError('libcudart.so.13: not found')", "", "", "failed", "libcudart.so.13: not found"),
    "no kernels": (
        *("__version__ = '0.32.0'", "device_type = 'cuda'"),
        "import sys; sys.stderr.write('Failed to import from vllm._C: libcudart.so.13\\n')",
        *("failed", "without its kernels: Failed to import from vllm._C: libcudart.so.13"),
    ),
    "hangs": ("import time; time.sleep(60)", "", "", "warning", "not done after"),
}


def put_vllm_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Make a package vllm that does what a broken one does, and have child processes import it."""
    package, platform, kernels, _, _ = FAKE_VLLM[case]
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text(package)
    (folder / "vllm" / "_custom_ops.py").write_text(kernels)
    (folder / "vllm" / "platforms.py").write_text(f"class current_platform:\n    {platform or 'pass'}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize("case", FAKE_VLLM)
def test_a_vllm_that_cannot_start_here_has_failed_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    put_vllm_on_the_path(tmp_path, monkeypatch, case)
    if case == "hangs":
        monkeypatch.setattr("ludic.doctor.server.PROBE_DEADLINE_S", 0.5)
    finding = check_vllm()
    *_, status, said = FAKE_VLLM[case]
    assert finding.status == status and said in finding.found


@pytest.mark.vllm
def test_a_real_vllm_that_starts_is_said_to_start_with_its_device() -> None:
    finding = check_vllm()
    assert finding.status == "ok" and "can start here, on " in finding.found


# --- the server -------------------------------------------------------------------------------------------------------


class Sync:
    """Stands in for `WeightSync`."""

    error: Exception | None = None

    def __init__(self, control: ServerControl, **settings: Any) -> None:
        assert settings["deadline_s"] < 60

    def sync(self, model: torch.nn.Module, policy_version: int) -> WeightSyncReport:
        if self.error is not None:
            raise self.error
        return WeightSyncReport(policy_version=0, num_tensors=1, num_bytes=4, seconds=0.1, proof="all tensors held")

    def close(self) -> None: ...


@pytest.fixture
async def server(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeServer]:
    monkeypatch.setattr("ludic.inference.weights.weight_sync.WeightSync", Sync)
    monkeypatch.setattr(Sync, "error", None)
    monkeypatch.setattr(handshake, "PAUSED_LOOKS", 1)
    fake = FakeServer(tokenizer=load_tokenizer(args.model), model=args.model)  # type: ignore[arg-type]
    fake.server_info |= {"vllm_version": "0.32.0"}
    async with serving(fake) as running:
        args.port = int(running.base_url.rpartition(":")[2])
        yield running


async def findings_of(args: argparse.Namespace) -> dict[str, Finding]:
    """Of all server checks by name, made on a thread: the server is on this one's loop."""
    found = await asyncio.to_thread(lambda: list(run_checks(server_checks(args, from_arguments(args)))))
    return {finding.name: finding for finding in found}


async def test_a_server_that_fits_passes_every_check_and_belongs_to_nobody_afterwards(
    args: argparse.Namespace, server: FakeServer
) -> None:
    found = await findings_of(args)
    assert {finding.status for finding in found.values()} == {"ok"}, [str(finding) for finding in found.values()]
    assert "all tensors held" in found["weight sync"].found and "8 tokens" not in found["generation"].found
    control = ServerControl(server.base_url)
    assert await asyncio.to_thread(handshake.holder, control) is None


async def test_no_server_is_one_failure_with_the_command_that_starts_one(
    args: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ludic.doctor.server.installed", lambda name: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        args.port = free.getsockname()[1]
        found = await findings_of(args)
    assert found["server"].status == "failed" and "ludic.inference.vllm_server --model" in found["server"].found
    assert sum(finding.status == "failed" for finding in found.values()) == 1
    assert "not looked at" in found["same GPU"].found and "vLLM" not in found


async def test_of_two_servers_the_one_that_is_down_is_named(
    args: argparse.Namespace, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ludic.doctor.server.installed", lambda name: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}"
        args.server = [server.base_url, down]
        found = await findings_of(args)
    assert [name for name, finding in found.items() if finding.status == "failed"] == [f"server of {down}"]
    assert found[f"weight sync of {server.base_url}"].status == "ok"


async def test_no_server_where_vllm_cannot_start_either_says_both(
    args: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_vllm_on_the_path(tmp_path, monkeypatch, "no device")
    monkeypatch.setattr("ludic.doctor.server.installed", lambda name: "0.32.0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        args.port = free.getsockname()[1]
        found = await findings_of(args)
    assert found["server"].status == "failed"
    assert found["vLLM"].status == "failed" and "finds no device" in found["vLLM"].found


def other_tokenizer(server: FakeServer) -> None:
    server.tokenizer = make_tiny_tokenizer()
    server.tokenizer.add_tokens(["boxes"])


def other_template(server: FakeServer) -> None:
    server.tokenizer = make_tiny_tokenizer()
    server.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("broken", "name", "said"),
    [
        (lambda server: setattr(server, "model", "another"), "server", "serves another, not"),
        (lambda server: setattr(server, "max_model_len", 64), "server", "--max-model-len 128"),
        (other_tokenizer, "tokenizer", "tokenizer is not the trainer's"),
        (other_template, "tokenizer", "chat template is not the trainer's"),
        (lambda server: server.server_info.update(logprobs_mode="raw_logprobs"), "settings", "raw_logprobs"),
        (lambda server: server.server_info.update(transfer_backend=""), "settings", "without weight transfer"),
        (lambda server: server.server_info.clear(), "settings", "worker extension"),
    ],
)
async def test_what_does_not_fit_this_run_has_failed(
    args: argparse.Namespace, server: FakeServer, broken: Callable[[FakeServer], None], name: str, said: str
) -> None:
    broken(server)
    finding = (await findings_of(args))[name]
    assert finding.status == "failed" and said in str(finding)


async def test_a_server_of_another_trainer_is_a_warning_and_gets_no_weights(
    args: argparse.Namespace, server: FakeServer
) -> None:
    control = ServerControl(server.base_url)
    other = {"host": "node-9", "pid": 77, "pid_started": "1", "user": "eve", "out_dir": "/x", "since": "now"}
    await asyncio.to_thread(handshake.claim, control, other)
    found = await findings_of(args)
    assert found["holder"].status == "warning" and "eve@node-9, process 77" in found["holder"].found
    assert "not looked at" in found["weight sync"].found


async def test_a_paused_server_a_failing_one_and_one_without_log_probs_are_told_apart(
    args: argparse.Namespace, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    server.paused = True
    assert "paused" in (await findings_of(args))["generation"].found
    server.paused = False
    server.faults = [web.Response(status=500, text="out of blocks") for _ in range(6)]
    finding = (await findings_of(args))["generation"]
    assert finding.status == "failed" and "out of blocks" in finding.found
    completions = server.completions

    def without_logprobs(body: dict[str, Any]) -> Sequence[Any]:
        return completions(body | {"logprobs": False})

    monkeypatch.setattr(server, "completions", without_logprobs)
    finding = (await findings_of(args))["generation"]
    assert finding.status == "warning" and "no log-probs" in finding.found


async def test_a_sync_that_is_not_proven_has_failed_and_the_server_is_given_back(
    args: argparse.Namespace, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sync, "error", WeightSyncError("2 of 26 tensors on the server differ"))
    finding = (await findings_of(args))["weight sync"]
    assert finding.status == "failed" and "2 of 26 tensors" in finding.found
    assert await asyncio.to_thread(handshake.holder, ServerControl(server.base_url)) is None


@pytest.mark.parametrize(
    ("backend", "theirs", "status"),
    [("ludic_nccl", "GPU-a", "failed"), ("ludic_shm", "GPU-a", "ok"), ("ludic_nccl", "GPU-b", "ok")],
)
def test_one_gpu_on_both_sides_is_found(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, backend: str, theirs: str, status: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-a"))
    checks = ServerChecks(args, from_arguments(args), "http://127.0.0.1:8000")
    checks._info = {"transfer_backend": backend, "device_uuid": theirs}
    assert checks.gpus().status == status


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_one_line_a_check_and_its_exit_code_says_whether_one_failed(
    args: argparse.Namespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", args.model, "--dataset", args.dataset, "--out-dir", args.out_dir, "--max-seq-len", "128"]
    assert main([*flags, "--engine", "local"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines[:-1]) and lines[-1].endswith("0 warning, 0 failed")
    monkeypatch.setattr(machine, "_free_memory", lambda: 1000)
    assert main([*flags, "--engine", "local"]) == 1
    assert main([*flags, "--group-size", "1"]) == 2
    assert "--group-size must be at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "code"), [(["--help"], 0), (["--no-such-flag"], 2)])
def test_help_and_a_wrong_flag_do_not_wait_for_torch(flags: list[str], code: int) -> None:
    script = (
        "import sys\n"
        "from ludic.doctor.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: sys.stderr.write(' '.join({'torch', 'transformers', 'numpy', 'jinja2'} & set(sys.modules)) + '|')"
    )
    done = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True)
    assert done.returncode == code and done.stderr.rstrip().endswith("|")
    assert not {"torch", "transformers", "numpy", "jinja2"} & set(done.stderr.splitlines()[-1].rstrip("|").split())


def test_what_a_server_says_of_itself_cannot_act_on_the_terminal() -> None:
    assert "\x1b" not in str(failed("server", "\x1b]0;owned\x07", "look\x1b[2J"))
    assert str(ok("server", "fine")) == "ok       server: fine"


def test_a_check_that_raises_has_failed_with_its_own_words() -> None:
    def broken() -> Finding:
        raise OSError("the disk\nis gone")

    (finding,) = run_checks([("disk", broken)])
    assert (finding.status, finding.found) == ("failed", "the disk is gone")
    assert json.dumps(str(finding))
