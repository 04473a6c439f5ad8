import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from ludic.train.attention import prepare_packed_attention
from ludic.train.corrections import check_rollout_logprobs
from ludic.train.logprobs import TokenStats, token_logprobs
from ludic.train.loss_inputs import LossInputs, LossOutput, LossSettings, loss_inputs
from ludic.train.loss_metrics import fetch_metrics, reduce_columns
from ludic.train.losses import LOSSES
from ludic.train.model_checks import check_head
from ludic.train.packing import pack
from ludic.types import MicroBatch, TrainingSample

# Two sequences of 3 and 4 tokens. Loss on the last 2 of the first and the last 1 of the second.
MASK = [False, True, True, False, False, False, True]
ADVANTAGES = [2.0, 2.0, 2.0, -1.0, -1.0, -1.0, -1.0]
OLD = [0.0, -1.0, -2.0, 0.0, 0.0, 0.0, -0.5]
RATIOS = [1.0, 1.5, 0.9, 1.0, 1.0, 1.0, 0.5]
"""pi / old: on a token to be encouraged above the clip and inside it, on one to be discouraged below the clip."""
NEW = [old + math.log(ratio) for old, ratio in zip(OLD, RATIOS, strict=True)]
CLIPS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3}


def figures_of(outputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """An update's figures from the metrics of its micro-batches."""
    return reduce_columns(fetch_metrics(outputs)[0])[0]


def _inputs(
    weights: list[float],
    *,
    new: list[float] = NEW,
    rollout: list[float] | None = None,
    ref: list[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> LossInputs:
    def tensor(values: list[float] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=dtype)

    return LossInputs(
        logprobs=torch.tensor(new, dtype=dtype, requires_grad=True),
        old_logprobs=torch.tensor(OLD, dtype=dtype),
        rollout_logprobs=tensor(rollout),
        ref_logprobs=tensor(ref),
        entropy=torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 3.0], dtype=dtype),
        advantages=torch.tensor(ADVANTAGES, dtype=dtype),
        loss_mask=torch.tensor(MASK),
        loss_weights=torch.tensor(weights, dtype=dtype),
        cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32),
    )


TOKEN_MEAN = [0, 1 / 3, 1 / 3, 0, 0, 0, 1 / 3]
SEQUENCE_MEAN = [0, 1 / 4, 1 / 4, 0, 0, 0, 1 / 2]
CONSTANT = [0, 1 / 20, 1 / 20, 0, 0, 0, 1 / 20]


def _gradient(output: LossOutput, inputs: LossInputs) -> list[float]:
    (gradient,) = torch.autograd.grad(output.loss, inputs.logprobs)
    return [float(value) for value in gradient]


@pytest.mark.parametrize(("name", "weights"), [("grpo", SEQUENCE_MEAN), ("dapo", TOKEN_MEAN), ("dr_grpo", CONSTANT)])
def test_the_clipped_surrogate_agrees_with_a_hand_computed_case(name: str, weights: list[float]) -> None:
    inputs = _inputs(weights)
    output = LOSSES[name].loss(inputs, LossSettings(**CLIPS))
    # Token 1: min(1.5 x 2, 1.3 x 2) = 2.6. Token 2: min(0.9 x 2, 0.9 x 2) = 1.8. Token 6: min(-0.5, -0.8) = -0.8.
    assert output.loss.item() == pytest.approx(-(weights[1] * 2.6 + weights[2] * 1.8 + weights[6] * -0.8))
    # d(ratio)/d(log pi) = ratio, where the clip has not cut it off: on token 2 alone.
    assert _gradient(output, inputs) == pytest.approx([0, 0, -weights[2] * 1.8, 0, 0, 0, 0])
    assert figures_of([output.metrics])["clip_fraction"] == pytest.approx(2 / 3)


def test_the_clip_lets_through_what_undoes_a_step_too_far() -> None:
    # A ratio above the clip on a token to be discouraged, and below it on one to be encouraged.
    new = [0.0, -1.0 + math.log(0.5), -2.0, 0.0, 0.0, 0.0, -0.5 + math.log(1.5)]
    inputs = _inputs(TOKEN_MEAN, new=new)
    output = LOSSES["dapo"].loss(inputs, LossSettings(**CLIPS))
    assert output.loss.item() == pytest.approx(-(0.5 * 2 + 1.0 * 2 - 1.5) / 3)
    assert _gradient(output, inputs) == pytest.approx([0, -1 / 3, -2 / 3, 0, 0, 0, 0.5])
    assert figures_of([output.metrics])["clip_fraction"] == 0


