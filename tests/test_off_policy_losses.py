"""Losses on data that are not the policy's own: hand-computed cases, and the public formulas written once more, plainly."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ludic.config import GRPOConfig
from ludic.rollout.overlong import overlong_reward, overlong_shaping
from ludic.train.advantages import BatchStd, group_advantages
from ludic.train.loss_inputs import MAX_LOG_RATIO, LossInputs, LossOutput, LossSettings
from ludic.train.loss_metrics import fetch_metrics, reduce_columns
from ludic.train.losses import LOSSES
from ludic.train.packing import pack
from ludic.types import Completion, ParseResult, Score, TrainingSample, Turn

# Two sequences: a prompt token and 2 trained ones, a prompt token and 3 trained ones.
LENGTHS = (2, 3)
ADVANTAGE = (2.0, -1.0)
MEAN = 1 / 5


def inputs(
    new: Sequence[float], *, old: Sequence[float] | None = None, rollout: Sequence[float] | None = None,
    ref: Sequence[float] | None = None, advantages: tuple[float, float] = ADVANTAGE,
) -> LossInputs:  # fmt: skip
    """What a loss is given, from the five trained tokens' log-probs."""

    def row(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor([0.0, *values[:2], 0.0, *values[2:]], dtype=torch.float64)

    logprobs = row(new).requires_grad_()
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() if old is None else row(old),
        rollout_logprobs=None if rollout is None else row(rollout),
        ref_logprobs=None if ref is None else row(ref),
        entropy=torch.zeros(7),
        advantages=torch.tensor([advantages[0]] * 3 + [advantages[1]] * 4, dtype=torch.float64),
        loss_mask=row([1.0] * 5).bool(),
        loss_weights=row([MEAN] * 5),
        cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32),
    )


def gradient(output: LossOutput, of: LossInputs) -> list[float]:
    (found,) = torch.autograd.grad(output.loss, of.logprobs)
    return [float(value) for value in found[of.loss_mask]]


def figures(output: LossOutput) -> dict[str, float]:
    return reduce_columns(fetch_metrics([output.metrics])[0])[0]


def logs(ratios: Sequence[float]) -> list[float]:
    return [math.log(ratio) for ratio in ratios]


# -- the ratio -----------------------------------------------------------------------------------------------------------

NEW = logs([0.6, 0.3, 0.2, 0.9, 0.5])
ROLLOUT = logs([0.4, 0.3, 0.4, 0.6, 0.5])  # new / rollout: 1.5, 1, 0.5, 1.5, 1


def test_to_the_update_one_step_has_ratios_of_one_and_to_the_sampler_what_the_sampler_recorded() -> None:
    settings = LossSettings(clip_low=0.2, clip_high=0.2)
    update = LOSSES["dapo"].loss(inputs(NEW, rollout=ROLLOUT), settings)
    assert figures(update)["ratio_mean"] == 1.0 and figures(update)["clip_fraction"] == 0.0
    sampler = LossSettings(clip_low=0.2, clip_high=0.2, ratio_to="sampler")
    given = inputs(NEW, rollout=ROLLOUT)
    output = LOSSES["dapo"].loss(given, sampler)
    # min(1.5 x 2, 1.2 x 2), 1 x 2, then min(r x -1, clip(r) x -1) of r = 0.5, 1.5 and 1
    assert output.loss.item() == pytest.approx(-MEAN * (2.4 + 2.0 - 0.8 - 1.5 - 1.0))
    assert gradient(output, given) == pytest.approx([0, -2 * MEAN, 0, 1.5 * MEAN, MEAN])
    found = figures(output)
    assert found["clip_fraction"] == pytest.approx(2 / 5)
    assert found["clip_fraction_positive"] == pytest.approx(1 / 2)
    assert found["clip_fraction_negative"] == pytest.approx(1 / 3)
    assert found["logprob_gap"] == pytest.approx(
        statistics.fmean(abs(n - r) for n, r in zip(NEW, ROLLOUT, strict=True))
    )
    k3 = [x - 1 - math.log(x) for x in (1.5, 1.0, 0.5, 1.5, 1.0)]
    assert found["kl_old"] == pytest.approx(sum(k3) / 5)
    assert found["kl_old_positive"] == pytest.approx(sum(k3[:2]) / 2)
    assert found["kl_old_negative"] == pytest.approx(sum(k3[2:]) / 3)


