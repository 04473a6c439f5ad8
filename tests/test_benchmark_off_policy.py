"""The benchmark of losses on data that are not the policy's own: its arms, its table, and a tiny run of it."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import off_policy
from benchmarks.harness import Records
from ludic.config import GRPOConfig

TINY = ["--seeds", "0,1", "--losses", "gspo", "--cases", "stale1,mini4", "--updates", "2", "--rollouts", "32",
        "--train-problems", "60", "--test-problems", "8", "--warm-start", "320"]  # fmt: skip


def script(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["off_policy.py", *flags])
    off_policy.main()


def test_every_arm_is_a_configuration_and_on_policy_data_have_one_ratio() -> None:
    found = off_policy.arms(["grpo", "cispo"], list(off_policy.CASES))
    assert len(found) == 2 * (1 + 2 * 3)
    assert found["cispo stale4 sampler"] == {"loss": "cispo", "ratio_to": "sampler", "max_staleness": 4}
    for settings in found.values():
        GRPOConfig(**settings)  # type: ignore[arg-type]


def test_a_row_has_the_mean_and_the_range_over_the_seeds() -> None:
    runs: list[dict[str, Any]] = [
        {"accuracy_after": after, "reward": [0.1, 0.3], "staleness": [0.0, 1.0]} for after in (0.5, 0.6, 0.4)
    ]
    base = [{**run, "accuracy_after": run["accuracy_after"] - 0.1} for run in runs]
    assert off_policy.table_row("gspo stale1 sampler", runs, base) == [
        "staleness 1", "gspo", "sampler", "50.0%", "40.0% to 60.0%", "+10.0 (+10.0 to +10.0)", "30.0%", 0.5
    ]  # fmt: skip
    assert off_policy.table_row("gspo stale1 update", base, base)[5] == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--losses", "ppo"], "--losses ppo is not one of grpo"),
        (["--cases", "stale9"], "--cases stale9 is not one of fresh"),
        (["--seeds", "1"], "--seeds needs at least 2"),
        (["--table"], "no arm was run with all seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        script(monkeypatch, "--out", str(tmp_path), *flags)


def test_a_tiny_run_has_stale_rollouts_and_several_steps_and_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(monkeypatch, "--out", str(tmp_path), *TINY)
    table = (tmp_path / "off_policy.md").read_text()
    assert (
        len(re.findall(r"^\| (staleness 1|4 mini-batches) +\| +gspo \| +(?:update|sampler) \|", table, re.MULTILINE))
        == 4
    )
    records = Records(tmp_path / "off_policy.jsonl")
    runs = [record for record in records.all() if record["part"] == "run"]
    assert len(runs) == 8
    assert all(run["staleness"] == [0.0, 1.0 if "stale1" in run["arm"] else 0.0] for run in runs)
    script(monkeypatch, "--out", str(tmp_path), *TINY)
    assert sum(record["part"] == "run" for record in records.all()) == 8
    script(monkeypatch, "--out", str(tmp_path), *TINY, "--losses", "gspo,cispo", "--table")
    assert "Not run with all seeds: cispo stale1 update" in (tmp_path / "off_policy.md").read_text()
