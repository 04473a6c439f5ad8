import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ludic.train.packing import Normalisation, num_loss_tokens, pack, update_scale
from ludic.types import MicroBatch, TrainingSample


def share_of_budgets(micro_batches: Sequence[MicroBatch], *, token_budget: int) -> float:
    """The share of the rows' budgets that holds tokens of sequences."""
    lengths = [row.cu_seqlens[-2] if row.sample_indices[-1] < 0 else row.input_ids.numel() for row in micro_batches]
    return sum(map(int, lengths)) / (token_budget * len(micro_batches))


def _sample(
    token_ids: list[int], prompt: int, advantage: float = 1.0, logprobs: list[float] | None = None
) -> TrainingSample:
    return TrainingSample(
        token_ids=token_ids,
        loss_mask=[i >= prompt for i in range(len(token_ids))],
        rollout_logprobs=logprobs,
        advantage=advantage,
    )


def _update() -> list[TrainingSample]:
    return [
        _sample([11, 12, 13], 1, 1.0, [0.0, -0.1, -0.2]),
        _sample([21, 22], 1, -1.0, [0.0, -0.3]),
        _sample([31, 32, 33], 2, 0.5, [0.0, 0.0, -0.4]),
    ]


def _group(prompt: list[int], *completions: list[int], advantage: float = 1.0) -> list[TrainingSample]:
    return [_sample(prompt + completion, len(prompt), advantage) for completion in completions]


def _sequences(batch: MicroBatch) -> dict[int, tuple[list[int], list[int]]]:
    """Of each sample in the row: the tokens that its last segment sees, and what its trained tokens are predicted from."""
    bounds, key_bounds = batch.cu_seqlens.tolist(), batch.cu_seqlens_k.tolist()
    tokens = batch.input_ids.tolist()
    keys = range(len(tokens)) if batch.key_indices is None else batch.key_indices.tolist()
    predictor = dict(zip(batch.target_positions.tolist(), batch.predictor_positions.tolist(), strict=True))
    found = {}
    for index, (start, end), (first, last) in zip(
        batch.sample_indices, pairwise(bounds), pairwise(key_bounds), strict=True
    ):
        if index >= 0:
            assert list(keys[last - (end - start) : last]) == list(
                range(start, end)
            )  # its own tokens are the last it sees
            found[index] = (
                [tokens[key] for key in keys[first:last]],
                [keys[first:last].index(predictor[t]) for t in range(start, end) if t in predictor],
            )
    return found


def _assert_equal(one: MicroBatch, other: MicroBatch) -> None:
    for field in fields(MicroBatch):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


def test_the_arrays_are_those_of_the_docstring() -> None:
    samples = [_sample([7, 8, 12, 13], 2, 1.0), _sample([7, 8, 22], 2, -1.0), _sample([31, 32, 33], 2, 0.5)]
    first, second = pack(samples, token_budget=5, normalisation="token_mean")
    assert first.sample_indices == (-1, 0, 1)
    assert first.input_ids.tolist() == [7, 8, 12, 13, 22]
    assert first.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert (first.cu_seqlens.tolist(), first.max_seqlen) == ([0, 2, 4, 5], 2)
    assert (first.cu_seqlens_k.tolist(), first.max_seqlen_k) == ([0, 2, 6, 9], 4)
    assert first.key_indices is not None
    assert first.key_indices.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4]
    assert first.target_positions.tolist() == [2, 3, 4]
    assert first.predictor_positions.tolist() == [1, 2, 1]
    assert (first.num_loss_tokens, first.num_sequence_tokens) == (3, 7)
    assert first.loss_mask.tolist() == [False, False, True, True, True]
    assert first.loss_weights.tolist() == [0, 0, 0.25, 0.25, 0.25]
    assert first.advantages.tolist() == [0, 0, 1.0, 1.0, -1.0]
    assert first.rollout_logprobs is None
    assert second.sample_indices == (2,)
    assert second.input_ids.tolist() == [31, 32, 33]
    assert second.key_indices is not None
    assert second.key_indices.tolist() == [0, 1, 2]
    assert (second.target_positions.tolist(), second.predictor_positions.tolist()) == ([2], [1])


