"""What the server says without vLLM: its help, mistakes in flags, and a machine that vLLM cannot serve on."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ludic.inference.server import server_help
from ludic.inference.server.server_defaults import DEFAULTS

HEAVY = ("torch", "vllm", "transformers", "numpy", "pydantic", "fastapi")


def run_main(*flags: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """`main(flags)` in a process of its own, which ends with a line of the heavy modules that it has imported."""
    program = f"""
import atexit, sys
from ludic.inference import vllm_server
atexit.register(lambda: print("imported:", *sorted({set(HEAVY)} & set(sys.modules))))
vllm_server.main({list(flags)!r})
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("LUDIC_API_KEY", "VLLM_API_KEY")}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment | variables, timeout=60
    )


@pytest.mark.parametrize("flags", [["--help"], ["-h"], ["--model", "m", "--help"]])
def test_help_is_ludics_own_and_imports_nothing_heavy(flags: list[str]) -> None:
    ran = run_main(*flags)
    assert ran.returncode == 0 and ran.stderr == ""
    assert ran.stdout.splitlines()[-1] == "imported:"
    for word in ("--no-training", "--enable-log-stats", "--api-key-file", "--help=all", "--help=WORD", "examples:"):
        assert word in ran.stdout
    for row in DEFAULTS:
        (line,) = [line for line in ran.stdout.splitlines() if line.startswith(f"    {row.setting} ")]
        assert row.vllm in line and line.endswith(row.ludic)


@pytest.mark.parametrize("flags", [["--port", "many"], ["--api-key-file"], ["--host", "0.0.0.0"], ["--api-key", "k"]])
def test_a_mistake_that_can_be_known_without_vllm_is_said_without_it(flags: list[str]) -> None:
    ran = run_main(*flags)
    assert ran.returncode == 2 and ran.stdout == "imported:\n"
    (line,) = ran.stderr.splitlines()
    assert flags[0] in line


def test_without_a_gpu_the_cuda_build_ends_with_one_line_before_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "vllm-0.32.0.dist-info").mkdir()
    (tmp_path / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    (tmp_path / "vllm.py").write_text("raise AssertionError('vLLM was imported')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = run_main("--model", "org/name", PYTHONPATH=path, VLLM_TARGET_DEVICE="", CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 2 and ran.stdout == "imported:\n"
    (line,) = ran.stderr.splitlines()
    assert "built for NVIDIA GPUs" in line and "scripts/make_vllm_cpu_env.sh" in line


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_help, "vllm_build", lambda: "0.32.0")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize(
    ("num_gpus", "visible", "reason"),
    [
        (None, None, "no driver"),
        (None, "0", "no driver"),
        (0, None, "nvidia-smi"),
        (2, None, ""),
        (2, "1", ""),
        (2, "1,0", ""),
        (2, "GPU-1234", ""),
        (2, "", "CUDA_VISIBLE_DEVICES='' hides all 2"),
        (2, "-1", "CUDA_VISIBLE_DEVICES='-1'"),
        (2, "2", "CUDA_VISIBLE_DEVICES='2'"),
    ],
)
def test_a_machine_without_a_gpu_that_vllm_may_use_is_one_line_with_the_way_out(
    num_gpus: int | None, visible: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_help, "num_nvidia_gpus", lambda: num_gpus)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    problem = server_help.missing_gpu()
    assert reason in problem and "\n" not in problem
    assert bool(problem) is bool(reason) and ("scripts/make_vllm_cpu_env.sh" in problem) is bool(reason)


@pytest.mark.usefixtures("cuda_build")
def test_what_only_vllm_can_know_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_help, "num_nvidia_gpus", lambda: None)
    for build in ("0.32.0+cpu", "0.32.0+rocm700", "0.32.0+xpu", ""):
        monkeypatch.setattr(server_help, "vllm_build", lambda build=build: build)
        assert server_help.missing_gpu() == ""
    monkeypatch.setattr(server_help, "vllm_build", lambda: "0.32.0+cu129")
    assert server_help.missing_gpu() != ""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ("another maker's",))
    assert server_help.missing_gpu() == ""


@pytest.mark.vllm
@pytest.mark.timeout(240)
def test_help_for_a_word_is_vllms_own_with_ludics_flags_among_them() -> None:
    program = [sys.executable, "-m", "ludic.inference.vllm_server", "--help=log-stats"]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0
    assert "--disable-log-stats" in ran.stdout and "--enable-log-stats" in ran.stdout