def test_with_the_ratio_to_the_sampler_five_losses_are_no_longer_three() -> None:
    """At equal normalisation: token ratios, sequence ratios and ratios without gradient give three gradients."""
    found = {}
    for ratio_to in ("update", "sampler"):
        for name in ("grpo", "gspo", "cispo"):
            given = inputs(NEW, rollout=ROLLOUT)
            settings = LossSettings(clip_low=0.2, clip_high=0.2, ratio_to=ratio_to)
            found[ratio_to, name] = gradient(LOSSES[name].loss(given, settings), given)
    assert found["update", "grpo"] == found["update", "gspo"] == found["update", "cispo"]
    assert len({tuple(found["sampler", name]) for name in ("grpo", "gspo", "cispo")}) == 3


def test_a_ratio_to_the_sampler_without_its_log_probs_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio_to sampler needs the sampler's log-probs"):
        LOSSES["dapo"].loss(inputs(NEW), LossSettings(ratio_to="sampler"))


def test_without_a_token_of_a_sign_its_figures_are_absent() -> None:
    found = figures(LOSSES["dapo"].loss(inputs(NEW, advantages=(1.0, 1.0)), LossSettings()))
    assert "clip_fraction_positive" in found and "clip_fraction_negative" not in found


# -- dual clip -----------------------------------------------------------------------------------------------------------


def test_dual_clip_bounds_the_loss_of_what_is_to_be_discouraged_and_nothing_else() -> None:
    old = [new - math.log(ratio) for new, ratio in zip(NEW, (4.0, 1.0, 4.0, 2.5, 0.5), strict=True)]
    given = inputs(NEW, old=old)
    output = LOSSES["dapo"].loss(given, LossSettings(clip_low=0.2, clip_high=0.2, dual_clip=3.0))
    # A = 2: 1.2 x 2 and 2; A = -1: max(-4, -3), max(-2.5, -3), max(-0.8, -3)
    assert output.loss.item() == pytest.approx(-MEAN * (2.4 + 2.0 - 3.0 - 2.5 - 0.8))
    assert gradient(output, given) == pytest.approx([0, -2 * MEAN, 0, 2.5 * MEAN, 0])
    assert figures(output)["clip_fraction_negative"] == pytest.approx(2 / 3)


def test_dual_clip_is_the_public_formula_written_as_losses() -> None:
    """Trainers write it as a loss: where A < 0 min(max(-A r, -A clip(r)), -A c), else max(-A r, -A clip(r))."""
    draws = torch.Generator().manual_seed(5)
    ratios = (2 * torch.randn(200, generator=draws, dtype=torch.float64)).exp().tolist()
    for ratio in ratios:
        for advantage in (1.5, -0.7):
            old = [new - math.log(ratio) for new in NEW]
            given = inputs(NEW, old=old, advantages=(advantage, advantage))
            output = LOSSES["dapo"].loss(given, LossSettings(clip_low=0.2, clip_high=0.28, dual_clip=3.0))
            upper = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.28))
            expected = min(upper, -advantage * 3.0) if advantage < 0 else upper
            assert output.loss.item() == pytest.approx(expected)


# -- corrections ---------------------------------------------------------------------------------------------------------