def test_without_a_shared_prompt_a_sequence_is_one_segment_and_its_keys_are_the_row() -> None:
    first, second = pack(_update(), token_budget=5, normalisation="token_mean", share_prompts=False)
    assert first.sample_indices == (0, 1)
    assert first.input_ids.tolist() == [11, 12, 13, 21, 22]
    assert first.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert first.cu_seqlens.tolist() == first.cu_seqlens_k.tolist() == [0, 3, 5]
    assert (first.max_seqlen, first.max_seqlen_k, first.key_indices) == (3, 3, None)
    assert first.target_positions.tolist() == [1, 2, 4]
    assert first.predictor_positions.tolist() == [0, 1, 3]
    assert (first.num_loss_tokens, first.num_sequence_tokens) == (3, 5)
    assert first.loss_mask.tolist() == [False, True, True, False, True]
    assert first.loss_weights.tolist() == [0, 0.25, 0.25, 0, 0.25]
    assert first.advantages.tolist() == [1.0, 1.0, 1.0, -1.0, -1.0]
    assert first.rollout_logprobs is not None
    assert first.rollout_logprobs.tolist() == pytest.approx([0.0, -0.1, -0.2, 0.0, -0.3])
    assert second.sample_indices == (2,)
    assert second.input_ids.tolist() == [31, 32, 33]
    assert second.loss_weights.tolist() == [0, 0, 0.25]


@pytest.mark.parametrize("share_prompts", [True, False])
def test_the_dtypes_are_those_of_the_contract(share_prompts: bool) -> None:
    samples = [*_update(), *_group([1, 2], [3], [4, 5])]
    for batch in pack(samples, token_budget=7, normalisation="token_mean", share_prompts=share_prompts):
        assert (batch.key_indices is not None) == share_prompts
        dtypes = {field.name: getattr(getattr(batch, field.name), "dtype", None) for field in fields(MicroBatch)}
        long = {"input_ids", "position_ids", "target_positions", "predictor_positions"}
        assert {name for name, dtype in dtypes.items() if dtype == torch.int64} == long | (
            {"key_indices"} if share_prompts else set()
        )
        assert dtypes["cu_seqlens"] == dtypes["cu_seqlens_k"] == torch.int32
        assert dtypes["loss_mask"] == torch.bool
        assert dtypes["loss_weights"] == dtypes["advantages"] == torch.float32
        assert dtypes["rollout_logprobs"] in (None, torch.float32)


def test_samples_of_one_prompt_with_equal_completions_stay_separate() -> None:
    (batch,) = pack(_group([1, 2], [3, 4], [3, 4]), token_budget=10, normalisation="token_mean")
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 3, 4]
    assert (batch.num_loss_tokens, batch.num_sequence_tokens) == (4, 8)
    assert _sequences(batch) == {0: ([1, 2, 3, 4], [1, 2]), 1: ([1, 2, 3, 4], [1, 2])}


def test_several_turns_share_what_stands_before_the_first_trained_token_and_no_more() -> None:
    mask = [False, False, True, False, True]
    turns = [
        TrainingSample(token_ids=ids, loss_mask=mask, rollout_logprobs=None, advantage=1.0)
        for ids in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6])
    ]
    (batch,) = pack(turns, token_budget=10, normalisation="token_mean")
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 3, 4, 6]
    assert batch.loss_mask.tolist() == [False, False, True, False, True, True, False, True]
    assert _sequences(batch) == {0: ([1, 2, 3, 4, 5], [1, 3]), 1: ([1, 2, 3, 4, 6], [1, 3])}


def test_a_prompt_that_another_one_only_begins_with_is_not_shared() -> None:
    (batch,) = pack([_sample([1, 2, 3], 1), _sample([1, 2, 4], 2)], token_budget=10, normalisation="token_mean")
    assert batch.input_ids.tolist() == [1, 2, 3, 1, 2, 4]


def test_a_group_that_does_not_fit_is_spread_over_rows_that_each_hold_the_prompt() -> None:
    samples = _group([1, 2, 3], [10] * 5, [11] * 4, [12] * 3, [13] * 2)
    batches = pack(samples, token_budget=11, normalisation="token_mean")
    assert sorted(batch.input_ids.tolist() for batch in batches) == sorted(
        [[1, 2, 3, *[10] * 5, *[12] * 3], [1, 2, 3, *[11] * 4, *[13] * 2]]
    )
    assert sum(batch.num_sequence_tokens for batch in batches) == sum(len(sample.token_ids) for sample in samples)


def test_parts_of_a_group_that_meet_in_a_row_share_one_prompt() -> None:
    # 8 + 8 tokens over two rows of 9: the first group fills a row, the second fits into neither whole.
    samples = [*_group([1, 2], [3] * 3, [4] * 2, [5]), *_group([6, 7], [8] * 3, [9] * 2, [10])]
    for batch in pack(samples, token_budget=9, normalisation="token_mean"):
        prompts = [tokens for tokens in (1, 6) for token in batch.input_ids.tolist() if token == tokens]
        assert len(prompts) == len(set(prompts))


