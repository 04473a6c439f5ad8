"""Disks that fail while a run saves and logs; `python -m benchmarks.faults.disk` injects hundreds of the same."""

from pathlib import Path

from benchmarks.faults.disk import KILLS, LOGGING, SAVING, inject


def test_no_failing_disk_and_no_kill_costs_the_last_good_checkpoint_or_a_line_that_was_logged(tmp_path: Path) -> None:
    injections = inject(len(SAVING) + len(LOGGING) + len(KILLS), seed=4, folder=tmp_path)
    assert {injection.fault.partition(": ")[2] for injection in injections} >= {*SAVING, *LOGGING}
    assert [injection for injection in injections if not injection.ok] == []
