"""The benchmark of learning per rollout: its arithmetic, and a tiny run of it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning
from benchmarks.harness import Records

TINY = ["--seeds", "0,1", "--updates", "2", "--rollouts", "16", "--train-problems", "60", "--test-problems", "8",
        "--warm-start", "320"]  # fmt: skip


def run(arm: str, seed: int, rewards: list[float], after: float) -> dict[str, Any]:
    staleness = [0.0] + [float(arm != "on_policy")] * (len(rewards) - 1)
    return {"arm": arm, "seed": seed, "reward": rewards, "staleness": staleness,
            "accuracy_before": 0.25, "accuracy_after": after}  # fmt: skip


def script(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["learning.py", *flags])
    learning.main()


def test_the_interval_is_students_over_the_pairs() -> None:
    # mean 2, standard deviation 1, t = 4.303 with 2 degrees of freedom: 2 +- 4.303 / sqrt(3)
    assert learning.interval([1.0, 2.0, 3.0]) == pytest.approx((-0.484, 4.484), abs=1e-3)
    assert learning.interval([0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize("length", [1, 3, 10, 47, 50])
def test_every_update_is_in_exactly_one_stretch(length: int) -> None:
    covered = [update for first, last in learning.stretches(length) for update in range(first, last)]
    assert covered == list(range(length))
    sizes = [last - first for first, last in learning.stretches(length)]
    assert len(sizes) == min(10, length) and max(sizes) - min(sizes) <= 1


def test_the_tables_compare_each_seed_with_itself() -> None:
    runs = [
        run("on_policy", 0, [0.2, 0.4], 0.5),
        run("on_policy", 1, [0.6, 0.8], 0.9),
        run("stale", 0, [0.1, 0.4], 0.52),
        run("stale", 1, [0.5, 0.8], 0.92),
    ]
    rewards, final, differences = learning.sections(runs, ["on_policy", "stale"], [0, 1])[1::2]
    assert [cell.strip() for cell in rewards.splitlines()[2].split("|")[1:-1]] == [
        "1 to 1", "40.0% ± 28.3", "30.0% ± 28.3"
    ]  # fmt: skip
    assert [cell.strip() for cell in rewards.splitlines()[-1].split("|")[1:-1]] == ["staleness", "0", "0.5"]
    assert "seed 1" in final and "92.0%" in final and "72.0% ± 28.3" in final
    # The seeds differ by 40 points and every pair by the same: the interval has no width.
    assert "-5.0 (-5.0 to -5.0)" in differences and "+2.0 (+2.0 to +2.0)" in differences


def test_rewards_of_stale_rollouts_are_those_of_the_version_that_sampled_them() -> None:
    assert learning.by_version(run("on_policy", 0, [0.1, 0.2, 0.3], 0.5)) == [0.1, 0.2]
    assert learning.by_version(run("stale", 0, [0.1, 0.15, 0.2], 0.5)) == [0.15, 0.2]


def test_a_table_is_not_made_of_runs_that_are_not_there() -> None:
    runs = [run("on_policy", seed, [0.2], 0.5) for seed in (0, 1)] + [run("stale", 0, [0.2], 0.5)]
    with pytest.raises(ValueError, match="no run of stale with seed 1"):
        learning.sections(runs, ["on_policy", "stale"], [0, 1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "2 to 10 different"),
        (["--seeds", "1,1"], "2 to 10 different"),
        (["--arms", "stale"], "lacks on_policy"),
        (["--arms", "on_policy,fresh"], "--arms fresh is not one of"),
        (["--updates", "1"], "--updates must be at least 2"),
        (["--table"], "no run of on_policy with seed 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        script(monkeypatch, "--out", str(tmp_path), *flags)


def test_a_tiny_run_shares_its_policies_goes_one_update_stale_and_is_not_made_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(monkeypatch, "--out", str(tmp_path), *TINY)
    result = json.loads((tmp_path / "learning.json").read_text())
    runs = {(run["arm"], run["seed"]): run for run in result["runs"]}
    assert set(runs) == {(arm, seed) for arm in learning.DEFAULT_ARMS.split(",") for seed in (0, 1)}
    for (arm, seed), made in runs.items():
        assert len(made["reward"]) == 2 and made["rollouts"] == 32
        assert made["staleness"] == [0.0, 0.0 if arm == "on_policy" else 1.0]
        assert made["reward"][0] == runs["on_policy", seed]["reward"][0]
        assert made["accuracy_before"] == runs["on_policy", seed]["accuracy_before"]
    table = (tmp_path / "learning.md").read_text()
    assert "staleness 1, uncorrected" in table and "learning.py --out" in table
    records = Records(tmp_path / "learning.jsonl")
    script(monkeypatch, "--out", str(tmp_path), *TINY)
    assert sum(record["part"] == "run" for record in records.all()) == len(runs)
