"""Checkpoints of real runs in a real vLLM server on the CPU: what a run saves can be served, scored and generated from."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.make_policy import SHAPES
from ludic.inference.client import vllm_client
from ludic.inference.client.server_process import ServerProcess
from ludic.inference.client.vllm_client import VLLMEngine, stop_token_ids
from ludic.inference.vllm_server import head_size_problem
from ludic.rollout.errors import ServerUnreachableError
from ludic.task.prompts import encode_prompt, load_tokenizer
from ludic.types import ChatMessage, SamplingParams
from tests.conftest import make_digit_policy
from tests.test_demo import demo
from tests.test_vllm_integration import run_script
from tests.vllm_helpers import cpu_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SMALL = [
    *("--engine", "local", "--rollouts-per-update", "32", "--group-size", "8", "--max-seq-len", "160"),
    *("--micro-token-budget", "640", "--max-tokens", "12", "--lr", "3e-3", "--warmup-steps", "0", "--train-steps", "2"),
    *("--eval-limit", "8", "--logger", "none"),
]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A checkpoint of a run that has ended, and the server that was started with its folder."""

    checkpoint: Path
    problems: Path
    server: ServerProcess


@pytest.fixture(scope="module", params=["qwen2", "demo"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, digit_problems: Path
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen2":
        model, problems = make_digit_policy(folder / "model", tie_word_embeddings=True), digit_problems
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)  # as most models come
    else:
        demo.build_demo(folder, seed=0, num_train=64, num_test=32, num_warm_start=4000)
        model, problems = folder / "model", folder
    flags = ["--system-prompt", "", "--max-tokens", "24"] if request.param == "demo" else []
    flags += ["--model", str(model), "--dataset", str(problems), "--out-dir", str(folder / "run")]
    trained = run_script("train_gsm8k.py", *SMALL, *flags)
    assert trained.returncode == 0, trained.stderr
    checkpoint = folder / "run" / "checkpoints_gsm8k" / "step_2"
    with cpu_server(
        checkpoint, folder / "server.log", extra_args=["--max-model-len", "160", "--dtype", "float32"]
    ) as server:
        yield Served(checkpoint=checkpoint, problems=problems, server=server)


async def test_the_server_computes_with_the_weights_that_the_run_had_at_its_end(served: Served) -> None:
    tokenizer = load_tokenizer(served.checkpoint)
    policy = AutoModelForCausalLM.from_pretrained(served.checkpoint, dtype=torch.float32)  # as this server computes
    chat: list[ChatMessage] = [{"role": "user", "content": "Question 3: which one?"}]
    prompt = encode_prompt(tokenizer, chat)
    client = VLLMEngine(
        served.server.base_url,
        model=str(served.checkpoint),
        stop_token_ids=stop_token_ids(str(served.checkpoint), tokenizer),
    )
    await client.connect(tokenizer, max_seq_len=160)
    completions = await client.generate(prompt, num_completions=4, sampling=SamplingParams(max_tokens=12))
    await client.aclose()
    for completion in completions:
        with torch.no_grad():
            ids = torch.tensor([prompt + completion.token_ids])
            logprobs = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-3, rtol=0)


def test_the_evaluation_script_scores_it(served: Served, tmp_path: Path) -> None:
    flags = ["--model", str(served.checkpoint), "--dataset", str(served.problems), "--max-seq-len", "160"]
    flags += [
        "--system-prompt",
        "",
        "--limit",
        "32",
        "--max-tokens",
        "24",
        "--out-dir",
        str(tmp_path),
        "--out",
        "eval.jsonl",
    ]
    scored = run_script("eval_gsm8k_vllm.py", *flags, "--port", str(served.server.port))
    assert scored.returncode == 0, scored.stderr
    summary = json.loads((tmp_path / "eval.jsonl.summary.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert summary["num_problems"] == len(records) == 32
    assert (
        sum("boxed" in record["completions"][0]["text"] for record in records) > 16
    )  # of the tiny demo not all end in one


async def test_a_server_that_is_killed_over_a_request_is_told_of_by_the_client_and_by_its_process(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of this module for each server: it is gone afterwards."""
    monkeypatch.setattr(vllm_client, "BACKOFF_S", 0.01)
    client = VLLMEngine(served.server.base_url, model=str(served.checkpoint))
    await client.connect(load_tokenizer(served.checkpoint), max_seq_len=160)
    long = SamplingParams(max_tokens=100)

    async def without_end() -> None:  # a policy may end its turns soon
        while True:
            await client.generate([5] * 20, num_completions=256, sampling=long)

    running = [asyncio.create_task(without_end()) for _ in range(4)]
    await asyncio.sleep(0.3)
    served.server.process.kill()
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    await client.aclose()
    lost = [str(one) for one in outcomes if isinstance(one, ServerUnreachableError)]
    assert any("stopped answering in the middle of a request" in one for one in lost), outcomes
    ending = served.server.ending(wait_s=5)
    assert ending is not None and "was ended by SIGKILL" in ending
    assert ending.endswith(f"(its whole log: {served.server.log_path})")


def test_no_policy_of_ours_has_a_head_size_that_the_cpu_cannot_serve_and_others_are_refused(tmp_path: Path) -> None:
    from argparse import Namespace

    from transformers import Qwen2Config

    shapes = {name: {key: shape[key] for key in shape if key != "vocab_size"} for name, shape in SHAPES.items()}
    shapes["demo"] = demo.build_policy(demo.build_tokenizer(["a"]), 0).config.to_dict()
    shapes["of 16"] = {"hidden_size": 64, "num_attention_heads": 4}
    refused = {}
    for name, shape in shapes.items():
        sizes = {key: shape[key] for key in ("hidden_size", "num_attention_heads")}
        Qwen2Config(**sizes).save_pretrained(tmp_path / name)
        refused[name] = head_size_problem(Namespace(model=str(tmp_path / name), trust_remote_code=False))
    assert [name for name, problem in refused.items() if problem] == ["of 16"]
    assert "heads of size 16" in refused["of 16"] and "\n" not in refused["of 16"]
    assert head_size_problem(Namespace(model=str(tmp_path / "nothing"), trust_remote_code=False)) == ""