RHO = (0.4, 1.5, 0.9, 6.0, 1.2)
"""old / rollout of each token. Products: 0.6 and 6.48; geometric means 0.775 and 1.864."""
SAMPLED = [new - math.log(rho) for new, rho in zip(NEW, RHO, strict=True)]


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"importance_mask": "token", "mask_low": 0.5, "mask_high": 5.0}, (0, 1.5, 0.9, 0, 1.2)),
        ({"importance_mask": "sequence", "mask_low": 0.0, "mask_high": 2.0}, (0.6, 0.6, 0, 0, 0)),
        ({"importance_mask": "sequence", "mask_low": 1.0, "mask_high": 7.0}, (0, 0, 6.48, 6.48, 6.48)),
        ({"importance_mask": "geometric", "mask_low": 0.7, "mask_high": 1.3}, (1, 1, 0, 0, 0)),
        ({"importance_mask": "geometric", "mask_low": 1.8, "mask_high": 1.9, "tis_cap": 2.0}, (0, 0, 0.9, 2.0, 1.2)),
        ({"importance_mask": "token", "mask_low": 0.5, "mask_high": 5.0, "ratio_to": "sampler"}, (0, 1, 1, 0, 1)),
    ],
)
def test_a_mask_leaves_tokens_out_of_the_sum_and_not_out_of_what_it_is_divided_by(
    settings: dict[str, Any], weights: tuple[float, ...]
) -> None:
    given = inputs(NEW, rollout=SAMPLED)
    output = LOSSES["cispo"].loss(given, LossSettings(clip_low=1.0, clip_high=1e9, **settings))
    ratio = RHO if "ratio_to" in settings else (1.0,) * 5
    advantages = (2, 2, -1, -1, -1)
    expected = [-MEAN * w * r * a for w, r, a in zip(weights, ratio, advantages, strict=True)]
    assert gradient(output, given) == pytest.approx(expected)
    assert figures(output)["importance_masked_fraction"] == pytest.approx(sum(weight == 0 for weight in weights) / 5)
    assert figures(output)["tis_weight_mean"] == pytest.approx(sum(weights) / 5)


def test_masked_tokens_still_owe_the_kl_penalty() -> None:
    ref = [new + 0.5 for new in NEW]
    mask: dict[str, Any] = {"importance_mask": "token", "mask_low": 100.0, "mask_high": 200.0}
    output = LOSSES["dapo"].loss(inputs(NEW, rollout=SAMPLED, ref=ref), LossSettings(kl_coef=0.1, **mask))
    assert output.loss.item() == pytest.approx(0.1 * (math.exp(0.5) - 1.5))


def test_masks_are_the_public_formulas_on_padded_rows() -> None:
    """As trainers with padded rows [B, L] write them: log-ratios times the mask, summed along the row."""
    draws = torch.Generator().manual_seed(8)
    for _ in range(20):
        rollout = [new + 0.3 * float(torch.randn((), generator=draws)) for new in NEW]
        mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
        padded = torch.zeros(2, 3, dtype=torch.float64)
        padded[mask.bool()] = torch.tensor(NEW, dtype=torch.float64) - torch.tensor(rollout, dtype=torch.float64)
        total = (padded * mask).sum(-1, keepdim=True)
        sequence = total.exp().expand(2, 3)
        geometric = (total / mask.sum(-1, keepdim=True)).exp().expand(2, 3)
        token = padded.exp()
        for kind, weighed, compared in (
            ("token", token, token),
            ("sequence", sequence, sequence),
            ("geometric", torch.ones_like(token), geometric),
        ):
            keep = (compared >= 0.9) & (compared <= 1.15)
            expected = ((weighed * keep)[mask.bool()] * -MEAN).tolist()
            given = inputs(NEW, rollout=rollout, advantages=(1.0, 1.0))
            settings = LossSettings(importance_mask=kind, mask_low=0.9, mask_high=1.15)  # type: ignore[arg-type]
            assert gradient(LOSSES["dapo"].loss(given, settings), given) == pytest.approx(expected)


# -- bounds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("far", [90.0, 1000.0, -1000.0])
def test_one_token_far_off_makes_neither_loss_nor_gradient_nor_a_figure_infinite(name: str, far: float) -> None:
    new = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0]).tolist()
    old = [-1.0, -1.0, -1.0 - far, -1.0, -1.0]
    ref = [-1.0, -1.0, -1.0, -1.0 + far, -1.0]
    given = inputs(new, old=old, ref=ref)
    output = LOSSES[name].loss(given, LossSettings(kl_coef=0.1))
    assert output.loss.float().isfinite() and all(map(math.isfinite, gradient(output, given)))
    found, broken = reduce_columns(fetch_metrics([output.metrics])[0])
    assert not broken and found["kl_ref"] > 0 and found["kl_old"] > 0