def test_gspo_clips_the_geometric_mean_of_a_sequences_ratios() -> None:
    inputs = _inputs(SEQUENCE_MEAN)
    output = LOSSES["gspo"].loss(inputs, LossSettings(**CLIPS))
    s1 = math.sqrt(1.5 * 0.9)  # 1.162, inside the clip though a token of it is not
    assert output.loss.item() == pytest.approx(-(s1 * 2 / 2 + -0.8 / 2))
    # d(s)/d(log pi_t) = s / |y|
    assert _gradient(output, inputs) == pytest.approx([0, -s1 * 2 / 2 / 2, -s1 * 2 / 2 / 2, 0, 0, 0, 0])
    figures = figures_of([output.metrics])
    assert figures["clip_fraction"] == pytest.approx(1 / 3)
    assert figures["ratio_mean"] == pytest.approx((2 * s1 + 0.5) / 3)


def test_cispo_keeps_the_gradient_of_clipped_tokens_at_the_clipped_weight() -> None:
    inputs = _inputs(TOKEN_MEAN)
    output = LOSSES["cispo"].loss(inputs, LossSettings(**CLIPS))
    expected = -(1.3 * 2 * NEW[1] + 0.9 * 2 * NEW[2] + 0.8 * -1 * NEW[6]) / 3
    assert output.loss.item() == pytest.approx(expected)
    assert _gradient(output, inputs) == pytest.approx([0, -1.3 * 2 / 3, -0.9 * 2 / 3, 0, 0, 0, 0.8 / 3])
    assert figures_of([output.metrics])["clip_fraction"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", LOSSES)
def test_strictly_on_policy_the_gradient_is_the_policy_gradient(name: str) -> None:
    inputs = _inputs(SEQUENCE_MEAN, new=OLD)
    output = LOSSES[name].loss(inputs, LossSettings(**CLIPS))
    expected = [-weight * advantage for weight, advantage in zip(SEQUENCE_MEAN, ADVANTAGES, strict=True)]
    assert _gradient(output, inputs) == pytest.approx(expected)
    assert figures_of([output.metrics])["clip_fraction"] == 0


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    rollout, ref = [0.1 * i - 1 for i in range(7)], [-0.2 * i for i in range(7)]
    settings = LossSettings(clip_low=0.2, clip_high=0.3, kl_coef=0.3, tis_cap=2.0)

    def loss(new: list[float]) -> tuple[LossOutput, LossInputs]:
        inputs = _inputs(SEQUENCE_MEAN, new=new, rollout=rollout, ref=ref)
        return LOSSES[name].loss(inputs, settings), inputs

    gradient, step = _gradient(*loss(NEW)), 1e-5
    for index in range(len(NEW)):
        up, down = ([value + sign * step * (i == index) for i, value in enumerate(NEW)] for sign in (1, -1))
        slope = (loss(up)[0].loss.item() - loss(down)[0].loss.item()) / (2 * step)
        assert gradient[index] == pytest.approx(slope, abs=1e-8)


def test_the_kl_term_is_schulmans_k3_against_the_reference() -> None:
    ref = [9.0, -1.5, -2.0, 9.0, 9.0, 9.0, -0.1]
    inputs = _inputs(TOKEN_MEAN, new=OLD, ref=ref)
    plain = LOSSES["dapo"].loss(_inputs(TOKEN_MEAN, new=OLD), LossSettings())
    output = LOSSES["dapo"].loss(inputs, LossSettings(kl_coef=0.1))
    k3 = [math.exp(x) - x - 1 for x in (-0.5, 0.0, 0.4)]
    assert output.loss.item() == pytest.approx(plain.loss.item() + 0.1 * sum(k3) / 3)
    assert figures_of([output.metrics])["kl_ref"] == pytest.approx(sum(k3) / 3)
    # d k3 / d(log pi) = 1 - ref / pi
    assert _gradient(output, inputs)[1] == pytest.approx((-2.0 + 0.1 * (1 - math.exp(-0.5))) / 3)


def test_a_reference_without_a_coefficient_is_only_watched() -> None:
    plain = LOSSES["dapo"].loss(_inputs(TOKEN_MEAN), LossSettings())
    watched = LOSSES["dapo"].loss(_inputs(TOKEN_MEAN, ref=OLD), LossSettings())
    assert watched.loss.item() == plain.loss.item()
    assert figures_of([watched.metrics])["kl_ref"] > 0


def test_truncated_importance_sampling_weighs_by_old_over_rollout_up_to_the_cap() -> None:
    # old / rollout: 1.25 on token 1, 4 (over the cap) on token 2, 0.5 on token 6
    rollout = [5.0, -1.0 - math.log(1.25), -2.0 - math.log(4), 5.0, 5.0, 5.0, -0.5 - math.log(0.5)]
    inputs = _inputs(TOKEN_MEAN, new=OLD, rollout=rollout)
    output = LOSSES["dapo"].loss(inputs, LossSettings(tis_cap=2.0))
    assert output.loss.item() == pytest.approx(-(1.25 * 2 + 2.0 * 2 - 0.5 * 1) / 3)
    assert _gradient(output, inputs) == pytest.approx([0, -1.25 * 2 / 3, -2.0 * 2 / 3, 0, 0, 0, 0.5 / 3])
    figures = figures_of([output.metrics])
    assert figures["tis_weight_mean"] == pytest.approx((1.25 + 2.0 + 0.5) / 3)
    assert figures["tis_capped_fraction"] == pytest.approx(1 / 3)


def test_the_gap_to_the_sampler_is_measured_on_trained_tokens_only() -> None:
    rollout = [5.0, -1.1, -1.7, 5.0, 5.0, 5.0, -0.5]
    figures = figures_of([LOSSES["dapo"].loss(_inputs(TOKEN_MEAN, rollout=rollout), LossSettings()).metrics])
    assert figures["logprob_gap"] == pytest.approx((0.1 + 0.3) / 3)
    assert figures["logprob_gap_max"] == pytest.approx(0.3)
    assert figures["kl_rollout"] == pytest.approx(sum(math.exp(x) - x - 1 for x in (0.1, -0.3)) / 3, rel=1e-5)
    assert figures["kl_old"] == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 0.9, 0.5)) / 3)
    assert figures["entropy"] == pytest.approx(2.0)


