"""The output layer without its logits: the same log-probs, entropies and gradients as the plain way, whatever the chunks."""

from typing import Any

import pytest
import torch
from torch.nn.functional import linear, one_hot

from ludic.train.lm_head import Head, head_stats

TEMPERATURE = 0.7
HEADS = {
    "plain": (False, 1.0, None),
    "bias": (True, 1.0, None),
    "scaled": (False, 0.25, None),
    "capped": (True, 0.5, 30.0),
}
"""(bias, scale, softcap)"""


def tensors(*, bias: bool, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    shapes: list[tuple[int, ...] | None] = [(300, 32), (97, 32), (97,) if bias else None]
    return [
        None if shape is None else torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes
    ]


def plain(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, temperature: float = TEMPERATURE
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = (head.logits(hidden) / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def gradients(logprobs: torch.Tensor, weights: torch.Tensor, leaves: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return list(torch.autograd.grad((logprobs * weights).sum(), [leaf for leaf in leaves if leaf is not None]))


@pytest.mark.parametrize("chunk_size", [1, 128, 300, 1000])
@pytest.mark.parametrize("kind", HEADS)
def test_log_probs_entropies_and_gradients_are_those_of_full_logits(kind: str, chunk_size: int) -> None:
    bias, scale, softcap = HEADS[kind]
    leaves = tensors(bias=bias)
    hidden, weight, bias_leaf = leaves
    assert hidden is not None and weight is not None
    head = Head(weight, bias_leaf, scale, softcap)
    targets, weights = torch.randint(97, (300,)), torch.randn(300)
    logprobs, entropy = head_stats(
        head, hidden, targets, temperature=TEMPERATURE, chunk_size=chunk_size, with_entropy=True, compiled=False
    )
    expected, expected_entropy = plain(hidden, head, targets)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(logprobs, weights, leaves), gradients(expected, weights, leaves)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("chunk_size", [64, 300])
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_a_frozen_heads_gradient_is_not_made_and_the_others_are_the_same(
    frozen: tuple[str, ...], chunk_size: int
) -> None:
    targets, weights = torch.randint(97, (300,)), torch.randn(300)

    def passed_back(*frozen: str) -> dict[str, torch.Tensor | None]:
        hidden, weight, bias = tensors(bias=True)
        assert hidden is not None and weight is not None and bias is not None
        weight.requires_grad_("weight" not in frozen)
        bias.requires_grad_("bias" not in frozen)
        logprobs, _ = head_stats(
            Head(weight, bias, 1.0, None),
            hidden,
            targets,
            temperature=TEMPERATURE,
            chunk_size=chunk_size,
            with_entropy=False,
            compiled=False,
        )
        # What the function itself returns: autograd would hide a gradient that nobody asked for.
        made: Any = logprobs.grad_fn
        if made.name() == "SliceBackward0":
            made = made.next_functions[0][0]
        with torch.no_grad():
            returned = made.apply(weights, torch.zeros(300))
        return dict(zip(("hidden", "weight", "bias"), returned[:3], strict=True))

    every, some = passed_back(), passed_back(*frozen)
    assert {name for name, gradient in some.items() if gradient is None} == set(frozen)
    for name in every.keys() - set(frozen):
        one, other = every[name], some[name]
        assert one is not None and other is not None and torch.equal(one, other)


def test_entropies_have_no_gradient_and_can_be_left_out() -> None:
    hidden, weight, _ = tensors(bias=False)
    assert hidden is not None and weight is not None
    targets = torch.zeros(300, dtype=torch.int64)
    settings = {"temperature": 1.0, "chunk_size": 64, "compiled": False}
    with_it, entropy = head_stats(Head(weight, None, 1.0, None), hidden, targets, with_entropy=True, **settings)  # type: ignore[arg-type]
    without, zeros = head_stats(Head(weight, None, 1.0, None), hidden, targets, with_entropy=False, **settings)  # type: ignore[arg-type]
    assert with_it.requires_grad and not entropy.requires_grad and entropy.min() > 0
    assert torch.equal(with_it, without) and not zeros.any()


def test_a_certain_prediction_has_a_log_prob_near_0_and_no_overflow() -> None:
    weight = torch.eye(4) * 1e4
    logprobs, entropy = head_stats(
        Head(weight, None, 1.0, None),
        torch.eye(4),
        torch.tensor([0, 1, 2, 0]),
        temperature=1.0,
        chunk_size=4,
        with_entropy=True,
        compiled=False,
    )
    assert logprobs.tolist() == [0.0, 0.0, 0.0, -1e4]
    assert entropy.tolist() == [0.0] * 4


BF16_ROUNDOFF = 2.0**-8
"""A significand of 8 bits: rounding to nearest moves a number by at most this share of itself (numpy's eps is twice it)."""


def rounding_errors(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> list[torch.Tensor]:
    """Standard deviations of entropies and gradients, all in fp32, where bf16 rounds what it must; to first order.

    One rounding of x is an error within 2^-8 |x|, of variance (2^-8 x)^2 / 3 where it is uniform; independent variances add
    up. Rounded are each logit z (twice where a bias is added to it), each gradient of a logit, and each product of those.
    t = f(z) / T is what the softmax sees, and an error of t is a relative error of its probability:

        d log p_v = dt_v - sum_w p_w dt_w        dH = -sum_v p_v (log p_v + H) dt_v        g_v = a t'(z_v) ([v = y] - p_v)

    Large logits make it large (2^-8 of 20 is a tenth of a probability), and one completion's token has nothing to average:
    so a constant share of the result fits no case.
    """
    logits = linear(hidden, head.weight, head.bias)
    finished = logits * head.scale
    slope = torch.ones_like(logits)
    if head.softcap is not None:
        slope = 1 - (finished / head.softcap).tanh().square()
        finished = head.softcap * (finished / head.softcap).tanh()
    slope = slope * head.scale / TEMPERATURE
    logprobs = (finished / TEMPERATURE).log_softmax(-1)
    p, one = logprobs.exp(), BF16_ROUNDOFF**2 / 3
    of_logits = (1 if head.bias is None else 2) * one * logits**2
    of_t = slope**2 * of_logits
    of_logprobs = (1 - 2 * p) * of_t + (p**2 * of_t).sum(-1, keepdim=True)
    entropy = -(p * logprobs).sum(-1, keepdim=True)
    grad = weights.unsqueeze(-1) * slope * (one_hot(targets, p.shape[-1]) - p)
    of_grad = (weights.unsqueeze(-1) * slope * p) ** 2 * of_logprobs + one * grad**2
    if head.softcap is not None:  # d t'(z) = -2 t'(z) tanh dz scale / cap
        of_grad += (2 * grad * finished * head.scale / head.softcap**2) ** 2 * of_logits
    variances = [
        (p**2 * (logprobs + entropy) ** 2 * of_t).sum(-1),
        of_grad @ head.weight**2 + one * (grad @ head.weight) ** 2,
        of_grad.t() @ hidden**2 + 2 * one * (grad.t() @ hidden) ** 2,  # a chunk's, and that of the sum of chunks
    ]
    if head.bias is not None:
        variances.append(of_grad.sum(0) + one * grad.sum(0) ** 2)
    return [variance.sqrt() for variance in variances]


def largest_rounding_error(kind: str, count: int, *, device: str, compiled: bool) -> float:
    """Of entropies and gradients in bf16 against fp32 on the same numbers, in the standard deviations of `rounding_errors`."""
    bias, scale, softcap = HEADS[kind]
    rounded = [None if leaf is None else leaf.detach().bfloat16() for leaf in tensors(bias=bias)]
    targets, weights = torch.randint(97, (300,)).to(device)[:count], torch.randn(300).to(device)[:count]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [None if leaf is None else leaf.detach().to(device, dtype).requires_grad_() for leaf in rounded]
        hidden, weight, bias_leaf = leaves
        assert hidden is not None and weight is not None
        logprobs, entropy = head_stats(
            Head(weight, bias_leaf, scale, softcap),
            hidden[:count],
            targets,
            temperature=TEMPERATURE,
            chunk_size=128,
            with_entropy=True,
            compiled=compiled and dtype == torch.bfloat16,
        )
        assert logprobs.shape == entropy.shape == (count,)
        results.append([entropy, *gradients(logprobs, weights, leaves)])
    exact = [None if leaf is None else leaf.to(device, torch.float32) for leaf in rounded]
    hidden, weight, bias_leaf = exact
    assert hidden is not None and weight is not None
    expected = rounding_errors(Head(weight, bias_leaf, scale, softcap), hidden[:count], targets, weights)
    results[0][1], results[1][1] = (result[1][:count] for result in results)  # the other positions have no gradient
    return max(
        float((one - other.float()).norm() / deviation.norm())
        for one, other, deviation in zip(*results, expected, strict=True)
    )


MOST_DEVIATIONS = 3.0
"""Roundings that add up to a normal error stay below 3 deviations 99.7% of the time; a single one below the square root of 3.
Over 480 draws of these cases on a CPU the largest was 1.35. A temperature wrong by 2% in the forward pass makes 6.7 to 23."""


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("count", [300, 256, 1])
def test_in_bf16_it_is_what_fp32_gives_but_for_rounding(kind: str, count: int) -> None:
    assert largest_rounding_error(kind, count, device="cpu", compiled=False) < MOST_DEVIATIONS


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("count", [300, 256, 1])
def test_on_a_gpu_compiled_and_in_bf16_it_is_what_fp32_gives_but_for_rounding(kind: str, count: int) -> None:
    assert largest_rounding_error(kind, count, device="cuda", compiled=True) < MOST_DEVIATIONS
