from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ludic.training.packing import num_loss_tokens, pack, packing_efficiency
from ludic.types import MicroBatch, TrainingSample


def _sample(
    token_ids: list[int], prompt: int, advantage: float = 1.0, logprobs: list[float] | None = None
) -> TrainingSample:
    return TrainingSample(
        token_ids=token_ids,
        loss_mask=[i >= prompt for i in range(len(token_ids))],
        rollout_logprobs=logprobs,
        advantage=advantage,
        policy_version=0,
    )


def _update() -> list[TrainingSample]:
    return [
        _sample([11, 12, 13], 1, 1.0, [0.0, -0.1, -0.2]),
        _sample([21, 22], 1, -1.0, [0.0, -0.3]),
        _sample([31, 32, 33], 2, 0.5, [0.0, 0.0, -0.4]),
    ]


def test_the_arrays_are_those_of_the_docstring() -> None:
    first, second = pack(_update(), token_budget=5, normalisation="token_mean")
    assert first.sample_indices == (0, 1)
    assert first.input_ids.tolist() == [11, 12, 13, 21, 22]
    assert first.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert first.cu_seqlens.tolist() == [0, 3, 5]
    assert first.max_seqlen == 3
    assert first.loss_mask.tolist() == [False, True, True, False, True]
    assert first.loss_weights.tolist() == [0, 0.25, 0.25, 0, 0.25]
    assert first.advantages.tolist() == [1.0, 1.0, 1.0, -1.0, -1.0]
    assert first.rollout_logprobs is not None
    assert first.rollout_logprobs.tolist() == pytest.approx([0.0, -0.1, -0.2, 0.0, -0.3])
    assert second.sample_indices == (2,)
    assert second.input_ids.tolist() == [31, 32, 33]
    assert second.loss_weights.tolist() == [0, 0, 0.25]


def test_the_dtypes_are_those_of_the_contract() -> None:
    batch = pack(_update(), token_budget=5, normalisation="token_mean")[0]
    assert (batch.input_ids.dtype, batch.position_ids.dtype) == (torch.int64, torch.int64)
    assert (batch.cu_seqlens.dtype, batch.loss_mask.dtype) == (torch.int32, torch.bool)
    assert (batch.loss_weights.dtype, batch.advantages.dtype) == (torch.float32, torch.float32)


def _weights(batches: list[MicroBatch]) -> dict[int, list[float]]:
    weights = {}
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        for index, start, end in zip(batch.sample_indices, bounds[:-1], bounds[1:], strict=True):
            weights[index] = batch.loss_weights[start:end].tolist()
    return weights


@pytest.mark.parametrize("token_budget", [3, 5, 8])
def test_the_sequence_mean_gives_every_sequence_the_same_share(token_budget: int) -> None:
    weights = _weights(pack(_update(), token_budget=token_budget, normalisation="sequence_mean"))
    assert weights[0] == pytest.approx([0, 1 / 6, 1 / 6])
    assert weights[1] == pytest.approx([0, 1 / 3])
    assert weights[2] == pytest.approx([0, 0, 1 / 3])


@pytest.mark.parametrize("token_budget", [3, 5, 8])
def test_the_constant_divides_by_sequences_times_the_limit_on_completions(token_budget: int) -> None:
    batches = pack(_update(), token_budget=token_budget, normalisation="constant", max_completion_tokens=10)
    weights = _weights(batches)
    assert weights[0] == pytest.approx([0, 1 / 30, 1 / 30])
    assert weights[2] == pytest.approx([0, 0, 1 / 30])


@pytest.mark.parametrize("limit", [None, 0])
def test_the_constant_without_a_limit_is_refused(limit: int | None) -> None:
    with pytest.raises(ValueError, match=f"max_completion_tokens of at least 1, not {limit}"):
        pack(_update(), token_budget=5, normalisation="constant", max_completion_tokens=limit)


def test_a_sample_longer_than_the_budget_is_refused_with_its_length_and_the_budget() -> None:
    with pytest.raises(ValueError, match="sample 1 has 6 tokens, more than the budget of 5"):
        pack([_sample([1, 2], 1), _sample([1, 2, 3, 4, 5, 6], 1)], token_budget=5, normalisation="token_mean")


