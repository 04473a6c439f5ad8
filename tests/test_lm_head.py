"""The output layer without its logits: the same log-probs, entropies and gradients as the plain way, whatever the chunks."""

import pytest
import torch

from ludic.training.lm_head import Head, head_stats

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


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("count", [300, 256, 1])
def test_on_a_gpu_compiled_and_in_bf16_it_is_what_fp32_gives_but_for_rounding(kind: str, count: int) -> None:
    bias, scale, softcap = HEADS[kind]
    exact = tensors(bias=bias, device="cuda")
    rounded = [None if leaf is None else leaf.detach().bfloat16().requires_grad_() for leaf in exact]
    targets, weights = torch.randint(97, (300,), device="cuda"), torch.randn(300, device="cuda")
    results = []
    for leaves, compiled in ((exact, False), (rounded, True)):
        hidden, weight, bias_leaf = leaves
        assert hidden is not None and weight is not None
        logprobs, entropy = head_stats(
            Head(weight, bias_leaf, scale, softcap),
            hidden[:count],
            targets[:count],
            temperature=TEMPERATURE,
            chunk_size=128,
            with_entropy=True,
            compiled=compiled,
        )
        assert logprobs.shape == entropy.shape == (count,)
        results.append([entropy, *gradients(logprobs, weights[:count], leaves)])
    for one, other in zip(*results, strict=True):
        assert float((one.float() - other.float()).norm() / one.float().norm()) < 3e-2
