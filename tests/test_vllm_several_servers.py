"""A training over two real vLLM servers on the CPU, one of which is killed."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from ludic.inference.client.server_process import ServerProcess
from tests.vllm_helpers import CPU_SERVER_ENV, cpu_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "examples" / "gsm8k" / "train_gsm8k.py"
NUM_UPDATES = 8
SETTINGS = [
    *("--rollouts-per-update", "64", "--group-size", "8", "--max-seq-len", "160", "--micro-token-budget", "640"),
    *("--max-tokens", "12", "--lr", "1e-3", "--train-steps", str(NUM_UPDATES), "--eval-limit", "8"),
    *("--logger", "print", "--verbose", "--server-wait", "0.5"),
]


def generated_tokens(server: ServerProcess) -> float:
    text = requests.get(f"{server.base_url}/metrics", timeout=10).text
    return float(re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)[0])


@pytest.mark.timeout(900)
def test_a_training_over_two_servers_uses_both_and_goes_on_without_one_that_is_killed(
    digit_server: tuple[ServerProcess, Path], digit_problems: Path, tmp_path: Path
) -> None:
    (first, policy), out = digit_server, tmp_path / "run"
    with cpu_server(policy, tmp_path / "second.log") as second:
        before = [generated_tokens(one) for one in (first, second)]
        flags = ["--model", str(policy), "--dataset", str(digit_problems), "--out-dir", str(out)]
        flags += ["--server", first.base_url, "--server", second.base_url]
        with subprocess.Popen(
            [sys.executable, str(SCRIPT), *SETTINGS, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **CPU_SERVER_ENV},
        ) as training:
            metrics = out / "gsm8k_train_metrics.jsonl"
            while training.poll() is None and not (metrics.exists() and '"step": 2' in metrics.read_text()):
                time.sleep(0.02)
            shares = [generated_tokens(one) - start for one, start in zip((first, second), before, strict=True)]
            second.process.kill()
            printed, _ = training.communicate(timeout=300)
    assert training.returncode == 0, printed
    assert min(shares) > 0.3 * sum(shares), "one of them did nearly all of the work"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["policy_version"] for row in rows if "reward_mean" in row] == list(range(1, NUM_UPDATES + 1))
    rollouts = [json.loads(line) for line in (out / "gsm8k_train_rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 64 * NUM_UPDATES and all(row["policy_version"] == row["step"] - 1 for row in rollouts)
    proofs = [line for line in printed.splitlines() if "weight sync" in line]
    assert (
        first.base_url in proofs[0] and second.base_url in proofs[0] and proofs[0].count("log-probs of the probe") == 2
    )
    assert first.base_url in proofs[-1] and proofs[-1].count("log-probs of the probe") == 1
    assert f"the server at {second.base_url} is given up, 1 of 2 go on" in printed
