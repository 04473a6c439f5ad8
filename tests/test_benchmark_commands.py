"""Every benchmark command of the documentation, small, as a user types it, against a real vLLM server on the CPU.

No figure is asserted: what must be there is each command's own rows, with numbers in them, and no part that failed.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.browser import chromium
from benchmarks.harness import ROOT, Record, Records
from tests.vllm_helpers import CPU_SERVER_ARGS, CPU_SERVER_ENV

if TYPE_CHECKING:
    from ludic.inference.client.server_process import ServerProcess

README = (ROOT / "benchmarks" / "README.md").read_text()
ELSEWHERE = {
    "learning.py": "tests/test_benchmark_learning.py runs it, without a server",
    "choosing.py": "tests/test_benchmark_choosing.py runs it, without a server",
    "off_policy.py": "tests/test_benchmark_off_policy.py runs it, without a server",
    "data_that_teaches.py": "tests/test_benchmark_data_that_teaches.py runs it, without a server",
    "logprob_gap.py": "tests/test_benchmark_gap.py runs both of its sides, the server's with the one that the other tests have",
    "ranks.py": "tests/test_ranks.py runs it, without a server",
    "record_trl.py": "TRL is not installed here; tests/test_record_trl.py holds its settings and its picture",
    "-m benchmarks.faults.nccl": "NCCL does not exist without two GPUs",
}
"""Commands that no test here runs, and why."""


def in_the_gate(test: Callable[..., None]) -> Callable[..., None]:
    """In the part that has a vLLM for the CPU."""
    marked: Callable[..., None] = pytest.mark.vllm(pytest.mark.slow(pytest.mark.timeout(600)(test)))
    return marked


def run(command: str, flags: str, out: Path | None = None, *, codes: Collection[int] = (0,)) -> str:
    """What `python COMMAND FLAGS` wrote to standard output, from the repository's root; it must end with one of `codes`."""
    words = command.split() if command.startswith("-m ") else [f"benchmarks/{command}"]
    environment = {**os.environ, **CPU_SERVER_ENV, "PYTHONPATH": f"src:.:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *words, *shlex.split(flags), *([] if out is None else ["--out", str(out)])],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout


def check_rows(report: str, *names: str) -> None:
    """Each name begins a row that has a number in it, and nothing is said to have failed."""
    assert not re.search(r"ended with code|was not done|did not come up", report), report
    for name in names:
        row = re.search(rf"^\| {re.escape(name)} *\|(.*)$", report, flags=re.MULTILINE)
        assert row is not None and re.search(r"\d", row[1]), f"{name!r} has no figures in\n{report}"


def part(out: Path, table: str, name: str) -> list[Record]:
    """The rows that a part recorded."""
    rows: list[Record] = Records(out / f"{table}.jsonl").last()[name]["rows"]
    return rows


# --- nothing is left out ----------------------------------------------------------------------------------------------


def test_every_command_in_the_benchmarks_readme_is_run_by_a_test_or_said_why_not() -> None:
    _, _, table = README.partition("| command |")
    listed = re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)
    run_here = re.findall(r"\brun\(\s*\"([^\"]+)\"", Path(__file__).read_text())
    assert len(listed) == len(set(listed)) >= 10
    assert sorted(listed) == sorted({*run_here, *ELSEWHERE}) and not set(run_here) & set(ELSEWHERE)


def test_every_program_among_the_benchmarks_is_named_in_their_readme() -> None:
    programs = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]
    unnamed = [path.stem for path in programs if not re.search(rf"\b{path.stem}\b", README)]
    assert len(programs) >= 10 and unnamed == []


