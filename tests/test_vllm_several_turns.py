"""Conversations with one real vLLM server on the CPU: their tokens, their log-probs, and two updates that are trained on them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ludic import GRPOTrainer
from ludic.config import RunPaths
from ludic.inference.client.server_process import ServerProcess
from ludic.inference.client.vllm_client import VLLMEngine, stop_token_ids
from ludic.task.prompts import load_tokenizer
from tests.test_several_turns import Digits, config, lines_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


async def test_conversations_with_a_server_are_sampled_with_the_logprobs_that_training_recomputes(
    tmp_path: Path, digit_server: tuple[ServerProcess, Path]
) -> None:
    server, folder = digit_server
    tokenizer = load_tokenizer(folder)
    engine = VLLMEngine(
        server.base_url, model=str(folder), stop_token_ids=stop_token_ids(str(folder), tokenizer), seed_requests=True
    )
    await engine.connect(tokenizer, max_seq_len=512)
    await engine.enable_weight_sync(list(range(5, 60)))
    paths = RunPaths(out_dir=tmp_path, name="digits")
    trainer = GRPOTrainer(
        config=config(max_staleness=1),
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        engine=engine,
        environment=Digits(),
        train_samples=[1, 2, 3],
        paths=paths,
    )
    await trainer.run()
    await engine.aclose()
    rollouts, metrics = lines_of(paths.rollouts), lines_of(paths.metrics)
    assert {len(one["turns"]) for one in rollouts} == {1, 3}
    assert all(one["turns"][1]["content"] == "again" for one in rollouts if len(one["turns"]) == 3)
    for one in rollouts:
        assert sum(turn["tokens"] for turn in one["turns"]) == len(one["completion_token_ids"])
    # In the first update the trainer has the weights that sampled; in the second, those of one update later.
    (first,) = (one for one in metrics if one["step"] == 1 and "logprob_gap_max" in one)
    assert first["num_gap_tokens"] == first["num_loss_tokens"] and first["logprob_gap_max"] < 1e-2
