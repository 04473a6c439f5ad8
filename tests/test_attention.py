from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from ludic.training.attention import (
    boundary_kwargs,
    check_isolation,
    compile_layers,
    packed_attention,
    prepare_packed_attention,
)

_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 8}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_GROUPED)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_GROUPED,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=11,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{**_SHAPE, "rotary_pct": 0.5})),
}
LENGTHS = (7, 1, 12, 4)


def _model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[family]()


def _sequences(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 97, (length,), generator=generator) for length in lengths]


def _packed(model: PreTrainedModel, sequences: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    """Hidden states [T, H] of the sequences in one row, whose attention is told of `lengths`."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    hidden: torch.Tensor = model.base_model(
        input_ids=torch.cat(sequences).unsqueeze(0),
        position_ids=torch.cat([torch.arange(len(sequence)) for sequence in sequences]).unsqueeze(0),
        use_cache=False,
        **boundary_kwargs(cu_seqlens, max(lengths)),
    ).last_hidden_state[0]
    return hidden


def _separate(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    """The same, one plain transformers forward a sequence."""
    rows = [model.base_model(input_ids=sequence.unsqueeze(0)).last_hidden_state[0] for sequence in sequences]
    return torch.cat(rows)


def _gradient(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.base_model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", MODELS)
def test_packed_sequences_are_what_they_are_alone(family: str) -> None:
    model, sequences = _model(family), _sequences()
    alone = _separate(model, sequences)
    gradient_alone = _gradient(model, alone)
    prepare_packed_attention(model)
    packed = _packed(model, sequences, list(LENGTHS))
    torch.testing.assert_close(packed, alone, atol=2e-6, rtol=1e-5)
    gradient = _gradient(model, packed)
    assert (gradient - gradient_alone).norm() < 1e-5 * gradient_alone.norm()


@pytest.mark.parametrize("family", MODELS)
def test_the_comparison_would_see_a_leak(family: str) -> None:
    model, sequences = _model(family), _sequences()
    alone = _separate(model, sequences)
    prepare_packed_attention(model)
    leaked = _packed(model, sequences, [sum(LENGTHS)])  # one long sequence, as a missing boundary would have it
    assert (leaked - alone).abs().max() > 1e-2
    torch.testing.assert_close(leaked[: LENGTHS[0]], alone[: LENGTHS[0]], atol=2e-6, rtol=1e-5)


def test_a_window_shorter_than_a_sequence_is_honoured_and_not_by_chance() -> None:
    narrow = _model("gemma3")
    wide = _model("gemma3")
    for layer in wide.modules():
        if isinstance(layer, Gemma3Attention):
            layer.sliding_window = None
    for model in (narrow, wide):
        prepare_packed_attention(model)
    sequences = _sequences()
    difference = (_packed(narrow, sequences, list(LENGTHS)) - _packed(wide, sequences, list(LENGTHS))).abs()
    assert difference[:4].max() == 0  # up to the window's four tokens nothing is out of sight
    assert difference[4:7].max() > 1e-3


@pytest.mark.parametrize("family", MODELS)
def test_each_decoder_layer_is_compiled_and_the_weights_keep_their_names(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(family)
    names = list(model.state_dict())
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, dynamic: compiled.append(layer))
    compile_layers(model)
    assert compiled == list(model.base_model.get_submodule("layers").children())
    assert list(model.state_dict()) == names


def test_the_check_at_start_passes_and_leaves_the_mode_alone() -> None:
    model = _model("qwen2")
    prepare_packed_attention(model)
    model.train()
    check_isolation(model)
    assert model.training


def test_the_check_at_start_finds_positions_mixed_outside_of_attention() -> None:
    model = _model("qwen2")
    prepare_packed_attention(model)
    # A short convolution, as hybrid models have, that does not know where a sequence begins.
    model.get_submodule("model.layers.0.mlp").register_forward_hook(
        lambda _m, _i, output: output + output.roll(1, dims=1)
    )
    with pytest.raises(RuntimeError, match="Qwen2ForCausalLM lets packed sequences see each other"):
        check_isolation(model)


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_no_mask_of_the_row_by_itself_is_ever_built(family: str) -> None:
    model, lengths = _model(family), (10,) * 40
    prepare_packed_attention(model)
    with _LargestTensor() as largest:
        _packed(model, _sequences(lengths), list(lengths)).sum().backward()
    assert largest.numel <= 400 * 64 < 400 * 400  # the widest activation; a mask would be 400 x 400


def test_a_forward_without_boundaries_is_refused_and_so_is_generation() -> None:
    model = _model("qwen2")
    prepare_packed_attention(model)
    with pytest.raises(ValueError, match=r"needs packed_attention_kwargs\(micro_batch\)"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"needs packed_attention_kwargs\(micro_batch\)"):
        generate: Any = model.generate
        generate(torch.ones(1, 4, dtype=torch.int64), attention_mask=torch.ones(1, 4), max_new_tokens=2)


def test_several_rows_are_refused() -> None:
    model = _model("qwen2")
    prepare_packed_attention(model)
    with pytest.raises(ValueError, match="takes one row and no cache"):
        model(
            input_ids=torch.ones(2, 4, dtype=torch.int64),
            use_cache=False,
            **boundary_kwargs(torch.tensor([0, 4], dtype=torch.int32), 4),
        )


def _call(**changes: object) -> None:
    states = torch.zeros(1, 2, 4, 8)
    arguments: dict[str, object] = {
        "attention_mask": None,
        "cu_seq_lens_q": torch.tensor([0, 4], dtype=torch.int32),
        "max_length_q": 4,
    }
    packed_attention(torch.nn.Identity(), states, states, states, **(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "an attention mask"),
        ({"dropout": 0.1}, r"dropout 0\.1"),
        ({"softcap": 50.0}, r"logit soft-capping 50\.0"),
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"position_bias": torch.zeros(4)}, "a position bias"),
        ({"is_causal": False}, "attention in both directions"),
    ],
)
def test_what_the_kernels_cannot_honour_is_refused_by_name(changes: dict[str, object], reason: str) -> None:
    _call()
    with pytest.raises(ValueError, match=f"Identity: packed attention cannot honour {reason}"):
        _call(**changes)


def test_a_model_that_caps_its_attention_logits_is_refused_when_it_is_prepared() -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**_GROUPED))
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM caps its attention logits at 50\.0"):
        prepare_packed_attention(model)


def test_layers_that_are_not_attention_are_refused_when_a_model_is_prepared() -> None:
    model = _model("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has layers of type linear_attention"):
        prepare_packed_attention(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_varlen_kernel_agrees_with_one_attention_a_sequence(window: int | None, kv_heads: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = (33, 1, 128, 70)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        generator.manual_seed(0)
        states = [
            torch.randn(1, heads, sum(lengths), 64, generator=generator, device="cuda").to(torch.bfloat16).to(dtype)
            for heads in (4, kv_heads, kv_heads)
        ]
        for state in states:
            state.requires_grad_()
        output, _ = packed_attention(
            torch.nn.Identity(), states[0], states[1], states[2], None, scaling=0.2, sliding_window=window,
            cu_seq_lens_q=cu_seqlens, max_length_q=max(lengths),
        )  # fmt: skip
        output.float().square().sum().backward()
        return [output.detach().float(), *(state.grad.float() for state in states if state.grad is not None)]

    for fast, exact in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        assert (fast - exact).norm() < 1e-2 * exact.norm()
