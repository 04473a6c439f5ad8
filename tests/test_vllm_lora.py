"""An adapter and real vLLM servers on the CPU: merged into what a run syncs, and loaded by vLLM from its own folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ludic.config import GRPOConfig
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.server_process import ServerProcess
from ludic.train.learner import Learner
from tests.test_lora import train
from tests.test_trainer import load
from tests.vllm_helpers import CPU_SERVER_ENV, cpu_server, make_tiny_model, prompt_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = Path(__file__).parent.parent / "examples" / "gsm8k" / "train_gsm8k.py"
PROBE = list(range(5, 45))


@pytest.mark.timeout(600)
def test_a_run_with_an_adapter_syncs_whole_models_whose_every_tensor_is_proven(
    digit_server: tuple[ServerProcess, Path], digit_problems: Path, tmp_path: Path
) -> None:
    server, model = digit_server
    words = ["--model", str(model), "--port", server.base_url.rpartition(":")[2], "--dataset", str(digit_problems)]
    words += [
        "--rollouts-per-update",
        "32",
        "--group-size",
        "16",
        "--max-seq-len",
        "160",
        "--micro-token-budget",
        "640",
    ]
    words += ["--max-tokens", "12", "--lr", "3e-3", "--warmup-steps", "0", "--train-steps", "5", "--eval-limit", "8"]
    words += ["--logger", "print", "--verbose", "--logprob-share", "1", "--lora-rank", "8", "--out-dir", str(tmp_path)]
    environment = {**os.environ, **CPU_SERVER_ENV}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("tensors held by the server have the digests of those sent") == 6
    rows = [json.loads(line) for line in (tmp_path / "gsm8k_train_metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if row.get("trained_sequences")]
    assert len(updates) >= 2 and max(row["logprob_gap"] for row in updates) < 1e-3
    assert updates[-1]["changed_weights_share"] > 0.1


@pytest.mark.timeout(600)
def test_vllm_serves_the_adapter_of_a_checkpoint_over_its_base_as_the_merged_model_computes(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    config = GRPOConfig(
        lora_rank=8, max_seq_len=32, max_completion_len=20, rollouts_per_update=4, group_size=2, micro_token_budget=64
    )
    learner = Learner(config, load(tmp_path / "base"))
    train(learner, updates=4)
    assert learner.adapter is not None
    learner.adapter.save(tmp_path)
    with learner.whole_model() as merged:
        merged.save_pretrained(tmp_path / "merged")
    wanted = {name: torch.tensor(prompt_logprobs(load(tmp_path / name), PROBE)) for name in ("base", "merged")}
    assert (wanted["base"] - wanted["merged"]).abs().mean() > 0.1
    adapter = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={tmp_path / 'adapter'}"]
    with cpu_server(tmp_path / "base", tmp_path / "server.log", extra_args=adapter) as server:
        control = ServerControl(server.base_url)
        for name, model in (("base", str(tmp_path / "base")), ("merged", "tuned")):
            served = torch.tensor(control.prompt_logprobs(model, PROBE, cache_salt=name))
            assert (served - wanted[name]).abs().mean() < 2e-3, name