def test_within_the_bound_ratios_are_exact() -> None:
    old = [new - (MAX_LOG_RATIO - 1e-6) for new in NEW]
    output = LOSSES["dapo"].loss(inputs(NEW, old=old, advantages=(-1.0, -1.0)), LossSettings())
    assert output.loss.item() == pytest.approx(math.exp(MAX_LOG_RATIO - 1e-6))


# -- advantages and reward -----------------------------------------------------------------------------------------------


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    rewards = [1.0, 0.0, 0.25, 0.5]
    others = [(sum(rewards) - reward) / 3 for reward in rewards]
    expected = [reward - other for reward, other in zip(rewards, others, strict=True)]
    assert expected[0] == pytest.approx(1.0 - 0.25)
    assert group_advantages(rewards, normalise_std=False, baseline="leave_one_out") == pytest.approx(expected)


def test_the_batch_standard_deviation_is_that_of_all_group_centred_rewards() -> None:
    groups = [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    std = BatchStd()
    for group in groups:
        std.add(group)
    # Squares: 4 x 0.25, 0, 3 x 0.0625 + 0.5625; over 12 - 1
    assert std.scale == pytest.approx(1 / math.sqrt(1.75 / 11), rel=1e-5)
    # As trainers with all rewards in one tensor write it: centre by group, then divide by the standard deviation.
    rewards = torch.tensor(groups, dtype=torch.float64)
    centred = rewards - rewards.mean(1, keepdim=True)
    expected = (centred - centred.mean()) / (centred.std() + 1e-6)
    found = [[std.scale * a for a in group_advantages(group, normalise_std=False)] for group in groups]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)


def test_the_overlong_punishment_is_dapos_line() -> None:
    def paper(length: int, longest: int, cache: int) -> float:
        if length <= longest - cache:
            return 0.0
        return (longest - cache - length) / cache if length <= longest else -1.0

    for length in range(1, 130):
        assert overlong_reward(length, max_tokens=100, buffer=30) == pytest.approx(paper(length, 100, 30))


def test_the_punishment_is_a_named_part_of_the_reward_and_nothing_without_a_buffer() -> None:
    score = Score(reward=1.0, correct=True, parse=ParseResult(answer="1"), parts={"strict": 1.0})
    completion = Completion(token_ids=[5] * 9, logprobs=None, finish_reason="stop", policy_version=0)
    shaped = overlong_shaping(4)(score, completion, 10)
    assert shaped.reward == pytest.approx(0.25) and shaped.correct
    assert shaped.parts == {"strict": 1.0, "overlong": -0.75}
    assert overlong_shaping(0)(score, completion, 10) is score


def test_a_conversation_is_as_long_as_what_the_model_wrote_and_minus_one_if_it_was_cut_off() -> None:
    score = Score(reward=0.0, correct=False, parse=ParseResult(answer="1"))
    turns = (
        Turn(role="assistant", text="", num_tokens=30),
        Turn(role="tool", text="", num_tokens=40),
        Turn(role="assistant", text="", num_tokens=20),
    )
    whole = Completion(token_ids=[5] * 90, logprobs=None, finish_reason="stop", policy_version=0, turns=turns)
    assert overlong_shaping(20)(score, whole, 100).parts == {"overlong": 0.0}
    assert overlong_shaping(60)(score, whole, 100).parts == {"overlong": pytest.approx(-10 / 60)}
    cut_off = dataclasses.replace(whole, token_ids=[5] * 70, finish_reason="length", turns=turns[:2])
    assert overlong_shaping(20)(score, cut_off, 100).parts == {"overlong": -1.0}


# -- the mean over prompts -----------------------------------------------------------------------------------------------


