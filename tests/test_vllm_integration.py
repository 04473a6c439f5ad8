"""ludic's own parts against one real vLLM server on the CPU: generation, syncs, both scripts.

The server serves the digit policy (tied embeddings, float32) for the whole session. Every test hands it the weights that
it wants first, so the order of the tests does not matter. What the server does by itself is in test_vllm_server.py.
"""

import asyncio
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ludic.inference.client import handshake
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.server_process import ServerProcess, free_port
from ludic.inference.client.vllm_client import VLLMEngine, stop_token_ids
from ludic.inference.weights.weight_sync import _Proof
from ludic.inference.weights.weight_transport import Sent, SharedMemoryTransport, WireWeights
from ludic.rollout.engine import PolicyWeights
from ludic.rollout.errors import EngineError, ServerMismatchError, WeightSyncError
from ludic.task.prompts import decode_completion, encode_prompt, load_tokenizer
from ludic.train.attention import prepare_packed_attention
from ludic.types import Completion, SamplingParams
from tests.conftest import digit_chat, make_digit_policy
from tests.printed import printed_command
from tests.vllm_helpers import CPU_SERVER_ENV, make_tiny_model, randomize_weights

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EXAMPLES = Path(__file__).parent.parent / "examples" / "gsm8k"
PROMPTS = [list(range(10, 40)), list(range(200, 150, -1)), [300]]
SETTINGS = [
    "--logprob-share",
    "1",  # the gap is checked in every update
    *("--rollouts-per-update", "32", "--group-size", "16", "--max-seq-len", "160", "--micro-token-budget", "640"),
    *("--max-tokens", "12", "--lr", "3e-3", "--warmup-steps", "0", "--train-steps", "2", "--eval-limit", "8"),
    *("--logger", "print", "--verbose"),
]


@pytest.fixture
def server(digit_server: tuple[ServerProcess, Path]) -> ServerProcess:
    return digit_server[0]