def test_rows_of_long_groups_waste_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 400, (32, 8), generator=generator).tolist()
    samples = [
        sample
        for group, of_group in enumerate(lengths)
        for sample in _group([group] * 100, *([1000 + j] * n for j, n in enumerate(of_group)))
    ]
    batches = pack(samples, token_budget=4096, normalisation="token_mean")
    once = 32 * 100 + sum(map(sum, lengths))
    forwarded = sum(batch.input_ids.numel() for batch in batches)
    assert forwarded < 1.02 * once  # hardly a prompt stands twice
    assert len(batches) == -(-once // 4096)
    assert share_of_budgets(batches, token_budget=4096) == forwarded / (4096 * len(batches))
    sizes = [batch.input_ids.numel() for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] > 0.8 * sizes[0]


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


def test_log_probs_that_the_sampler_did_not_give_are_nan_where_they_would_be_needed() -> None:
    samples = [_sample([1, 2, 3], 1, logprobs=[9.0, -1.0, -2.0]), _sample([4, 5], 1), _sample([6] * 5, 1)]
    mixed, without = pack(samples, token_budget=5, normalisation="token_mean")
    assert mixed.rollout_logprobs is not None
    known, unknown = mixed.rollout_logprobs.tolist()[:4], mixed.rollout_logprobs.tolist()[4]
    assert known == [0.0, -1.0, -2.0, 0.0]  # 0 off the mask, whatever the sample says there
    assert math.isnan(unknown)
    assert without.rollout_logprobs is None


def test_a_mask_or_log_probs_of_another_length_are_refused() -> None:
    mask = TrainingSample(token_ids=[1, 2, 3], loss_mask=[False, True], rollout_logprobs=None, advantage=1.0)
    with pytest.raises(ValueError, match="3 tokens and a loss mask of 2"):
        pack([mask], token_budget=5, normalisation="token_mean")
    with pytest.raises(ValueError, match="3 tokens and 2 rollout log-probs"):
        pack([_sample([1, 2, 3], 1, logprobs=[0.0, 0.0])], token_budget=5, normalisation="token_mean")


def test_no_samples_make_no_micro_batches() -> None:
    assert pack([], token_budget=5, normalisation="token_mean") == []


def test_the_efficiency_is_the_filled_share_of_the_budgets() -> None:
    assert share_of_budgets(pack(_update(), token_budget=5, normalisation="token_mean"), token_budget=5) == 0.8


def test_micro_batches_are_filled_evenly_where_that_takes_no_more_of_them() -> None:
    # Best fit alone would fill the first to 100 and leave 10 for the last.
    samples = [_sample([index, *range(9)], 5) for index in range(11)]
    sizes = [batch.input_ids.numel() for batch in pack(samples, token_budget=100, normalisation="token_mean")]
    assert sizes == [60, 50]


def test_a_tight_packing_is_kept_where_an_even_one_would_not_fit() -> None:
    # Two rows of 10 hold 6 + 4 and 4 + 3 + 3; handing the longest to the emptiest would put 6 + 3 beside 4 + 4 + 3.
    samples = [_sample([index] * n, 1) for index, n in enumerate((6, 4, 4, 3, 3))]
    sizes = [batch.input_ids.numel() for batch in pack(samples, token_budget=10, normalisation="token_mean")]
    assert sizes == [10, 10]


@settings(deadline=None, max_examples=80)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 40), min_size=1, max_size=6)), min_size=1, max_size=10
    ),
    slack=st.integers(0, 100),
    normalisation=st.sampled_from(["token_mean", "sequence_mean"]),
    share_prompts=st.booleans(),
    pad_to_multiple=st.sampled_from([1, 8]),
)
def test_every_sequence_is_packed_whole_and_once_and_no_row_exceeds_the_budget(
    groups: list[tuple[int, list[int]]],
    slack: int,
    normalisation: Normalisation,
    share_prompts: bool,
    pad_to_multiple: int,
) -> None:
    samples = []
    for number, (prompt, completions) in enumerate(groups):
        of_group = [[100 * number + 50 + j] * length for j, length in enumerate(completions)]
        samples += _group([100 * number] * prompt, *of_group)
    budget = max(len(sample.token_ids) for sample in samples) + slack + pad_to_multiple - 1
    batches = pack(
        samples,
        token_budget=budget,
        normalisation=normalisation,
        share_prompts=share_prompts,
        pad_to_multiple=pad_to_multiple,
    )
    seen, forwarded = [], 0
    for batch in batches:
        tokens = batch.input_ids.numel()
        forwarded += tokens
        assert batch.cu_seqlens[0] == batch.cu_seqlens_k[0] == 0
        assert batch.cu_seqlens[-1] == tokens <= budget
        assert tokens % pad_to_multiple == 0
        assert (
            batch.max_seqlen == batch.cu_seqlens.diff().max() and batch.max_seqlen_k == batch.cu_seqlens_k.diff().max()
        )
        assert batch.target_positions.tolist() == batch.loss_mask.nonzero().flatten().tolist()
        assert batch.num_loss_tokens == batch.loss_mask.sum()
        found = _sequences(batch)
        for index, (ids, predictors) in found.items():
            assert ids == samples[index].token_ids
            assert predictors == [i - 1 for i, trained in enumerate(samples[index].loss_mask) if trained]
        before = batch.position_ids[batch.predictor_positions]
        assert torch.equal(batch.position_ids[batch.target_positions], before + 1)
        assert batch.num_sequence_tokens == sum(len(samples[index].token_ids) for index in found)
        seen += list(found)
    assert sorted(seen) == list(range(len(samples)))
    assert sum(batch.num_loss_tokens for batch in batches) == num_loss_tokens(samples)
    assert sum(float(batch.loss_weights.sum()) for batch in batches) == pytest.approx(1.0, rel=1e-5)
    padding = (pad_to_multiple - 1) * len(batches)
    assert forwarded <= sum(len(sample.token_ids) for sample in samples) + padding  # sharing never costs a token
    if share_prompts and len(batches) == 1:
        assert forwarded <= sum(prompt + sum(completions) for prompt, completions in groups) + padding


