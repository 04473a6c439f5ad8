"""Log-probabilities and entropies of chosen tokens under a language model's output layer, without keeping its logits.

With a vocabulary of 150,000 the logits of one micro-batch are larger than all its other activations together. Here the
positions meet the output layer a chunk at a time: forward keeps one number a position (the log of the softmax's
normaliser), backward makes the chunk's logits again and turns them into their own gradient in one pass,

    d log p(y) / d logit_v = [v = y] - p(v),

so that neither a one-hot matrix nor a second normalisation is ever made. On a GPU the passes over the logits are
compiled; the matrix products are torch's own either way. Entropies carry no gradient.

A bf16 product rounds a logit near 20 by up to 0.06, before the softmax. With `Head.fp32_product` the operands stay as they are
and the sums of their products are kept in fp32, as vLLM's `head_dtype` has it; the gradients of logits are rounded to the
operands' dtype for the two products of the backward pass, either way.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear, pad


class Head(NamedTuple):
    """The last layer of a causal language model, and what the architecture does to its logits."""

    weight: torch.Tensor
    """[V, H]"""
    bias: torch.Tensor | None
    """[V]"""
    scale: float
    softcap: float | None
    fp32_product: bool = False
    """Whether `head_stats` keeps the product's sums in fp32; it is then not rounded before the softmax."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, V] float32, the product itself in the dtype of the operands."""
        return _finished(linear(hidden, self.weight, self.bias), self.scale, self.softcap)


_PAD_TO = 128
"""On a GPU, positions are padded to a multiple of this: the compiled passes then serve every micro-batch."""

_Settings = tuple[float, float, float | None]
"""1 / temperature, scale, softcap"""


def head_stats(
    head: Head,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    chunk_size: int,
    with_entropy: bool,
    compiled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (with gradient) and entropies (without) of `targets`, both [N] float32.

    Args:
        head: The output layer.
        hidden: [N, H], the final hidden states of the positions that predict.
        targets: [N] int64, the tokens that they predict.
        temperature: Logits are divided by it.
        chunk_size: Positions whose logits are in memory at once, with as many gradients of logits in the backward pass.
        with_entropy: Zeros otherwise.
        compiled: Compile the passes over the logits.
    """
    count = hidden.shape[0]
    if compiled and count % _PAD_TO:
        hidden = pad(hidden, (0, 0, 0, -count % _PAD_TO))
        targets = pad(targets, (0, -count % _PAD_TO))
    settings: _Settings = (1.0 / temperature, head.scale, head.softcap)
    logprobs, entropy = _HeadStats.apply(  # type: ignore[no-untyped-call, unused-ignore]
        hidden, head.weight, head.bias, targets, settings, chunk_size, with_entropy, head.fp32_product, compiled
    )
    return logprobs[:count], entropy[:count]


class _HeadStats(torch.autograd.Function):
    """hidden [N, H], weight [V, H], bias [V] | None, targets [N], ... -> log-probs [N], entropies [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        settings: _Settings,
        chunk_size: int,
        with_entropy: bool,
        fp32_product: bool,
        compiled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, normaliser, entropy = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
        stats = _compiled(_stats) if compiled else _stats
        for part in _chunks(hidden.shape[0], chunk_size):
            logits = _marked(_product(hidden[part], weight, bias, fp32_product), compiled)
            logprobs[part], normaliser[part], entropy[part] = stats(
                logits, _marked(targets[part], compiled), settings, with_entropy
            )
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.settings, ctx.chunk_size, ctx.fp32_product, ctx.compiled = settings, chunk_size, fp32_product, compiled
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: torch.Tensor, _grad_entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        compiled = ctx.compiled
        grad = _compiled(_grad_logits) if compiled else _grad_logits
        grad_hidden = torch.empty_like(hidden)
        grad_weight: torch.Tensor | None = None
        grad_bias: torch.Tensor | None = None
        weight_trains, bias_trains = ctx.needs_input_grad[1:3]  # a frozen head's gradient, [V, H], is not made
        parts = _chunks(hidden.shape[0], ctx.chunk_size)
        for part in parts:
            logits = _product(hidden[part], weight, bias, ctx.fp32_product)
            grad_logits = grad(
                _marked(logits, compiled),
                _marked(targets[part], compiled),
                _marked(normaliser[part], compiled),
                _marked(grad_logprobs[part], compiled),
                ctx.settings,
                weight.dtype,
            )
            del logits
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            if weight_trains:
                product = grad_logits.t() @ hidden[part]
                if grad_weight is None:  # chunks add up in fp32: a bf16 sum would lose the small ones
                    grad_weight = product if len(parts) == 1 else product.float()
                else:
                    grad_weight += product
            if bias_trains:
                row_sum = grad_logits.sum(0, dtype=torch.float32)
                grad_bias = row_sum if grad_bias is None else grad_bias + row_sum
        if weight_trains:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        if bias_trains:
            grad_bias = torch.zeros_like(bias) if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, fp32: bool) -> torch.Tensor:
    """[N, H] x [V, H] -> [N, V], in fp32 or in the dtype of the operands."""
    if not fp32 or hidden.dtype == torch.float32:
        return linear(hidden, weight, bias)
    if not hidden.is_cuda:
        return linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    # The kernels sum in fp32 either way; here they do not round at the end, and need no copy of the weight.
    logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return logits if bias is None else logits.add_(bias)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _finished(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def _stats(
    raw: torch.Tensor, targets: torch.Tensor, settings: _Settings, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, V] -> log-probs, log-normalisers and entropies, [N] each."""
    inverse_temperature, scale, softcap = settings
    logits = _finished(raw, scale, softcap) * inverse_temperature
    largest = logits.amax(-1)
    shifted = logits - largest.unsqueeze(-1)  # never above 0: no overflow, and small sums stay exact
    exponentials = shifted.exp()
    total = exponentials.sum(-1)
    log_total = total.log()
    logprobs = shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_total
    entropy = log_total - (exponentials * shifted).sum(-1) / total if with_entropy else torch.zeros_like(logprobs)
    return logprobs, largest + log_total, entropy


def _grad_logits(
    raw: torch.Tensor,
    targets: torch.Tensor,
    normaliser: torch.Tensor,
    grad: torch.Tensor,
    settings: _Settings,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[N, V] in `dtype`: the gradient of the log-probs with regard to the product of the layer."""
    inverse_temperature, scale, softcap = settings
    finished = _finished(raw, scale, softcap)
    probabilities = (finished * inverse_temperature - normaliser.unsqueeze(-1)).exp()
    chosen = torch.arange(raw.shape[-1], device=raw.device) == targets.unsqueeze(-1)
    result = (chosen.float() - probabilities) * (grad * (inverse_temperature * scale)).unsqueeze(-1)
    if softcap is not None:
        result = result * (1.0 - (finished / softcap).square())
    return result.to(dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _marked(tensor: torch.Tensor, compiled: bool) -> torch.Tensor:
    """Tell the compiler that the number of rows varies and the vocabulary does not."""
    if compiled:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor
