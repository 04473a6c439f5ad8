"""Alarms: each is raised when it should be and at the update it should be, and healthy runs hear nothing."""

import json
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludic.telemetry.alarms import ALARM_NAMES, Alarm, Alarms

History = Callable[[int], Mapping[str, float]]
"""The metrics of update `step`, from 1."""
PLAIN: dict[str, float] = {
    "reward_mean": 0.5,
    "correct_rate": 0.5,
    "parse_err_rate": 0.02,
    "truncation_rate": 0.01,
    "zero_variance_share": 0.3,
    "entropy": 0.4,
    "logprob_gap": 0.006,
    "grad_norm": 0.4,
    "grad_clipped": 0.0,
    "grader_failures": 0.0,
    "changed_weights_share": 0.01,
    "learning_rate": 1e-6,
    "generation_s": 10.0,
    "total_completion_tokens": 51_200.0,
    "avg_completion_length": 200.0,
}


def watch(history: History, updates: int) -> list[Alarm]:
    alarms = Alarms()
    return [alarm for step in range(1, updates + 1) for alarm in alarms.observe(step, history(step))]


def raised(history: History, updates: int = 50) -> list[tuple[str, int]]:
    return [(alarm.name, alarm.step) for alarm in watch(history, updates)]


def plain(step: int, **changes: float) -> dict[str, float]:
    """A step of a run that learns a little with every update."""
    return {**PLAIN, "reward_mean": 0.3 + 0.002 * step, **changes}


def from_update(start: int, **changes: float) -> History:
    """Plain up to `start`, and changed from then on."""
    return lambda step: plain(step, **changes) if step >= start else plain(step)


def noisy_run(seed: int, *, updates: int = 200, group_noise: float = 0.06) -> History:
    """A run as they are: 256 completions of 32 prompts, learning for all of its length, with a warm-up and a decay."""
    rng = random.Random(seed)

    def step_of(step: int) -> dict[str, float]:
        done = step / updates
        rate = min(step / 6, 1.0) * max(0.02, 1 - done)
        correct = min(1.0, max(0.0, 0.3 + 0.5 * done + rng.gauss(0, group_noise)))
        return plain(
            step,
            reward_mean=correct,
            correct_rate=correct,
            parse_err_rate=min(1.0, max(0.0, 0.05 * (1 - done) + abs(rng.gauss(0, 0.02)))),
            truncation_rate=abs(rng.gauss(0.05, 0.03)),
            zero_variance_share=min(1.0, max(0.0, 0.35 + 0.25 * done + rng.gauss(0, 0.09))),
            entropy=0.4 * (1 - 0.6 * done) * math.exp(rng.gauss(0, 0.1)),
            logprob_gap=0.006 * math.exp(rng.gauss(0, 0.2)),
            grad_norm=(norm := 0.7 * math.exp(rng.gauss(0, 0.4))),
            grad_clipped=float(norm > 1),
            grader_failures=float(rng.random() < 0.1),
            changed_weights_share=0.01 * rate,
            learning_rate=1e-6 * rate,
            generation_s=10 * math.exp(rng.gauss(0, 0.25)),
            total_completion_tokens=256 * (length := 200 + 100 * done + rng.gauss(0, 10)),
            avg_completion_length=length,
        )

    return step_of


# --- each alarm, at the update where it should be raised --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "history", "step"),
    [
        ("truncated", from_update(1, truncation_rate=0.26), 5),
        ("truncated", from_update(11, truncation_rate=0.7), 12),  # (3 x 0.01 + 2 x 0.7) / 5 is above 0.25
        ("zero_variance", from_update(1, zero_variance_share=0.81), 5),
        ("zero_variance", from_update(21, zero_variance_share=1.0), 24),
        ("parse_rate", from_update(21, parse_err_rate=0.25), 24),
        ("entropy", from_update(21, entropy=0.07), 25),
        ("logprob_gap", from_update(21, logprob_gap=0.04), 24),
        ("logprob_gap", from_update(21, logprob_gap=5.0), 21),
        ("logprob_gap_large", from_update(1, logprob_gap=0.101), 5),
        ("logprob_gap_large", lambda step: plain(step, logprob_gap=0.05 if step < 21 else 0.12), 24),
        ("changed_weights", from_update(1, changed_weights_share=9e-5), 5),
        ("changed_weights", from_update(21, changed_weights_share=0.0), 25),
        ("clipping", from_update(1, grad_clipped=1.0, grad_norm=3.0), 20),
        ("clipping", from_update(15, grad_clipped=1.0, grad_norm=3.0), 34),
        ("grader", from_update(21, grader_failures=3.0), 25),
        ("grader", from_update(21, grader_failures=40.0), 21),
        ("queue", from_update(21, generation_s=31.0), 26),  # the median of ten
    ],
)
def test_an_alarm_is_raised_once_at_the_update_where_its_window_is_beyond_the_threshold(
    name: str, history: History, step: int
) -> None:
    assert raised(history) == [(name, step)]


