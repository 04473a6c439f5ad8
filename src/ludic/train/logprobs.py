"""Token log-probabilities of a packed row.

The backbone runs once over the row; only positions whose next token is trained on meet the LM head, a chunk at a time,
and a chunk's logits are thrown away and made again in the backward pass.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ludic.train.attention import packed_attention_kwargs
from ludic.train.lm_head import Head, head_stats
from ludic.types import MicroBatch


class TokenStats(NamedTuple):
    """Entry t speaks of the token input_ids[t]; 0 where it is not trained on."""

    logprobs: torch.Tensor
    """[T] float32, with gradient: log pi(input_ids[t] | what stands before it in its sequence), at the temperature"""
    entropy: torch.Tensor
    """[T] float32, detached: the entropy in nats of the distribution that the token was drawn from"""


def token_logprobs(
    model: PreTrainedModel,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    chunk_size: int = 4096,
    with_entropy: bool = True,
    fp32_head: bool = False,
    compile_head: bool = False,
) -> TokenStats:
    """Log-probabilities and entropies of the tokens that are trained on. Logits are divided by the temperature in fp32.

    Args:
        model: A causal language model after `prepare_packed_attention`.
        micro_batch: On the model's device.
        temperature: The one that the completions were sampled at.
        chunk_size: Tokens that meet the LM head at a time; logits and their gradient need chunk_size x vocabulary x 2
            numbers of the model's dtype, half as many more with `fp32_head`.
        with_entropy: Compute entropies; zeros otherwise.
        fp32_head: Keep logits in fp32 where the model computes in bf16; without, the product rounds them.
        compile_head: Compile the work on a chunk (worth it on a GPU with a large vocabulary).

    Raises:
        ValueError: if the temperature or the chunk size is not positive, or the model has no separate LM head.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0 to train on log-probs, not {temperature}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    head = output_layer(model)._replace(fp32_product=fp32_head)
    if torch.is_autocast_enabled(head.weight.device.type):  # autocast would not reach the head's backward pass
        dtype = torch.get_autocast_dtype(head.weight.device.type)
        head = head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))
    hidden = model.base_model(
        input_ids=micro_batch.input_ids.unsqueeze(0),
        position_ids=micro_batch.position_ids.unsqueeze(0),
        use_cache=False,
        **packed_attention_kwargs(micro_batch),
    ).last_hidden_state[0]
    targets = micro_batch.input_ids.index_select(0, micro_batch.target_positions)
    if micro_batch.key_indices is not None:
        hidden = hidden.float()  # the last token of a shared prompt predicts several: their gradients add up in fp32
    predictors = hidden.index_select(0, micro_batch.predictor_positions)
    logprobs, entropy = head_stats(
        head,
        predictors.to(head.weight.dtype),
        targets,
        temperature=temperature,
        chunk_size=chunk_size,
        with_entropy=with_entropy,
        compiled=compile_head,
    )
    positions = micro_batch.target_positions
    zeros = torch.zeros(micro_batch.input_ids.shape, dtype=torch.float32, device=hidden.device)
    return TokenStats(
        logprobs=zeros.index_copy(0, positions, logprobs),
        entropy=zeros.index_copy(0, positions, entropy),
    )


def output_layer(model: PreTrainedModel) -> Head:
    """The model's output layer, with what the architecture does to its logits.

    Raises:
        ValueError: if it has none apart from its backbone, or does what is not supported.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    layer: torch.nn.Linear | None = model.get_output_embeddings()
    if layer is None or model.base_model is model:
        raise ValueError(f"{name} has no LM head apart from its backbone; load it with AutoModelForCausalLM")
    if getattr(config, "lm_head_multiplier", 1.0) != 1.0:
        raise ValueError(f"{name} multiplies its logits by lm_head_multiplier, which is not supported")
    # Cohere multiplies its logits, Granite divides them, Gemma 2 caps them.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
