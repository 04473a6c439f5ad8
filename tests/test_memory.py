"""The budget that fits: found by trials of the worst micro-batch, refused with figures, never guessed."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ludic.config import GRPOConfig
from ludic.train import memory
from ludic.train.learner import ROW_MULTIPLE
from ludic.train.memory import BudgetError, choose_budget, smallest_budget, worst_samples
from ludic.train.packing import pack
from ludic.train.token_budget import OutOfMemory

GIB = 2**30


def device(capacity_gib: float, *, fixed_gib: float = 8.0, per_token: int = 1_000_000) -> Callable[[int], int | None]:
    """A GPU on which a micro-batch needs so much for the weights and so much for each token."""

    def measure(budget: int) -> int | None:
        need = int(fixed_gib * GIB) + per_token * budget
        return need if need <= capacity_gib * GIB else None

    return measure


def test_a_budget_that_fits_is_taken_as_it_is() -> None:
    fit = choose_budget(device(80), requested=16384, minimum=1024, capacity=80 * GIB)
    assert fit.token_budget == 16384
    assert fit.need_bytes == 8 * GIB + 16384 * 1_000_000


@pytest.mark.parametrize("requested", [65536, 200_000])
def test_a_budget_that_does_not_fit_is_refused_with_the_one_that_would(requested: int) -> None:
    with pytest.raises(BudgetError, match=f"--micro-token-budget {requested} needs about") as refusal:
        choose_budget(device(40), requested=requested, minimum=1024, capacity=40 * GIB)
    would = int(str(refusal.value).partition("free: ")[2].split()[0])
    assert choose_budget(device(40), requested=would, minimum=1024, capacity=40 * GIB).token_budget == would
    larger = device(40)(would + 4096)
    assert larger is None or larger > 0.95 * 40 * GIB, "much more would have fitted"


def test_auto_takes_the_largest_that_fits_and_no_more_than_the_limit() -> None:
    fit = choose_budget(device(40), requested=0, minimum=1024, capacity=40 * GIB)
    assert 30_000 < fit.token_budget < 34_000 and fit.need_bytes <= 0.95 * 40 * GIB
    assert choose_budget(device(1000), requested=0, minimum=1024, capacity=1000 * GIB).token_budget == 65536
    assert choose_budget(device(10), requested=0, minimum=1024, capacity=10 * GIB).token_budget == 1024


def test_auto_goes_down_where_memory_grows_faster_than_two_trials_showed() -> None:
    def quadratic(budget: int) -> int | None:
        need = 8 * GIB + 40 * budget * budget
        return need if need <= 40 * GIB else None

    fit = choose_budget(quadratic, requested=0, minimum=1024, capacity=40 * GIB)
    assert 20_000 < fit.token_budget < 29_000


def test_a_model_that_fits_no_micro_batch_is_refused_with_what_helps() -> None:
    with pytest.raises(BudgetError, match=r"not even micro-batches of 1024 tokens fit.*--gradient-checkpointing"):
        choose_budget(device(8), requested=0, minimum=1024, capacity=8 * GIB)
    with pytest.raises(BudgetError, match="not even"):
        choose_budget(device(8.9, fixed_gib=7.6), requested=4096, minimum=1024, capacity=int(8.9 * GIB))


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize(("max_seq_len", "budget"), [(256, 4096), (1024, 1024), (1500, 1536), (9000, 16384)])
def test_the_worst_micro_batch_is_one_and_full_and_mostly_trained_on(
    max_seq_len: int, budget: int, share_prompts: bool
) -> None:
    config = GRPOConfig(max_seq_len=max_seq_len, share_prompts=share_prompts, micro_token_budget=None)
    samples = worst_samples(config, budget)
    (row,) = pack(samples, token_budget=budget, normalisation="token_mean", share_prompts=share_prompts, scale=1.0)
    assert row.input_ids.numel() > budget - max_seq_len // 8 - 2
    assert row.num_loss_tokens > 0.85 * row.input_ids.numel()
    assert len(samples[0].token_ids) == max_seq_len


@pytest.mark.parametrize("max_seq_len", [100, 1024, 1100, 1500, 2000, 3000])
def test_the_smallest_budget_holds_the_longest_sequence_in_padded_rows(max_seq_len: int) -> None:
    config = GRPOConfig(max_seq_len=max_seq_len, micro_token_budget=None)
    budget = smallest_budget(config)
    samples = worst_samples(config, budget)
    (row,) = pack(samples, token_budget=budget, normalisation="token_mean", scale=1.0, pad_to_multiple=ROW_MULTIPLE)
    assert len(samples[0].token_ids) == max_seq_len and row.input_ids.numel() <= budget


def test_a_trial_that_runs_out_of_memory_is_over_and_forgotten_before_its_memory_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    class Full:
        """A learner whose trials never fit."""

        config, num_ranks, token_budget, device = GRPOConfig(max_seq_len=64), 1, 512, torch.device("cpu")
        masters = SimpleNamespace(parameters=[torch.nn.Parameter(torch.ones(2))], holds_gradients=False)

        def add_up(self, samples: object) -> None:
            raise OutOfMemory("too small")

        def discard(self) -> None:
            done.append("discarded")

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append(f"emptied within {sys.exc_info()[0]}"))
    learner: Any = Full()
    assert memory._need(learner, 1024) is None
    assert done == ["discarded", "emptied within None"] and learner.token_budget == 512
    learner.num_ranks = 2  # the others would wait for ever
    with pytest.raises(OutOfMemory):
        memory._need(learner, 1024)
