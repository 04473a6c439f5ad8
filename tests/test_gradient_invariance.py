"""The gradient of an update depends neither on how it is cut into micro-batches nor on whether prompts are shared.

Each packed, chunked gradient is held against one of separate unpacked rows: plain transformers forwards with whole
logits, and the losses written once more here, sequence by sequence, as their papers have them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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

from ludic.train.attention import prepare_packed_attention
from ludic.train.logprobs import token_logprobs
from ludic.train.loss_inputs import LossSettings, loss_inputs
from ludic.train.loss_metrics import fetch_metrics, reduce_columns
from ludic.train.losses import LOSSES
from ludic.train.packing import pack
from ludic.types import MicroBatch, TrainingSample

TIS_CAP, KL_COEF = 1.1, 0.1
TEMPERATURE, MAX_COMPLETION = 0.8, 16
GROUPS = ((5, (9, 4)), (9, (1,)), (4, (12, 8, 5)))
"""(prompt, completions): tokens of each group. Its samples share the prompt."""
BUDGETS = {"one row": 200, "several rows": 24, "as many rows as can be": 17}
NUM_ROWS = {
    True: {"one row": 1, "several rows": 3, "as many rows as can be": 5},
    False: {"one row": 1, "several rows": 4, "as many rows as can be": 6},
}
"""By whether prompts are shared. The last group does not fit into one of several rows."""

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


def figures_of(outputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """An update's figures from the metrics of its micro-batches."""
    return reduce_columns(fetch_metrics(outputs)[0])[0]


def _model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[family]()


OPTIONS: dict[str, dict[str, Any]] = {
    "ratio to the sampler": {"tis_cap": None, "ratio_to": "sampler"},
    "dual clip": {"dual_clip": 1.5},
    "token mask": {"tis_cap": None, "importance_mask": "token", "mask_low": 0.8, "mask_high": 1.2},
    "sequence mask": {"tis_cap": None, "importance_mask": "sequence", "mask_low": 0.8, "mask_high": 2.0},
    "geometric mask": {"importance_mask": "geometric", "mask_low": 0.9, "mask_high": 1.1},
    "token mask, ratio to the sampler": {
        "tis_cap": None, "ratio_to": "sampler", "importance_mask": "token", "mask_low": 0.8, "mask_high": 1.2
    },
}  # fmt: skip
"""Beside the settings of all tests here."""


def _settings(name: str, option: str = "") -> LossSettings:
    # The ratio of a whole sequence strays less than a token's: its clip must be narrower to cut anything here.
    clip = 0.04 if name == "gspo" else 0.2
    given = {"tis_cap": TIS_CAP, **OPTIONS.get(option, {})}
    return LossSettings(clip_low=clip, clip_high=1.4 * clip, kl_coef=KL_COEF, **given)


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
    group_of = [(prompt, completion) for prompt, completions in GROUPS for completion in completions]
    prompts = {prompt: torch.randint(3, 61, (prompt,), generator=generator).tolist() for prompt, _ in GROUPS}
    for index, (prompt, completion) in enumerate(group_of):
        sample = TrainingSample(
            token_ids=prompts[prompt] + torch.randint(3, 61, (completion,), generator=generator).tolist(),
            loss_mask=[False] * prompt + [True] * completion,
            rollout_logprobs=None,
            advantage=(-1.5, 0.5, 1.0)[index % 3],
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
            )
        )
    return samples, olds, refs


def _paper_loss(
    name: str,
    new: torch.Tensor,
    old: torch.Tensor,
    ref: torch.Tensor,
    rollout: torch.Tensor,
    advantage: float,
    option: str = "",
) -> torch.Tensor:
    """[C]: each token's loss, before any mean."""
    settings = _settings(name, option)
    log_ratio = new - (rollout if settings.ratio_to == "sampler" else old)
    ratio = log_ratio.mean().exp() * torch.ones_like(new) if name == "gspo" else log_ratio.exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if settings.dual_clip and advantage < 0:
        objective = objective.clamp(min=settings.dual_clip * advantage)
    if name == "cispo":
        objective = clipped.detach() * advantage * new
    kl = (ref - new).exp() - (ref - new) - 1
    return -objective * _paper_weight(settings, old - rollout) + KL_COEF * kl


def _paper_weight(settings: LossSettings, log_rho: torch.Tensor) -> torch.Tensor:
    """[C]: what the correction multiplies a token's policy loss by."""
    truncated = torch.ones_like(log_rho) if settings.tis_cap is None else log_rho.exp().clamp(max=settings.tis_cap)
    if settings.importance_mask == "none":
        return truncated
    of_the_mask = {"token": log_rho, "sequence": log_rho.sum(), "geometric": log_rho.mean()}[settings.importance_mask]
    kept = (of_the_mask.exp() >= settings.mask_low) & (of_the_mask.exp() <= settings.mask_high)
    if settings.importance_mask == "geometric" or settings.ratio_to == "sampler":
        return truncated * kept
    return torch.ones_like(log_rho) * of_the_mask.exp() * kept