@pytest.mark.slow
def test_the_script_that_makes_all_tables_calls_commands_and_flags_that_exist(tmp_path: Path) -> None:
    only_the_table = tmp_path / "python"
    only_the_table.write_text(f'#!/bin/sh\necho "$@"\nexec {sys.executable} "$@" --table\n')
    only_the_table.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "run_all.sh"), str(tmp_path), str(tmp_path / "out")],
        env={**os.environ, "PYTHON": str(only_the_table)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    called = re.findall(r"^benchmarks/(\S+) --dataset \S+ --out \S+$", done.stdout, flags=re.MULTILINE)
    assert called == ["update.py", "generation.py", "sync.py", "growth.py", "trainer.py"]


# --- the commands -----------------------------------------------------------------------------------------------------


def test_head_compares_the_two_products(tmp_path: Path) -> None:
    run("head.py", "--device cpu --shapes 64x997 --tokens 256 --chunk 64 --repeats 1", tmp_path)
    check_rows((tmp_path / "head.md").read_text(), "64x997, bf16", "64x997, fp32")


@pytest.fixture
def common(digit_policy_dir: Path, digit_problems: Path) -> str:
    return f"--policy {digit_policy_dir} --dataset {digit_problems} --device cpu"


@in_the_gate
def test_update_times_ludics_updates_beside_bare_generation(
    common: str, digit_server: "tuple[ServerProcess, Path]", tmp_path: Path
) -> None:
    small = "--updates 4 --skip 1 --turns 2 --rollouts 16 --group-size 4 --max-tokens 12 --max-seq-len 256"
    phases = f"--phases generation,ludic,ludic_1 --server {digit_server[0].base_url}"
    run("update.py", f"{common} {small} {phases} '--ludic-args=--lr 1e-3'", tmp_path)
    ludic = ("ludic, strictly on-policy", "ludic, --max-staleness 1")
    names = ("bare generation, no log-probs", "bare generation, with log-probs", *ludic)
    check_rows((tmp_path / "update.md").read_text(), *names)
    for name in ("ludic", "ludic_1"):
        rows = part(tmp_path, "update", name)
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert [row["metrics"]["policy_version"] for row in rows] == [1, 2, 3, 4]  # each update was synced
        assert [row["step"] for row in rows if "resumed" in row] == [3]
        assert all(row["metrics"]["server_recoveries"] == 0 for row in rows)  # by the engine that the scripts have


@pytest.mark.slow
def test_commits_lets_two_checkouts_take_turns(common: str, tmp_path: Path) -> None:
    for folder in ("src", "benchmarks", "environments"):
        shutil.copytree(ROOT / folder, tmp_path / "other" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    updates = tmp_path / "other" / "benchmarks" / "ludic_updates.py"
    changed = updates.read_text().replace('"rss_gib": _rss_gib()', '"rss_gib": -1.0')
    updates.write_text(changed)
    small = "--updates 2 --skip 1 --rollouts 8 --group-size 4 --max-tokens 8 --max-seq-len 256 --turns 1 --engine local"
    run("commits.py", f"{common} {small} --against {tmp_path / 'other'}", tmp_path / "out")
    report = (tmp_path / "out" / "commits.md").read_text()
    check_rows(report, "this commit 1", "the other 1")
    assert re.search(r"Median of this commit over median of the other, all turns: \d", report)
    assert all(row["rss_gib"] > 0 for row in part(tmp_path / "out", "commits", "this 1"))
    assert all(row["rss_gib"] == -1 for row in part(tmp_path / "out", "commits", "other 1"))


@in_the_gate
def test_generation_compares_offline_vllm_with_ludics_server_on_as_many_tokens(common: str, tmp_path: Path) -> None:
    small = "--prompts 3 --group-size 4 --max-tokens 16 --fixed-tokens 8 --repeats 1"
    points = "--concurrencies 8,16 --wave-tokens 4 --lengths 4,8 --length-completions 8"
    run("generation.py", f"{common} {small} {points}", tmp_path)
    cases = [
        f"{case}, {what} log-probs" for case in ("ended by the policy", "of fixed length") for what in ("no", "with")
    ]
    check_rows((tmp_path / "generation.md").read_text(), *cases, "8", "16", "4", "slope")
    rows = part(tmp_path, "generation", "compare")
    fixed = [row for row in rows if row["case"] == "of fixed length"]
    assert {row["side"] for row in fixed} == {"ludic", "offline"}
    assert {row["completion_tokens"] for row in fixed} == {3 * 4 * 8}
    ended = [row["completion_tokens"] for row in rows if row["case"] == "ended by the policy"]
    assert all(tokens < 3 * 4 * 16 for tokens in ended)  # the policy's own stop is seen on both sides


@in_the_gate
def test_engines_lets_one_and_two_engines_of_one_command_generate_the_same_prompts_by_turns(
    common: str, tmp_path: Path
) -> None:
    run("engines.py", f"{common} --engines 1,2 --prompts 4 --group-size 4 --max-tokens 16 --repeats 2", tmp_path)
    check_rows((tmp_path / "engines.md").read_text(), "1", "2")
    rows = part(tmp_path, "engines", "turns")
    assert [row["engines"] for row in rows] == [2, 1, 1, 2]  # the order turns
    assert all(row["completion_tokens"] > 0 for row in rows)


@in_the_gate
def test_sync_times_proven_syncs_with_generation_in_flight(common: str, tmp_path: Path) -> None:
    run("sync.py", f"{common} --shapes tiny --syncs 3 --skip 1 --in-flight 16", tmp_path)
    names = ("tiny, ludic, proven", "tiny, ludic, proven, 16 completions in flight")
    check_rows((tmp_path / "sync.md").read_text(), *names)
    rows = part(tmp_path, "sync", "ludic_tiny")
    assert len(rows) == 6 and all("digests" in row["proof"] for row in rows)


@in_the_gate
def test_sync_times_an_adapter_beside_whole_models(common: str, tmp_path: Path) -> None:
    run("sync.py", f"{common} --shapes tiny --syncs 3 --skip 1 --in-flight 0 --lora-rank 4", tmp_path)
    check_rows((tmp_path / "sync.md").read_text(), "tiny, ludic, proven", "tiny, ludic, an adapter alone, proven")
    whole, alone = (part(tmp_path, "sync", f"{kind}_tiny") for kind in ("ludic", "adapter"))
    assert len(alone) == 3 and all("adapter written in place" in row["proof"] for row in alone)
    assert alone[0]["gib"] < whole[0]["gib"]


@in_the_gate
def test_growth_times_one_trainer_at_every_point(common: str, tmp_path: Path) -> None:
    points = "--rollouts 4,8 --lengths 4,8 --concurrencies 8,16 --steps 3 --early 2 --small 8,4,8 --updates 1"
    run("growth.py", f"{common} {points}", tmp_path)
    check_rows((tmp_path / "growth.md").read_text(), "4", "8", "16", "slope", "update 2", "update 3")


@in_the_gate
def test_trainer_times_each_of_its_parts(tmp_path: Path) -> None:
    run(
        "trainer.py", "--device cpu --parts mfu,sharing,budget,vocabulary,gradients --updates 1 --sequences 8", tmp_path
    )
    names = ("tiny, padded rows, sdpa", "tiny, packed, compiled, prompts shared", "shared", "1,024", "4,096", "packed")
    check_rows((tmp_path / "trainer.md").read_text(), *names)


@in_the_gate
def test_load_finds_every_rollout_of_the_fake_and_of_a_real_server(digit_server: "tuple[ServerProcess, Path]") -> None:
    fake = run("load.py", "--rollouts 400 --concurrency 128 --max-tokens 32")
    server, model = digit_server
    real = run(
        "load.py",
        f"--rollouts 200 --concurrency 64 --group-size 4 --max-tokens 12 --server {server.base_url} --model {model}",
    )
    assert "| 400 | 0 / 0 / 0 |" in fake and "| 200 | 0 / 0 / 0 |" in real


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="needs chromium and chromedriver on the PATH")
def test_the_report_page_is_timed_with_few_and_with_many_rollouts() -> None:
    report = run("-m benchmarks.report_page", "--rollouts 100,4000 --repeats 1")
    check_rows(report, "100", "4,000")
    assert float(report.splitlines()[-1].strip("| ").split(" | ")[-1]) > 0, report


@in_the_gate
def test_families_are_proven_on_a_server_each(tmp_path: Path) -> None:
    """One whose names and experts differ between memory, checkpoint and server, and one that is held transposed."""
    run("families.py", "--families mixtral,gpt2", tmp_path)
    check_rows((tmp_path / "families.md").read_text(), "mixtral", "gpt2")
    rows = Records(tmp_path / "families.jsonl").last()
    for family in ("mixtral", "gpt2"):
        row = rows[family]
        assert row["refused"] == {}
        figures = [row[name] for name in ("packing", "local engine", "at start", "sync", "reload")]
        assert max(figures) < 1e-4, row
    assert "all 28 tensors held by the server have the digests of those sent" in rows["gpt2"]["proof"]


def test_families_are_compared_without_a_server_and_a_refusal_stands_under_the_table(tmp_path: Path) -> None:
    run("families.py", "--families phimoe,gemma2 --no-server", tmp_path)
    report = (tmp_path / "families.md").read_text()
    check_rows(report, "phimoe")
    assert "- gemma2, packing: Gemma2ForCausalLM caps its attention logits at 50.0" in report
    rows = Records(tmp_path / "families.jsonl").last()
    assert rows["phimoe"]["packing"] < 1e-4 and rows["phimoe"]["local engine"] < 1e-4
    assert rows["gemma2"]["refused"].keys() == {"packing", "local engine"}


def test_families_that_are_not_known_are_refused_with_those_that_are(tmp_path: Path) -> None:
    run("families.py", "--families llama,falcon9", tmp_path, codes=(2,))
    assert not (tmp_path / "families.md").exists()


@in_the_gate
def test_survival_pulls_every_plug_and_adds_the_lost_servers(
    digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    where = f"--model {digit_policy_dir} --dataset {digit_problems}"
    small = "--faults 1 --rollouts 32 --max-tokens 12 --lr 1e-3 --budget 1024"
    flags = f"{where} {small} --server-args '{shlex.join(CPU_SERVER_ARGS)}'"
    lost = run("-m benchmarks.faults.server_lost", flags, tmp_path / "lost")
    killed, books = (json.loads(line) for line in lost.splitlines())
    assert killed["ok"] and killed["fault"] == "killed in generation" and killed["seconds"] > 0
    assert books["ok"] and re.fullmatch(r"4 updates whole, \d+ completions asked for again", books["outcome"])
    (tmp_path / "lost.jsonl").write_text(lost)
    # Code 1 where a promise was not kept: a slow machine grades fewer answers a second than is promised, and nothing else.
    flags = f"{where} --scale 0.001 --add {tmp_path / 'lost.jsonl'}"
    run("survival.py", flags, tmp_path / "survival", codes=(0, 1))
    injected = [json.loads(line) for line in (tmp_path / "survival" / "survival.jsonl").read_text().splitlines()]
    report = (tmp_path / "survival" / "survival.md").read_text()
    check_rows(report, *{row["row"] for row in injected}, "server lost (our own)")
    assert len({row["row"] for row in injected}) >= 9
    broken = [row for row in injected if not row["ok"]]
    assert [row for row in broken if not row["fault"].startswith("rate of ordinary answers")] == []