def test_the_figures_of_an_update_are_means_over_its_tokens_not_over_its_micro_batches() -> None:
    one = {"loss": 0.5, "num_loss_tokens": 3.0, "entropy": 6.0, "num_gap_tokens": 2.0, "logprob_gap_max": 0.1}
    other = {"loss": 0.25, "num_loss_tokens": 1.0, "entropy": 4.0, "num_gap_tokens": 1.0, "logprob_gap_max": 0.4}
    figures = figures_of([{k: torch.tensor(v) for k, v in metrics.items()} for metrics in (one, other)])
    assert figures == pytest.approx(
        {"loss": 0.75, "num_loss_tokens": 4, "entropy": 2.5, "num_gap_tokens": 3, "logprob_gap_max": 0.4}
    )


def test_the_gap_to_the_sampler_is_averaged_over_the_tokens_whose_log_prob_it_gave() -> None:
    nan, settings = float("nan"), LossSettings()
    known, mixed, unknown = [5.0, -1.1, -1.7, 5, 5, 5, -0.5], [5.0, -1.2, nan, 5, 5, 5, nan], [nan] * 7
    none = LOSSES["dapo"].loss(_inputs(TOKEN_MEAN), settings)
    rows = [LOSSES["dapo"].loss(_inputs(TOKEN_MEAN, rollout=values), settings) for values in (known, mixed, unknown)]
    figures = figures_of([output.metrics for output in (*rows, none)])
    assert figures["num_loss_tokens"] == 12
    assert figures["num_gap_tokens"] == 4
    assert figures["logprob_gap"] == pytest.approx((0.1 + 0.3 + 0.0 + 0.2) / 4)
    assert figures["kl_rollout"] == pytest.approx(sum(math.exp(x) - x - 1 for x in (0.1, -0.3, 0.2)) / 4, rel=1e-5)
    assert figures["logprob_gap_max"] == pytest.approx(0.3)
    for output in rows:  # what is unknown touches neither the loss nor its gradient
        assert output.loss.item() == none.loss.item()


