"""Load: many rollouts at once, none lost or doubled, and a harness that would notice."""

import asyncio
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import load, wire_server
from benchmarks.load import LoadReport, TallyWriter, busy_interpreter, load_fake, load_real, row, slope

if TYPE_CHECKING:
    from ludic.inference.client.server_process import ServerProcess


@pytest.fixture(scope="module")
def report() -> LoadReport:
    return asyncio.run(
        load_fake(rollouts=1200, concurrency=256, group_size=8, max_tokens=32, think_s=0.01, gil_share=0.1)
    )


def test_no_rollout_is_lost_doubled_or_changed_and_no_descriptor_stays_open(report: LoadReport) -> None:
    assert report.num_rollouts == 1200
    assert (report.num_lost, report.num_doubled, report.num_wrong, report.num_retries) == (0, 0, 0, 0)
    assert report.fds_end == report.fds_start, "descriptors stay open"
    assert report.fds_start < report.fds_most <= report.fds_start + 256 // 8 + 16, "more connections than requests"


def test_the_table_has_a_cell_for_each_column(report: LoadReport) -> None:
    header, line = load.HEAD.splitlines()
    assert row(report).count("|") == header.count("|") == line.count("|")
    assert row(report).endswith("| yes |")


@pytest.mark.parametrize(
    "change", [{"num_lost": 1}, {"num_doubled": 1}, {"num_wrong": 1}, {"rss_slope_mib": 1.5}], ids=str
)
def test_a_loss_a_double_a_change_or_growth_is_not_ok(report: LoadReport, change: dict[str, Any]) -> None:
    fine = dataclasses.replace(report, num_rollouts=10_000, rss_slope_mib=0.0)
    assert fine.ok and not dataclasses.replace(fine, **change).ok


def test_a_run_too_short_for_a_slope_is_not_judged_by_it(report: LoadReport) -> None:
    assert dataclasses.replace(report, num_rollouts=400, rss_slope_mib=1.5).ok


def test_the_tally_tells_lost_from_doubled() -> None:
    tally = TallyWriter(6, 2)
    for group, member in ((0, 0), (0, 1), (2, 1), (2, 1)):
        tally.write({"group": group, "rollout": member})
    assert list(tally.times) == [1, 1, 0, 0, 0, 2]


def test_a_completion_names_its_prompt_its_request_and_its_member() -> None:
    drawn = {
        (tuple(prompt), request_id, member): tuple(wire_server.drawn(prompt, request_id, member, 64).token_ids[:4])
        for prompt in ([5, 4], [6, 4])
        for request_id in ("a", "b")
        for member in range(3)
    }
    assert len(set(drawn.values())) == len(drawn)


def test_a_straight_line_has_its_slope() -> None:
    assert slope([(float(x), 3.0 + 0.5 * x) for x in range(9)]) == pytest.approx(0.5)
    assert slope([(1.0, 2.0)]) == 0.0


def test_a_busy_interpreter_is_idle_again_afterwards() -> None:
    with busy_interpreter(0.5):
        pass
    with busy_interpreter(0.0):
        pass


@pytest.mark.vllm
async def test_hundreds_of_rollouts_of_the_real_server_are_all_there(
    digit_server: "tuple[ServerProcess, Path]",
) -> None:
    server, model = digit_server
    report = await load_real(server.base_url, str(model), rollouts=200, concurrency=256, group_size=4, max_tokens=12)
    assert (report.num_lost, report.num_doubled) == (0, 0)
    assert report.fds_end <= report.fds_start + 1  # the control session may keep a connection
