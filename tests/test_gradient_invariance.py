"""The gradient of an update does not depend on how it is cut into micro-batches.

Each packed, chunked gradient is held against one of separate unpacked rows: plain transformers forwards with whole
logits, and the losses written once more here, sequence by sequence, as their papers have them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ludic.training.attention import prepare_packed_attention
from ludic.training.losses import LOSSES, LossSettings, loss_inputs, reduce_metrics, token_logprobs
from ludic.training.packing import pack
from ludic.types import MicroBatch, TrainingSample

TIS_CAP, KL_COEF = 1.1, 0.1
TEMPERATURE, MAX_COMPLETION = 0.8, 16
LENGTHS = ((5, 9), (5, 4), (9, 1), (4, 12), (2, 8), (8, 5))
"""(prompt, completion) tokens of each sample"""
BUDGETS = {"one row": 200, "several rows": 30, "one sample a row": 16}

_SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, num_key_value_heads=2)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_SHAPE,
            num_key_value_heads=2,
            head_dim=4,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=3.0,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE)),
}


def _model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[family]()


def _settings(name: str) -> LossSettings:
    # The ratio of a whole sequence strays less than a token's: its clip must be narrower to cut anything here.
    clip = 0.04 if name == "gspo" else 0.2
    return LossSettings(clip_low=clip, clip_high=1.4 * clip, kl_coef=KL_COEF, tis_cap=TIS_CAP)


def _row_logprobs(model: PreTrainedModel, sample: TrainingSample) -> torch.Tensor:
    """[C] log-probs of a completion from a plain forward over its own row."""
    ids = torch.tensor(sample.token_ids)
    logits = model(input_ids=ids.unsqueeze(0)).logits[0].float() / TEMPERATURE
    logprobs: torch.Tensor = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    return logprobs[torch.tensor(sample.loss_mask)[1:]]


@cache
def _update(family: str) -> tuple[list[TrainingSample], list[torch.Tensor], list[torch.Tensor]]:
    """Samples, and old and reference log-probs [L] of each: near the policy's, so that some tokens are clipped."""
    model, generator = _model(family), torch.Generator().manual_seed(3)
    samples, olds, refs = [], [], []
    for index, (prompt, completion) in enumerate(LENGTHS):
        sample = TrainingSample(
            token_ids=torch.randint(3, 61, (prompt + completion,), generator=generator).tolist(),
            loss_mask=[False] * prompt + [True] * completion,
            rollout_logprobs=None,
            advantage=(-1.5, 0.5, 1.0)[index % 3],
            policy_version=0,
        )
        with torch.no_grad():
            new = _row_logprobs(model, sample)
        old, ref, rollout = (new + 0.3 * torch.randn(completion, generator=generator) for _ in range(3))
        none = torch.zeros(prompt)
        olds.append(torch.cat([none, old]))
        refs.append(torch.cat([none, ref]))
        samples.append(
            TrainingSample(
                token_ids=sample.token_ids,
                loss_mask=sample.loss_mask,
                rollout_logprobs=torch.cat([none, rollout]).tolist(),
                advantage=sample.advantage,
                policy_version=0,
            )
        )
    return samples, olds, refs


def _paper_loss(
    name: str, new: torch.Tensor, old: torch.Tensor, ref: torch.Tensor, rollout: torch.Tensor, advantage: float
) -> torch.Tensor:
    """[C]: each token's loss, before any mean."""
    settings, ratio = _settings(name), (new - old).exp()
    if name == "gspo":
        ratio = (new - old).mean().exp() * torch.ones_like(new)
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if name == "cispo":
        objective = clipped.detach() * advantage * new
    kl = (ref - new).exp() - (ref - new) - 1
    return -objective * (old - rollout).exp().clamp(max=TIS_CAP) + KL_COEF * kl


def _flat_gradient(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@cache
def _separate_rows(family: str, name: str) -> tuple[float, torch.Tensor]:
    """The loss of the update and its gradient, from one plain forward a sample."""
    model, (samples, olds, refs) = _model(family), _update(family)
    losses = []
    for sample, old, ref in zip(samples, olds, refs, strict=True):
        on, rollout = torch.tensor(sample.loss_mask), torch.tensor(sample.rollout_logprobs)
        new = _row_logprobs(model, sample)
        losses.append(_paper_loss(name, new, old[on], ref[on], rollout[on], sample.advantage))
    if name in ("dapo", "cispo"):
        loss = torch.cat(losses).mean()
    elif name == "dr_grpo":
        loss = torch.cat(losses).sum() / (len(samples) * MAX_COMPLETION)
    else:
        loss = torch.stack([each.mean() for each in losses]).mean()
    loss.backward()
    return loss.item(), _flat_gradient(model)


def _pack(samples: list[TrainingSample], name: str, budget: int) -> list[MicroBatch]:
    return pack(
        samples,
        token_budget=budget,
        normalisation=LOSSES[name].normalisation,
        max_completion_tokens=MAX_COMPLETION,
    )


@pytest.mark.parametrize("cut", BUDGETS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("family", MODELS)
def test_the_gradient_is_the_same_however_the_update_is_cut(family: str, name: str, cut: str) -> None:
    expected_loss, expected = _separate_rows(family, name)
    model, (samples, olds, refs) = _model(family), _update(family)
    prepare_packed_attention(model)
    batches = _pack(samples, name, BUDGETS[cut])
    assert len(batches) == {"one row": 1, "several rows": 3, "one sample a row": 6}[cut]
    metrics = []
    for batch in batches:
        stats = token_logprobs(model, batch, temperature=TEMPERATURE, chunk_size=7)
        old, ref = (torch.cat([values[i] for i in batch.sample_indices]) for values in (olds, refs))
        output = LOSSES[name].loss(loss_inputs(stats, batch, old_logprobs=old, ref_logprobs=ref), _settings(name))
        output.loss.backward()
        metrics.append(output.metrics)
    gradient, figures = _flat_gradient(model), reduce_metrics(metrics)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert figures["loss"] == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert 0 < figures["clip_fraction"] < 1 and 0 < figures["tis_capped_fraction"] < 1  # nothing is idle here


def test_a_loss_divided_within_each_micro_batch_would_be_noticed() -> None:
    _, expected = _separate_rows("qwen2", "dapo")
    model, (samples, olds, refs) = _model("qwen2"), _update("qwen2")
    prepare_packed_attention(model)
    batches = _pack(samples, "dapo", BUDGETS["several rows"])
    for batch in batches:
        stats = token_logprobs(model, batch, temperature=TEMPERATURE)
        old, ref = (torch.cat([values[i] for i in batch.sample_indices]) for values in (olds, refs))
        loss = (
            LOSSES["dapo"].loss(loss_inputs(stats, batch, old_logprobs=old, ref_logprobs=ref), _settings("dapo")).loss
        )
        (loss / batch.loss_weights.sum() / len(batches)).backward()
    assert (_flat_gradient(model) - expected).norm() > 1e-2 * expected.norm()
