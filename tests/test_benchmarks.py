"""The benchmark harness: its parts, and every table's command end to end, small and on the CPU. Nothing asserts a time."""

import contextlib
import itertools
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generation, growth, make_policy, sync, update
from benchmarks.harness import (
    HashRewardGSM8K,
    Record,
    Records,
    hash_reward,
    markdown_table,
    number,
    open_engine,
    percentile,
    slope,
    without_stop,
    write_report,
)
from benchmarks.parts import Part, Prepared, Worker, in_turns, pauses_after, run_part
from benchmarks.peers import common as peers
from benchmarks.processes import PartError, ServerSpec, as_flags, process_group, serving, trl_server
from environments.gsm8k import load
from ludic.task.pretrained import load_model
from ludic.task.prompts import encode_prompt, load_tokenizer
from ludic.types import SamplingParams

ON = {"hardware": "2 x GPU", "versions": {"torch": "2.11"}, "date": "2026-01-02", "command": "python benchmarks/x.py"}


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


def rows_of(markdown: str) -> list[list[str]]:
    """The cells of every table line, rules left out."""
    lines = [line for line in markdown.splitlines() if line.startswith("|") and not re.fullmatch(r"[|:-]+", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


# --- the task ---------------------------------------------------------------------------------------------------------


def test_the_reward_is_the_peers_reward_and_half_of_all_texts_get_it() -> None:
    texts = [f"The answer is \\boxed{{{number}}}." for number in range(2000)]
    rewards = [hash_reward(text) for text in texts]
    assert set(rewards) == {0.0, 1.0} and 900 < sum(rewards) < 1100
    assert rewards == peers.conversation_reward([[{"role": "assistant", "content": text}] for text in texts])


async def test_the_environment_has_gsm8ks_prompts_and_the_checksums_reward(digit_problems: Path) -> None:
    environment = HashRewardGSM8K()
    samples = load("train", dataset=digit_problems)
    assert [environment.messages(sample) for sample in samples] == peers.gsm8k_prompts(digit_problems, len(samples))
    for text in ("\\boxed{7}", "7", "eight"):
        score = await environment.score(samples[0], text)
        assert score.reward == hash_reward(text) and score.correct == bool(score.reward)
    await environment.aclose()


async def test_without_a_stop_completions_have_the_length_that_was_asked_for(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    folder, stops = without_stop(digit_policy_dir, tmp_path / "open")
    tokenizer = load_tokenizer(digit_policy_dir)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Question 3: which one?"}])
    sampling = SamplingParams(max_tokens=24, seed=1)
    async with open_engine(folder, None) as engine:
        endless = await engine.generate(prompt, num_completions=8, sampling=sampling)
    async with open_engine(folder, None, stops=stops) as engine:
        ended = await engine.generate(prompt, num_completions=8, sampling=sampling)
    assert {len(completion.token_ids) for completion in endless} == {24}
    assert all(completion.token_ids[-1] in stops for completion in ended if completion.finish_reason == "stop")
    assert sum(completion.finish_reason == "stop" for completion in ended) > 4


def test_a_policy_without_a_padding_token_of_its_own_is_refused(digit_policy_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(digit_policy_dir)
    tokenizer.pad_token = tokenizer.eos_token
    for file in digit_policy_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no padding token of its own"):
        without_stop(tmp_path, tmp_path / "open")


@pytest.mark.parametrize(
    ("shape", "parameters"), [("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("7b", 7_615_616_512)]
)
def test_the_shapes_have_the_parameters_of_qwens_own_models(
    shape: str, parameters: int, digit_policy_dir: Path
) -> None:
    tokenizer: Any = load_tokenizer(digit_policy_dir)
    model = make_policy.build_model(make_policy.SHAPES[shape], tokenizer, torch.device("meta"), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_random_policy_is_saved_with_its_tokenizer(
    digit_problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--dataset", str(digit_problems), "--out", str(tmp_path), "--shape", "tiny", "--random"]
    monkeypatch.setattr(sys, "argv", ["make_policy.py", *flags])
    make_policy.main()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == 128 and config["tie_word_embeddings"]
    assert load_tokenizer(tmp_path).eos_token_id == config["eos_token_id"]


def test_a_pretrained_model_is_trained_on_and_a_number_of_steps_gives_the_same_again(
    digit_problems: Path, digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for out in ("once", "again"):
        flags = ["--dataset", str(digit_problems), "--out", str(tmp_path / out), "--from", str(digit_policy_dir)]
        monkeypatch.setattr(sys, "argv", ["make_policy.py", *flags, "--steps", "3", "--batch-size", "4"])
        make_policy.main()
        weights.append((tmp_path / out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "once" / "config.json").read_text())["dtype"] == "bfloat16"
    before = load_model(digit_policy_dir, dtype=torch.bfloat16).state_dict()
    after = load_model(tmp_path / "once", dtype=torch.bfloat16).state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(tmp_path / "once").chat_template == load_tokenizer(digit_policy_dir).chat_template


@pytest.mark.parametrize(
    "flags", [["--random"], ["--shape", "tiny"], ["--steps", "0"], ["--steps", "3", "--seconds", "9"]]
)
def test_flags_that_contradict_one_another_are_refused_before_anything_is_loaded(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_policy.py", "--dataset", "x", "--out", "y", "--from", "z", *flags])
    with pytest.raises(SystemExit) as ended:
        make_policy.main()
    assert ended.value.code == 2


# --- figures and tables -----------------------------------------------------------------------------------------------


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    assert slope([1, 2, 4, 8], [3 * x**0.5 for x in (1, 2, 4, 8)]) == pytest.approx(0.5)
    assert slope([4, 4], [1, 2]) != slope([4, 4], [1, 2])  # NaN: one point has no slope


def test_a_percentile_is_the_smallest_value_with_that_share_below_or_at_it() -> None:
    values = [float(value) for value in range(10, 0, -1)]
    assert percentile(values, 0.9) == 9 and percentile(values, 0.5) == 5 and percentile(values, 1.0) == 10


def test_a_cell_is_three_digits_or_a_dash() -> None:
    cells = [number(value) for value in (0.012345, 1.5, 123456.7, 12, None, float("nan"), "words")]
    assert cells == ["0.0123", "1.5", "123,457", "12", "-", "-", "words"]


def test_a_table_is_aligned_with_text_on_the_left_and_figures_on_the_right() -> None:
    assert markdown_table(["", "seconds"], [["ludic", 1.25], ["TRL", None]]) == (
        "|       | seconds |\n|-------|--------:|\n| ludic |    1.25 |\n| TRL   |       - |\n"
    )


def test_a_report_names_command_machine_versions_and_date(tmp_path: Path) -> None:
    write_report(tmp_path / "x.md", "Speed", ON, ["| table |\n", "Words."])
    assert (tmp_path / "x.md").read_text() == (
        "# Speed, 2026-01-02\n\n    python benchmarks/x.py\n\n2 x GPU; torch 2.11.\n\n| table |\n\nWords.\n"
    )


def test_the_last_record_of_a_part_counts(tmp_path: Path) -> None:
    records = Records(tmp_path / "new" / "x.jsonl")
    assert records.last() == {}
    for seconds in (3, 2):
        records.add("ludic", seconds=seconds)
    assert Records(records.path).last() == {"ludic": {"part": "ludic", "seconds": 2}}


# --- child processes --------------------------------------------------------------------------------------------------


def test_a_part_gives_its_json_lines_with_the_time_of_each(tmp_path: Path) -> None:
    code = (
        "import sys; print('loading'); print('{\"step\": 1}'); print('noise', file=sys.stderr); print('{\"step\": 2}')"
    )
    seen: list[Record] = []
    records = run_part(python(code), log_path=tmp_path / "log", deadline_s=60, on_record=seen.append)
    assert [record["step"] for record in records] == [1, 2] and records == seen
    assert 0 < records[0]["at_s"] <= records[1]["at_s"]
    assert (tmp_path / "log").read_text() == "noise\n"


def test_a_part_that_is_too_slow_keeps_what_it_had_and_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "import json, subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
        "print(json.dumps({'step': 1, 'child': child.pid}), flush=True)\ntime.sleep(600)"
    )
    first, last = run_part(python(code), log_path=tmp_path / "log", deadline_s=3)
    assert first["step"] == 1 and last == {"cut_off": "was not done after 3 s"}
    assert wait_until_gone(first["child"])


def test_a_part_that_fails_at_once_says_why(tmp_path: Path) -> None:
    with pytest.raises(PartError, match="it ended with code 1: ValueError: no GPU today"):
        run_part(python("raise ValueError('no GPU today')"), log_path=tmp_path / "log", deadline_s=60)


TAKES_TURNS = """
import sys
from benchmarks.harness import emit
from benchmarks.parts import Pauses
pauses = Pauses([int(word) for word in sys.argv[1:]])
for step in range(1, 6):
    emit({"step": step})
    if pauses.due(step):
        pauses.wait(step)
"""


def test_parts_take_turns_and_a_record_that_had_a_pause_before_it_says_so(tmp_path: Path) -> None:
    order: list[tuple[str, int]] = []
    rounds: list[int] = []
    with contextlib.ExitStack() as stack:
        parts = {}
        for name, pauses in (("a", "2 4"), ("b", "3"), ("c", "1")):
            command = python(TAKES_TURNS, *pauses.split())
            log_path = tmp_path / f"{name}.log"
            parts[name] = stack.enter_context(
                Part(
                    command,
                    log_path=log_path,
                    deadline_s=60,
                    on_record=lambda record, name=name: order.append((name, record["step"])),  # type: ignore[misc]
                )
            )
        lanes = [["a"], ["b", "c"]]  # b and c stand in one lane
        in_turns(lanes, lambda name: parts[name].turn(), between=lambda: rounds.append(len(order)))
    turns = [
        *(("a", [1, 2]), ("b", [1, 2, 3])),
        *(("a", [3, 4]), ("b", [4, 5])),
        *(("a", [5]), ("c", [1]), ("c", [2, 3, 4, 5])),
    ]
    assert order == [(name, step) for name, steps in turns for step in steps]
    assert rounds == [0, 5, 9, 11]
    assert [row["step"] for row in parts["a"].records if "resumed" in row] == [3, 5]
    assert not any(part.problem for part in parts.values())
    assert all(before["at_s"] <= after["at_s"] for before, after in itertools.pairwise(parts["a"].records))


def test_a_part_that_is_left_in_its_pause_ends_with_whoever_started_it(tmp_path: Path) -> None:
    with Part(python(TAKES_TURNS, "2"), log_path=tmp_path / "log", deadline_s=60) as part:
        assert part.turn() and [row["step"] for row in part.records] == [1, 2]
        process = part._process
        assert process is not None and process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 1
    assert "paused after update 2, and whoever was to say when to go on is gone" in (tmp_path / "log").read_text()


def test_a_part_that_dies_in_its_pause_keeps_what_it_had(tmp_path: Path) -> None:
    with Part(python(TAKES_TURNS, "2"), log_path=tmp_path / "log", deadline_s=60) as part:
        assert part.turn() and part._process is not None
        part._process.kill()
        part._process.wait(timeout=60)
        assert not part.turn()
    assert part.problem == "ended with code -9" and [row["step"] for row in part.records] == [1, 2]


def test_a_part_has_its_whole_deadline_though_it_waited_longer(tmp_path: Path) -> None:
    with Part(python(TAKES_TURNS, "2"), log_path=tmp_path / "log", deadline_s=30) as part:
        part.turn()
        part._spent_s = 0.5  # as if its first turn had been as short, and its pause of any length
        assert not part.turn() and not part.problem and len(part.records) == 5
    with Part(python(TAKES_TURNS, "2"), log_path=tmp_path / "log", deadline_s=30) as part:
        part.turn()
        part._spent_s = 30.0
        assert not part.turn() and part.problem == "was not done after 30 s"


@pytest.mark.parametrize(
    ("updates", "turns", "skip", "ends"),
    [(10, 3, 2, [4, 7]), (12, 3, 2, [6, 9]), (11, 3, 2, [4, 7]), (9, 3, 2, [4, 7]), (5, 2, 1, [3]), (3, 1, 1, [])],
)
def test_turns_have_pairs_of_updates_after_those_that_are_left_out(
    updates: int, turns: int, skip: int, ends: list[int]
) -> None:
    assert pauses_after(updates, turns=turns, skip=skip) == ends


def test_a_turn_without_an_update_that_counts_is_refused() -> None:
    assert pauses_after(7, turns=3, skip=2) == [3, 5]
    with pytest.raises(ValueError, match="--turns 3 of 6 updates: 7 are the least where the first 2 warm up"):
        pauses_after(6, turns=3, skip=2)


def test_a_worker_answers_line_by_line_and_its_end_is_an_error(tmp_path: Path) -> None:
    code = (
        "import json, sys\nprint('{\"ready\": 1}', flush=True)\n"
        "for line in sys.stdin:\n    if 'stop' in line: raise OSError('enough')\n    print(line.upper(), flush=True)"
    )
    with process_group(python(code), log_path=tmp_path / "log", pipes=True) as process:
        worker = Worker(process, tmp_path / "log")
        worker.ready(60)
        assert worker.ask({"a": 1}) == {"A": 1}
        with pytest.raises(PartError, match="the process ended: OSError: enough"):
            worker.ask({"stop": 1})


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_a_server_that_does_not_come_up_costs_only_itself(tmp_path: Path) -> None:
    codes = {"good": SERVER, "bad": "raise SystemExit('error: no memory')"}
    specs = [ServerSpec(name=name, command=tuple(python(code)), gpu=None) for name, code in codes.items()]
    with serving(specs, log_dir=tmp_path, deadline_s=60) as urls:
        assert list(urls) == ["good"] and urls["good"].startswith("http://127.0.0.1:")
    assert "no memory" in (tmp_path / "server_bad.log").read_text()


def test_trls_server_is_vllms_own_with_the_flags_that_trl_gives_it() -> None:
    spec = trl_server(Path("P"), {"max_model_len": 512, "enforce_eager": True}, gpu=0)
    assert spec.command[:4] == (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
    given = " ".join(spec.command)
    assert "P --max-model-len 512 --enforce-eager" in given and '--weight-transfer-config {"backend": "nccl"}' in given
    assert "--logprobs-mode processed_logprobs --max-logprobs -1" in given and spec.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert as_flags({"gpu_memory_utilization": 0.4}) == ["--gpu-memory-utilization", "0.4"]


# --- the tables -------------------------------------------------------------------------------------------------------


@pytest.fixture
def common(digit_policy_dir: Path, digit_problems: Path, tmp_path: Path) -> list[str]:
    """The flags of a run without a server, in this process as far as that goes."""
    return ["--policy", str(digit_policy_dir), "--dataset", str(digit_problems), "--out", str(tmp_path),
            "--device", "cpu", "--engine", "local"]  # fmt: skip


def table_of(out: Path, name: str) -> list[list[str]]:
    report = (out / f"{name}.md").read_text()
    assert re.search(r"^# .*, \d{4}-\d\d-\d\d\n\n    python .*\n\n\d+ CPU cores; torch [\d.]+", report)
    return rows_of(report)


def test_generation_is_compared_and_grown(common: Sequence[str], tmp_path: Path) -> None:
    small = ["--prompts", "2", "--group-size", "2", "--max-tokens", "24", "--fixed-tokens", "6", "--repeats", "2"]
    points = ["--concurrencies", "2,4", "--wave-tokens", "4", "--lengths", "4,8", "--length-completions", "4"]
    assert generation.main([*common, *small, *points]) == 0
    records = Records(tmp_path / "generation.jsonl").last()
    rows = records["compare"]["rows"]
    assert len(rows) == 2 * 2 * 2 and {row["side"] for row in rows} == {"ludic"}
    assert {row["completion_tokens"] for row in rows if row["case"] == generation.FIXED} == {2 * 2 * 6}
    assert all(row["completion_tokens"] <= 2 * 2 * 24 for row in rows if row["case"] == generation.ENDED)
    assert [point["completion_tokens"] for point in records["growth"]["length"]] == [16, 32]
    assert [point["completion_tokens"] for point in records["growth"]["concurrency"]] == [8, 16]
    cells = table_of(tmp_path, "generation")
    assert [row[0] for row in cells] == [
        "completions", *(f"{case}, {what} log-probs" for case in generation.CASES for what in ("no", "with")),
        "cost of log-probs", *generation.CASES,
        "completions in flight", "2", "4", "slope",
        "completion tokens", "4", "8", "slope",
    ]  # fmt: skip


@pytest.mark.slow
def test_updates_are_measured_by_a_run_of_the_trainer(common: Sequence[str], tmp_path: Path) -> None:
    small = ["--updates", "5", "--skip", "1", "--rollouts", "8", "--group-size", "4", "--max-tokens", "12"]
    flags = [*common, *small, "--turns", "2", "--max-seq-len", "160", "--ludic-args=--lr 1e-3"]
    assert update.main([*flags, "--phases", "ludic,ludic_1,generation,trl"]) == 1  # for want of TRL's server
    every = Records(tmp_path / "update.jsonl").all()
    turns = [(record["part"], len(record["rows"])) for record in every if record["part"] != "machine"]
    of_one_turn = [("host", 1), ("generation", 6), ("ludic", 3), ("ludic_1", 3)]
    assert turns == [("trl", 0), *of_one_turn, ("host", 2), ("generation", 10), ("ludic", 5), ("ludic_1", 5)]
    records = Records(tmp_path / "update.jsonl").last()
    assert [(row["step"], row["logprobs"]) for row in records["generation"]["rows"]] == [
        (step, logprobs) for step in (1, 2, 3, 4, 5) for logprobs in (False, True)
    ]
    rows = records["ludic"]["rows"]
    for name in ("ludic", "ludic_1"):
        assert [row["step"] for row in records[name]["rows"]] == [1, 2, 3, 4, 5] and records[name]["problem"] is None
    for name in ("generation", "ludic", "ludic_1"):
        assert {row["step"] for row in records[name]["rows"] if "resumed" in row} == {4}
    for row in rows:
        assert 0 < row["seconds"] < row["at_s"] and {"train_s", "sync_s"} <= row["parts"].keys()
        assert 8 <= row["completion_tokens"] <= 8 * 12 and row["metrics"]["learning_rate"] > 0
        assert row["rss_gib"] > 0 and row["open_fds"] > 3
    assert not any(path.name.startswith("checkpoints") for path in tmp_path.rglob("*"))
    cells = table_of(tmp_path, "update")
    ludic = [update.PHASES["ludic"], update.PHASES["ludic_1"]]
    whole = [update.PHASES["generation"], update.BARE_WITH_LOGPROBS, *ludic]
    hosts = ["the host", "before turn 1", "before turn 2"]
    assert [row[0] for row in cells] == ["", *whole, "", *ludic, *hosts]
    assert [row[-2:] for row in cells[1:5]] == [["3", "5 of 5"]] * 4  # neither the first one nor that after the pause
    report = (tmp_path / "update.md").read_text()
    assert "TRL GRPOTrainer, vLLM server mode, 0 updates: its server did not come up." in report
    assert re.search(
        r"^Host: 1,000,000 rounds of a Python loop in [\d.]+ s, a copy of 256 MiB in [\d.]+ s\.$", report, re.M
    )


def test_a_table_of_updates_compares_with_trl_and_leaves_the_first_ones_out(tmp_path: Path) -> None:
    records = Records(tmp_path / "update.jsonl")
    records.add("machine", **ON)
    records.add("generation", rows=[
        {"step": step, "logprobs": logprobs, "seconds": 0.5 + logprobs, "completion_tokens": 100}
        for step in range(1, 7) for logprobs in (False, True)
    ])  # fmt: skip
    ours = {
        "completion_tokens": 100,
        "peak_gib": 3.0,
        "parts": {"wait_s": 0.4, "generation_s": 9.0, "train_s": 0.3, "sync_s": 0.1},
    }
    theirs = {"completion_tokens": 100, "peak_gpu_gib": 30.0, "generation_s": 2.0, "train_s": 1.0, "sync_s": 0.5}
    for name, seconds, figures in (("ludic", 1.0, ours), ("trl", 4.0, theirs)):
        rows = [
            {"step": step, "at_s": 10.0 * step, "seconds": seconds if step in (3, 5, 6) else 99.0, **figures}
            for step in range(1, 7)
        ]
        rows[3]["resumed"] = True
        records.add(name, rows=rows, problem=None, updates=6)
    records.add("trl_async", rows=[], problem="it ended with code 1: no kernel", updates=10)
    assert update.main(["--table", "--out", str(tmp_path)]) == 0
    report = (tmp_path / "update.md").read_text()
    cells = {row[0]: row[1:] for row in rows_of(report)[:5]}
    assert cells[update.PHASES["ludic"]] == ["1", "1", "1.00 to 1.00", "4", "2", "100", "3", "6 of 6"]
    assert cells[update.PHASES["trl"]] == ["4", "4", "4.00 to 4.00", "1", "8", "100", "3", "6 of 6"]
    assert cells[update.BARE_WITH_LOGPROBS][0] == "1.5"
    parts = {row[0]: row[1:] for row in rows_of(report)[5:]}
    assert parts[update.PHASES["ludic"]] == ["0.4", "0.3", "0.1", "0.2", "3", "10"]
    assert parts[update.PHASES["trl"]] == ["2", "1", "0.5", "0.5", "30", "10"]
    assert "TRL AsyncGRPOTrainer, 0 of 10 updates: it ended with code 1: no kernel." in report


def test_an_asynchronous_trainer_is_timed_by_as_many_rollouts_as_the_others() -> None:
    assert update.seconds_of({"seconds": 3.0, "seconds_per_rollouts": 1.5}) == 1.5
    assert update.seconds_of({"seconds": 3.0}) == 3.0


def test_syncs_are_timed_by_phase(common: Sequence[str], tmp_path: Path) -> None:
    assert sync.main([*common, "--shapes", "tiny", "--syncs", "3", "--skip", "1", "--in-flight", "8"]) == 0
    rows = Records(tmp_path / "sync.jsonl").last()["ludic_tiny"]["rows"]
    assert [(row["in_flight"], row["step"]) for row in rows] == [(load, step) for load in (0, 8) for step in (1, 2, 3)]
    for row in rows:
        counted = [seconds for name, seconds in row["phases"].items() if name not in sync.UNCOUNTED]
        assert row["seconds"] == pytest.approx(sum(counted)) and row["proof"]
    cells = table_of(tmp_path, "sync")
    names = ["tiny, ludic, proven", "tiny, ludic, proven, 8 completions in flight"]
    assert [row[0] for row in cells] == ["", *names, "", *names]
    assert re.search(r"[a-z]+ 0\.\d{4}, [a-z]+ \d\.\d{4}", cells[-1][1])


def test_syncs_on_one_gpu_are_told_apart_and_compared(tmp_path: Path) -> None:
    args = sync.build_parser().parse_args(["--out", str(tmp_path), "--table", "--skip", "1", "--shapes", "0.5b,1.5b"])
    records = Records(tmp_path / "sync.jsonl")
    records.add("machine", **ON)
    rows = [
        {"step": step, "way": way, "in_flight": 0, "seconds": seconds, "phases": {"send": seconds}, "gib": 0.9}
        for step in (1, 2, 3)
        for way, seconds in ((sync.OVER_IPC, 9.0 if step == 1 else 0.02), ("shared memory", 0.5))
    ]
    records.add("one_gpu_0.5b", rows=rows, problem=None)
    records.add("ludic_1.5b", rows=[], problem="the server did not come up")
    sync.write_table(args)
    report = (tmp_path / "sync.md").read_text()
    names = ["0.5b, one GPU, ludic over CUDA IPC, proven", "0.5b, one GPU, ludic over shared memory, proven"]
    assert re.findall(r"^\| (0\.5b.*?) *\|", report, flags=re.MULTILINE) == names * 2
    assert "0.5b, one GPU: shared memory takes 25.0 times what CUDA IPC takes." in report
    assert "ludic_1.5b: the server did not come up." in report


PREPARED = """
import sys
print('{"loaded": true}', flush=True)
word = sys.stdin.readline().strip()
if word == "http://up":
    print('{"step": 1}')
    print('{"step": 2}', flush=True)
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("code", "ends"), [(0, 2), (3, 3)])
def test_a_part_that_is_prepared_measures_when_it_is_told_where(tmp_path: Path, code: int, ends: int) -> None:
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", PREPARED, str(code)]
        part = Prepared(stack, command, log_path=tmp_path / "part.log", gpu=None)
        records = part.records("http://up", deadline_s=60)
        assert [record.get("step") for record in records] == [1, 2, None][:ends]
        assert records[-1].get("cut_off") == (f"ended with code {code}" if code else None)
        silent = Prepared(stack, command, log_path=tmp_path / "silent.log", gpu=None)
        with pytest.raises(PartError, match="it measured nothing"):
            silent.records("http://down", deadline_s=60)


def test_the_peer_and_one_gpu_are_measured_with_the_first_shape_alone() -> None:
    args = sync.build_parser().parse_args(["--shapes", "0.5b,1.5b"])
    assert sync.kinds_of(args, "0.5b", 2) == ("ludic", "nccl", "one_gpu") and sync.kinds_of(args, "1.5b", 2) == (
        "ludic",
    )
    assert sync.kinds_of(args, "0.5b", 1) == ("one_gpu",) and sync.kinds_of(args, "1.5b", 1) == ()
    backends = {
        kind: " ".join(sync.server_of(args, kind, "0.5b", Path("policy"), 0).command).partition('"backend": ')[2]
        for kind in ("ludic", "nccl", "one_gpu")
    }
    assert backends == {"ludic": "", "nccl": '"nccl"}', "one_gpu": '"ludic_shm"}'}


def test_growth_is_measured_with_one_trainer(common: Sequence[str], tmp_path: Path) -> None:
    points = ["--rollouts", "4,8", "--lengths", "4,8", "--concurrencies", "4,8", "--steps", "4", "--early", "2"]
    assert growth.main([*common, *points, "--small", "8,4,8", "--updates", "1"]) == 0
    records = Records(tmp_path / "growth.jsonl").last()
    tokens = {
        name: [row["completion_tokens"] for row in record["rows"]]
        for name, record in records.items()
        if name != "machine"
    }
    assert tokens == {
        "rollouts 4": [32, 32], "rollouts 8": [64, 64], "length 4": [32, 32], "length 8": [64, 64],
        "concurrency 4": [16, 16], "concurrency 8": [16, 16], "steps 4": [64, 64, 64, 64],
    }  # fmt: skip
    steps = [row["step"] for name, record in records.items() if name != "machine" for row in record["rows"]]
    assert steps == list(range(1, 17))
    cells = table_of(tmp_path, "growth")
    assert [row[0] for row in cells] == [
        "rollouts an update", "4", "8", "slope", "tokens of a completion", "4", "8", "slope",
        "completions in flight", "4", "8", "slope", "", "update 2", "update 4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "nowhere"], "--dataset nowhere holds no train.jsonl"),
        (["--engine", "local", "--device", "cuda"], "--engine local is for --device cpu"),
        (["--server", "http://x"], "--server http://x needs --policy: name the folder that it serves"),
        (["--phases", "ludik"], "--phases ludik does not exist: choose among generation, ludic"),
        (["--updates", "6"], "--turns 3 of 6 updates: 7 are the least where the first 2 warm up"),
    ],
)
def test_a_run_that_cannot_begin_says_why_in_one_line(
    common: list[str], flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = common[2:] if "--server" in flags else common  # without the policy
    assert update.main([*given, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
