"""Padding-free attention: the sequences of a packed row cannot see each other, and no mask of the row is ever built.

The function is registered with transformers' attention interface, so any causal language model that uses the interface
can run it. The boundaries of the segments travel as the keyword arguments that transformers passes to flash attention
(`cu_seq_lens_q` and its kin). On a GPU in bf16 or fp16 the work is one call of `torch.nn.attention.varlen`; elsewhere
one `scaled_dot_product_attention` a segment.

A prompt that several sequences share stands in the row once (see `MicroBatch`). What follows it sees it through
`key_indices`, by which keys and values are gathered along each segment's path before attention. A segment's queries are the
last of its keys, which is how causality and windows are aligned where there are fewer queries than keys.

transformers can isolate packed sequences by itself, from restarting positions, but builds a T x T mask for it and drops
the isolation without a word when it is given an attention mask or leaves `use_cache` on. Here a call without boundaries
is an error.

Left out on purpose: key-value caches (generation belongs to an engine), attention weights as an output, and what the
kernels cannot honour: logit soft-capping, attention sinks, dropout, attention in both directions. Those are refused.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ludic.task.architectures import OTHER_FAMILY, attention_problem
from ludic.types import MicroBatch

ATTENTION_NAME = "ludic_packed"
"""The name under which transformers knows this attention. No mask function is registered beside it: for a name without
one, transformers makes no mask, and does not look at the positions on the device either."""

ACTIVATION_BUDGET = 0.8
"""The share of a compiled layer's activations that is kept for its backward pass. At 0.8 the compiler makes again what costs
no matrix product (norms, the gated product of the MLP): at Qwen2.5-0.5B's shape 30,000 in place of 43,300 bytes a token
and layer."""

_VARLEN_HEAD_DIM = 256
_VARLEN_ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""torch 2.11's wrapper takes fewer key heads than query heads without being asked; later ones want to be. The kernel is
the same, and its backward returns gradients of the key heads."""


def prepare_packed_attention(model: PreTrainedModel) -> None:
    """Switch a causal language model to packed attention and to evaluation mode, in place.

    From then on its forward needs `packed_attention_kwargs`, and generating with it is refused; keep another copy of
    the weights for generation.

    Raises:
        ValueError: if the model's architecture does not take an attention function, or has layers or settings that
            packed attention cannot honour.
    """
    name = type(model).__name__
    problem = attention_problem(model)
    if problem:
        raise ValueError(f"{name} {problem}; {OTHER_FAMILY}")
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"{name} does not use transformers' attention interface, so its rows cannot be packed; {OTHER_FAMILY}"
        )
    # The policy that sampled had no dropout and no router jitter. Both hang on this flag, not on modules that could be found
    # and set to 0: many architectures call `functional.dropout(..., training=self.training)`. Gradients do not need the flag.
    model.eval()


def packed_attention_kwargs(micro_batch: MicroBatch) -> dict[str, torch.Tensor | int]:
    """The keyword arguments by which a prepared model's forward learns where the segments of a row begin and end."""
    kwargs: dict[str, torch.Tensor | int] = {
        "cu_seq_lens_q": micro_batch.cu_seqlens,
        "cu_seq_lens_k": micro_batch.cu_seqlens_k,
        "max_length_q": _rounded(micro_batch.max_seqlen),
        "max_length_k": _rounded(micro_batch.max_seqlen_k),
    }
    if micro_batch.key_indices is not None:
        # In a row that shares nothing there are as many keys as tokens: the compiler must not take that for a rule.
        torch._dynamo.maybe_mark_dynamic(micro_batch.key_indices, 0)
        kwargs["key_indices"] = micro_batch.key_indices
    return kwargs


def boundary_kwargs(cu_seqlens: torch.Tensor, max_seqlen: int) -> dict[str, torch.Tensor | int]:
    """The same for a row of separate sequences that is no micro-batch: `cu_seqlens` is [S + 1] int32, `max_seqlen` the
    longest sequence."""
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": _rounded(max_seqlen),
        "max_length_k": _rounded(max_seqlen),
    }