@pytest.mark.parametrize("rollout", [None, [float("nan")] * 7])
def test_without_any_log_prob_of_the_sampler_there_is_no_gap_to_report(rollout: list[float] | None) -> None:
    figures = figures_of([LOSSES["dapo"].loss(_inputs(TOKEN_MEAN, rollout=rollout), LossSettings()).metrics])
    assert not {"num_gap_tokens", "logprob_gap", "logprob_gap_max", "kl_rollout"} & figures.keys()
    assert figures["num_loss_tokens"] == 3


def test_a_correction_is_refused_on_the_host_when_the_sampler_gave_only_some_log_probs() -> None:
    samples = [
        TrainingSample(token_ids=[1, 2], loss_mask=[False, True], rollout_logprobs=logprobs, advantage=1.0)
        for logprobs in ([0.0, -1.0], None, None)
    ]
    check_rollout_logprobs(samples, LossSettings())
    check_rollout_logprobs(samples[:1], LossSettings(tis_cap=2.0))
    with pytest.raises(ValueError, match=r"tis_cap 2\.0 needs the sampler's log-probs, and 2 of 3 samples have none"):
        check_rollout_logprobs(samples, LossSettings(tis_cap=2.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_left_out_and_named(bad: float) -> None:
    one = {"loss": 0.5, "num_loss_tokens": 3.0, "entropy": bad, "num_gap_tokens": 2.0, "logprob_gap_max": 0.1}
    other = {"loss": bad, "num_loss_tokens": 1.0, "entropy": 4.0, "num_gap_tokens": 1.0, "logprob_gap_max": 0.4}
    columns, others = fetch_metrics(
        [{k: torch.tensor(v) for k, v in metrics.items()} for metrics in (one, other)], torch.tensor(7.0)
    )
    figures, broken = reduce_columns(columns)
    assert figures == pytest.approx({"num_loss_tokens": 4, "num_gap_tokens": 3, "logprob_gap_max": 0.4})
    assert broken == ["loss", "entropy"] and others == [7.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_log_probs_of_the_policy_that_are_not_finite_are_counted_and_keep_out_of_the_gap(bad: float) -> None:
    rollout = [5.0, -1.1, -1.7, 5.0, 5.0, 5.0, -0.5]
    new = [*OLD[:2], bad, *OLD[3:]]
    inputs = _inputs(TOKEN_MEAN, new=new, rollout=rollout)
    inputs = dataclasses.replace(inputs, old_logprobs=inputs.logprobs.detach())
    columns, _ = fetch_metrics([LOSSES["dapo"].loss(inputs, LossSettings()).metrics])
    assert columns["num_nonfinite_policy_logprobs"].tolist() == [1.0]
    figures, broken = reduce_columns(columns)
    assert figures["num_gap_tokens"] == 2 and figures["logprob_gap"] == pytest.approx((0.1 + 0.0) / 2)
    assert "loss" in broken


def test_an_update_without_micro_batches_has_no_metrics() -> None:
    with pytest.raises(ValueError, match="without micro-batches"):
        figures_of([])


def test_a_correction_or_a_kl_term_without_the_log_probs_it_needs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tis_cap 2\.0 needs the sampler's log-probs"):
        LOSSES["dapo"].loss(_inputs(TOKEN_MEAN), LossSettings(tis_cap=2.0))
    with pytest.raises(ValueError, match=r"kl_coef 0\.1 needs the reference policy's log-probs"):
        LOSSES["dapo"].loss(_inputs(TOKEN_MEAN), LossSettings(kl_coef=0.1))


# Token log-probabilities

_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}

HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    "plain": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE, num_key_value_heads=2)),
    "tied": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=True)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**_SHAPE)),
    "softcap": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_SHAPE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)
    ),
    "logit_scale": lambda: CohereForCausalLM(CohereConfig(**_SHAPE, logit_scale=0.25)),
    "logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**_SHAPE, logits_scaling=4.0)),
}


