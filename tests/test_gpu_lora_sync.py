"""An adapter that is sent by itself to a vLLM server on a GPU: with and without CUDA graphs, over NCCL with two GPUs."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch

from ludic.config import GRPOConfig
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.server_process import ServerProcess
from ludic.inference.weights.sync_probe import trainer_logprobs
from ludic.rollout.engine import PolicyWeights
from ludic.train.learner import Learner
from ludic.types import SamplingParams
from tests.test_lora import train
from tests.test_trainer import load
from tests.test_vllm_lora import PROBE, connected_engine
from tests.vllm_helpers import CPU_SERVER_ENV, make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

LIMIT = 0.05
"""Nats, on average, between bf16 on the server and autocast to bf16 in the trainer, for weights this large."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("graphs", [True, False])
async def test_on_a_gpu_each_version_of_an_adapter_is_what_completions_are_sampled_with(
    graphs: bool, tmp_path: Path
) -> None:
    make_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    two = torch.cuda.device_count() > 1
    flags = ["--dtype", "bfloat16", "--max-model-len", "512", "--gpu-memory-utilization", "0.2"]
    flags += ["--enable-lora", "--max-lora-rank", "16", *([] if graphs else ["--enforce-eager"])]
    flags += ["--weight-transfer-config", f'{{"backend": "{"ludic_nccl" if two else "ludic_shm"}"}}']
    config = GRPOConfig(
        lora_rank=8, lora_sync="adapter", max_seq_len=128, rollouts_per_update=4, group_size=2, compile=False
    )
    device = torch.device("cuda", 1 if two else 0)
    torch.cuda.set_device(device)
    learner = Learner(config, torch.nn.Module.to(load(tmp_path / "base"), device))
    server = ServerProcess(
        str(tmp_path / "base"),
        gpu=0,
        extra_args=flags,
        log_path=tmp_path / "server.log",
        timeout_s=400,
        python=sys.executable,
        env=CPU_SERVER_ENV,
    )
    try:
        await asyncio.to_thread(server.start)
        held = set()
        async with connected_engine(server, tmp_path / "base") as engine:
            for version in range(4):
                report = await engine.update_weights(PolicyWeights(learner.model, version))
                assert "all 28 tensors held by the server have the digests of those sent" in report.proof
                held.add(await asyncio.to_thread(ServerControl(server.base_url).weights_digest))
                (completion,) = await engine.generate(
                    PROBE, num_completions=1, sampling=SamplingParams(temperature=1.0, max_tokens=48)
                )
                tokens = [*PROBE, *completion.token_ids]
                ours = trainer_logprobs(learner.model, tokens, fp32_head=False)[len(PROBE) - 1 :]
                assert completion.logprobs is not None
                assert (torch.tensor(completion.logprobs) - ours).abs().mean() < LIMIT
                train(learner, updates=3)
        assert len(held) == 4
    finally:
        await asyncio.to_thread(server.close)