@pytest.fixture
def tokenizer(digit_policy_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(digit_policy_dir)


@pytest.fixture
async def engine(
    server: ServerProcess, digit_policy_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> AsyncIterator[VLLMEngine]:
    """A client that is connected, sends seeds, and has given the server the digit policy as version 0."""
    client = VLLMEngine(
        server.base_url,
        model=str(digit_policy_dir),
        stop_token_ids=stop_token_ids(str(digit_policy_dir), tokenizer),
        seed_requests=True,
    )
    await client.connect(tokenizer, max_seq_len=512)
    await client.enable_weight_sync(list(range(5, 60)))
    await client.update_weights(PolicyWeights(policy(digit_policy_dir), 0))
    yield client
    await client.aclose()


def plain(folder: Path, *, random_seed: int | None = None) -> PreTrainedModel:
    """The digit policy as transformers runs it, or random weights in its shape."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if random_seed is not None:
        randomize_weights(model, seed=random_seed)
    return model


def policy(folder: Path, *, random_seed: int | None = None) -> PreTrainedModel:
    """The same as the trainer has it."""
    model = plain(folder, random_seed=random_seed)
    prepare_packed_attention(model)
    return model


@torch.no_grad()
def logprobs_of(model: PreTrainedModel, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    """[C] log-probabilities of the completion's tokens, by transformers."""
    ids = torch.tensor([prompt + completion.token_ids])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    logprobs: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    return logprobs


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_log_probs_are_those_of_the_distribution_that_was_sampled_from(
    engine: VLLMEngine, digit_policy_dir: Path, temperature: float
) -> None:
    await engine.update_weights(PolicyWeights(policy(digit_policy_dir, random_seed=5), 1))
    model = plain(digit_policy_dir, random_seed=5)
    sampling = SamplingParams(temperature=temperature, max_tokens=24, seed=3)
    different_tokens = set()
    for prompt in PROMPTS:
        completions = await engine.generate(prompt, num_completions=8, sampling=sampling)
        assert len(completions) == 8
        for completion in completions:
            different_tokens.update(completion.token_ids)
            wanted = logprobs_of(model, prompt, completion, temperature)
            assert completion.logprobs is not None and completion.policy_version == 1
            torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-3, rtol=0)
    assert len(different_tokens) > 50


async def test_greedy_decoding_takes_the_most_likely_token_each_time(
    engine: VLLMEngine, digit_policy_dir: Path
) -> None:
    model = plain(digit_policy_dir, random_seed=6)
    await engine.update_weights(PolicyWeights(policy(digit_policy_dir, random_seed=6), 1))
    (completion,) = await engine.generate(
        PROMPTS[0], num_completions=1, sampling=SamplingParams(temperature=0.0, max_tokens=16)
    )
    ids = torch.tensor([PROMPTS[0] + completion.token_ids])
    likeliest = model(input_ids=ids).logits[0, len(PROMPTS[0]) - 1 : -1].argmax(-1)
    assert likeliest.tolist() == completion.token_ids


async def test_a_finished_completion_ends_with_its_stop_token_and_a_truncated_one_has_none(
    engine: VLLMEngine, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = encode_prompt(tokenizer, digit_chat(1))
    whole = await engine.generate(prompt, num_completions=6, sampling=SamplingParams(max_tokens=40, seed=1))
    for completion in whole:
        assert completion.finish_reason == "stop"
        assert completion.token_ids.index(tokenizer.eos_token_id) == len(completion.token_ids) - 1
        assert re.fullmatch(r"\\boxed\{\d\}", decode_completion(tokenizer, completion.token_ids))
    (cut,) = await engine.generate(prompt, num_completions=1, sampling=SamplingParams(max_tokens=5, seed=1))
    assert cut.finish_reason == "length" and cut.token_ids == whole[0].token_ids[:5]


async def test_a_seed_repeats_a_group_and_its_members_differ(engine: VLLMEngine, digit_policy_dir: Path) -> None:
    await engine.update_weights(PolicyWeights(policy(digit_policy_dir, random_seed=5), 1))

    async def group(seed: int, client: VLLMEngine) -> list[list[int]]:
        sampling = SamplingParams(temperature=2.0, max_tokens=12, seed=seed)
        completions = await client.generate(PROMPTS[0], num_completions=6, sampling=sampling)
        return [completion.token_ids for completion in completions]

    first = await group(11, engine)
    assert await group(11, engine) == first
    assert await group(1000, engine) != first
    assert len({tuple(ids) for ids in first}) == 6
    in_parts = VLLMEngine(engine.base_url, model=engine.model, concurrency=4, seed_requests=True)
    assert await group(11, in_parts) == first, "a group asked for in parts is not the group asked for at once"
    await in_parts.aclose()


@pytest.fixture
async def plain_client(engine: VLLMEngine) -> AsyncIterator[VLLMEngine]:
    """A client of the same server that was not told of ludic's route, so that it takes /v1/completions."""
    client = VLLMEngine(engine.base_url, model=engine.model, stop_token_ids=engine._stop_token_ids, seed_requests=True)
    yield client
    await client.aclose()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_both_routes_give_the_same_tokens_and_the_same_log_probs(
    engine: VLLMEngine,
    plain_client: VLLMEngine,
    digit_policy_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
) -> None:
    sampling = SamplingParams(temperature=temperature, max_tokens=24, seed=4)
    count = 1 if temperature == 0 else 6  # vLLM draws one greedy completion per request
    reasons = set()
    for policy_version, prompts in ((0, [encode_prompt(tokenizer, digit_chat(1))]), (1, PROMPTS)):
        if policy_version:
            await engine.update_weights(PolicyWeights(policy(digit_policy_dir, random_seed=5), 1))
        for prompt in prompts:
            ours = await engine.generate(prompt, num_completions=count, sampling=sampling)
            theirs = await plain_client.generate(prompt, num_completions=count, sampling=sampling)
            for mine, other in zip(ours, theirs, strict=True):
                assert (mine.token_ids, mine.finish_reason) == (other.token_ids, other.finish_reason)
                torch.testing.assert_close(mine.logprobs, other.logprobs, atol=1e-5, rtol=0)
                reasons.add(mine.finish_reason)
            without = await engine.generate(
                prompt, num_completions=count, sampling=dataclasses.replace(sampling, logprobs=False)
            )
            assert [one.logprobs for one in without] == [None] * count
            assert [one.token_ids for one in without] == [one.token_ids for one in ours]
    assert reasons == {"stop", "length"}


async def test_log_probs_of_many_requests_at_once_are_recorded_apart_and_nothing_of_them_stays(
    engine: VLLMEngine, server: ServerProcess, digit_policy_dir: Path
) -> None:
    await engine.update_weights(PolicyWeights(policy(digit_policy_dir, random_seed=5), 1))
    model = plain(digit_policy_dir, random_seed=5)

    def group(prompt: list[int], max_tokens: int, seed: int | None) -> asyncio.Task[list[Completion]]:
        sampling = SamplingParams(temperature=0.7, max_tokens=max_tokens, seed=seed)
        return asyncio.create_task(engine.generate(prompt, num_completions=8, sampling=sampling))

    leaving = group(PROMPTS[0], 400, None)
    groups = [(prompt, group(prompt, 3 + 20 * number, 10 * number)) for number, prompt in enumerate(PROMPTS * 3)]
    await groups[1][1]
    leaving.cancel()
    for prompt, task in groups:
        for completion in await task:
            wanted = logprobs_of(model, prompt, completion, 0.7)
            torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-3, rtol=0)
    await group(PROMPTS[0], 2, None)
    body = {"method": "ludic_recorder_sizes"}
    (sizes,) = requests.post(f"{server.base_url}/collective_rpc", json=body, timeout=10).json()["results"]
    assert sizes == {"requests": 0, "members": 0, "steps": 0, "table_bytes": 8}


async def test_a_caller_that_leaves_frees_its_places_in_the_engine(engine: VLLMEngine, digit_policy_dir: Path) -> None:
    await engine.update_weights(PolicyWeights(policy(digit_policy_dir, random_seed=5), 1))

    def metric(name: str) -> float:
        text = requests.get(f"{engine.base_url}/metrics", timeout=10).text
        return float(re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)[0])

    async def wait_until(condition: Callable[[], bool]) -> None:
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)

    sampling = SamplingParams(temperature=2.0, max_tokens=480)
    whole = await engine.generate(PROMPTS[0], num_completions=32, sampling=sampling)  # many stop before their limit
    before = metric("generation_tokens_total")
    leaving = asyncio.create_task(engine.generate(PROMPTS[0], num_completions=512, sampling=sampling))
    await wait_until(lambda: metric("generation_tokens_total") > before)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    counts = [before, metric("generation_tokens_total")]
    while counts[-1] != counts[-2]:  # a step takes some milliseconds
        await asyncio.sleep(0.5)
        counts.append(metric("generation_tokens_total"))
    of_all = 512 / 32 * sum(len(one.token_ids) for one in whole)
    assert counts[-1] - before < of_all / 2, "they were generated to their end"


