"""The benchmark of sampling that looks for groups with variance: its mix, its table, and a tiny run of it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import data_that_teaches

TINY = ["--seeds", "0", "--rollouts", "16", "--max-rollouts", "32", "--eval-rollouts", "16", "--train-problems", "24",
        "--test-problems", "4", "--warm-start", "160"]  # fmt: skip


def script(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["data_that_teaches.py", *flags])
    data_that_teaches.main()


def run(arm: str, seed: int, *, rollouts: int, reached: bool = True) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "reached": reached, "rollouts": rollouts, "updates": 3, "seconds": 9.0,
            "cpu_s": rollouts / 10, "curve": [(0, 0.25), (rollouts, 0.5)], "flat": [0.75, 0.25]}  # fmt: skip


def test_the_mix_has_the_shares_that_were_asked_for_and_every_problem_once() -> None:
    rows = [{"question": f"q{i}", "answer": "1+1=2\n" + "2+1=3\n" * (i % 2) + f"#### {2 + i % 2}"} for i in range(40)]
    mix = data_that_teaches.mixed(rows, count=16, impossible=0.5, easy=0.25)
    answers = [int(row["answer"].rpartition("#### ")[2]) for row in mix]
    assert sum(answer > data_that_teaches.IMPOSSIBLE for answer in answers) == 8
    assert answers.count(2) == 4 and answers.count(3) == 4
    assert len({row["question"] for row in mix}) == 16
    with pytest.raises(ValueError, match="30 problems of a kind are needed, and 20 are there"):
        data_that_teaches.mixed(rows, count=60, impossible=0.5, easy=0.25)


def test_ratios_are_of_pairs_of_equal_seeds_and_what_did_not_get_there_is_counted() -> None:
    runs = [run("plain", 0, rollouts=100), run("plain", 1, rollouts=400, reached=False),
            run("dynamic", 0, rollouts=50), run("dynamic", 1, rollouts=100)]  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
            data_that_teaches.table(runs, ["plain", "dynamic"], [0, 1]).splitlines()[2:]]  # fmt: skip
    assert [row[1] for row in rows] == ["1 of 2", "2 of 2"] and rows[1][3] == "50%"
    assert rows[1][-2] == rows[1][-1] == "0.38 (0.25 to 0.50)"
    with pytest.raises(ValueError, match="no run of all with seed 0"):
        data_that_teaches.table(runs, ["plain", "all"], [0, 1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "dynamic"], "lacks plain"),
        (["--arms", "plain,random"], "--arms random is not one of"),
        (["--easy", "0.6"], "leave no problems to learn from"),
        (["--table"], "no run of plain with seed 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        script(monkeypatch, "--out", str(tmp_path), *flags)


def test_a_tiny_run_makes_every_arm_once_and_ends_each_after_its_rollouts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(monkeypatch, "--out", str(tmp_path), *TINY)
    result = json.loads((tmp_path / "data_that_teaches.json").read_text())
    runs = {one["arm"]: one for one in result["runs"]}
    assert set(runs) == set(data_that_teaches.ARMS)
    assert runs["plain"]["updates"] == 2 and runs["plain"]["rollouts"] == 32
    for one in runs.values():
        assert one["curve"][0] == runs["plain"]["curve"][0] and one["rollouts"] >= 32
    table = (tmp_path / "data_that_teaches.md").read_text()
    assert "| --dynamic-sampling " in table and "data_that_teaches.py --out" in table
