"""Padding-free attention: the sequences of a packed row cannot see each other, and no mask is ever built.

The function is registered with transformers' attention interface, so any causal language model that uses the interface
can run it. The sequence boundaries travel as the keyword arguments that transformers passes to flash attention
(`cu_seq_lens_q` and its kin). On a GPU in bf16 or fp16 the work is one call of `torch.nn.attention.varlen`; elsewhere
one `scaled_dot_product_attention` a sequence, which on the CPU is faster than one padded batch at the head sizes of
small models (14 against 19 ms, forward and backward, for 32 sequences of 60 to 120 tokens).

transformers can isolate packed sequences by itself, from restarting positions, but builds a T x T mask for it and drops
the isolation without a word when it is given an attention mask or leaves `use_cache` on. Here a call without boundaries
is an error.

Left out on purpose: key-value caches (generation belongs to an engine), attention weights as an output, and what the
kernels cannot honour: logit soft-capping, attention sinks, dropout, attention in both directions. Those are refused.
"""

import inspect
from functools import partial

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ludic.types import MicroBatch

ATTENTION_NAME = "ludic_packed"
"""The name under which transformers knows this attention. No mask function is registered beside it: for a name without
one, transformers makes no mask, and does not look at the positions on the device either."""

_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
_VARLEN_HEAD_DIM = 256
_VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def prepare_packed_attention(model: PreTrainedModel) -> None:
    """Switch a causal language model to packed attention, in place.

    From then on its forward needs `packed_attention_kwargs`, and generating with it is refused; keep another copy of
    the weights for generation.

    Raises:
        ValueError: if the model's architecture does not take an attention function, or has layers or settings that
            packed attention cannot honour.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYERS
    if layers:
        raise ValueError(f"{name} has layers of type {', '.join(sorted(layers))}, which packed rows would leak through")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"{name} caps its attention logits at {config.attn_logit_softcapping}, which packed attention cannot do; "
            "set attn_logit_softcapping to None, or choose another model"
        )
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(f"{name} does not use transformers' attention interface, so its rows cannot be packed")


def packed_attention_kwargs(micro_batch: MicroBatch) -> dict[str, torch.Tensor | int]:
    """The keyword arguments by which a prepared model's forward learns where the sequences of a row begin and end."""
    return boundary_kwargs(micro_batch.cu_seqlens, micro_batch.max_seqlen)


def boundary_kwargs(cu_seqlens: torch.Tensor, max_seqlen: int) -> dict[str, torch.Tensor | int]:
    """The same for a row that is no micro-batch: `cu_seqlens` is [S + 1] int32, `max_seqlen` the longest sequence."""
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
    }


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
    max_length_q: int | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a packed row, as transformers' attention interface calls it.

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
        cu_seq_lens_q: [S + 1] int32, where the sequences begin and end.
        max_length_q: The length of the longest.

    Returns:
        [1, T, Hq, D], and None for the attention weights.

    Raises:
        ValueError: if the boundaries are missing, or for what packed attention cannot honour.
    """
    name = type(module).__name__
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(
            f"{name} runs packed attention, which needs packed_attention_kwargs(micro_batch) in the forward"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{name}: packed attention takes one row and no cache, not queries {tuple(query.shape)} "
            f"over keys {tuple(key.shape)}; pass use_cache=False"
        )
    refused = {
        "an attention mask": attention_mask is not None,
        f"dropout {dropout}": dropout > 0,
        f"logit soft-capping {softcap}": softcap is not None,
        "attention sinks": s_aux is not None,
        "a position bias": position_bias is not None,
        "attention in both directions": not (getattr(module, "is_causal", True) if is_causal is None else is_causal),
    }
    if any(refused.values()):
        raise ValueError(f"{name}: packed attention cannot honour {', '.join(k for k, v in refused.items() if v)}")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings in fp32 promote bf16 projections; varlen_attn is not on autocast's list, so cast here.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if _varlen_can(query, key, value):
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, window), None
    return _one_by_one(query, key, value, cu_seq_lens_q, scaling, window), None


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
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, D]
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _VARLEN_HAS_GQA:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    # A window of (left, 0) is causal; left does not count the token itself, and -1 is no limit.
    run = partial(varlen_attn, scale=scaling, window_size=(-1 if window is None else window - 1, 0))
    if groups > 1:
        run = partial(run, enable_gqa=True)
    output = run(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0)


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    lengths = cu_seqlens.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = None
        if window is not None and window < q.shape[2]:
            position = torch.arange(q.shape[2], device=q.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < window)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer of a prepared model, in place; goes with `compile_head` of `token_logprobs`. It costs
    some 20 s at the first micro-batches on a GPU (benchmarks/RESULTS.md), and is not worth it on a CPU. Saved weights keep
    their names.

    Raises:
        ValueError: if the model has no layers that can be told apart.
    """
    layers = [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no decoder layers of transformers' kind to compile; do not ask for it"
        )
    for layer in layers:
        layer.compile(dynamic=True)


def check_isolation(model: PreTrainedModel) -> None:
    """Prove on a prepared model, with three tiny forwards, that a packed sequence cannot see the one before it.

    Worth its milliseconds once a run: an architecture may mix positions outside its attention layers.

    Raises:
        RuntimeError: if changing the first sequence changes the second, or the second differs from itself alone.
    """
    device = next(model.parameters()).device
    vocabulary: int = model.config.get_text_config().vocab_size
    first, other, second = (torch.arange(5) + start for start in (1, 11, 21))
    second = second % vocabulary

    def hidden(*sequences: torch.Tensor) -> torch.Tensor:
        lengths = [len(sequence) for sequence in sequences]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        states: torch.Tensor = model.base_model(
            input_ids=(torch.cat(sequences) % vocabulary).unsqueeze(0).to(device),
            position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device),
            use_cache=False,
            **boundary_kwargs(cu_seqlens, max(lengths)),
        ).last_hidden_state
        return states[0, -len(second) :].float()

    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            alone, packed, changed = hidden(second), hidden(first, second), hidden(other, second)
    finally:
        model.train(training)
    differences = torch.stack([packed - changed, packed - alone]).norm(dim=-1)
    # A leak may touch one token only. Kernels round differently for another shape: in bf16 by well under a percent.
    gap = float((differences / alone.norm(dim=-1)).max())
    if not gap < 0.03:
        raise RuntimeError(
            f"{type(model).__name__} lets packed sequences see each other (relative difference {gap:.2g}); "
            "its architecture mixes positions outside of attention, so it cannot be trained on packed rows"
        )
