"""What tests of the vLLM server share: tiny random models in checkpoint format, and a CPU server that serves one.

The models are made in code, tokenizer and chat template included, so that no test needs a download.
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from ludic.inference.client.server_process import ServerProcess, start_server

if TYPE_CHECKING:
    import pytest
    from transformers import PretrainedConfig, PreTrainedModel

CPU_SERVER_ARGS = (
    *("--max-model-len", "512", "--max-num-seqs", "32"),  # limits that tests reach
    "--enable-log-stats",  # so that a test can see what runs in the engine
)
CPU_SERVER_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 5 special tokens and 256 bytes, so that any text goes round unchanged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=_SPECIAL_TOKENS[2:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(family: str, *, tie_word_embeddings: bool, vocab_size: int = 512) -> "PretrainedConfig":
    """The configuration of a two-layer model of about 0.2M parameters: hidden 64, 2 heads of 32, 1 KV head."""
    classes = {"qwen2": Qwen2Config, "llama": LlamaConfig, "gemma": GemmaConfig}
    config: PretrainedConfig = classes[family](
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
    )
    return config


def make_tiny_model(
    path: Path, *, tie_word_embeddings: bool, family: str = "qwen2", seed: int = 0, vocab_size: int = 512
) -> "PreTrainedModel":
    """Save a random model with its tokenizer at `path`, in transformers' format, and return it (float32, on the CPU).

    The weights are larger than an initialisation's, so that log-probs differ clearly from a uniform distribution's and
    two seeds clearly from one another.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(family, tie_word_embeddings=tie_word_embeddings, vocab_size=vocab_size)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        randomize_weights(model, seed=seed)
    model.save_pretrained(path)
    make_tiny_tokenizer().save_pretrained(path)
    return model


@torch.no_grad()
def randomize_weights(model: "PreTrainedModel", *, seed: int) -> None:
    """Draw new matrices and biases, scaled so that activations keep their size; norms stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = 0.3 if "embed" in name or "lm_head" in name else 1.5 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        elif name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def prompt_logprobs(model: "PreTrainedModel", token_ids: Sequence[int]) -> list[float]:
    """[len(token_ids) - 1] natural log-probabilities of each token after the first, by transformers."""
    ids = torch.tensor([list(token_ids)])
    logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    values: list[float] = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return values


@contextlib.contextmanager
def cpu_server(
    model: Path, log_path: Path, *, extra_args: Sequence[str] = (), api_key: str | None = None
) -> Iterator[ServerProcess]:
    """A real vLLM server on the CPU, up in 45 to 60 s; needs the environment that
    scripts/make_vllm_cpu_env.sh makes."""
    with start_server(
        str(model),
        extra_args=[*CPU_SERVER_ARGS, *extra_args],
        api_key=api_key,
        log_path=log_path,
        timeout_s=300,
        python=sys.executable,
        env=CPU_SERVER_ENV,
    ) as server:
        yield server


@contextlib.contextmanager
def tiny_server(
    tmp_path_factory: "pytest.TempPathFactory", tied: bool, *, api_key: str | None = None
) -> Iterator[tuple[ServerProcess, Path]]:
    """A CPU server with a tiny Qwen2 model, and the model's folder; for a fixture of session scope."""
    folder = tmp_path_factory.mktemp("tied" if tied else "untied")
    make_tiny_model(folder / "model", tie_word_embeddings=tied)
    with cpu_server(folder / "model", folder / "server.log", api_key=api_key) as server:
        yield server, folder / "model"