def _rounded(length: int) -> int:
    """Up to a multiple of 128. The kernels only size their grid by the longest segment, in blocks of 64 or 128 tokens, so
    that costs nothing, and a compiled forward meets few values."""
    return -(-length // 128) * 128


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_indices: torch.Tensor | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention along each segment of a packed row, as transformers' attention interface calls it.

    Args:
        module: The attention layer.
        query: [1, Hq, T, D]
        key: [1, Hkv, T, D], with Hq a multiple of Hkv
        value: [1, Hkv, T, D]
        attention_mask: Must be None.
        dropout: Must be 0.
        scaling: What the scores are multiplied by; None is 1 / sqrt(D).
        sliding_window: How many tokens, itself included, a token sees; None is all before it.
        softcap: Must be None.
        s_aux: Attention sinks; must be None.
        position_bias: Must be None.
        is_causal: Must not be False.
        cu_seq_lens_q: [S + 1] int32, where the segments begin and end.
        cu_seq_lens_k: [S + 1] int32, where the keys of each segment do.
        max_length_q: The length of the longest segment, or more.
        max_length_k: The most keys of a segment, or more.
        key_indices: [K], the token of the row that each key belongs to; None if the keys are the row itself.

    Returns:
        [1, T, Hq, D], and None for the attention weights.

    Raises:
        ValueError: if the boundaries are missing, or for what packed attention cannot honour.
    """
    name = type(module).__name__
    if cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
        raise ValueError(
            f"{name} was not given the boundaries of a packed row, which must be handed on to every layer (in code of your "
            f"own: packed_attention_kwargs(micro_batch) in the forward, another copy of the model to generate); {OTHER_FAMILY}"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{name}: packed attention takes one row and no cache, not queries {tuple(query.shape)} "
            f"over keys {tuple(key.shape)}; pass use_cache=False"
        )
    if (
        attention_mask is not None
        or dropout > 0
        or softcap is not None
        or s_aux is not None
        or position_bias is not None
        or not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    ):
        refused = {
            "an attention mask": attention_mask is not None,
            f"dropout {dropout}": dropout > 0,
            f"logit soft-capping {softcap}": softcap is not None,
            "attention sinks": s_aux is not None,
            "a position bias": position_bias is not None,
        }
        reasons = [reason for reason, given in refused.items() if given] or ["attention in both directions"]
        raise ValueError(f"{name}: packed attention cannot honour {', '.join(reasons)}; {OTHER_FAMILY}")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings in fp32 promote bf16 projections; varlen_attn is not on autocast's list, so cast here.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if key_indices is not None:
        key, value = _gathered(key, key_indices), _gathered(value, key_indices)
    if _varlen_can(query, key, value):
        lengths = (max_length_q, max_length_k)
        return _varlen(query, key, value, (cu_seq_lens_q, cu_seq_lens_k), lengths, scaling, sliding_window), None
    return _one_by_one(query, key, value, (cu_seq_lens_q, cu_seq_lens_k), scaling, sliding_window), None


def _gathered(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D] -> [1, H, K, D], laid out as [K, H, D].

    By way of fp32, for the way back: a shared token's gradient is the sum over all paths, which low precision would round
    at each addition. Compiled, the casts cost nothing.
    """
    return states[0].transpose(0, 1).float().index_select(0, indices).to(states.dtype).transpose(0, 1).unsqueeze(0)


def _varlen_can(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == key.shape[-1] == value.shape[-1] <= _VARLEN_HEAD_DIM
    )


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor],
    max_seqlens: tuple[int, int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T or K, H, D]
    # A window of (left, 0) is causal; left does not count the token itself, and -1 is no limit.
    run = partial(varlen_attn, scale=scaling, window_size=(-1 if window is None else window - 1, 0))
    if _VARLEN_ASKS_FOR_GQA and query.shape[1] != key.shape[1]:
        run = partial(run, enable_gqa=True)
    output = run(query, key, value, *cu_seqlens, *max_seqlens)
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0)


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    of_queries, of_keys = (boundaries.diff().tolist() for boundaries in cu_seqlens)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in zip(
        query.split(of_queries, dim=2), key.split(of_keys, dim=2), value.split(of_keys, dim=2), strict=True
    ):
        mask = None
        if q.shape[2] != k.shape[2] or (window is not None and window < k.shape[2]):
            position = torch.arange(k.shape[2], device=q.device)
            distance = position[-q.shape[2] :, None] - position[None, :]  # the queries are the last of the keys
            mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()  # as the kernel's is: some models take a view of it


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer of a prepared model, in place; goes with `compile_head` of `token_logprobs`. It costs
    some 20 s at the first micro-batches on a GPU (benchmarks/RESULTS.md), and is not worth it on a CPU. Saved weights keep
    their names.

    Raises:
        ValueError: if the model has no layers that can be told apart.
    """
    # Read when a layer is traced, and for the whole process: torch has no argument for it.
    functorch_config.activation_memory_budget = ACTIVATION_BUDGET
    for layer in decoder_layers(model, "compile: add --no-compile"):
        layer.compile(dynamic=True)


def decoder_layers(model: PreTrainedModel, purpose: str) -> list[Any]:
    """The layers of the backbone, in order. Raises ValueError, with the `purpose`, if they cannot be told apart."""
    layers = [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder layers of transformers' kind to {purpose}")
    return layers


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Recompute each decoder layer's activations in the backward pass, still in evaluation mode, in place.

    Raises:
        ValueError: if the model has no layers that can be told apart.
    """
    layers = decoder_layers(model, "recompute: leave out --gradient-checkpointing")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        # transformers recomputes only where the layer's own flag says that it trains. It is up at that question alone: the
        # layer itself would drop out by it too.
        layer.training = True
        layer._gradient_checkpointing_func = partial(
            _checkpoint_in_evaluation, layer, layer._gradient_checkpointing_func
        )


def _checkpoint_in_evaluation(
    layer: torch.nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any
) -> Any:
    def evaluated(*args: Any) -> Any:  # runs in the forward pass, and again in the backward pass
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    return checkpoint(evaluated, *args)
