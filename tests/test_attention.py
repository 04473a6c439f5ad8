from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from ludic.train import attention
from ludic.train.attention import (
    boundary_kwargs,
    checkpoint_layers,
    compile_layers,
    packed_attention,
    packed_attention_kwargs,
    prepare_packed_attention,
)
from ludic.train.packing import pack
from ludic.types import MicroBatch, TrainingSample

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


GROUPS = ((6, (7, 1, 12)), (1, (4, 9)), (11, (3,)))
"""(prompt, completions): tokens of each group, of which one has a prompt of one token and one has nothing to share"""


def _row(groups: tuple[tuple[int, tuple[int, ...]], ...] = GROUPS, seed: int = 2) -> MicroBatch:
    """One row of groups whose samples share a prompt."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        tokens: list[int] = torch.randint(1, 97, (length,), generator=generator).tolist()
        return tokens

    samples = []
    for prompt, completions in groups:
        prompt_ids = ids(prompt)
        samples += [
            TrainingSample(
                token_ids=[*prompt_ids, *ids(completion)],
                loss_mask=[i >= prompt for i in range(prompt + completion)],
                rollout_logprobs=None,
                advantage=1.0,
            )
            for completion in completions
        ]
    (row,) = pack(samples, token_budget=100_000, normalisation="token_mean")
    return row


def _forward(model: PreTrainedModel, row: MicroBatch) -> torch.Tensor:
    """Hidden states [T, H] of a row."""
    hidden: torch.Tensor = model.base_model(
        input_ids=row.input_ids.unsqueeze(0),
        position_ids=row.position_ids.unsqueeze(0),
        use_cache=False,
        **packed_attention_kwargs(row),
    ).last_hidden_state[0]
    return hidden


def _along_paths(row: MicroBatch) -> list[torch.Tensor]:
    """Of each sequence in the row, where its tokens stand, shared ones included."""
    assert row.key_indices is not None
    paths = row.key_indices.split(row.cu_seqlens_k.diff().tolist())
    return [path for index, path in zip(row.sample_indices, paths, strict=True) if index >= 0]


def _gradient(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)).sum().backward()
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


@pytest.mark.parametrize("family", MODELS)
def test_sequences_with_a_shared_prompt_are_what_they_are_alone(family: str) -> None:
    model, row = _model(family), _row()
    paths = _along_paths(row)
    alone = _separate(model, [row.input_ids[path] for path in paths])
    gradient_alone = _gradient(model, alone)
    prepare_packed_attention(model)
    shared = _forward(model, row)
    assert shared.shape[0] == alone.shape[0] - 2 * 6 - 1  # the prompts of two groups stand once
    shared = shared[torch.cat(paths)]
    torch.testing.assert_close(shared, alone, atol=2e-6, rtol=1e-5)
    gradient = _gradient(model, shared)
    assert (gradient - gradient_alone).norm() < 1e-5 * gradient_alone.norm()


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


@torch.library.custom_op("ludic_tests::varlen", mutates_args=())
def _stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window: list[int],
) -> torch.Tensor:
    """What the GPU's kernel computes, in the shapes and with the arguments of the kernel."""
    assert (max_q, max_k) >= (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    states = [state.transpose(0, 1).unsqueeze(0) for state in (query, key, value)]
    width = None if window[0] == -1 else window[0] + 1
    return attention._one_by_one(states[0], states[1], states[2], (cu_seq_q, cu_seq_k), scale, width)[0].contiguous()


@_stand_in.register_fake
def _(query: torch.Tensor, *_rest: object) -> torch.Tensor:
    return torch.empty_like(query)


@contextmanager
def _kernel_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def varlen_attn(*tensors_and_lengths: Any, scale: float | None, window_size: tuple[int, int], **_: bool) -> Any:
        return torch.ops.ludic_tests.varlen(*tensors_and_lengths, scale, list(window_size))

    with monkeypatch.context() as patch:
        patch.setattr(attention, "varlen_attn", varlen_attn)
        patch.setattr(attention, "_varlen_can", lambda *_: True)
        yield


@pytest.mark.parametrize(("family", "kinds_of_layer"), [("qwen2", 1), ("llama", 1), ("gemma3", 2)])
def test_compiled_layers_serve_rows_of_every_shape_from_one_graph_for_each_kind_of_layer(
    family: str, kinds_of_layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graphs = _model(family), 0
    prepare_packed_attention(model)
    rows = [
        _row(((28, (100,)),)),  # one sequence alone, whose length is also the number of keys and the longest segment
        _row(),
        _row(((1, (1, 1)),)),
        _row(((40, (200, 3, 97, 1, 30)), (2, (5,)), (13, (1, 2, 3, 4)))),
        _row(((9, (128,)), (3, (2,)), (60, (90, 91)))),
    ]

    def counted(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **kwargs: compiled(layer, backend=counted, **kwargs))
    torch._dynamo.reset()
    with _kernel_on_the_cpu(monkeypatch), torch.no_grad():
        eager = [_forward(model, row) for row in rows]
        compile_layers(model)
        for row, expected in zip(rows, eager, strict=True):
            torch.testing.assert_close(_forward(model, row), expected, atol=2e-6, rtol=1e-5)
            assert graphs == kinds_of_layer  # a graph break or a new compilation would make more
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_compiled_layers_have_the_gradient_of_plain_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, row = _model(family), _row()
    prepare_packed_attention(model)
    expected = _gradient(model, _forward(model, row))
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda layer, **kwargs: compiled(layer, backend="aot_eager", **kwargs)
    )
    torch._dynamo.reset()
    compile_layers(model)
    torch.testing.assert_close(_gradient(model, _forward(model, row)), expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_recomputed_layers_run_twice_in_evaluation_mode_and_give_the_same_gradient(family: str) -> None:
    model, row = _model(family), _row()
    prepare_packed_attention(model)
    expected, layer = _gradient(model, _forward(model, row)), model.get_submodule("model.layers.1")
    modes: list[bool] = []
    layer.register_forward_pre_hook(lambda module, _inputs: modes.append(module.training))
    checkpoint_layers(model)
    assert torch.equal(_gradient(model, _forward(model, row)), expected)
    assert modes == [False, False]


def test_layers_that_cannot_be_told_apart_are_not_recomputed_silently() -> None:
    model = _model("qwen2")
    model.base_model.layers = torch.nn.ModuleList()
    with pytest.raises(
        ValueError, match=r"Qwen2ForCausalLM has no decoder layers .* leave out --gradient-checkpointing"
    ):
        checkpoint_layers(model)


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
    with pytest.raises(
        ValueError, match=r"was not given the boundaries of a packed row, .*; train one of another family"
    ):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"was not given the boundaries of a packed row, .*; train one of another family"
    ):
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
        **boundary_kwargs(torch.tensor([0, 4], dtype=torch.int32), 4),
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
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (14, 2)])
def test_the_varlen_kernel_agrees_with_one_attention_a_segment(
    heads: int, kv_heads: int, window: int | None, shared: bool
) -> None:
    row = _row(((33, (1, 128, 70)), (100, (5, 60, 7, 9)), (1, (3, 3)), (9, (200,)))).to(torch.device("cuda"))
    generator = torch.Generator("cuda")
    kwargs: Any = packed_attention_kwargs(row)
    if not shared:
        kwargs = boundary_kwargs(row.cu_seqlens, row.max_seqlen)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        generator.manual_seed(0)
        states = [
            torch.randn(1, number, row.input_ids.numel(), 64, generator=generator, device="cuda")
            .to(torch.bfloat16)
            .to(dtype)
            .requires_grad_()
            for number in (heads, kv_heads, kv_heads)
        ]
        query, key, value = states
        output, _ = packed_attention(
            torch.nn.Identity(), query, key, value, None, scaling=0.2, sliding_window=window, **kwargs
        )
        output.float().square().sum().backward()
        return [output.detach().float(), *(state.grad.float() for state in states if state.grad is not None)]

    results = list(zip(run(torch.bfloat16), run(torch.float32), strict=True))
    assert len(results) == 4
    for fast, exact in results:
        assert fast.shape == exact.shape
        assert (fast - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_in_bf16_on_a_gpu_a_shared_prompt_learns_what_it_learns_in_separate_rows(family: str, compiled: bool) -> None:
    rows = [_row(((60, (90, 3, 128, 40)), (20, (7, 9)), (5, (64,))), seed) for seed in (3, 4)]
    rows += [_row(((33, (5, 200)),), seed=5)]
    model = _model(family)
    for dtype in (torch.bfloat16, torch.float32):  # weights that both have, so that only what is computed differs
        torch.nn.Module.to(model, dtype)
    expected = torch.zeros(())
    for row in rows:
        alone = _separate(model, [row.input_ids[path] for path in _along_paths(row)])
        expected = expected + _gradient(model, alone)  # [all parameters], in fp32 on the CPU
    torch.nn.Module.to(model, "cuda", torch.bfloat16)
    prepare_packed_attention(model)
    if compiled:
        torch._dynamo.reset()
        compile_layers(model)
    gradient = torch.zeros(())
    for row in rows:
        hidden = _forward(model, row.to(torch.device("cuda")))
        paths = torch.cat(_along_paths(row)).cuda()
        along = hidden.float().index_select(0, paths)
        gradient = gradient + _gradient(model, along).float().cpu()
    assert (gradient - expected).norm() < 2e-2 * expected.norm()
