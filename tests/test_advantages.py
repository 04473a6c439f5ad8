import math
from typing import Literal

import pytest

from ludic.train.advantages import group_advantages, has_variance, training_samples
from ludic.types import Completion, ParseResult, Rollout, RolloutGroup, Score


def _rollout(
    rollout_id: int,
    reward: float,
    *,
    finish_reason: Literal["stop", "length"] = "stop",
    prompt: tuple[int, ...] = (1, 2, 3),
    tokens: tuple[int, ...] = (7, 8),
    logprobs: list[float] | None = None,
) -> Rollout:
    return Rollout(
        group_id=5,
        rollout_id=rollout_id,
        prompt_token_ids=list(prompt),
        completion=Completion(token_ids=list(tokens), logprobs=logprobs, finish_reason=finish_reason, policy_version=4),
        text="",
        score=Score(reward=reward, correct=reward > 0, parse=ParseResult(answer="1")),
    )


def _group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(group_id=5, target="1", rollouts=rollouts)


def test_grpo_divides_by_the_sample_standard_deviation() -> None:
    # mean 0.25; deviations 0.75, -0.25 x 3; sum of squares 0.75; over n - 1 = 3: 0.25; its root 0.5
    assert group_advantages([1.0, 0.0, 0.0, 0.0], normalise_std=True) == pytest.approx(
        [1.5, -0.5, -0.5, -0.5], rel=1e-5
    )


def test_dr_grpo_only_takes_the_mean_off() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 0.0], normalise_std=False) == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("normalise_std", [True, False])
@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.0, 0.0], [0.3], [], [0.1 + 0.2, 0.3]])
def test_rewards_that_do_not_differ_give_exactly_zero(rewards: list[float], normalise_std: bool) -> None:
    assert not has_variance(rewards)
    assert group_advantages(rewards, normalise_std=normalise_std) == [0.0] * len(rewards)


def test_a_small_but_real_difference_in_reward_is_variance() -> None:
    assert has_variance([1.0, 1.001])
    assert group_advantages([1.0, 1.001], normalise_std=True) == pytest.approx([-0.7071, 0.7071], abs=2e-3)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused_by_value(reward: float) -> None:
    with pytest.raises(ValueError, match=f"must be finite, not {reward}"):
        group_advantages([1.0, reward], normalise_std=True)


def test_a_sample_is_prompt_and_completion_with_a_loss_on_the_completion_only() -> None:
    group = _group(_rollout(0, 1.0, logprobs=[-0.5, -0.25]), _rollout(1, 0.0, logprobs=[-1.0, -2.0]))
    samples, stats = training_samples([group], scale_rewards=False, mask_truncated=False)
    assert [sample.advantage for sample in samples] == [0.5, -0.5]
    assert samples[0].token_ids == [1, 2, 3, 7, 8]
    assert samples[0].loss_mask == [False, False, False, True, True]
    assert samples[0].rollout_logprobs == [0.0, 0.0, 0.0, -0.5, -0.25]
    assert (stats.num_zero_variance_groups, stats.num_truncated_masked, stats.num_samples) == (0, 0, 2)


def test_without_log_probs_from_the_engine_a_sample_has_none() -> None:
    samples, _ = training_samples(
        [_group(_rollout(0, 1.0), _rollout(1, 0.0))], scale_rewards=True, mask_truncated=False
    )
    assert [sample.rollout_logprobs for sample in samples] == [None, None]


def test_groups_without_variance_are_left_out_and_counted() -> None:
    flat = _group(_rollout(0, 1.0), _rollout(1, 1.0), _rollout(2, 1.0, finish_reason="length"))
    mixed = _group(_rollout(0, 1.0, tokens=(9,)), _rollout(1, 0.0, tokens=(10,)))
    samples, stats = training_samples([flat, mixed, flat], scale_rewards=True, mask_truncated=False)
    assert [sample.token_ids[-1] for sample in samples] == [9, 10]
    assert (stats.num_zero_variance_groups, stats.num_samples) == (2, 2)
    assert stats.num_without_loss == 6
    _, masked = training_samples([flat, mixed, flat], scale_rewards=True, mask_truncated=True)
    assert masked.num_without_loss == 4 and masked.num_truncated_masked == 0


def test_where_every_token_owes_a_penalty_groups_without_variance_are_samples_with_an_advantage_of_0() -> None:
    flat = _group(_rollout(0, 1.0), _rollout(1, 1.0, tokens=(8,), finish_reason="length"))
    mixed = _group(_rollout(0, 1.0, tokens=(9,)), _rollout(1, 0.0, tokens=(10,)))
    for mask_truncated, expected in ((False, [0.0, 0.0, 0.5, -0.5]), (True, [0.0, 0.5, -0.5])):
        samples, stats = training_samples(
            [flat, mixed], scale_rewards=False, mask_truncated=mask_truncated, keep_zero_variance=True
        )
        assert [sample.advantage for sample in samples] == expected
        assert stats.num_zero_variance_groups == 1 and stats.num_without_loss == 0
        assert stats.num_truncated_masked == mask_truncated


def test_a_masked_truncated_completion_still_counts_in_the_mean_of_its_group() -> None:
    group = _group(_rollout(0, 1.0), _rollout(1, 0.0, finish_reason="length"), _rollout(2, 0.5))
    samples, stats = training_samples([group], scale_rewards=False, mask_truncated=True)
    assert [sample.advantage for sample in samples] == [0.5, 0.0]  # against the mean of all three, 0.5
    assert (stats.num_truncated_masked, stats.num_samples) == (1, 2)


def test_truncated_completions_are_trained_on_when_they_are_not_masked() -> None:
    group = _group(_rollout(0, 1.0), _rollout(1, 0.0, finish_reason="length"))
    samples, stats = training_samples([group], scale_rewards=False, mask_truncated=False)
    assert [sample.advantage for sample in samples] == [0.5, -0.5]
    assert stats.num_truncated_masked == 0


def test_log_probs_that_do_not_match_the_tokens_are_refused_with_both_lengths() -> None:
    group = _group(_rollout(0, 1.0, logprobs=[-0.5]), _rollout(1, 0.0, logprobs=[-0.5, -1.0]))
    with pytest.raises(ValueError, match="rollout 0 of group 5 has 1 log-probs for 2 completion tokens"):
        training_samples([group], scale_rewards=True, mask_truncated=False)


@pytest.mark.parametrize(("prompt", "tokens"), [((1,), ()), ((), (7,))])
def test_an_empty_prompt_or_completion_is_refused_by_name(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    group = _group(_rollout(0, 1.0), _rollout(1, 0.0, prompt=prompt, tokens=tokens))
    with pytest.raises(ValueError, match="rollout 1 of group 5 has"):
        training_samples([group], scale_rewards=True, mask_truncated=False)
