"""Two ranks over gloo train with a real vLLM server on the CPU, and prove each of their weight syncs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ludic.inference.client.server_process import ServerProcess
from tests.vllm_helpers import CPU_SERVER_ENV

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(900)
def test_a_server_is_sent_the_weights_that_two_ranks_have_trained_and_proves_it_after_each_update(
    digit_server: tuple[ServerProcess, Path], digit_problems: Path, tmp_path: Path
) -> None:
    server, policy = digit_server
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("examples/gsm8k/train_gsm8k.py", "--model", str(policy), "--dataset", str(digit_problems / "train.jsonl")),
        *("--server", server.base_url, "--train-steps", "2", "--rollouts-per-update", "32", "--group-size", "8"),
        *("--max-tokens", "12", "--max-seq-len", "160", "--micro-token-budget", "640", "--lr", "1e-3"),
        *("--warmup-steps", "0", "--eval-limit", "0", "--logger", "print", "--verbose", "--out-dir", str(tmp_path)),
    ]
    environment = {**os.environ, **CPU_SERVER_ENV, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout
    proofs = [line for line in done.stdout.splitlines() if "weight sync" in line]
    assert len(proofs) >= 2 and all("log-probs of the probe" in line for line in proofs[:2]), done.stdout
    metrics = (tmp_path / "gsm8k_train_metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, metrics) if "reward_mean" in row]
    assert [row["policy_version"] for row in rows] == [1, 2]
    assert all(row["sync/logprob_gap"] < 0.15 and row["changed_weights_share"] > 0.1 for row in rows)
