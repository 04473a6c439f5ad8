"""The benchmark that changes one setting of the demo at a time: its table, and a tiny run of it."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import choosing
from benchmarks.harness import ROOT, Records

TINY = ["--seeds", "0,1", "--sweeps", "group_size", "--updates", "2", "--rollouts", "32", "--train-problems", "60",
        "--test-problems", "8", "--warm-start", "320"]  # fmt: skip


def script(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["choosing.py", *flags])
    choosing.main()


def run(after: float, rewards: list[float]) -> dict[str, Any]:
    return {"accuracy_after": after, "reward": rewards, "zero_variance": [0.5, 0.25], "truncated": [0.0, 0.1],
            "staleness": [0.0, 1.0]}  # fmt: skip


def test_a_row_compares_each_seed_with_the_demo_of_that_seed() -> None:
    base = [run(0.5, [0.2, 0.4]), run(0.9, [0.6, 0.8])]
    changed = [run(0.4, [0.1, 0.3]), run(0.8, [0.5, 0.7])]
    # The seeds differ by 40 points and every pair by the same: the interval has no width.
    assert choosing.table_row("group_size 2", changed, base) == [
        "group_size 2", "40.0% / 80.0%", "-10.0 (-10.0 to -10.0)", "50.0%", "37.5%", "5.0%", 0.5
    ]  # fmt: skip
    assert choosing.table_row("demo", base, base)[2] == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweeps", "colour"], "--sweeps colour is not one of"),
        (["--seeds", "3"], "--seeds needs at least 2"),
        (["--table"], "no run of demo with seed 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        script(monkeypatch, "--out", str(tmp_path), *flags)


@pytest.mark.slow
def test_a_tiny_run_compares_each_seed_with_its_own_demo_and_is_not_made_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for _ in range(2):
        script(monkeypatch, "--out", str(tmp_path), *TINY)
    records = Records(tmp_path / "choosing.jsonl")
    runs = [(record["arm"], record["seed"]) for record in records.all() if record["part"] == "run"]
    assert runs == [(arm, seed) for seed in (0, 1) for arm in ("demo", "group_size 2", "group_size 32")]
    table = (tmp_path / "choosing.md").read_text()
    assert "| group_size 32 " in table and "choosing.py --out" in table


def test_the_shares_of_groups_that_teach_nothing_on_the_page_are_those_of_its_formula() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    sizes = [int(size) for size in re.findall(r"\d+", re.findall(r"^\| p \| G = (.*)$", page, flags=re.MULTILINE)[0])]
    rows = re.findall(r"^\| (0\.\d+)[^|]*\|((?: \d+% \|)+)$", page, flags=re.MULTILINE)
    assert "`p**G + (1 - p)**G`" in page and len(sizes) == 5 and len(rows) == 4
    for share, cells in rows:
        p = float(share)
        said = [int(cell) for cell in re.findall(r"\d+", cells)]
        assert said == pytest.approx([100 * (p**size + (1 - p) ** size) for size in sizes], abs=0.51)
