"""Several optimizer steps on disjoint parts of one update, held against a plain loop over separate rows."""

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from ludic.config import GRPOConfig
from ludic.survival.changed_settings import changed_settings
from ludic.train.learner import Learner
from ludic.train.mini_batches import split
from ludic.types import TrainingSample
from tests.test_trainer import Run

LEARNING_RATE = 0.02
CLIPS = {"clip_low": 0.1, "clip_high": 0.1}
BEFORE = (
    "rollouts_per_update", "group_size", "temperature", "max_seq_len", "max_completion_len", "max_staleness", "logprob_share",
    "record_token_logprobs", "train_steps", "loss", "learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "max_grad_norm", "epochs_per_update", "clip_low", "clip_high", "kl_coef", "tis_cap", "mask_truncated",
    "scale_rewards", "micro_token_budget", "share_prompts", "gradient_checkpointing", "compile", "fp32_head", "logprob_chunk",
    "eval_every", "eval_limit", "eval_temperature", "save_every", "keep_checkpoints", "seed",
)  # fmt: skip
"""The settings of commit 71449ab: an old checkpoint has these."""


def _model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.3, max_position_embeddings=64,
        )
    )  # fmt: skip


def _samples() -> list[TrainingSample]:
    """Five groups of two, with log-probs of a sampler that is not far away."""
    draws = random.Random(4)
    samples = []
    for group, member in itertools.product(range(10, 15), range(2)):
        length = draws.randint(1, 7)
        samples.append(
            TrainingSample(
                token_ids=[group, 5, *(draws.randint(6, 60) for _ in range(length))],
                loss_mask=[False] * 2 + [True] * length,
                rollout_logprobs=[0.0] * 2 + [draws.uniform(-5, -3) for _ in range(length)],
                advantage=(1.0, -1.0)[member] * draws.uniform(0.5, 1.5),
                rollout=(group, member),
            )
        )
    return samples


SAMPLES = _samples()
PARTS = [SAMPLES[:6], SAMPLES[6:]]  # three groups and two
KL_COEF = 0.1


def _learner(reference: Qwen2ForCausalLM | None = None, **settings: Any) -> Learner:
    config = GRPOConfig(
        **{"max_seq_len": 16, "micro_token_budget": 64, "rollouts_per_update": 12, "group_size": 2, "max_grad_norm": 0.0,
           **CLIPS, **settings}
    )  # fmt: skip
    torch.manual_seed(1)  # of a new adapter
    return Learner(config, _model(), reference_model=reference)


def _weights(learner: Learner) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner.model.parameters()])


def _logprobs(model: Qwen2ForCausalLM, sample: TrainingSample) -> torch.Tensor:
    ids = torch.tensor(sample.token_ids)
    logprobs: torch.Tensor = (
        model(input_ids=ids.unsqueeze(0)).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    )
    return logprobs[torch.tensor(sample.loss_mask)[1:]]