def _model(head: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = HEADS[head]()
    for name, parameter in model.named_parameters():
        if name == "lm_head.bias":
            torch.nn.init.normal_(parameter)
    model.eval()
    return model


def _micro_batch(lengths: tuple[int, ...] = (6, 9, 4), vocabulary: int = 97) -> MicroBatch:
    generator = torch.Generator().manual_seed(2)
    samples = [
        TrainingSample(
            token_ids=torch.randint(vocabulary, (length,), generator=generator).tolist(),
            loss_mask=[i >= 2 and (i + length) % 4 != 0 for i in range(length)],  # with holes, as several turns have
            rollout_logprobs=None,
            advantage=1.0,
        )
        for length in lengths
    ]
    (batch,) = pack(samples, token_budget=sum(lengths), normalisation="token_mean")
    return batch


def _full(model: PreTrainedModel, batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [T] from whole logits of separate plain forwards."""
    logprobs, entropies = [], []
    bounds = batch.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        ids = batch.input_ids[start:end]
        distribution = (model(input_ids=ids.unsqueeze(0)).logits[0].float() / temperature).log_softmax(-1)
        zero = distribution.new_zeros(1)
        logprobs.append(torch.cat([zero, distribution[:-1].gather(1, ids[1:, None]).squeeze(1)]))
        entropies.append(torch.cat([zero, -(distribution.exp() * distribution).sum(-1)[:-1]]))
    return torch.cat(logprobs) * batch.loss_mask, torch.cat(entropies) * batch.loss_mask


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_log_probs_are_those_of_the_models_own_logits(head: str, temperature: float) -> None:
    model, batch = _model(head), _micro_batch()
    with torch.no_grad():
        logprobs, entropy = _full(model, batch, temperature)
    assert logprobs.std() > 0.5  # the distributions are far from uniform
    prepare_packed_attention(model)
    check_head(model)
    stats = token_logprobs(model, batch, temperature=temperature, chunk_size=4)
    torch.testing.assert_close(stats.logprobs.detach(), logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert not stats.entropy.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 5, 4096])
def test_the_gradient_through_the_chunks_is_that_of_whole_logits(chunk_size: int) -> None:
    model, batch = _model("tied"), _micro_batch()
    _full(model, batch, 0.7)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    prepare_packed_attention(model)
    token_logprobs(model, batch, temperature=0.7, chunk_size=chunk_size).logprobs.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_without_entropy_the_log_probs_are_the_same_and_the_entropies_zero() -> None:
    model, batch = _model("plain"), _micro_batch()
    prepare_packed_attention(model)
    stats = token_logprobs(model, batch, temperature=1.0, with_entropy=False)
    assert torch.equal(stats.logprobs, token_logprobs(model, batch, temperature=1.0).logprobs)
    assert not stats.entropy.any()


class _RowsOverVocabulary(TorchDispatchMode):
    """How many rows the largest tensor [rows, vocabulary] had."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, value.numel() // self.vocabulary)
        return result


def test_no_more_logits_than_a_chunks_are_ever_made_forward_or_backward() -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**_SHAPE, "vocab_size": 1009}, num_key_value_heads=2))
    prepare_packed_attention(model)
    batch = _micro_batch((40, 50, 30), 1009)
    with _RowsOverVocabulary(1009) as seen:
        token_logprobs(model, batch, temperature=0.7, chunk_size=8).logprobs.sum().backward()
    assert 1 <= seen.rows <= 32  # the transposed weight is [hidden 32, vocabulary]; 90 tokens are trained on
    with _RowsOverVocabulary(1009) as seen:
        token_logprobs(model, batch, temperature=0.7, chunk_size=4096).logprobs.sum().backward()
    assert seen.rows == int(batch.loss_mask.sum()) > 60  # the measurement sees whole logits, and no masked token's


def test_no_logits_wait_for_the_backward_pass() -> None:
    model, batch = _model("plain"), _micro_batch((40, 50, 30))
    prepare_packed_attention(model)
    saved: list[int] = []

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1:] == (97,):
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        token_logprobs(model, batch, temperature=1.0, chunk_size=8)
    assert saved == []


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    model = _model("plain")
    prepare_packed_attention(model)
    with pytest.raises(ValueError, match=f"temperature must be above 0 to train on log-probs, not {temperature}"):
        token_logprobs(model, _micro_batch(), temperature=temperature)