def test_the_same_samples_give_the_same_micro_batches() -> None:
    samples = [_sample([100 * (i // 3), *[i + j for j in range(1 + i * 7 % 13)]], 1) for i in range(30)]
    first, again = (pack(samples, token_budget=40, normalisation="token_mean") for _ in range(2))
    for one, other in zip(first, again, strict=True):
        _assert_equal(one, other)


def test_padding_belongs_to_no_one_and_counts_for_nothing() -> None:
    plain, padded = (
        pack(_group([1, 2], [3], [4]), token_budget=16, normalisation="token_mean", pad_to_multiple=multiple)[0]
        for multiple in (1, 8)
    )
    assert padded.sample_indices == (*plain.sample_indices, -1)
    assert padded.input_ids.tolist() == [*plain.input_ids.tolist(), 0, 0, 0, 0]
    assert padded.position_ids.tolist() == [*plain.position_ids.tolist(), 0, 1, 2, 3]
    assert padded.cu_seqlens.tolist() == [*plain.cu_seqlens.tolist(), 8]
    assert _sequences(padded) == _sequences(plain)
    assert padded.num_sequence_tokens == plain.num_sequence_tokens == 6
    assert padded.loss_weights.tolist()[4:] == [0, 0, 0, 0]
    assert share_of_budgets([padded], token_budget=16) == share_of_budgets([plain], token_budget=16) == 4 / 16


def test_a_sample_that_only_the_rounded_budget_has_no_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"11 tokens, more than the budget of 12 \(8 in rows of a multiple of 8\)"):
        pack([_sample([1] * 11, 1)], token_budget=12, normalisation="token_mean", pad_to_multiple=8)
    with pytest.raises(ValueError, match="pad_to_multiple must be at least 1"):
        pack(_update(), token_budget=12, normalisation="token_mean", pad_to_multiple=0)


@pytest.mark.parametrize("normalisation", ["token_mean", "sequence_mean", "constant"])
def test_packed_in_parts_with_the_factor_given_later_the_weights_are_those_of_the_whole(
    normalisation: Normalisation,
) -> None:
    samples = _update()
    whole = _weights(pack(samples, token_budget=8, normalisation=normalisation, max_completion_tokens=9))
    factor = update_scale(normalisation, num_sequences=3, num_loss_tokens=4)
    for index, sample in enumerate(samples):
        (part,) = pack([sample], token_budget=8, normalisation=normalisation, max_completion_tokens=9, scale=1.0)
        assert (part.loss_weights * factor).tolist() == pytest.approx(whole[index])


@pytest.mark.parametrize("normalisation", ["token_mean", "sequence_mean"])
def test_an_update_of_nothing_has_no_scale(normalisation: Normalisation) -> None:
    with pytest.raises(ValueError, match="0 sequences and 0 loss tokens has no mean"):
        update_scale(normalisation, num_sequences=0, num_loss_tokens=0)


def test_moving_a_micro_batch_keeps_all_of_it() -> None:
    for batch in pack(_group([1, 2], [3], [4, 5]), token_budget=10, normalisation="token_mean"):
        _assert_equal(batch.to(torch.device("cpu")), batch)
        assert batch.to(torch.device("meta")).key_indices is not None
        for field in fields(MicroBatch):
            value = getattr(batch.to(torch.device("meta")), field.name)
            assert not isinstance(value, torch.Tensor) or value.is_meta, field.name
