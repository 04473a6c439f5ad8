"""What every test shares: settings of the process, tiny policies made in code, and one real server for a whole session.

The digit policy answers any question with a boxed random digit, so that a training run on questions whose answer is always
7 finds some reward at once, and its weights really change.
"""

import os

# Before torch is imported: on tiny tensors one thread is faster than two, and sums come out the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may look anything up

import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

from environments.gsm8k import DEFAULT_SYSTEM_PROMPT
from ludic.types import ChatMessage
from tests.vllm_helpers import cpu_server, make_tiny_model, make_tiny_tokenizer

if TYPE_CHECKING:
    from ludic.inference.client.server_process import ServerProcess

# As in a terminal: who runs the tests in the background, or under nohup, has these ignored, and children inherit that.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# How long it takes to draw inputs depends on what else the machine does; the first draw of a text also makes tables.
hypothesis.settings.register_profile("ludic", suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("ludic")

TARGET = 7
"""The answer to every question of the digit problems."""


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Qwen2 and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="session")
def digit_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with tied embeddings that answers with a boxed random digit, and then ends its turn."""
    return make_digit_policy(tmp_path_factory.mktemp("digits") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def digit_problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (12 rows) and test.jsonl (32 rows) in GSM8K's format; every answer is 7."""
    folder = tmp_path_factory.mktemp("problems")
    write_digit_problems(folder / "train.jsonl", 12)
    write_digit_problems(folder / "test.jsonl", 32)
    return folder


@pytest.fixture(scope="session")
def digit_server(
    tmp_path_factory: pytest.TempPathFactory, digit_policy_dir: Path
) -> "Iterator[tuple[ServerProcess, Path]]":
    """The one real vLLM server of a session, on the CPU, and the folder of the digit policy that it serves."""
    with cpu_server(digit_policy_dir, tmp_path_factory.mktemp("server") / "server.log") as server:
        yield server, digit_policy_dir


@torch.no_grad()
def make_digit_policy(folder: Path, *, tie_word_embeddings: bool) -> Path:
    r"""Save a tiny Qwen2 that answers `\boxed{d}` with a random digit d; the folder.

    Its weights are set by hand. Token i of the answer has the unit vector e_i as its embedding, the first MLP adds the
    vectors of the tokens that may follow, and the head reads them off; some noise makes everything else matter a little.
    """
    model = make_tiny_model(folder, tie_word_embeddings=tie_word_embeddings)
    tokenizer = make_tiny_tokenizer()
    chain = [*tokenizer.encode(r"\boxed{", add_special_tokens=False)]
    digits = tokenizer.encode("0123456789", add_special_tokens=False)
    (brace,) = tokenizer.encode("}", add_special_tokens=False)
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    stages = [[assistant], *([token] for token in chain), digits, [brace], [tokenizer.eos_token_id]]
    place = {token: number for number, token in enumerate(token for stage in stages for token in stage)}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.mul_(0.1)
            if "embed_tokens" in name or "lm_head" in name:
                for token, number in place.items():
                    parameter[token] = torch.eye(parameter.shape[1])[number]
    mlp = model.model.layers[0].mlp
    for now, following in itertools.pairwise(stages):
        for token in now:
            number = place[token]
            mlp.gate_proj.weight[number, number] = mlp.up_proj.weight[number, number] = 1.0
            for successor in following:
                mlp.down_proj.weight[place[successor], number] = 0.06
    favourite = tokenizer.encode("3", add_special_tokens=False)[0]  # so that greedy decoding is wrong before training
    mlp.down_proj.weight[place[favourite], place[chain[-1]]] = 0.065
    model.model.norm.weight.fill_(5.0)
    model.save_pretrained(folder)
    return folder


def digit_question(number: int) -> str:
    return f"Question {number % 1000}: which one?"


def digit_chat(number: int) -> list[ChatMessage]:
    return [
        {"role": "system", "content": DEFAULT_SYSTEM_PROMPT},
        {"role": "user", "content": digit_question(number)},
    ]


def write_digit_problems(path: Path, count: int) -> None:
    rows = [{"question": digit_question(i), "answer": f"It is always the same.\n#### {TARGET}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
