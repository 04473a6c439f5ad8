"""NaN and infinity in the numbers of an update: skipped, counted, explained, and never in a weight."""

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.faults.numbers import (
    BAD,
    CONFIG,
    PLACES,
    Run,
    fault,
    inject,
    make_learner,
    make_samples,
    same,
    update,
)
from ludic.train import learner as learner_module
from ludic.train.learner import Learner


@pytest.fixture
def learner(digit_policy_dir: Path) -> Learner:
    return make_learner(CONFIG, digit_policy_dir)


def twin_of(learner: Learner, policy: Path, **settings: Any) -> Learner:
    return make_learner(dataclasses.replace(learner.config, **settings), policy)


def test_whatever_is_not_finite_is_skipped_and_leaves_no_trace(digit_policy_dir: Path, tmp_path: Path) -> None:
    outcomes = inject(12, seed=0, folder=tmp_path, policy=digit_policy_dir)
    assert len(outcomes) == 12
    assert [outcome for outcome in outcomes if not outcome.ok] == []
    assert any("in a run" in outcome.fault for outcome in outcomes)


def test_the_injections_notice_a_learner_that_lets_one_through(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "LARGEST_NORM", math.inf)
    monkeypatch.setattr("benchmarks.faults.numbers.PLACES", ("gradient",))
    monkeypatch.setattr("benchmarks.faults.numbers.BAD", {"Inf": math.inf})
    monkeypatch.setattr("benchmarks.faults.numbers._RUNS_SHARE", -1.0)
    assert not all(outcome.ok for outcome in inject(4, seed=0, folder=tmp_path, policy=digit_policy_dir))


# --- what is skipped, and what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BAD))
@pytest.mark.parametrize("place", PLACES)
def test_a_skipped_update_says_so_in_finite_figures_and_names_what_was_not(
    learner: Learner, digit_policy_dir: Path, place: str, name: str
) -> None:
    twin, rng = twin_of(learner, digit_policy_dir), random.Random(1)
    with fault(learner, place, BAD[name], rng):
        figures = update(learner, make_samples(rng))
    assert figures["skipped_update"] == 1.0 and not learner.stepped
    assert all(map(math.isfinite, figures.values())), figures
    assert figures["num_loss_tokens"] > 0 and "changed_weights_share" not in figures
    assert same(learner, twin)
    assert learner.optimizer.state_dict() == twin.optimizer.state_dict(), "no state before the first step"
    if place == "gradient":
        assert figures["nonfinite_gradients"] == 1 and "loss" in figures and "grad_norm" not in figures
        (broken,) = learner.nonfinite.gradients if learner.nonfinite else ()
        assert (
            f"not finite: the gradient, in 1 of {len(twin.masters.parameters)} parameters ({broken})"
            in learner.diagnosis()
        )
    elif place == "log-prob":
        assert figures["nonfinite_policy_logprobs"] == 1
        assert "1 of the policy's log-probs, in 1 of 2 micro-batches" in learner.diagnosis()
    else:
        assert figures["nonfinite_losses"] == 1 and "loss" not in figures
        assert "the loss, in 1 of 2 micro-batches" in learner.diagnosis()
    for part in (
        "learning rate 0.001",
        "largest |log-ratio| to the sampler",
        "the weights are finite",
        "--learning-rate",
    ):
        assert part in learner.diagnosis()
    assert "\n" not in learner.diagnosis()


def test_an_update_that_is_finite_is_not_skipped(learner: Learner, digit_policy_dir: Path) -> None:
    twin, rng = twin_of(learner, digit_policy_dir), random.Random(1)
    figures = update(learner, make_samples(rng))
    assert figures["skipped_update"] == 0.0 and "skipped_steps" not in figures and learner.stepped
    assert 0 < figures["changed_weights_share"] <= 1 and figures["grad_clipped"] == float(figures["grad_norm"] > 1)
    assert not {name for name in figures if "nonfinite" in name}
    assert learner.diagnosis() == "no update has been skipped"
    assert not same(learner, twin)


@pytest.mark.parametrize(("norm", "skipped"), [(0.99e15, 0.0), (1.01e15, 1.0), (1e30, 1.0)])
def test_a_gradient_is_refused_once_its_square_is_at_home_in_no_second_moment(
    digit_policy_dir: Path, norm: float, skipped: float
) -> None:
    learner = make_learner(dataclasses.replace(CONFIG, max_grad_norm=0.0), digit_policy_dir)
    samples = make_samples(random.Random(0))
    tokens = sum(sum(sample.loss_mask) for sample in samples)  # what the gradient is divided by
    with fault(learner, "gradient", norm * tokens, random.Random(0)):
        figures = update(learner, samples)
    assert figures["skipped_update"] == skipped
    if norm < 1e18:
        assert figures["grad_norm"] == pytest.approx(norm)
    assert ("beyond" in learner.diagnosis() or "the norm of the gradient" in learner.diagnosis()) == bool(skipped)
    moments = [tensor for state in learner.optimizer.state.values() for tensor in state.values()]
    assert all(bool(tensor.isfinite().all()) for tensor in moments)