def _sample(group: int, member: int, length: int) -> TrainingSample:
    return TrainingSample(
        token_ids=[group, *range(length)], loss_mask=[False] + [True] * length, rollout_logprobs=None, advantage=1.0,
        rollout=(group, member),
    )  # fmt: skip


@pytest.mark.parametrize("budget", [64, 8])
def test_the_prompt_mean_gives_every_prompt_the_same_weight(budget: int) -> None:
    samples = [_sample(3, 0, 2), _sample(3, 1, 6), _sample(9, 0, 1), _sample(9, 1, 3)]
    of_sample = {}
    for row in pack(samples, token_budget=budget, normalisation="prompt_mean"):
        for place, values in zip(
            row.sample_indices, row.loss_weights.split(row.cu_seqlens.diff().tolist()), strict=True
        ):
            if place >= 0:
                of_sample[place] = values[values > 0].tolist()
    # 1 / (2 prompts x 8 tokens) and 1 / (2 x 4)
    assert of_sample == {0: [1 / 16] * 2, 1: [1 / 16] * 6, 2: [1 / 8], 3: [1 / 8] * 3}


def test_a_prompt_mean_of_samples_whose_group_is_unknown_is_refused() -> None:
    sample = TrainingSample(token_ids=[1, 2], loss_mask=[False, True], rollout_logprobs=None, advantage=1.0)
    with pytest.raises(ValueError, match="1 of 1 samples have no `rollout`"):
        pack([sample], token_budget=8, normalisation="prompt_mean")


# -- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mini_batches": 5, "rollouts_per_update": 32}, "--mini-batches 5 is more than the 4 groups"),
        ({"ratio_to": "sampler", "tis_cap": 2.0}, "--tis-cap 2.0 with --ratio-to sampler would correct twice"),
        (
            {"importance_mask": "token", "tis_cap": 2.0},
            "--tis-cap 2.0 with --importance-mask token would correct twice",
        ),
        ({"mask_low": 0.5}, "band of an --importance-mask, and none is set: choose one"),
        ({"importance_mask": "token", "mask_low": 6.0}, "6.0 is not below 5.0"),
        ({"dual_clip": 3.0, "loss": "cispo"}, "--dual-clip 3.0 has nothing to bound with --loss cispo"),
        ({"dual_clip": 0.9}, "--dual-clip must be above 1, or 0 for none, not 0.9"),
        ({"advantage_std": "batch", "scale_rewards": False}, "--advantage-std batch divides nothing"),
        ({"advantage_std": "batch", "kl_coef": 0.1}, "--kl-coef 0.1 too; take --advantage-std group, or --kl-coef 0"),
        (
            {"overlong_buffer": 64, "max_completion_len": 64},
            "--overlong-buffer 64 must be smaller than --max-tokens 64",
        ),
        ({"overlong_buffer": 64}, "--overlong-buffer 64 .* give --max-tokens, or leave it out"),
        ({"mini_batches": 0}, "--mini-batches must be at least 1, not 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        GRPOConfig(**settings)
    assert "\n" not in str(error.value)


def test_stale_rollouts_are_corrected_once_whatever_corrects_them() -> None:
    assert GRPOConfig(max_staleness=1).importance_cap == 2.0
    assert GRPOConfig(max_staleness=1, importance_mask="geometric").importance_cap == 2.0
    for settings in ({"ratio_to": "sampler"}, {"importance_mask": "token"}, {"importance_mask": "sequence"}):
        config = GRPOConfig(max_staleness=1, **settings)  # type: ignore[arg-type]
        assert config.importance_cap is None and config.needs_logprobs
        assert all(map(config.wants_logprobs, range(config.groups_per_update)))
    assert not GRPOConfig().needs_logprobs


def test_what_belongs_to_no_division_is_not_divided_unless_it_is_asked_for() -> None:
    assert not GRPOConfig(baseline="leave_one_out").scales_rewards
    assert GRPOConfig(baseline="leave_one_out", scale_rewards=True).scales_rewards
    assert GRPOConfig(loss="dr_grpo", advantage_std="batch").scales_rewards
