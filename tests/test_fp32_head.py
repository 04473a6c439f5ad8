"""Logits that are not rounded before the softmax, on both sides by one flag."""

import argparse
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from ludic.config import GRPOConfig
from ludic.inference.client import handshake
from ludic.run.engine import _server_flags
from ludic.train.learner import Learner
from ludic.train.lm_head import Head, head_stats
from ludic.train.logprobs import token_logprobs
from ludic.train.mini_batches import Row
from ludic.train.packing import pack
from ludic.types import TrainingSample

VOCABULARY = 997


def _operands(*, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """bf16 hidden states [300, 64], weight [V, 64] and bias [V] whose logits reach about 20."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (
        torch.randn(shape, generator=generator).mul(scale).bfloat16()
        for shape, scale in (((300, 64), 0.75), ((VOCABULARY, 64), 0.75), ((VOCABULARY,), 1.0))
    )
    return hidden, weight, offset if bias else None


def _stats(head: Head, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.randint(VOCABULARY, (300,), generator=torch.Generator().manual_seed(1))
    return head_stats(head, hidden, targets, temperature=1.0, chunk_size=128, with_entropy=True, compiled=False)


@pytest.mark.parametrize("bias", [False, True])
def test_with_an_fp32_product_only_the_operands_are_rounded(bias: bool) -> None:
    hidden, weight, offset = _operands(bias=bias)
    wide = Head(weight.float(), None if offset is None else offset.float(), 1.0, None)
    exact, exact_entropy = _stats(wide, hidden.float())
    kept, entropy = _stats(Head(weight, offset, 1.0, None, fp32_product=True), hidden)
    rounded, _ = _stats(Head(weight, offset, 1.0, None), hidden)
    torch.testing.assert_close(kept, exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, exact_entropy, atol=1e-5, rtol=1e-5)
    assert 0.01 < float((rounded - exact).abs().mean()) < 0.1


def test_the_gradient_of_an_fp32_product_is_the_exact_one_but_for_the_rounding_of_its_own_operands() -> None:
    hidden, weight, _ = _operands(bias=False)
    errors = {}
    wide = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    exact = torch.autograd.grad(_stats(Head(wide[1], None, 1.0, None), wide[0])[0].sum(), wide)
    for fp32_product in (False, True):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logprobs, _ = _stats(Head(leaves[1], None, 1.0, None, fp32_product=fp32_product), leaves[0])
        found = torch.autograd.grad(logprobs.sum(), leaves)
        assert [gradient.dtype for gradient in found] == [torch.bfloat16] * 2
        errors[fp32_product] = [
            float((one.float() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)
        ]
    assert max(errors[True]) < 5e-3
    assert all(kept < rounded / 2 for kept, rounded in zip(errors[True], errors[False], strict=True))


@pytest.mark.parametrize("fp32_head", [False, True])
def test_the_learner_takes_the_product_that_its_setting_says(fp32_head: bool) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5},
    }
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    learner = Learner(GRPOConfig(fp32_head=fp32_head, max_seq_len=32, rollouts_per_update=4, group_size=2), model)
    torch.nn.Module.to(model, torch.bfloat16)
    ids = torch.randint(VOCABULARY, (24,), generator=torch.Generator().manual_seed(2)).tolist()
    mask = [i > 3 for i in range(24)]
    sample = TrainingSample(token_ids=ids, loss_mask=mask, rollout_logprobs=None, advantage=1.0)
    (row,) = pack([sample], token_budget=24, normalisation="token_mean", scale=1.0)
    kept, rounded = (token_logprobs(model, row, temperature=1.0, fp32_head=flag).logprobs for flag in (True, False))
    assert not torch.allclose(kept, rounded, atol=1e-3)
    trained = learner._backward(Row(batch=row, reference=None))
    assert torch.equal(trained, (kept if fp32_head else rounded).detach())


# -- the server's side -------------------------------------------------------------------------------------------------


def _flags(fp32_head: bool | None, server_args: str = "") -> list[str]:
    args = argparse.Namespace(
        server_args=server_args, chat_template=None, trust_remote_code=False, server_memory_share=None
    )
    flags = _server_flags(args, 64, fp32_head, 0)
    return flags[flags.index("--hf-overrides") :][:2] if "--hf-overrides" in flags else []


def test_a_server_that_is_started_is_told_only_what_is_not_its_default() -> None:
    assert _flags(False) == _flags(None) == []
    assert _flags(True) == ["--hf-overrides", '{"head_dtype": "float32"}']
    given = '{"head_dtype": "bfloat16"}'
    assert _flags(True, f"--hf-overrides '{given}'") == ["--hf-overrides", given]


@pytest.mark.parametrize(
    ("head_dtype", "fp32_head", "way_out"),
    [
        ("float32", True, ""),
        ("bfloat16", False, ""),
        ("bfloat16", True, """--hf-overrides '{"head_dtype": "float32"}', or train with --no-fp32-head"""),
        ("float32", False, """--hf-overrides '{"head_dtype": "bfloat16"}', or train with --fp32-head"""),
    ],
)  # fmt: skip
def test_a_server_with_another_precision_of_its_head_is_told_apart(
    caplog: pytest.LogCaptureFixture, head_dtype: str, fp32_head: bool, way_out: str
) -> None:
    handshake.check_head_dtype({"dtype": "bfloat16", "head_dtype": head_dtype}, fp32_head)
    assert [record.getMessage().endswith(way_out) for record in caplog.records] == ([True] if way_out else [])


def test_where_everything_is_fp32_there_is_nothing_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    for fp32_head in (True, False):
        handshake.check_head_dtype({"dtype": "float32", "head_dtype": "float32"}, fp32_head)
    assert not caplog.records