def test_a_sample_with_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 0 has no token to train on"):
        pack([_sample([1, 2], 2)], token_budget=5, normalisation="token_mean")


def test_a_loss_on_the_first_token_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 0 has a loss on its first token"):
        pack([_sample([1, 2], 0)], token_budget=5, normalisation="token_mean")


def test_samples_with_and_without_log_probs_cannot_be_mixed() -> None:
    samples = [_sample([1, 2], 1, logprobs=[0.0, -1.0]), _sample([1, 2], 1)]
    with pytest.raises(ValueError, match="samples 0 and 1 differ in having rollout log-probs"):
        pack(samples, token_budget=5, normalisation="token_mean")


def test_a_mask_or_log_probs_of_another_length_are_refused() -> None:
    mask = TrainingSample(
        token_ids=[1, 2, 3], loss_mask=[False, True], rollout_logprobs=None, advantage=1.0, policy_version=0
    )
    with pytest.raises(ValueError, match="3 tokens and a loss mask of 2"):
        pack([mask], token_budget=5, normalisation="token_mean")
    with pytest.raises(ValueError, match="3 tokens and 2 rollout log-probs"):
        pack([_sample([1, 2, 3], 1, logprobs=[0.0, 0.0])], token_budget=5, normalisation="token_mean")


def test_no_samples_make_no_micro_batches() -> None:
    assert pack([], token_budget=5, normalisation="token_mean") == []
    assert packing_efficiency([], token_budget=5) == 1.0


def test_the_efficiency_is_the_filled_share_of_the_budgets() -> None:
    assert packing_efficiency(pack(_update(), token_budget=5, normalisation="token_mean"), token_budget=5) == 0.8


def test_micro_batches_are_filled_evenly_where_that_takes_no_more_of_them() -> None:
    # Best fit alone would fill the first to 100 and leave 10 for the last.
    samples = [_sample(list(range(10)), 5) for _ in range(11)]
    sizes = [batch.input_ids.numel() for batch in pack(samples, token_budget=100, normalisation="token_mean")]
    assert sizes == [60, 50]


def test_a_tight_packing_is_kept_where_an_even_one_would_not_fit() -> None:
    # Two rows of 10 hold 6 + 4 and 4 + 3 + 3; handing the longest to the emptiest would put 6 + 3 beside 4 + 4 + 3.
    samples = [_sample(list(range(n)), 1) for n in (6, 4, 4, 3, 3)]
    sizes = [batch.input_ids.numel() for batch in pack(samples, token_budget=10, normalisation="token_mean")]
    assert sizes == [10, 10]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 50), min_size=1, max_size=40),
    slack=st.integers(0, 100),
    normalisation=st.sampled_from(["token_mean", "sequence_mean"]),
)
def test_every_sequence_is_packed_whole_and_once_and_no_row_exceeds_the_budget(
    lengths: list[int], slack: int, normalisation: str
) -> None:
    samples = [_sample([100 * i + j for j in range(length)], 1 + i % (length - 1)) for i, length in enumerate(lengths)]
    budget = max(lengths) + slack
    batches = pack(samples, token_budget=budget, normalisation=normalisation)  # type: ignore[arg-type]
    seen = []
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == batch.input_ids.numel() <= budget
        for index, start, end in zip(batch.sample_indices, bounds[:-1], bounds[1:], strict=True):
            assert batch.input_ids[start:end].tolist() == samples[index].token_ids
            assert batch.loss_mask[start:end].tolist() == samples[index].loss_mask
            assert batch.position_ids[start:end].tolist() == list(range(end - start))
            seen.append(index)
    assert sorted(seen) == list(range(len(samples)))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == num_loss_tokens(samples)
    assert sum(float(batch.loss_weights.sum()) for batch in batches) == pytest.approx(1.0, rel=1e-5)
    # Best fit opens a row only for what no other has room for, so rows are more than half full on average.
    assert len(batches) == 1 or 2 * sum(lengths) > budget * len(batches)


def test_the_same_samples_give_the_same_micro_batches() -> None:
    samples = [_sample([100 * i + j for j in range(2 + i * 7 % 13)], 1) for i in range(30)]
    first, again = (pack(samples, token_budget=40, normalisation="token_mean") for _ in range(2))
    for one, other in zip(first, again, strict=True):
        for field in fields(MicroBatch):
            left, right = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
