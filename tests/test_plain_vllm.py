"""An evaluation against plain vLLM, started without ludic: the model's generation_config.json must not sample in its place."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.server_process import free_port
from ludic.inference.client.vllm_client import VLLMEngine, stop_token_ids
from ludic.rollout.local import LocalEngine
from ludic.task.prompts import load_tokenizer
from ludic.types import SamplingParams
from tests.vllm_helpers import CPU_SERVER_ARGS, CPU_SERVER_ENV, make_tiny_model, prompt_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "examples" / "gsm8k" / "eval_gsm8k_vllm.py"
NOT_NEUTRAL = {"do_sample": True, "repetition_penalty": 1.3, "top_k": 20, "top_p": 0.8, "temperature": 0.7}
PROMPTS = [list(range(first, first + 12)) for first in range(10, 250, 30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "model"
    make_tiny_model(path, tie_word_embeddings=True, seed=3)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "pad_token_id": 0, **NOT_NEUTRAL}))
    return path


@pytest.fixture(scope="module")
def base_url(folder: Path) -> Iterator[str]:
    """vLLM's own server, which serves the folder as `policy`."""
    port = free_port("127.0.0.1")
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    words += ["--served-model-name", "policy", "--host", "127.0.0.1", *CPU_SERVER_ARGS]
    words += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "256M"]  # not 92% of the memory
    words.remove("--enable-log-stats")  # ludic's own flag
    with (folder.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **CPU_SERVER_ENV})
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while not _healthy(url):
            assert process.poll() is None and time.monotonic() < deadline, (folder.parent / "server.log").read_text()
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def _healthy(url: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(f"{url}/health", timeout=5).ok
    return False


async def test_greedy_completions_are_those_of_the_model_whatever_its_generation_config_says(
    base_url: str, folder: Path
) -> None:
    tokenizer = load_tokenizer(folder)
    greedy = SamplingParams(temperature=0.0, max_tokens=24, logprobs=False)
    engine = VLLMEngine(base_url, model="policy", stop_token_ids=stop_token_ids(str(folder), tokenizer))
    local = LocalEngine.from_pretrained(folder)
    await engine.connect(tokenizer)
    for prompt in PROMPTS:
        (served,) = await engine.generate(prompt, num_completions=1, sampling=greedy)
        (wanted,) = await local.generate(prompt, num_completions=1, sampling=greedy)
        assert served.token_ids == wanted.token_ids
        body = {"model": "policy", "prompt": prompt, "max_tokens": 24, "temperature": 0.0, "return_token_ids": True}
        answer = requests.post(f"{base_url}/v1/completions", json=body, timeout=60).json()
        # The file's repetition penalty changes what repeats a token of the prompt or of itself, and nothing else.
        repeats = len({*prompt, *wanted.token_ids}) < len(prompt) + len(wanted.token_ids)
        assert (answer["choices"][0]["token_ids"] != wanted.token_ids) == repeats
    await engine.aclose()
    await local.aclose()


async def test_the_probe_of_a_sync_asks_for_the_models_own_log_probs(base_url: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    control = ServerControl(base_url)
    served = control.prompt_logprobs("policy", PROMPTS[0], cache_salt="probe")
    assert served == pytest.approx(prompt_logprobs(AutoModelForCausalLM.from_pretrained(folder), PROMPTS[0]), abs=1e-3)


def test_an_evaluation_says_what_plain_vllm_does_not_tell_and_records_every_sampling_value(
    base_url: str, folder: Path, digit_problems: Path, tmp_path: Path
) -> None:
    flags = ["--model", "policy", "--tokenizer", str(folder), "--base-url", base_url, "--dataset", str(digit_problems)]
    flags += ["--limit", "4", "--max-tokens", "8", "--out-dir", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "weights: what the server serves as policy; it does not say which they are" in ended.stdout
    assert f"train_gsm8k.py --model {folder} --dataset {digit_problems} --start-server --port 8001" in ended.stdout
    settings = json.loads((tmp_path / "gsm8k_eval.jsonl.settings.json").read_text())
    said: dict[str, object] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    said |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": [1], "seeded": False}
    assert settings.items() >= said.items()
    assert settings["weights"].startswith("files ")