def test_the_reward_is_flat_once_the_line_through_its_window_does_not_rise() -> None:
    assert raised(lambda step: PLAIN, 100) == [("reward_flat", 60)]
    # It rises by 0.01 an update for 40 updates and stays: a line through 60 rises as long as it sees any of that.
    assert raised(lambda step: {**PLAIN, "reward_mean": 0.1 + 0.01 * min(step, 40)}, 150) == [("reward_flat", 99)]
    assert raised(lambda step: {**PLAIN, "reward_mean": 0.5 - 0.001 * step}, 100) == [("reward_flat", 60)]


@pytest.mark.parametrize(
    "history",
    [
        from_update(1, truncation_rate=0.25),
        from_update(1, zero_variance_share=0.8),
        from_update(21, parse_err_rate=0.169),
        from_update(21, entropy=0.0801),
        from_update(21, logprob_gap=0.0299),  # five times the first, and still little
        from_update(1, logprob_gap=0.099),  # much, and it does not rise
        from_update(1, changed_weights_share=1.01e-4),
        lambda step: plain(step, grad_clipped=float(step % 20 > 0), grad_norm=5.0),
        from_update(1, grader_failures=2.0),  # 10 of 1280
        from_update(21, generation_s=29.9),
        from_update(21, generation_s=80.0, total_completion_tokens=150_000.0),  # more work
        from_update(
            21, generation_s=80.0, avg_completion_length=600.0, total_completion_tokens=51_201.0
        ),  # longer ones
        lambda step: plain(step, generation_s=0.1 if step < 21 else 1.0),  # ten times a tenth of a second
    ],
)
def test_just_below_the_threshold_nothing_is_said(history: History) -> None:
    assert raised(history) == []


def test_a_reward_that_cannot_rise_any_more_is_no_alarm() -> None:
    solved = {**PLAIN, "reward_mean": 0.95, "correct_rate": 0.95}
    assert raised(lambda step: solved, 200) == []


def test_small_steps_on_purpose_are_no_lost_steps() -> None:
    def decayed(step: int) -> dict[str, float]:
        rate = max(0.001, 1 - step / 40)
        return plain(step, learning_rate=1e-6 * rate, changed_weights_share=2.5e-4 * rate)

    assert raised(decayed) == []
    assert raised(lambda step: plain(step, changed_weights_share=2.5e-4 * max(0.001, 1 - step / 40)))


def test_the_noise_of_small_updates_is_not_taken_for_a_falling_parse_rate() -> None:
    """Eight completions an update: up to six of the forty in a window without an answer are chance."""

    def small(errors: float) -> History:
        return lambda step: plain(step, total_completion_tokens=1600.0, parse_err_rate=errors if step > 20 else 0.02)

    assert raised(small(0.3)) == []
    assert raised(small(0.4)) == [("parse_rate", 25)]


def test_a_policy_that_solves_two_in_a_hundred_hears_that_its_groups_teach_nothing_and_why() -> None:
    (alarm,) = watch(from_update(1, zero_variance_share=0.84, correct_rate=0.02), 50)
    assert alarm.name == "zero_variance" and alarm.step == 5
    assert (
        "84% of the groups of updates 1 to 5" in alarm.message and "2.0% of the completions are right" in alarm.message
    )
    assert "too hard" in alarm.message and "--group-size" in alarm.message
    (alarm,) = watch(from_update(1, zero_variance_share=0.84, correct_rate=0.97), 50)
    assert "too easy" in alarm.message


def test_every_alarm_says_on_one_line_what_it_saw_over_which_updates_and_what_to_turn() -> None:
    bad: dict[str, Any] = {
        "truncation_rate": 0.9, "zero_variance_share": 0.95, "parse_err_rate": 0.9, "entropy": 0.001, "logprob_gap": 1.0,
        "changed_weights_share": 0.0, "grad_clipped": 1.0, "grad_norm": 8.0, "grader_failures": 99.0, "generation_s": 500.0,
        "reward_mean": 0.1,
    }  # fmt: skip
    alarms = watch(from_update(11, **bad), 120) + watch(from_update(1, logprob_gap=0.2), 20)
    assert {alarm.name for alarm in alarms} == set(ALARM_NAMES)
    for alarm in alarms:
        assert "\n" not in alarm.message and 100 < len(alarm.message) < 480, alarm.message
        assert f"to {alarm.step}" in alarm.message, alarm.message
        assert str(alarm) == f"alarm {alarm.name}: {alarm.message}"
        if alarm.name != "grader":  # its limits are of the environment, not of a flag
            assert "--" in alarm.message, alarm.message