def _flat_gradient(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@cache
def _separate_rows(family: str, name: str, option: str = "") -> tuple[float, torch.Tensor]:
    """The loss of the update and its gradient, from one plain forward a sample."""
    model, (samples, olds, refs) = _model(family), _update(family)
    losses = []
    for sample, old, ref in zip(samples, olds, refs, strict=True):
        on, rollout = torch.tensor(sample.loss_mask), torch.tensor(sample.rollout_logprobs)
        new = _row_logprobs(model, sample)
        losses.append(_paper_loss(name, new, old[on], ref[on], rollout[on], sample.advantage, option))
    if name in ("dapo", "cispo"):
        loss = torch.cat(losses).mean()
    elif name == "dr_grpo":
        loss = torch.cat(losses).sum() / (len(samples) * MAX_COMPLETION)
    else:
        loss = torch.stack([each.mean() for each in losses]).mean()
    loss.backward()
    return loss.item(), _flat_gradient(model)


def _pack(
    samples: list[TrainingSample], name: str, budget: int, share_prompts: bool, pad_to_multiple: int = 1
) -> list[MicroBatch]:
    return pack(
        samples,
        token_budget=budget,
        normalisation=LOSSES[name].normalisation,
        max_completion_tokens=MAX_COMPLETION,
        share_prompts=share_prompts,
        pad_to_multiple=pad_to_multiple,
    )


def _of_row(values: list[torch.Tensor], batch: MicroBatch) -> torch.Tensor:
    """[T] of a row from what goes by samples, [L] each: a segment holds the last tokens of its sequence."""
    segments = zip(batch.sample_indices, batch.cu_seqlens.diff().tolist(), strict=True)
    return torch.cat([values[i][-length:] if i >= 0 else torch.zeros(length) for i, length in segments])


def _backward(
    model: PreTrainedModel,
    batches: list[MicroBatch],
    name: str,
    olds: list[torch.Tensor],
    refs: list[torch.Tensor],
    option: str = "",
) -> dict[str, float]:
    """Add up the gradients of the rows in the model; the figures of the update."""
    device, metrics = model.device, []
    for batch in batches:
        row = batch.to(device)
        stats = token_logprobs(model, row, temperature=TEMPERATURE, chunk_size=7)
        old, ref = (_of_row(values, batch).to(device) for values in (olds, refs))
        output = LOSSES[name].loss(loss_inputs(stats, row, old_logprobs=old, ref_logprobs=ref), _settings(name, option))
        output.loss.backward()
        metrics.append(output.metrics)
    return figures_of(metrics)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("cut", BUDGETS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("family", MODELS)
def test_the_gradient_is_the_same_however_the_update_is_cut_and_whether_prompts_are_shared(
    family: str, name: str, cut: str, share_prompts: bool
) -> None:
    expected_loss, expected = _separate_rows(family, name)
    model, (samples, olds, refs) = _model(family), _update(family)
    prepare_packed_attention(model)
    batches = _pack(samples, name, BUDGETS[cut], share_prompts)
    assert len(batches) == NUM_ROWS[share_prompts][cut]
    figures = _backward(model, batches, name, olds, refs)
    gradient = _flat_gradient(model)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert figures["loss"] == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert 0 < figures["clip_fraction"] < 1 and 0 < figures["tis_capped_fraction"] < 1  # nothing is idle here


@pytest.mark.parametrize("cut", BUDGETS)
@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name in ("dapo", "gspo", "cispo")
        for option in OPTIONS
        if (name, option) != ("cispo", "dual clip")
    ],
)
def test_the_gradient_of_every_option_is_the_same_however_the_update_is_cut(name: str, option: str, cut: str) -> None:
    expected_loss, expected = _separate_rows("qwen2", name, option)
    model, (samples, olds, refs) = _model("qwen2"), _update("qwen2")
    prepare_packed_attention(model)
    figures = _backward(model, _pack(samples, name, BUDGETS[cut], True), name, olds, refs, option)
    assert (_flat_gradient(model) - expected).norm() < 1e-5 * expected.norm()
    assert figures["loss"] == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    if "mask" in option:
        assert 0 < figures["importance_masked_fraction"] < 1  # nothing is idle here
    if name == "dapo":
        assert not torch.equal(expected, _separate_rows("qwen2", name)[1])


@pytest.mark.parametrize("family", MODELS)
def test_padding_changes_no_gradient(family: str) -> None:
    _, expected = _separate_rows(family, "dapo")
    model, (samples, olds, refs) = _model(family), _update(family)
    prepare_packed_attention(model)
    batches = _pack(samples, "dapo", 40, share_prompts=True, pad_to_multiple=8)
    assert all(batch.input_ids.numel() % 8 == 0 for batch in batches)
    assert any(batch.sample_indices[-1] == -1 for batch in batches)  # there is padding
    _backward(model, batches, "dapo", olds, refs)
    assert (_flat_gradient(model) - expected).norm() < 1e-5 * expected.norm()


def test_a_loss_divided_within_each_micro_batch_would_be_noticed() -> None:
    _, expected = _separate_rows("qwen2", "dapo")
    model, (samples, olds, refs) = _model("qwen2"), _update("qwen2")
    prepare_packed_attention(model)
    batches = _pack(samples, "dapo", BUDGETS["several rows"], share_prompts=False)
    for batch in batches:
        share = float(batch.loss_weights.sum()) * len(batches)
        _backward(model, [replace(batch, loss_weights=batch.loss_weights / share)], "dapo", olds, refs)
    assert (_flat_gradient(model) - expected).norm() > 1e-2 * expected.norm()


def test_a_first_token_predicted_from_its_neighbour_in_the_row_would_be_noticed() -> None:
    _, expected = _separate_rows("qwen2", "dapo")
    model, (samples, olds, refs) = _model("qwen2"), _update("qwen2")
    prepare_packed_attention(model)
    (batch,) = _pack(samples, "dapo", BUDGETS["one row"], share_prompts=True)
    wrong = replace(batch, predictor_positions=batch.target_positions - 1)
    _backward(model, [wrong], "dapo", olds, refs)
    assert (_flat_gradient(model) - expected).norm() > 1e-2 * expected.norm()