@pytest.mark.parametrize("epochs", [2, 3])
def test_epochs_before_the_one_that_is_not_finite_stay_and_the_others_are_left_out(
    learner: Learner, digit_policy_dir: Path, epochs: int
) -> None:
    """One epoch is taken: exactly what a learner of one epoch does."""
    twin, rng = twin_of(learner, digit_policy_dir), random.Random(1)
    learner = twin_of(learner, digit_policy_dir, epochs_per_update=epochs)
    samples = make_samples(rng)
    with fault(learner, "loss", math.nan, rng, epoch=1):
        figures = update(learner, samples)
    wanted = update(twin, samples)
    assert figures["skipped_update"] == 0.0 and figures["skipped_steps"] == epochs - 1 and learner.stepped
    assert {name: figures[name] for name in wanted} == wanted
    assert same(learner, twin) and "the loss, in 1 of 2" in learner.diagnosis()


def test_the_sampler_is_named_by_its_largest_log_ratio(learner: Learner) -> None:
    rng = random.Random(1)
    samples = [dataclasses.replace(s, rollout_logprobs=[-40.0] * len(s.token_ids)) for s in make_samples(rng)]
    with fault(learner, "gradient", math.nan, rng):
        figures = update(learner, samples)
    assert f"largest |log-ratio| to the sampler {figures['logprob_gap_max']:.3g} nats" in learner.diagnosis()
    assert figures["logprob_gap_max"] > 20
    with fault(learner, "gradient", math.nan, rng):
        update(learner, [dataclasses.replace(sample, rollout_logprobs=None) for sample in samples])
    assert "largest |log-ratio| to the sampler unknown" in learner.diagnosis()


# --- what no update can mend ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_bf16", [False, True])
def test_a_damaged_optimizer_state_stops_at_once_and_says_that_the_weights_must_not_be_saved(
    digit_policy_dir: Path, in_bf16: bool
) -> None:
    learner, rng = make_learner(CONFIG, digit_policy_dir, in_bf16=in_bf16), random.Random(0)
    update(learner, make_samples(rng))
    first = learner.masters.parameters[0]
    learner.optimizer.state[first]["exp_avg"].view(-1)[3] = math.nan
    with pytest.raises(
        FloatingPointError, match=rf"{learner.masters.names[0]}.*optimizer's state is damaged; --resume"
    ):
        update(learner, make_samples(rng))
    assert learner.stepped
    with pytest.raises(
        FloatingPointError, match=r"THE WEIGHTS THEMSELVES ARE NOT FINITE, in 1 parameters \(model\.embed"
    ):
        update(learner, make_samples(rng))
    assert "earlier checkpoint" in learner.nonfinite.text if learner.nonfinite else True


def test_three_updates_in_a_row_end_the_run_and_two_do_not(digit_policy_dir: Path, tmp_path: Path) -> None:
    plan = {step: ("gradient", math.nan) for step in (1, 2, 4)}
    run = Run(random.Random(0), digit_policy_dir, tmp_path / "two", plan)
    assert run.go() is None
    assert run.trainer.state.skipped_updates == 3 and run.trainer.state.skipped_in_a_row == 0
    assert [step for step, row in run.logger.rows.items() if row.get("skipped_update") == 1.0] == [1, 2, 4]
    run = Run(
        random.Random(0), digit_policy_dir, tmp_path / "three", {step: ("loss", math.inf) for step in (2, 3, 4, 5)}
    )
    with pytest.raises(
        FloatingPointError, match=r"updates 2 to 4 .*the loss, in \d of \d micro-batches.*--learning-rate"
    ):
        raise run.go() or AssertionError("the run went on")
    assert run.logger.digests[4] == run.logger.digests[1] != run.logger.digests[0]
    assert run.saved() == dict.fromkeys(range(1, 5), True)


def test_nothing_that_the_sampler_says_reaches_a_weight_as_nan(digit_policy_dir: Path, tmp_path: Path) -> None:
    """With a correction its log-probs are multiplied in: the sequence is left out then, and counted either way."""
    for settings, dropped in (({}, 0.0), ({"tis_cap": 2.0}, 1.0)):
        run = Run(random.Random(0), digit_policy_dir, tmp_path / f"{dropped}", {2: ("sampler", math.nan)}, **settings)
        assert run.go() is None
        row = run.logger.rows[2]
        assert row["nonfinite_logprobs"] == 1.0 and row["skipped_update"] == 0.0
        assert row["dropped_without_logprobs"] == dropped
        assert run.logger.rows[1]["nonfinite_logprobs"] == 0.0
        assert all(bool(p.isfinite().all()) for p in run.learner.masters.parameters)


def test_torch_still_reports_nan_and_infinity_in_the_norms_that_are_looked_at() -> None:
    """The names of broken gradients and the watch over the weights both rest on it."""
    for value in BAD.values():
        tensor = torch.tensor([1.0, value, 2.0])
        assert not torch._foreach_norm([tensor], math.inf)[0].isfinite()
        assert not torch.linalg.vector_norm(tensor.bfloat16(), math.inf).isfinite()
