"""A user who types what the programs print, against a real vLLM server on the CPU, with no flag of its own for the CPU."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ludic.inference.client.server_process import free_port
from tests.printed import printed_command
from tests.vllm_helpers import CPU_SERVER_ENV

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, **CPU_SERVER_ENV}


@contextlib.contextmanager
def running(words: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A program whose output goes to `log`, with a process group of its own, which ends with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=ENVIRONMENT, start_new_session=True
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(happened: Callable[[], bool], log: Path, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.25)


@pytest.mark.timeout(900)
def test_the_commands_that_a_training_prints_start_its_server_start_it_again_and_evaluate_its_checkpoint(
    digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    train = [*("uv", "run", "python", "examples/gsm8k/train_gsm8k.py", "--model", str(digit_policy_dir))]
    train += ["--dataset", str(digit_problems), "--port", str(free_port("127.0.0.1")), "--out-dir", str(tmp_path)]
    train += ["--rollouts-per-update", "32", "--group-size", "8", "--max-seq-len", "160", "--max-tokens", "12"]
    train += ["--micro-token-budget", "640", "--lr", "1e-3", "--train-steps", "400", "--eval-limit", "8"]
    words = printed_command(" ".join([*train, "--logger", "print"]))
    log, metrics = tmp_path / "training.txt", tmp_path / "gsm8k_train_metrics.jsonl"

    refused = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=120)
    assert refused.returncode == 2, refused.stderr
    start = printed_command(re.findall("`(.*)`", refused.stderr)[0])

    with contextlib.ExitStack() as stack:
        server_log = tmp_path / "server.txt"
        server = stack.enter_context(running(start, server_log))
        wait_until(lambda: "Application startup complete" in server_log.read_text(errors="replace"), server_log)
        training = stack.enter_context(running(words, log))
        wait_until(lambda: metrics.exists() and '"reward_mean"' in metrics.read_text(), log)
        kill(server)
        wait_until(lambda: "Start it again with: " in log.read_text(), log)
        updates = metrics.read_text().count('"reward_mean"')
        again = printed_command(re.findall("Start it again with: (.*)", log.read_text())[0])
        stack.enter_context(running(again, tmp_path / "server_again.txt"))
        wait_until(lambda: metrics.read_text().count('"reward_mean"') >= updates + 2, log)
        training.send_signal(signal.SIGINT)
        assert training.wait(timeout=60) == 130

        done = metrics.read_text().count('"reward_mean"')
        resume = [*printed_command(log.read_text()), "--train-steps", str(done + 2)]
        with running(resume, tmp_path / "resumed.txt") as resumed:
            assert resumed.wait(timeout=240) == 0, (tmp_path / "resumed.txt").read_text()

    evaluated = subprocess.run(
        printed_command((tmp_path / "resumed.txt").read_text()),
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    (summary,) = tmp_path.glob("gsm8k_eval_step_*.jsonl.summary.json")
    assert json.loads(summary.read_text())["num_problems"] == 8  # those that the run evaluated on: --eval-limit 8
