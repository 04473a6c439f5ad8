"""A model's shape from its config, and what follows from it alone: parameters, activations, bytes of the KV cache."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMED: dict[str, dict[str, Any]] = {
    "0.5B": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "32B": {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
            "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "70B": {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
"""The public shapes of Qwen2.5 (0.5B to 32B) and of Llama 3 (70B)."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose parameters are counted."""
_BF16 = 2
_FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The dimensions of a dense decoder with gated MLPs."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the output layer's matrix is the embedding's."""
    qkv_bias: bool
    output_bias: bool
    """Of the attention's output projection."""
    mlp_bias: bool
    head_norms: bool
    """Whether each head's queries and keys are normalised (Qwen3)."""

    @property
    def query_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's seven matrices: q, k, v, o, gate, up, down."""
        h, i, q, kv = self.hidden, self.intermediate, self.query_dim, self.kv_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    @property
    def layer_parameters(self) -> int:
        biases = (
            self.qkv_bias * (self.query_dim + 2 * self.kv_dim)
            + self.output_bias * self.hidden
            + self.mlp_bias * (2 * self.intermediate + self.hidden)
        )
        norms = 2 * self.hidden + self.head_norms * 2 * self.head_dim
        return sum(inputs * outputs for inputs, outputs in self.linears) + biases + norms

    @property
    def vocabulary_parameters(self) -> int:
        """Of one matrix over the vocabulary."""
        return self.vocabulary * self.hidden

    @property
    def root_parameters(self) -> int:
        """Outside the layers: embedding, output layer, last norm."""
        return self.vocabulary_parameters * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them; a tied matrix counts once."""
        return self.layers * self.layer_parameters + self.root_parameters

    def adapter_parameters(self, rank: int) -> int:
        """Of LoRA (arXiv 2106.09685) on all seven matrices of each layer: A [rank, inputs] and B [outputs, rank] of each."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linears)

    @property
    def activation_bytes(self) -> int:
        """What a compiled layer keeps of a token for its backward pass, at the compiler's activation budget of
        `ludic.train.attention.ACTIVATION_BUDGET`.

        In bf16: the inputs of its two halves, queries, keys, values, the attention's output, gate and up; in fp32: the
        attention's normaliser of each head, the scales of both norms. Norms and the gated product are made again.
        """
        kept = 2 * self.hidden + 2 * self.query_dim + 2 * self.kv_dim + 2 * self.intermediate
        kept += self.head_norms * (self.query_dim + self.kv_dim)
        scales = 2 + self.heads + self.head_norms * (self.heads + self.kv_heads)
        return _BF16 * kept + _FP32 * scales

    @property
    def kv_cache_bytes(self) -> int:
        """Of a token in all layers, in bf16."""
        return 2 * _BF16 * self.layers * self.kv_dim


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """The shape in a config as transformers writes it.

    Raises:
        ValueError: the family is not one of `FAMILIES`, the weights are quantised, or a dimension is missing.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{name}: parameters of model_type {family!r} are not counted: take one of {', '.join(FAMILIES)}"
        )
    if config.get("quantization_config"):
        raise ValueError(f"{name} is quantised: name the folder of the bf16 weights, which are what is trained")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        bias = bool(config.get("attention_bias"))
        return Shape(
            name=name,
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or (family != "mistral" and bias),
            output_bias=family in ("llama", "qwen3") and bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
            head_norms=family == "qwen3",
        )
    except KeyError as error:
        raise ValueError(f"{name}: its config.json has no {error.args[0]}: name the folder of a whole model") from error


def read_shape(model: str) -> Shape:
    """A named shape, or that of a folder with config.json.

    Raises:
        ValueError: there is no such name or folder, or `shape_of` refuses its config.
    """
    if model in NAMED:
        return shape_of(NAMED[model], model)
    path = Path(model).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--model {model}: take one of {', '.join(NAMED)}, or a folder with config.json") from error
    except ValueError as error:
        raise ValueError(f"--model {model}: its config.json is no JSON ({error}): save the model again") from error
    if not isinstance(config, dict):
        raise ValueError(f"--model {model}: its config.json holds no object: save the model again")
    return shape_of(config, model)