def test_a_backbone_without_a_head_is_refused_by_name() -> None:
    model = Qwen2Model(Qwen2Config(**_SHAPE, num_key_value_heads=2))
    prepare_packed_attention(model)
    with pytest.raises(ValueError, match="Qwen2Model has no LM head"):
        token_logprobs(model, _micro_batch(), temperature=1.0)


def test_a_head_that_changes_its_logits_in_an_unknown_way_is_found_at_start() -> None:
    model = _model("plain")
    prepare_packed_attention(model)
    original = model.forward

    def shifted(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = shifted
    with pytest.raises(ValueError, match="Qwen2ForCausalLM changes its logits after the LM head"):
        check_head(model)


def test_loss_inputs_take_the_policy_itself_as_old_when_the_update_is_on_policy() -> None:
    model, batch = _model("plain"), _micro_batch()
    prepare_packed_attention(model)
    stats = token_logprobs(model, batch, temperature=1.0)
    inputs = loss_inputs(stats, batch)
    assert torch.equal(inputs.old_logprobs, stats.logprobs)
    assert not inputs.old_logprobs.requires_grad
    assert inputs.logprobs.requires_grad


def _on_policy_gradient(name: str, samples: list[TrainingSample]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The losses of the micro-batches, and the gradient with regard to the log-probs, of one on-policy update."""
    spec = LOSSES[name]
    losses, gradients = list[torch.Tensor](), list[torch.Tensor]()
    settings = LossSettings(clip_low=spec.clip_low, clip_high=spec.clip_high)
    for row in pack(samples, token_budget=1024, normalisation=spec.normalisation):
        torch.manual_seed(0)
        logprobs = (-3 * torch.rand(row.input_ids.shape) * row.loss_mask).requires_grad_()
        output = spec.loss(loss_inputs(TokenStats(logprobs, torch.zeros_like(logprobs)), row), settings)
        losses.append(output.loss.detach())
        gradients += torch.autograd.grad(output.loss, logprobs)
        assert output.metrics["clip_fraction"] == 0
    return losses, torch.cat(gradients)


@pytest.mark.parametrize("seed", range(5))
def test_with_one_step_an_update_cispo_is_dapo_to_the_bit_and_gspo_is_grpo_but_for_one_sums_rounding(seed: int) -> None:
    draw = random.Random(seed)
    samples = [
        TrainingSample(
            token_ids=list(range(1, 4 + length)),
            loss_mask=[False] * 3 + [True] * length,
            rollout_logprobs=None,
            advantage=draw.gauss(0, 1),
        )
        for length in (draw.randint(1, 300) for _ in range(8))
    ]
    (_, dapo), (_, cispo) = (_on_policy_gradient(name, samples) for name in ("dapo", "cispo"))
    assert torch.equal(dapo, cispo)
    (grpo_losses, grpo), (gspo_losses, gspo) = (_on_policy_gradient(name, samples) for name in ("grpo", "gspo"))
    assert all(map(torch.equal, grpo_losses, gspo_losses))
    # A sequence's up to 300 equal terms are added and divided again: at most 300 roundings of 2^-24 each.
    torch.testing.assert_close(gspo, grpo, rtol=300 * 2.0**-24, atol=0)
    assert not torch.allclose(grpo, dapo, rtol=1e-2)  # another normalisation is another gradient


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", LOSSES)
def test_in_bf16_on_a_gpu_the_host_never_waits_and_the_log_probs_are_near_those_of_fp32(name: str) -> None:
    lengths, device = (60, 90, 40), torch.device("cuda")
    model = _model("tied")
    torch.nn.Module.to(model, device)
    model.config.max_position_embeddings = 128
    batch = _micro_batch(lengths)
    on_device = batch.to(device)
    prepare_packed_attention(model)
    with torch.no_grad():
        exact = token_logprobs(model, on_device, temperature=0.7).logprobs
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            stats = token_logprobs(model, on_device, temperature=0.7, chunk_size=32)
        output = LOSSES[name].loss(loss_inputs(stats, on_device), LossSettings())
        output.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.logprobs.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    gap = (stats.logprobs - exact).abs()[on_device.loss_mask]
    assert gap.mean() < 0.05