@pytest.mark.parametrize(
    ("prompt", "sampling", "said"),
    [
        ([5] * 500, SamplingParams(max_tokens=13), "500 tokens and max_tokens 13 are more than .* context of 512"),
        ([5, 10**6], SamplingParams(max_tokens=8), "400: Token id 1000000 is out of vocabulary"),
        ([5], SamplingParams(temperature=3.0, max_tokens=8), "400: temperature must be"),
        ([5], SamplingParams(temperature=0.0, max_tokens=8), "400: n must be 1 when using greedy sampling"),
    ],
)
async def test_a_request_that_vllm_refuses_comes_back_with_its_reason(
    engine: VLLMEngine, prompt: list[int], sampling: SamplingParams, said: str
) -> None:
    with pytest.raises(EngineError, match=said):
        await engine.generate(prompt, num_completions=2, sampling=sampling)
    assert engine.num_retries == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "another/model"}, "serves .*, not another/model"),
        ({"max_seq_len": 513}, "context is 512 tokens, shorter than --max-seq-len 513"),
        (
            {"max_seq_len": 256, "longrope_switch": 256},
            "context is 512 tokens: beyond 256 it rotates positions .* restart it with --max-model-len 256",
        ),
        ({"tokenizer": "with another word"}, "tokenizer is not the trainer's"),
        ({"tokenizer": "with another template"}, "chat template is not the trainer's"),
    ],
    ids=str,
)
async def test_a_server_that_is_not_the_one_that_the_run_needs_is_told_apart(
    server: ServerProcess, digit_policy_dir: Path, change: dict[str, Any], said: str
) -> None:
    tokenizer = load_tokenizer(digit_policy_dir)
    if change.get("tokenizer") == "with another word":
        tokenizer.add_tokens(["boxes"])
    elif "tokenizer" in change:
        tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    client = VLLMEngine(
        server.base_url,
        model=change.get("model", str(digit_policy_dir)),
        longrope_switch=change.get("longrope_switch"),
    )
    with pytest.raises(ServerMismatchError, match=said):
        await client.connect(tokenizer, max_seq_len=change.get("max_seq_len", 512))
    await client.aclose()