# --- healthy runs -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_noisy_run_that_learns_hears_nothing(seed: int) -> None:
    assert watch(noisy_run(seed), 200) == []


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(PLAIN)), share=st.floats(0.1, 0.9))
def test_missing_metrics_nan_and_infinity_are_passed_over(seed: int, name: str, share: float) -> None:
    rng, run = random.Random(seed), noisy_run(seed)

    def torn(step: int) -> dict[str, float]:
        metrics = dict(run(step))
        for metric in list(metrics):
            if rng.random() < 0.05 or (metric == name and rng.random() < share):
                metrics[metric] = rng.choice((math.nan, math.inf, -math.inf))
            elif rng.random() < 0.05:
                del metrics[metric]
        return metrics

    assert [alarm for alarm in watch(torn, 200) if alarm.name != "reward_flat"] == []


def test_nothing_is_known_from_no_metrics() -> None:
    assert watch(lambda step: {}, 200) == []


def test_updates_without_the_metric_delay_an_alarm_and_do_not_hide_it() -> None:
    def torn(step: int) -> dict[str, float]:
        metrics = plain(step, truncation_rate=0.5)
        if step % 2:
            del metrics["truncation_rate"]
        return metrics

    (alarm,) = watch(torn, 50)
    assert (alarm.name, alarm.step) == ("truncated", 10) and "updates 2 to 10" in alarm.message


def test_what_is_kept_of_a_long_run_is_bounded() -> None:
    alarms, run = Alarms(), noisy_run(0, updates=5000)
    for step in range(1, 5001):
        alarms.observe(step, {**run(step), **{f"sync/{step}_s": 1.0}})
    kept = [len(seen.values) for seen in alarms._history.values()]
    assert len(kept) < 20 and max(kept) == 60


# --- resumed runs -----------------------------------------------------------------------------------------------------


def lines(history: History, updates: int) -> list[dict[str, Any]]:
    """A metrics file's, with an evaluation and the alarms that were raised in between."""
    alarms, records = Alarms(), list[dict[str, Any]]()
    for step in range(1, updates + 1):
        records.append({"step": step, "time": 1e9 + step, **history(step)})
        records += [{"step": step, "time": 1e9, "event": str(alarm)} for alarm in alarms.observe(step, history(step))]
        records.append({"step": step, "time": 1e9 + step, "eval/accuracy": 0.5, "eval/truncation_rate": 1.0})
    return [json.loads(json.dumps(record)) for record in records]


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 80), seed=st.integers(0, 1000), start=st.integers(1, 60))
def test_a_run_resumed_anywhere_raises_what_the_whole_run_would_have_raised_then(
    cut: int, seed: int, start: int
) -> None:
    run, worse = noisy_run(seed), {"truncation_rate": 0.6, "entropy": 0.01, "grad_clipped": 1.0}
    rows = {step: {**run(step), **(worse if step >= start else {})} for step in range(1, 101)}
    whole = watch(rows.__getitem__, 100)
    resumed = Alarms()
    resumed.replay(lines(rows.__getitem__, cut))
    later = [alarm for step in range(cut + 1, 101) for alarm in resumed.observe(step, rows[step])]
    assert later == [alarm for alarm in whole if alarm.step > cut]


def test_of_an_update_that_was_done_twice_the_later_line_counts() -> None:
    records = lines(from_update(1, entropy=0.3), 20) + [
        {"step": step, **plain(step, entropy=0.001)} for step in (19, 20)
    ]
    both = Alarms()
    both.replay(records)
    assert [alarm.name for step in (21, 22) for alarm in both.observe(step, plain(step, entropy=0.001))] == []
    assert [alarm.name for alarm in both.observe(23, plain(23, entropy=0.001))] == ["entropy"]


def test_an_alarm_that_the_metrics_file_tells_of_is_not_told_again() -> None:
    history = from_update(11, truncation_rate=0.7)
    told = [record for record in lines(history, 12) if "event" in record]
    assert told
    resumed = Alarms()
    resumed.replay(lines(history, 10) + told)  # without the updates that raised it
    assert [alarm for step in range(11, 30) for alarm in resumed.observe(step, history(step))] == []


def test_strange_lines_of_a_metrics_file_are_passed_over() -> None:
    alarms = Alarms()
    alarms.replay(
        [
            {},
            {"event": "alarm", "step": 1},
            {"event": "alarm nothing: known"},
            {"event": 7},
            {"step": "3", "reward_mean": 1.0},
            {"step": 4, "reward_mean": None, "entropy": "high", "loss": [1]},
            {"step": 5, "event": "checkpoint written"},
        ]
    )
    assert [
        alarm.name for step in range(6, 12) for alarm in alarms.observe(step, plain(step, truncation_rate=0.9))
    ] == ["truncated"]
