"""`--server-engines 2` with real vLLM servers: on the CPU a training that loses one of them, on GPUs syncs over NCCL."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ludic.inference.client.server_process import free_port, start_server
from tests.vllm_helpers import CPU_SERVER_ARGS, CPU_SERVER_ENV

SCRIPT = Path(__file__).parents[1] / "examples" / "gsm8k" / "train_gsm8k.py"
NUM_UPDATES = 6
SETTINGS = [
    *("--rollouts-per-update", "64", "--group-size", "8", "--max-seq-len", "160", "--micro-token-budget", "640"),
    *("--max-tokens", "12", "--lr", "1e-3", "--train-steps", str(NUM_UPDATES), "--eval-limit", "8"),
    *("--logger", "print", "--verbose", "--server-wait", "0.5"),
]


def process_of(port: int) -> int:
    """The engine's process group: of the process that has the port on its command line and leads one."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError, ProcessLookupError):
            words, pid = entry.read_bytes().split(b"\0"), int(entry.parent.name)
            last = [words[i + 1] for i, word in enumerate(words[:-1]) if word == b"--port"][-1:]
            if last == [str(port).encode()] and b"--server-engines" in words and os.getpgid(pid) == pid:
                return pid
    raise AssertionError(f"no engine has the port {port}")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_training_uses_both_engines_of_one_command_and_goes_on_without_one_that_is_killed(
    digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    out, port = tmp_path / "run", free_port("127.0.0.1")
    with start_server(
        str(digit_policy_dir),
        port=port,
        extra_args=[*CPU_SERVER_ARGS, "--server-engines", "2"],
        log_path=tmp_path / "server.log",
        timeout_s=900,
        env=CPU_SERVER_ENV,
    ) as server:
        # Healthy means that both are up.
        second = process_of(port + 1)
        urls = [server.base_url, f"http://127.0.0.1:{port + 1}"]
        flags = ["--model", str(digit_policy_dir), "--dataset", str(digit_problems), "--out-dir", str(out)]
        with subprocess.Popen(
            [sys.executable, str(SCRIPT), *SETTINGS, *flags, "--base-url", server.base_url],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **CPU_SERVER_ENV},
        ) as training:
            metrics = out / "gsm8k_train_metrics.jsonl"
            while training.poll() is None and not (metrics.exists() and '"step": 2' in metrics.read_text()):
                time.sleep(0.05)
            os.killpg(second, signal.SIGKILL)
            printed, _ = training.communicate(timeout=600)
        assert server.is_running, "the command goes on with the other engine"
        log = server.log_path.read_text()
    assert training.returncode == 0, printed
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["policy_version"] for row in rows if "reward_mean" in row] == list(range(1, NUM_UPDATES + 1))
    proofs = [line for line in printed.splitlines() if "weight sync" in line]
    assert all(f"{url}: " in proofs[number] for url in urls for number in (0, 1)), proofs
    assert proofs[0].count("log-probs of the probe within") == 2
    assert urls[0] in proofs[-1] and urls[1] not in proofs[-1]
    assert f"the server at {urls[1]} is given up, 1 of 2 go on" in printed
    assert f"engines  | 2 engines are up; their address is {urls[0]}" in log
    assert "engine 1 | " in log and "engine 2 was ended by SIGKILL" in log
    with pytest.raises(ProcessLookupError):
        os.killpg(second, 0)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for the engines and one for the trainer")
def test_two_engines_on_one_gpu_take_the_weights_of_a_trainer_on_another_over_nccl(
    digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    out, port = tmp_path / "run", free_port("127.0.0.1")
    with start_server(
        str(digit_policy_dir),
        port=port,
        gpu=0,
        extra_args=[
            "--max-model-len",
            "512",
            "--dtype",
            "bfloat16",
            "--server-engines",
            "2",
            "--gpu-memory-utilization",
            "0.5",
        ],
        log_path=tmp_path / "server.log",
        timeout_s=900,
        env=CPU_SERVER_ENV,
    ) as server:
        flags = ["--model", str(digit_policy_dir), "--dataset", str(digit_problems), "--out-dir", str(out)]
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *SETTINGS, *flags, "--base-url", server.base_url],
            capture_output=True,
            text=True,
            env={**os.environ, **CPU_SERVER_ENV, "CUDA_VISIBLE_DEVICES": "1"},
            timeout=600,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    proofs = [line for line in (done.stdout + done.stderr).splitlines() if "weight sync" in line]
    urls = [server.base_url, f"http://127.0.0.1:{port + 1}"]
    assert len(proofs) == NUM_UPDATES + 1
    assert all(f"{url}: " in line for line in proofs for url in urls), proofs
    assert proofs[-1].count("written in place; all ") == 2, proofs[-1]
    rows = [json.loads(line) for line in (out / "gsm8k_train_metrics.jsonl").read_text().splitlines()]
    assert all(row["server_recoveries"] == 0 for row in rows if "reward_mean" in row)
