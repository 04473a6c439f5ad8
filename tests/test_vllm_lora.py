"""An adapter and real vLLM servers on the CPU: merged into what a run syncs, sent by itself, and loaded from its folder."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch

from ludic.config import GRPOConfig
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.server_process import ServerProcess
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.inference.weights.sync_probe import trainer_logprobs
from ludic.inference.wire import ADAPTER_NAME
from ludic.rollout.engine import PolicyWeights
from ludic.rollout.errors import ServerMismatchError
from ludic.survival.recovery import RecoveringEngine
from ludic.task.prompts import load_tokenizer
from ludic.train.learner import Learner
from ludic.types import Completion, SamplingParams
from tests.test_lora import train
from tests.test_trainer import load
from tests.vllm_helpers import CPU_SERVER_ENV, cpu_server, make_tiny_model, prompt_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = Path(__file__).parent.parent / "examples" / "gsm8k" / "train_gsm8k.py"
PROBE = list(range(5, 45))
LONG = PROBE * 5
"""More than a block of the prefix cache, which has 128 tokens at most."""


def run_words(server: ServerProcess, model: Path, problems: Path) -> list[str]:
    words = ["--model", str(model), "--port", server.base_url.rpartition(":")[2], "--dataset", str(problems)]
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
    words += ["--max-tokens", "12", "--lr", "3e-3", "--warmup-steps", "0", "--eval-limit", "8"]
    return [*words, "--logger", "print", "--verbose", "--logprob-share", "1"]


def run_script(words: list[str]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **CPU_SERVER_ENV}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=environment, timeout=500
    )


@pytest.mark.timeout(600)
def test_a_run_with_an_adapter_syncs_whole_models_whose_every_tensor_is_proven(
    digit_server: tuple[ServerProcess, Path], digit_problems: Path, tmp_path: Path
) -> None:
    server, model = digit_server
    words = [*run_words(server, model, digit_problems), "--train-steps", "5", "--lora-rank", "8"]
    done = run_script([*words, "--out-dir", str(tmp_path)])
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


@pytest.fixture(scope="module")
def adapter_server(
    tmp_path_factory: pytest.TempPathFactory, digit_policy_dir: Path
) -> Iterator[tuple[ServerProcess, Path]]:
    """One server that takes adapters of rank 16 at most, and the folder of the digit policy that it serves."""
    log = tmp_path_factory.mktemp("adapters") / "server.log"
    with cpu_server(digit_policy_dir, log, extra_args=["--enable-lora", "--max-lora-rank", "16"]) as server:
        yield server, digit_policy_dir


@pytest.mark.timeout(600)
def test_a_run_that_sends_its_adapter_trains_on_what_the_adapter_samples(
    adapter_server: tuple[ServerProcess, Path], digit_problems: Path, tmp_path: Path
) -> None:
    server, model = adapter_server
    words = [
        *run_words(server, model, digit_problems),
        "--train-steps",
        "3",
        "--lora-rank",
        "8",
        "--lora-sync",
        "adapter",
    ]
    done = run_script([*words, "--out-dir", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert said.count("all 28 tensors held by the server have the digests of those sent") == 4
    assert said.count("over a base of which 26 of 26 tensors were compared") == 4
    rows = [json.loads(line) for line in (tmp_path / "gsm8k_train_metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if row.get("trained_sequences")]
    # Of the completions themselves: sampled with the adapter on one side, forwarded with it on the other.
    assert len(updates) == 3 and max(row["logprob_gap"] for row in updates) < 1e-3


def lora_learner(model: Path, *, rank: int = 8, updates: int = 4, target: str = "all-linear") -> Learner:
    config = GRPOConfig(
        lora_rank=rank,
        lora_sync="adapter",
        lora_target=target,
        max_seq_len=32,
        max_completion_len=20,
        rollouts_per_update=4,
        group_size=2,
        micro_token_budget=64,
    )
    learner = Learner(config, load(model))
    train(learner, updates=updates)
    return learner


@contextlib.asynccontextmanager
async def connected_engine(server: ServerProcess, model: Path, *, rank: int = 8) -> AsyncIterator[RecoveringEngine]:
    client = VLLMEngine(server.base_url, model=str(model), adapter_rank=rank)
    async with contextlib.aclosing(RecoveringEngine(client)) as engine:
        await engine.connect(load_tokenizer(str(model)))
        await engine.enable_weight_sync(PROBE)
        yield engine


@pytest.mark.timeout(600)
async def test_each_version_of_an_adapter_is_what_the_server_computes_with_and_no_cached_prompt_outlives_it(
    adapter_server: tuple[ServerProcess, Path],
) -> None:
    server, model = adapter_server
    learner = lora_learner(model, updates=0)
    control = ServerControl(server.base_url)
    base = trainer_logprobs(learner.model, PROBE, fp32_head=False)  # B is 0
    held = []
    async with connected_engine(server, model) as engine:
        for version in range(3):
            report = await engine.update_weights(PolicyWeights(learner.model, version))
            assert report.num_tensors == 28 and report.proof.startswith("adapter written in place"), report.proof
            held.append(await asyncio.to_thread(control.weights_digest))
            served = await asyncio.to_thread(control.prompt_logprobs, ADAPTER_NAME, PROBE, cache_salt=f"{version}")
            wanted = trainer_logprobs(learner.model, PROBE, fp32_head=False)
            assert (torch.tensor(served) - wanted).abs().mean() < 2e-3
            assert version == 0 or (wanted - base).abs().mean() > 0.05
            # The same prompt each time: a block of the prefix cache that outlived its version would show in the log-probs.
            completion = await sampled_with(engine, learner)
            assert completion.policy_version == version
            train(learner, updates=3)
        plain = await asyncio.to_thread(control.prompt_logprobs, str(model), PROBE, cache_salt="base")
        assert (torch.tensor(plain) - base).abs().mean() < 2e-3
        await engine.update_weights(PolicyWeights(learner.model, 3))
    assert len(set(held)) == 3
    # Whoever asks for the model's name later, as an evaluation does, gets the policy.
    async with contextlib.aclosing(VLLMEngine(server.base_url, model=str(model))) as evaluation:
        await evaluation.connect(load_tokenizer(str(model)))
        assert (await sampled_with(evaluation, learner)).policy_version == 3


async def sampled_with(engine: "RecoveringEngine | VLLMEngine", learner: Learner) -> Completion:
    """A completion whose tokens were sampled with the log-probs that the learner's model gives them."""
    sampling = SamplingParams(temperature=1.0, max_tokens=24)
    (completion,) = await engine.generate(LONG, num_completions=1, sampling=sampling)
    assert completion.logprobs is not None
    ours = trainer_logprobs(learner.model, [*LONG, *completion.token_ids], fp32_head=False)[len(LONG) - 1 :]
    assert (torch.tensor(completion.logprobs) - ours).abs().max() < 5e-3
    return completion


@pytest.mark.timeout(600)
async def test_a_server_that_cannot_serve_an_adapter_refuses_it_in_one_line_and_still_serves(
    adapter_server: tuple[ServerProcess, Path], tmp_path: Path
) -> None:
    server, model = adapter_server
    with pytest.raises(ServerMismatchError, match=r"rank 16 at most, and --lora-rank is 17: .*--max-lora-rank 32"):
        async with connected_engine(server, model, rank=17):
            pass
    with pytest.raises(ServerMismatchError, match="with --enable-lora, and then vLLM takes no whole models"):
        async with connected_engine(server, model, rank=0):
            pass
    make_tiny_model(tmp_path / "other", tie_word_embeddings=True, seed=9)
    other = lora_learner(tmp_path / "other", updates=1)
    async with connected_engine(server, model) as engine:
        with pytest.raises(ServerMismatchError, match="holds another base than the one below the adapter"):
            await engine.update_weights(PolicyWeights(other.model, 1))
        assert "\n" not in str(engine.failure or "")
    async with connected_engine(server, model) as engine:  # nothing was touched
        report = await engine.update_weights(PolicyWeights(lora_learner(model, updates=1).model, 1))
        assert "have the digests of those sent" in report.proof
