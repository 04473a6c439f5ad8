"""What an update's mean counts, and which weights decay: cases computed by hand."""

from typing import Any

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ludic.config import GRPOConfig
from ludic.train.advantages import training_samples
from ludic.train.learner import Learner
from ludic.train.losses import LOSSES
from ludic.types import Completion, ParseResult, Rollout, RolloutGroup, Score, TrainingSample

KL_COEF = 0.25


def _model(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.3, max_position_embeddings=64,
        )
    )  # fmt: skip


def _group(number: int, rewards: tuple[float, float], lengths: tuple[int, int]) -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            group_id=number,
            rollout_id=member,
            prompt_token_ids=[5 + number, 6],
            completion=Completion(
                token_ids=[10 + 3 * member + i for i in range(length)],
                logprobs=None,
                finish_reason="stop",
                policy_version=0,
            ),
            text="",
            score=Score(reward=reward, correct=reward > 0, parse=ParseResult(answer="1")),
        )
        for member, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
    )
    return RolloutGroup(group_id=number, target="1", rollouts=rollouts)


GROUPS = [_group(0, (1.0, 0.0), (2, 5)), _group(1, (1.0, 1.0), (4, 1))]
"""The advantages of the first are 0.5 and -0.5. The second has no variance."""


def _learner(loss: str, **settings: Any) -> Learner:
    config = GRPOConfig(
        loss=loss, max_seq_len=16, max_completion_len=10, rollouts_per_update=4, group_size=2, **settings
    )
    return Learner(config, _model(0), reference_model=_model(1) if config.kl_coef else None)


def _update(learner: Learner) -> dict[str, float]:
    samples, stats = training_samples(
        GROUPS, scale_rewards=False, mask_truncated=False, keep_zero_variance=learner.config.kl_coef > 0
    )
    learner.accumulate(samples)
    return learner.step(learning_rate=1e-3, num_without_loss=stats.num_without_loss)


def _logprobs(model: Qwen2ForCausalLM, sample: TrainingSample) -> torch.Tensor:
    ids = torch.tensor(sample.token_ids)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids.unsqueeze(0)).logits[0]
    logprobs: torch.Tensor = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    return logprobs[torch.tensor(sample.loss_mask)[1:]]


# Strictly on-policy a token's policy loss is -A: 2 tokens of -0.5 and 5 of 0.5.
POLICY_LOSS = {
    "grpo": (-0.5 + 0.5) / 4,
    "dr_grpo": (2 * -0.5 + 5 * 0.5) / (4 * 10),
    "dapo": (2 * -0.5 + 5 * 0.5) / 7,
    "gspo": (-0.5 + 0.5) / 4,
}


@pytest.mark.parametrize("loss", POLICY_LOSS)
def test_what_the_mean_counts_without_a_penalty_is_what_the_paper_counts(loss: str) -> None:
    figures = _update(_learner(loss))
    assert figures["loss"] == pytest.approx(POLICY_LOSS[loss], abs=1e-7)
    assert figures["num_loss_tokens"] == 7  # the group without variance is not forwarded


@pytest.mark.parametrize(("loss", "counted"), [("grpo", 4), ("dr_grpo", 4), ("gspo", 4), ("dapo", 2), ("cispo", 2)])
def test_the_gradient_is_divided_by_the_sequences_of_groups_without_variance_where_the_paper_does(
    loss: str, counted: int
) -> None:
    with_them = _update(_learner(loss))["grad_norm"]
    learner = _learner(loss)
    samples, _ = training_samples(GROUPS[:1], scale_rewards=False, mask_truncated=False)
    learner.accumulate(samples)
    without = learner.step(learning_rate=1e-3)["grad_norm"]
    assert with_them == pytest.approx(without * 2 / counted, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_with_a_penalty_every_sampled_token_owes_it_and_every_mean_counts_it(loss: str) -> None:
    samples, _ = training_samples(GROUPS, scale_rewards=False, mask_truncated=False, keep_zero_variance=True)
    assert [len(sample.token_ids) - 2 for sample in samples] == [2, 5, 4, 1]
    terms = []
    for sample in samples:
        policy, reference = _logprobs(_model(0), sample), _logprobs(_model(1), sample)
        penalty = (reference - policy).exp() - (reference - policy) - 1
        term = -sample.advantage * (policy if loss == "cispo" else 1) + KL_COEF * penalty
        divided_by = {"token_mean": 12, "sequence_mean": 4 * len(term), "constant": 4 * 10}
        terms.append(float(term.sum()) / divided_by[LOSSES[loss].normalisation])
    figures = _update(_learner(loss, kl_coef=KL_COEF))
    assert figures["loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert figures["num_loss_tokens"] == 12


# -- weight decay --------------------------------------------------------------------------------------------------------


def _phi() -> PhiForCausalLM:
    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # biases and norms too have something to lose
    return model


def _weights_after(weight_decay: float) -> dict[str, torch.Tensor]:
    model = _phi()
    config = GRPOConfig(max_seq_len=16, rollouts_per_update=4, group_size=2, weight_decay=weight_decay)
    learner = Learner(config, model)
    samples, _ = training_samples(GROUPS[:1], scale_rewards=False, mask_truncated=False)
    learner.accumulate(samples)
    learner.step(learning_rate=0.01)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_weights_and_embeddings_decay_as_adamw_has_it_and_norms_and_biases_do_not() -> None:
    start, plain, decayed = dict(_phi().named_parameters()), _weights_after(0.0), _weights_after(0.5)
    kinds = {name.rpartition(".")[2] if "norm" not in name else "norm" for name in plain}
    assert kinds == {"weight", "bias", "norm"}
    for name, weight in decayed.items():
        lost = plain[name] - weight
        if name.endswith("bias") or "norm" in name:
            assert not lost.any(), name
        else:
            # The step is the same; the weight that it is taken from is 0.005 (learning rate x decay) smaller.
            torch.testing.assert_close(lost, 0.005 * start[name].detach(), atol=1e-6, rtol=1e-4)