def _plain(
    loss: str,
    parts: list[list[TrainingSample]],
    epochs: int,
    ratio_to: str,
    without: int = 0,
    reference: Qwen2ForCausalLM | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The weights after the same update, and the means over the steps of the last epoch, from the formulas."""
    model = _model()
    steps: list[tuple[float, float]] = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    with torch.no_grad():  # of all parts, before the first step
        olds = {sample.rollout: _logprobs(model, sample) for part in parts for sample in part}
    total = sum(map(len, parts))
    for _, part in itertools.product(range(epochs), parts):
        losses = []
        for sample in part:
            new = _logprobs(model, sample)
            assert sample.rollout_logprobs is not None
            old = olds[sample.rollout] if ratio_to == "update" else torch.tensor(sample.rollout_logprobs)[2:]
            ratio = (new - old).exp()
            losses.append(-torch.minimum(ratio * sample.advantage, ratio.clamp(0.9, 1.1) * sample.advantage))
            if reference is not None:
                away = _logprobs(reference, sample).detach() - new
                losses[-1] = losses[-1] + KL_COEF * (away.exp() - 1 - away)
        if loss == "dapo":
            value = torch.cat(losses).mean()
        else:
            value = torch.stack([each.mean() for each in losses]).sum() / (len(part) * (1 + without / total))
        optimizer.zero_grad()
        value.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        steps.append((float(value.detach()), float(torch.nn.utils.get_total_norm(gradients))))
        optimizer.step()
    means = [sum(column) / len(parts) for column in zip(*steps[-len(parts) :], strict=True)]
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return weights, {"loss": means[0], "grad_norm": means[1]}


def _same_figures(found: dict[str, float], expected: dict[str, float]) -> None:
    """AdamW's steps hardly depend on a factor that all gradients have in common; these two do."""
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("ratio_to", ["update", "sampler"])
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_the_steps_are_those_of_a_plain_loop_with_all_old_log_probs_of_before_the_first(
    loss: str, epochs: int, ratio_to: str
) -> None:
    learner = _learner(loss=loss, mini_batches=2, epochs_per_update=epochs, ratio_to=ratio_to)
    learner.accumulate(SAMPLES)
    figures = learner.step(learning_rate=LEARNING_RATE, num_without_loss=2)
    weights, expected = _plain(loss, PARTS, epochs, ratio_to, 2)
    torch.testing.assert_close(_weights(learner), weights, atol=2e-4, rtol=1e-3)
    _same_figures(figures, expected)
    assert figures["optimizer_steps"] == 2 * epochs and figures["skipped_steps"] == 0
    assert figures["num_loss_tokens"] == sum(sample.loss_mask.count(True) for sample in SAMPLES)
    assert 0 < figures["clip_fraction"] < 1


def test_an_update_in_pieces_in_another_order_and_in_smaller_rows_is_the_same_update() -> None:
    whole = _learner(mini_batches=2)
    whole.accumulate(SAMPLES)
    expected = whole.step(learning_rate=LEARNING_RATE)
    pieces = _learner(mini_batches=2, micro_token_budget=16)
    for group in (14, 10, 12, 13, 11):
        pieces.accumulate([sample for sample in SAMPLES if sample.rollout and sample.rollout[0] == group])
    figures = pieces.step(learning_rate=LEARNING_RATE)
    torch.testing.assert_close(_weights(whole), _weights(pieces), atol=1e-4, rtol=1e-3)
    _same_figures(figures, expected)


def test_the_reference_of_a_kl_penalty_is_compared_with_in_every_step() -> None:
    learner = _learner(_model(1), mini_batches=2, kl_coef=KL_COEF)
    learner.accumulate(SAMPLES)
    figures = learner.step(learning_rate=LEARNING_RATE)
    weights, expected = _plain("dapo", PARTS, 1, "update", reference=_model(1))
    torch.testing.assert_close(_weights(learner), weights, atol=2e-4, rtol=1e-3)
    _same_figures(figures, expected)
    assert figures["kl_ref"] > 0.1


def test_mini_batches_train_an_adapter_as_one_update_on_each_part_does() -> None:
    """The ratio is to the sampler, so that an update of its own has no other `old`."""
    given: dict[str, Any] = {"lora_rank": 2, "kl_coef": KL_COEF, "ratio_to": "sampler"}
    at_once, one_by_one = _learner(mini_batches=2, **given), _learner(**given)
    before = [parameter.clone() for parameter in at_once.masters.parameters]
    at_once.accumulate(SAMPLES)
    figures = at_once.step(learning_rate=LEARNING_RATE)
    steps = []
    for part in PARTS:
        one_by_one.accumulate(part)
        steps.append(one_by_one.step(learning_rate=LEARNING_RATE))
    _same_figures(figures, {name: (steps[0][name] + steps[1][name]) / 2 for name in ("loss", "grad_norm")})
    assert steps[1]["kl_ref"] > 0, "the first step moved it away from the base"
    trained = zip(at_once.masters.parameters, one_by_one.masters.parameters, before, strict=True)
    for one, other, start in trained:
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
        assert torch.equal(one, start) != one.requires_grad, "the adapter moved, and nothing else"


def test_the_pass_that_takes_the_old_log_probs_counts_as_forwarded() -> None:
    learner = _learner(mini_batches=2, share_prompts=False)
    learner.accumulate(SAMPLES)
    figures = learner.step(learning_rate=LEARNING_RATE)
    assert figures["trained_tokens"] == sum(len(sample.token_ids) for sample in SAMPLES)
    assert figures["forwarded_tokens"] == 2 * figures["trained_tokens"]


def test_every_sample_is_in_one_part_with_its_group_and_the_parts_are_as_even_as_can_be() -> None:
    shuffled = random.Random(1).sample(SAMPLES, len(SAMPLES))
    for num_parts in (1, 2, 3, 5, 8):
        parts = split(shuffled, num_parts)
        assert sorted(itertools.chain(*parts)) == list(range(len(shuffled)))
        groups = [{(shuffled[place].rollout or (0, 0))[0] for place in part} for part in parts]
        assert sum(map(len, groups)) == 5 and max(map(len, groups)) - min(map(len, groups)) <= 1
        assert len(parts) == min(num_parts, 5)
        rollouts = [shuffled[place].rollout for part in parts for place in part]
        assert rollouts == sorted(sample.rollout for sample in SAMPLES if sample.rollout)


def test_there_are_no_more_steps_than_groups_and_the_log_says_so() -> None:
    learner = _learner(mini_batches=4)
    learner.accumulate(SAMPLES[:4])
    assert learner.step(learning_rate=LEARNING_RATE)["optimizer_steps"] == 2


def test_a_mini_batch_of_samples_whose_group_is_unknown_is_refused() -> None:
    learner = _learner(mini_batches=2)
    learner.accumulate([dataclasses.replace(SAMPLES[0], rollout=None)])
    with pytest.raises(ValueError, match="1 of 1 samples have no `rollout`"):
        learner.step(learning_rate=LEARNING_RATE)


@pytest.mark.parametrize("loss", ["dapo", "gspo", "cispo"])
def test_scaling_the_summed_gradient_once_is_scaling_every_advantage(loss: str) -> None:
    """A batch's standard deviation is known when the gradient is there already."""
    late = _learner(loss=loss, advantage_std="batch", ratio_to="sampler")
    late.accumulate(SAMPLES)
    figures = late.step(learning_rate=LEARNING_RATE, advantage_scale=0.25)
    early = _learner(loss=loss, ratio_to="sampler")
    early.accumulate([dataclasses.replace(sample, advantage=0.25 * sample.advantage) for sample in SAMPLES])
    expected = early.step(learning_rate=LEARNING_RATE)
    assert figures["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_the_prompt_mean_does_not_depend_on_how_the_update_comes_in() -> None:
    found = []
    for pieces in ([SAMPLES], [SAMPLES[6:], SAMPLES[:2], SAMPLES[2:6]]):
        learner = _learner(normalisation="prompt_mean")
        for piece in pieces:
            learner.accumulate(piece)
        found.append(learner.step(learning_rate=LEARNING_RATE)["loss"])
    by_group = [SAMPLES[place : place + 2] for place in range(0, 10, 2)]
    means = [
        sum(-sample.advantage * sample.loss_mask.count(True) for sample in group)
        / sum(sample.loss_mask.count(True) for sample in group)
        for group in by_group
    ]
    assert found == pytest.approx([sum(means) / 5] * 2, rel=1e-5)


def test_a_run_with_stale_rollouts_mini_batches_and_the_ratio_to_the_sampler_repeats_bit_for_bit(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    runs = [
        Run(
            digit_policy_dir, tmp_path / str(number), max_staleness=1, ratio_to="sampler", mini_batches=2,
            rollouts_per_update=32, train_steps=3, eval_limit=0, advantage_std="batch",
        )
        for number in range(2)
    ]  # fmt: skip
    for run in runs:
        run.go()
    first, second = (run.logger.updates() for run in runs)
    left_out = {"tokens_per_s"}
    assert [{k: v for k, v in row.items() if k not in left_out} for row in first] == [
        {k: v for k, v in row.items() if k not in left_out} for row in second
    ]
    assert first[-1]["staleness"] == 1 and first[-1]["dropped_without_logprobs"] == 0
    assert first[-1]["num_gap_tokens"] == first[-1]["num_loss_tokens"]  # all log-probs were asked for
    assert any(row["ratio_mean"] != 1.0 for row in first)


def test_a_checkpoint_of_before_these_settings_goes_on_without_a_word_and_not_with_another_value() -> None:
    given = dataclasses.asdict(GRPOConfig())
    stored = {name: given[name] for name in BEFORE}
    assert changed_settings(stored, given) == []
    changed = dataclasses.asdict(GRPOConfig(mini_batches=2, drop_solved=3))
    assert changed_settings(stored, changed) == [
        "--drop-solved is 3, the checkpoint was made without it",
        "--mini-batches is 2, the checkpoint was made without it",
    ]