# --- syncs ------------------------------------------------------------------------------------------------------------


async def test_a_sync_changes_what_is_sampled_and_reports_what_it_compared(
    engine: VLLMEngine, digit_policy_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = encode_prompt(tokenizer, digit_chat(1))
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    (before,) = await engine.generate(prompt, num_completions=1, sampling=greedy)
    report = await engine.update_weights(PolicyWeights(policy(digit_policy_dir, random_seed=5), 7))
    (after,) = await engine.generate(prompt, num_completions=1, sampling=greedy)
    assert (before.policy_version, after.policy_version) == (0, 7)
    assert before.token_ids != after.token_ids, "stale weights or a stale prefix cache"
    assert report.policy_version == 7 and report.num_tensors == 26
    assert report.logprob_gap is not None and report.logprob_gap < 1e-3
    assert "digests" in report.proof and "nats" in report.proof


class Traffic:
    """One completion a request, four requests at a time that end one after the other, each followed by the next."""

    def __init__(self, server: ServerProcess, model: Path) -> None:
        self.server, self.model = server, model
        self.running: set[int] = set()
        self._numbers = itertools.count()
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(4)
        self._streams = [self._pool.submit(self._stream, 300 + 50 * k) for k in range(4)]

    def complete(self, max_tokens: int) -> int:
        """The number of tokens of a completion that ends at ``max_tokens`` only."""
        body = {"model": str(self.model), "prompt": PROMPTS[0], "max_tokens": max_tokens}
        answer = requests.post(f"{self.server.base_url}/v1/completions", json=body | {"ignore_eos": True}, timeout=120)
        return int(answer.json()["usage"]["completion_tokens"])

    def _stream(self, max_tokens: int) -> None:
        while not self._stopping.is_set():
            number = next(self._numbers)
            self.running.add(number)
            assert self.complete(max_tokens) == max_tokens
            self.running.remove(number)

    def stop(self) -> None:
        """Lets the running requests end, and raises if one was answered with less than all of its tokens."""
        self._stopping.set()
        for stream in self._streams:
            stream.result()
        self._pool.shutdown()


async def test_generation_in_flight_goes_on_over_a_sync_and_a_request_that_comes_while_it_is_held_back_waits(
    engine: VLLMEngine, server: ServerProcess, digit_policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = PolicyWeights(policy(digit_policy_dir, random_seed=5), 3)
    control = ServerControl(server.base_url)
    traffic = Traffic(server, digit_policy_dir)
    await asyncio.to_thread(control.pause)
    try:
        held_back = asyncio.create_task(asyncio.to_thread(traffic.complete, 4))
        await asyncio.sleep(1.0)
        assert not held_back.done() and is_paused(server)
    finally:
        await asyncio.to_thread(control.resume)
    over_the_sync: list[set[int]] = []
    pause, resume = ServerControl.pause, ServerControl.resume

    def watched_pause(self: ServerControl) -> None:
        over_the_sync.append(set(traffic.running))
        pause(self)

    def watched_resume(self: ServerControl) -> None:
        over_the_sync[-1] &= traffic.running
        resume(self)

    monkeypatch.setattr(ServerControl, "pause", watched_pause)
    monkeypatch.setattr(ServerControl, "resume", watched_resume)
    report = await engine.update_weights(weights)
    (requests_over_the_sync,) = over_the_sync
    assert requests_over_the_sync, "the sync waited for running requests to end"
    assert report.logprob_gap is not None and report.logprob_gap < 1e-3
    assert await held_back == 4
    await asyncio.to_thread(traffic.stop)
    control.close()


def is_paused(server: ServerProcess) -> bool:
    return bool(requests.get(f"{server.base_url}/is_paused", timeout=10).json()["is_paused"])


async def test_one_element_that_changes_on_the_way_is_caught_and_the_old_weights_go_on_serving(
    engine: VLLMEngine, server: ServerProcess, digit_policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    (before,) = await engine.generate(PROMPTS[0], num_completions=1, sampling=greedy)
    original = ServerControl.update_weights

    def corrupt(self: ServerControl, update_info: dict[str, Any]) -> None:
        tensors = load_file(update_info["path"])  # its digests were computed before
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
        save_file(tensors, update_info["path"])
        original(self, update_info)

    monkeypatch.setattr(ServerControl, "update_weights", corrupt)
    with pytest.raises(WeightSyncError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*corrupted"):
        await engine.update_weights(PolicyWeights(policy(digit_policy_dir, random_seed=5), 1))
    assert not is_paused(server) and engine.policy_version == 0
    assert await engine.generate(PROMPTS[0], num_completions=1, sampling=greedy) == [before]


@pytest.mark.parametrize("with_digests", [True, False])
async def test_other_weights_than_the_policys_are_caught_by_digests_and_by_log_probs_alike(
    engine: VLLMEngine,
    server: ServerProcess,
    digit_policy_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_digests: bool,
) -> None:
    send, stale = SharedMemoryTransport.send, policy(digit_policy_dir, random_seed=8)

    def send_stale(self: SharedMemoryTransport, weights: WireWeights, *, weight_version: str) -> Sent:
        return send(self, WireWeights(model=stale, dtype=weights.dtype), weight_version=weight_version)

    monkeypatch.setattr(SharedMemoryTransport, "send", send_stale)
    if not with_digests:
        nothing = _Proof(total=1, compared=0, in_memory=0, inexact="")
        monkeypatch.setattr(_Proof, "of", classmethod(lambda cls, weights, control, sent: nothing))
    with pytest.raises(WeightSyncError, match="differ from those sent" if with_digests else "log-probs of the probe"):
        await engine.update_weights(PolicyWeights(policy(digit_policy_dir, random_seed=5), 1))
    assert is_paused(server), "what it holds is not the policy: nobody is to generate with it"
    monkeypatch.undo()
    await engine.update_weights(PolicyWeights(policy(digit_policy_dir), 2))
    assert not is_paused(server), "the next sync sets it right"


async def test_a_model_of_another_shape_is_refused_in_the_servers_words(
    engine: VLLMEngine, server: ServerProcess, digit_policy_dir: Path, tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path, tie_word_embeddings=True, vocab_size=640)
    prepare_packed_attention(other)
    with pytest.raises(WeightSyncError, match=r"embed_tokens\.weight"):
        await engine.update_weights(PolicyWeights(other, 1))
    assert is_paused(server)
    await engine.update_weights(PolicyWeights(policy(digit_policy_dir), 2))
    assert not is_paused(server)


# --- the scripts ------------------------------------------------------------------------------------------------------


def run_script(name: str, *flags: str, timeout_s: float = 280) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *flags],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **CPU_SERVER_ENV},
    )


def check_training(out_dir: Path, printed: str) -> None:
    """Two updates that changed the policy, each with a sync that was proven."""
    proofs = [line for line in printed.splitlines() if "weight sync" in line]
    assert [int(re.findall(r"weight sync (\d+)", line)[0]) for line in proofs] == [0, 1, 2]
    gaps = [float(re.findall(r"within (\S+) nats", line)[0]) for line in proofs]
    assert max(gaps) < 1e-3, proofs
    assert all("digests of" in line for line in proofs)
    metrics = [json.loads(line) for line in (out_dir / "gsm8k_train_metrics.jsonl").read_text().splitlines()]
    updates = [row for row in metrics if "reward_mean" in row]
    assert [row["policy_version"] for row in updates] == [1, 2]
    assert all(row["logprob_gap"] < 1e-3 and row["grad_norm"] > 0 for row in updates if row["trained_sequences"])
    assert any(row["trained_sequences"] for row in updates), "no group had any variance: nothing was trained"
    rollouts = [json.loads(line) for line in (out_dir / "gsm8k_train_rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 64 and all(row["policy_version"] == row["step"] - 1 for row in rollouts)
    summary = json.loads((out_dir / "gsm8k_train_summary.json").read_text())
    assert summary["updates"] == 2 and summary["accuracy_before"] == 0.0 and summary["eval_problems"] == 8


def test_the_training_script_trains_against_the_server_and_the_evaluation_script_scores_it(
    server: ServerProcess, digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    port = server.base_url.rpartition(":")[2]
    shared = ["--model", str(digit_policy_dir), "--port", port, "--dataset", str(digit_problems)]
    trained = run_script("train_gsm8k.py", *SETTINGS, *shared, "--out-dir", str(tmp_path))
    assert trained.returncode == 0, trained.stderr
    check_training(tmp_path, trained.stdout + trained.stderr)

    scored = run_script(
        "eval_gsm8k_vllm.py", *shared, "--limit", "32", "--max-tokens", "16", "--out-dir", str(tmp_path),
        "--out", "eval.jsonl",
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    records = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert sorted(record["index"] for record in records) == list(range(32))
    summary = json.loads((tmp_path / "eval.jsonl.summary.json").read_text())
    right = sum(record["completions"][0]["text"].endswith("{7}") for record in records)
    assert summary["num_problems"] == 32 and summary["accuracy"] == summary["strict_accuracy"] == right / 32
    assert summary["total_completion_tokens"] > 32 and summary["truncation_rate"] == 0.0

    # The server goes by the name of the folder, and holds the weights of the run that has left it.
    said = f"update 2 of the run in {tmp_path} (not those of {digit_policy_dir})"
    assert f"weights: {said}" in scored.stdout and summary["weights"]["description"] == said
    assert (summary["weights"]["policy_version"], summary["weights"]["out_dir"]) == (2, str(tmp_path))
    assert {record["completions"][0]["policy_version"] for record in records} == {2}
    command = printed_command(scored.stdout)
    assert command[command.index("--model") + 1] == f"{tmp_path}/checkpoints_gsm8k/step_2"
    assert "--start-server" in command


async def test_a_server_says_which_weights_it_holds_and_the_same_weights_have_the_same_digest_however_they_came(
    server: ServerProcess, engine: VLLMEngine, digit_policy_dir: Path
) -> None:
    control = ServerControl(server.base_url)
    same = control.weights_digest()
    await engine.update_weights(PolicyWeights(policy(digit_policy_dir), 7))
    assert control.weights_digest() == same
    other = policy(digit_policy_dir, random_seed=3)
    await engine.update_weights(PolicyWeights(other, 8))
    changed = control.weights_digest()
    assert changed != same
    with torch.no_grad():
        other.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] += 1.0  # in a layer that the CPU holds packed
    await engine.update_weights(PolicyWeights(other, 9))
    assert control.weights_digest() not in (same, changed)
    weights = handshake.server_state(control).weights  # this engine has no lease
    assert weights is not None and weights["proven"] is False


def test_the_training_script_starts_its_own_server_without_a_flag_for_it_and_ends_it(
    digit_problems: Path, tmp_path: Path
) -> None:
    model = make_digit_policy(tmp_path / "model", tie_word_embeddings=False)
    assert "lm_head.weight" in load_file(model / "model.safetensors")
    port = free_port("127.0.0.1")
    flags = ["--model", str(model), "--dataset", str(digit_problems), "--out-dir", str(tmp_path), "--start-server"]
    trained = run_script("train_gsm8k.py", *SETTINGS, *flags, "--port", str(port))
    assert trained.returncode == 0, trained.stderr
    check_training(tmp_path, trained.stdout + trained.stderr)
    assert f"the server is up at http://127.0.0.1:{port}" in trained.stdout
    assert "max_model_len" in (tmp_path / "vllm_server.log").read_text()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/health", timeout=5)


def test_the_doctor_finds_nothing_wrong_with_a_server_that_fits_and_gives_it_back(
    server: ServerProcess, digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    port = server.base_url.rpartition(":")[2]
    flags = ["--model", str(digit_policy_dir), "--dataset", str(digit_problems), "--port", port]
    flags += ["--max-seq-len", "256", "--out-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ludic.doctor", *flags],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **CPU_SERVER_ENV},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (sync,) = (line for line in lines if "weight sync" in line)
    assert sync.startswith("ok ") and "digests of those sent" in sync
    assert [line.split(":")[0] for line in lines if line.startswith("warning")] == ["warning  GPUs"], lines
    assert handshake.holder(ServerControl(server.base_url)) is None
