"""The report page as a file: what is read of a run, what is in the page, and that no text of a run is HTML in it."""

import asyncio
import base64
import gzip
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report_page import make_run
from ludic.config import RunPaths
from ludic.report import timings
from ludic.report.__main__ import main
from ludic.report.evaluations import analysed, kind_of
from ludic.report.page import write_report
from ludic.report.rollouts import CUT_OFF, HAS_LOGPROBS, NO_ANSWER, RIGHT, evaluation_source, training_source
from ludic.report.runs import Run, default_page, find_runs
from ludic.report.spans import TokenGaps, spans
from ludic.report.start import write_start
from ludic.run.ending import finish
from ludic.run.report_page import page_at_an_early_end, write_page
from ludic.storage.jsonl import read_jsonl
from ludic.train.summary import TrainingSummary

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u2028"


def completion(answer: str | None, right: bool, **changed: Any) -> dict[str, Any]:
    parse_error = None if answer is not None else "no \\boxed{...} in the text"
    plain = {"text": f"\\boxed{{{answer}}}", "num_tokens": 9, "finish_reason": "stop", "answer": answer}
    verdicts = dict.fromkeys(("strict", "flexible", "qwen", "correct"), right)
    return {**plain, "parse_error": parse_error, **verdicts, "grader_failed": False, "policy_version": 0, **changed}


def problem(index: int, *completions: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": index,
        "question_id": "",
        "prompt": [{"role": "user", "content": f"problem {index}"}],
        "prompt_tokens": 3,
        "target": "7",
        "completions": list(completions),
    }


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def data_of(page: str, name: str) -> Any:
    """What the page's script reads under that name."""
    found = re.search(rf'<script type="application/octet-stream" id="data-{name}">([^<]*)</script>', page)
    assert found is not None, name
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", 512)


# --- what is read -------------------------------------------------------------------------------------------------------


def test_a_training_is_read_from_its_folder_and_from_its_metrics_file(run_folder: Path) -> None:
    for path in (run_folder, run_folder / "sums_train_metrics.jsonl"):
        (run,) = find_runs([path])
        assert run.name == "run" and [row["step"] for row in run.updates] == [1, 2]
        assert [row["step"] for row in run.evaluations] == [0, 2] and len(run.events) == 1
        assert run.rollouts == run_folder / "sums_train_rollouts.jsonl"


def test_intervals_of_an_evaluation_are_there_before_the_summary_is(run_folder: Path) -> None:
    (run,) = find_runs([run_folder])
    low, high = run.evaluations[0]["accuracy_ci95"]
    assert low == pytest.approx(0.195, abs=0.001) and high == pytest.approx(0.314, abs=0.001)  # Wilson, 50 of 200


def test_intervals_and_settings_come_from_the_files_that_have_them(run_folder: Path) -> None:
    evaluation = {"step": 0, "accuracy_ci95": [0.1, 0.9], "strict_accuracy_ci95": [0, 1], "qwen_accuracy_ci95": [0, 1]}
    (run_folder / "sums_train_summary.json").write_text(json.dumps({"evaluations": [evaluation], "model": "m"}))
    write_start(run_folder / "sums_train_start.json", command="train", settings={"loss": "dr_grpo"})
    (run,) = find_runs([run_folder])
    assert run.evaluations[0]["accuracy_ci95"] == [0.1, 0.9] and run.settings == {"model": "m", "loss": "dr_grpo"}
    assert run.start["command"] == "train" and run.start["versions"]["python"] and run.start["machine"]["cpu_cores"]


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, 8) for name in ("a/out", "b/out")]
    assert [run.name for run in find_runs(paths)] == ["a/out", "b/out"]
    assert [run.name for run in find_runs([paths[0], paths[0]])] == ["out (1)", "out (2)"]


def test_records_that_lie_in_a_folder_that_is_given_are_shown_once(run_folder: Path, tmp_path: Path) -> None:
    line = json.dumps({"completions": []}) + "\n"
    inside, elsewhere = run_folder / "before.jsonl", tmp_path / "other.jsonl"
    for path in (inside, elsewhere):
        path.write_text(line)
    runs = find_runs([run_folder, inside, elsewhere])
    assert [run.evaluation_files for run in runs] == [(inside,), (elsewhere,)]


def test_a_path_without_a_run_is_refused_in_one_line_that_says_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_lines(tmp_path / "other.jsonl", [{"a": 1}])
    for path in (tmp_path, tmp_path / "none", other):
        assert main([str(path)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(path) in said and "--out-dir" in said


def test_a_damaged_line_is_named_and_one_that_is_being_written_is_left_out(run_folder: Path) -> None:
    rollouts = run_folder / "sums_train_rollouts.jsonl"
    whole = rollouts.read_bytes()
    rollouts.write_bytes(whole + b'{"step": 3, "gro')
    assert training_source(rollouts, name="", run=0, limit=999, scale_rewards=True).total == 512
    rollouts.write_bytes(whole + b'{"step": 3, "gro\n' + whole)
    with pytest.raises(ValueError, match=r"rollouts\.jsonl:513: not valid JSON"):
        training_source(rollouts, name="", run=0, limit=9999, scale_rewards=True)


def test_the_page_goes_beside_the_files_of_the_first_run(run_folder: Path, tmp_path: Path) -> None:
    assert default_page(run_folder).name == "sums_train_report.html"
    assert default_page(tmp_path / "e.jsonl") == tmp_path / "e.jsonl.report.html"


# --- rollouts -----------------------------------------------------------------------------------------------------------


def texts_of(chunks: list[str]) -> list[Any]:
    return [group for chunk in chunks for group in json.loads(gzip.decompress(base64.b64decode(chunk)))]


def test_every_rollout_is_in_the_page_once_with_its_group(run_folder: Path) -> None:
    path = run_folder / "sums_train_rollouts.jsonl"
    source = training_source(path, name="", run=0, limit=9999, scale_rewards=True)
    records, groups = read_jsonl(path), texts_of(source.chunks)
    assert source.size == [8] * 64 and source.total == len(records) == len(source.member_reward)
    assert [member[0] for group in groups for member in group[2]] == [record["completion"] for record in records]
    assert source.step == [1] * 32 + [2] * 32 and source.group == list(range(64))
    flags = [
        RIGHT * bool(record["correct"])
        | CUT_OFF * (record["finish_reason"] == "length")
        | NO_ANSWER * (record["answer"] is None)
        for record in records
    ]
    assert source.member_flags == flags and len(set(flags)) == 3


def test_chunks_are_cut_between_groups_and_the_index_finds_each_group_in_its_chunk(tmp_path: Path) -> None:
    path = make_run(tmp_path, 4096) / "sums_train_rollouts.jsonl"
    source = training_source(path, name="", run=0, limit=9999, scale_rewards=True)
    assert len(source.chunks) > 2
    chunks = [texts_of([chunk]) for chunk in source.chunks]
    for group, chunk, place in zip(source.group, source.chunk, source.place, strict=True):
        assert chunks[chunk][place][0].startswith(f"Problem {group}:")


def test_of_too_many_rollouts_whole_updates_stay_the_first_and_the_last_among_them(tmp_path: Path) -> None:
    path = make_run(tmp_path, 256 * 20) / "sums_train_rollouts.jsonl"
    source = training_source(path, name="", run=0, limit=256 * 5, scale_rewards=True)
    assert sorted(set(source.step)) == [1, 6, 11, 15, 20] and source.total == 256 * 20
    assert len(source.member_reward) == 256 * 5


def test_the_lengths_of_tokens_are_counted_as_a_browser_counts_a_text() -> None:
    record = {"step": 1, "group": 0, "completion": "2≠🙂", "completion_token_ends": [1, 1, 2, 2, 3, 3],
              "completion_logprobs": [-0.1, -0.2, -0.3, -0.4, -0.5, None]}  # fmt: skip
    found = spans(record, TokenGaps(None, set()))
    assert found == [[1, 0, 1, 0, 2, 0], [-0.1, -0.2, -0.3, -0.4, -0.5, None], None]
    assert spans({"step": 1, "group": 0, "completion": "2"}, TokenGaps(None, set())) is None


def test_the_trainers_gaps_are_joined_with_the_rollouts_of_the_updates_on_the_page(tmp_path: Path) -> None:
    path = make_run(tmp_path, 256 * 6) / "sums_train_rollouts.jsonl"
    rows: list[Any] = read_jsonl(path)
    for row in rows:
        ends = sorted((row["step"] + member) % len(row["completion"]) for member in range(2))
        row.update(completion_logprobs=[-0.5, -1.5], completion_token_ends=ends)
    write_lines(path, rows)
    gaps = [
        {"step": row["step"], "group": row["group"], "rollout": row["rollout"],
         "completion_logprob_gaps": [0.001 * row["group"], None]}
        for row in reversed(rows) if row["step"] != 3 and row["rollout"] < 4
    ]  # fmt: skip
    gaps.sort(key=lambda row: row["step"])  # by updates; within one they come as they were trained on
    file = write_lines(tmp_path / "sums_train_token_gaps.jsonl", gaps)
    with file.open("a") as torn:
        torn.write('{"step": 6, "gro')
    source = training_source(path, name="", run=0, limit=256 * 4, scale_rewards=True, token_gaps=file)
    assert sorted(set(source.step)) == [1, 3, 4, 6]
    assert all(flags & HAS_LOGPROBS for flags in source.member_flags)
    for step, group, (_, _, members) in zip(source.step, source.group, texts_of(source.chunks), strict=True):
        joined = [float(f"{0.001 * group:.3g}"), None]
        wanted = [joined if step != 3 and member < 4 else None for member in range(8)]
        assert [member[4][2] for member in members] == wanted


def test_a_file_of_another_version_is_named_with_its_line(run_folder: Path, tmp_path: Path) -> None:
    with (run_folder / "sums_train_rollouts.jsonl").open("a") as file:
        file.write('{"step": 3, "group": 1, "completion": "7"}\n')
    older = completion("7", True)
    del older["qwen"]
    records = write_lines(tmp_path / "e.jsonl", [problem(0, completion("7", True)), problem(1, older)])
    for path, line in ((run_folder, "rollouts.jsonl:513: "), (records, "e.jsonl:2: ")):
        with pytest.raises(ValueError, match=f"{line}this is no .* of this version of ludic"):
            write_report([path], tmp_path / "page.html")


# --- time ---------------------------------------------------------------------------------------------------------------


def test_the_parts_of_an_update_add_up_to_its_seconds_and_end_when_it_ended() -> None:
    row = {"step": 1, "time": 104.0, "step_s": 4.0, "wait_s": 1.0, "train_s": 2.0, "sync_s": 0.5, "generation_s": 1.5}
    blocks = timings.timeline(Run(name="", updates=[row]))
    assert [(block["part"], block["start"], block["end"]) for block in blocks] == [
        ("wait", 0.0, 1.0), ("train", 1.0, 3.0), ("sync", 3.0, 3.5), ("other", 3.5, 4.0), ("generation", 0.0, 1.5)
    ]  # fmt: skip


def test_generation_that_began_in_an_earlier_update_is_not_drawn() -> None:
    row = {"step": 1, "time": 104.0, "step_s": 4.0, "generation_s": 9.0, "staleness_max": 1}
    assert {block["lane"] for block in timings.timeline(Run(name="", updates=[row]))} == {"trainer"}


# --- evaluations --------------------------------------------------------------------------------------------------------


def test_pass_at_k_and_the_majority_of_a_small_case_are_those_by_hand(tmp_path: Path) -> None:
    wrong, right, none = completion("3", False), completion("7", True), completion(None, False, text="I do not know")
    records = [problem(0, right, wrong, wrong, none), problem(1, right, right, right, right)]
    figures = analysed(records, tmp_path / "e.jsonl")
    assert figures["k"] == [1, 2, 4] and figures["pass_at_k"] == pytest.approx([5 / 8, 3 / 4, 1])
    # Problem 0, the six pairs: 7 and 3 tie twice, 7 stands alone once, and 3 wins thrice: a third. All four: 3.
    assert figures["majority_at_k"] == pytest.approx([5 / 8, 2 / 3, 1 / 2])
    assert [(row["index"], row["right"], row["wrong"]) for row in figures["worst"]] == [(0, 1, [["3", 2], ["None", 1]])]
    assert not figures["finished"]


@pytest.mark.parametrize(
    ("one", "kind"),
    [
        (completion("7", True), "right"),
        (completion("7", True, strict=False), "right, but not in a box"),
        (completion("3", False), "wrong answer"),
        (completion(None, False, finish_reason="length"), "truncated"),
        (completion(None, False), "no answer: no \\boxed{...} in the text"),
        (completion("7", False, grader_failed=True), "the grader gave up"),
    ],
)
def test_a_completion_is_of_the_kind_that_a_reader_would_call_it(one: dict[str, Any], kind: str) -> None:
    assert kind_of(one, "flexible") == kind


def test_an_evaluations_problems_are_groups_in_their_order() -> None:
    source = evaluation_source([problem(4, completion("7", True)), problem(2, completion("3", False))], name="", run=0)
    assert source.group == [2, 4] and source.member_reward == [0, 1] and source.size == [1, 1]


# --- the page -----------------------------------------------------------------------------------------------------------


def test_no_text_of_a_run_is_in_the_page_as_html(run_folder: Path, tmp_path: Path) -> None:
    rows = read_jsonl(run_folder / "sums_train_rollouts.jsonl")[:8]
    for row in rows:
        row.update(completion=HOSTILE, prompt=HOSTILE, answer=HOSTILE, target=HOSTILE)
    write_lines(run_folder / "sums_train_rollouts.jsonl", rows)
    write_start(run_folder / "sums_train_start.json", command=HOSTILE, settings={"model": HOSTILE})
    with (run_folder / "sums_train_metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "time": 0.0, "event": HOSTILE}) + "\n")
    hostile_folder = run_folder.rename(tmp_path / "<script>x<!--")
    page = tmp_path / "page.html"
    write_report([hostile_folder], page)
    text = page.read_text()
    assert "owned" not in text and "onerror" not in text and "<!--" not in text and "\u2028" not in text
    assert data_of(text, "text-0-0")[0][0] == HOSTILE  # and yet it is all there


def test_the_policy_of_the_page_allows_its_own_scripts_and_nothing_else(run_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report([run_folder], page)
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', page.read_text())
    assert found is not None
    rules = dict(rule.strip().split(" ", 1) for rule in found[1].split(";"))
    assert rules["default-src"] == "'none'" and re.fullmatch(r"('sha256-[\w+/=]+' ?){2}", rules["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/=]+' 'nonce-[\w-]+'", rules["style-src"])
    assert "unsafe" not in found[1] and "http" not in found[1]


def test_a_page_of_two_runs_has_both_in_every_chart(run_folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", 512, seed=1)
    page = tmp_path / "page.html"
    assert main([str(run_folder), str(other), "--out", str(page), "--png"]) == 0
    text = page.read_text()
    assert [run["name"] for run in data_of(text, "main")["runs"]] == ["run", "other"]
    charts = data_of(text, "charts-curves")
    assert {"chart-reward_mean", "chart-accuracy", "chart-step_s"} <= set(charts["roots"].values())
    assert {"run-0", "run-1"} <= set(re.findall(r"run-\d", json.dumps(charts["document"])))
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_figures_that_are_not_finite_do_not_spoil_the_page(run_folder: Path, tmp_path: Path) -> None:
    rows = read_jsonl(run_folder / "sums_train_metrics.jsonl")
    write_lines(run_folder / "sums_train_metrics.jsonl", [{**row, "entropy": float("nan")} for row in rows])
    page = tmp_path / "page.html"
    write_report([run_folder], page)
    assert data_of(page.read_text(), "main")["runs"][0]["metrics"]["entropy"] == [None, None]


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "sums_train_metrics.jsonl").write_text("")
    write_report([tmp_path], tmp_path / "page.html")
    assert data_of((tmp_path / "page.html").read_text(), "main")["runs"][0]["steps"] == []


def test_an_evaluation_alone_has_a_page(tmp_path: Path) -> None:
    records = write_lines(tmp_path / "e.jsonl", [problem(0, completion("7", True), completion("3", False))])
    assert main([str(records)]) == 0
    main_data = data_of((tmp_path / "e.jsonl.report.html").read_text(), "main")
    assert main_data["evaluations"][0]["rates"]["flexible"]["rate"] == 0.5
    assert [source["kind"] for source in main_data["sources"]] == ["evaluation"]


def test_without_bokeh_the_command_says_in_one_line_what_to_install(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([str(run_folder)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "uv sync --extra report" in said
    assert not (run_folder / "sums_train_report.html").exists()


def test_a_run_whose_page_cannot_be_written_ends_well_and_says_why(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    paths = RunPaths(out_dir=run_folder, name="sums")
    write_page(paths.metrics, paths.report)
    assert capsys.readouterr().out.startswith("no report page: the report page needs the package bokeh")


def test_a_page_of_an_earlier_end_is_not_what_this_end_says_that_it_left(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = RunPaths(out_dir=run_folder, name="sums")
    settings = {"engine": "local", "rollouts_per_update": 8, "loss": "grpo", "learning_rate": 1e-3, "seed": 0}
    write_start(paths.start, command="train", settings=settings)
    summary = TrainingSummary(
        accuracy_before=None, accuracy_after=None, eval_problems=0, updates=2, seconds=1.0, rollouts=16,
        completion_tokens=64, last_checkpoint=None, evaluations=[],
    )  # fmt: skip
    finish(paths, summary, model="m", seconds=1.0, before=None)
    assert f"  report:       {paths.report}\n" in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    finish(paths, summary, model="m", seconds=1.0, before=None)
    said = capsys.readouterr().out
    assert paths.report.exists() and "no report page: " in said and str(paths.report) not in said


def test_a_fault_of_the_report_itself_is_one_line_at_the_end_of_a_run(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "sums_train_metrics.jsonl").write_text('{"reward_mean": 0.5}\n')  # a KeyError in the page's code
    write_page(run_folder / "sums_train_metrics.jsonl", run_folder / "page.html")
    assert capsys.readouterr().out == "no report page: KeyError: 'step'\n"


def test_a_run_that_ends_early_has_a_page_of_what_is_done_and_ends_as_it_would(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, page = run_folder / "sums_train_metrics.jsonl", run_folder / "page.html"
    with pytest.raises(asyncio.CancelledError), page_at_an_early_end(metrics, page):
        raise asyncio.CancelledError
    assert data_of(page.read_text(), "main")["runs"][0]["steps"] == [1, 2]
    assert capsys.readouterr().out == f"report of what is done: {page}\n"
    page.unlink()
    with page_at_an_early_end(metrics, page):
        pass  # whoever ends in good order writes it with the summary
    metrics.write_text("")
    with pytest.raises(ValueError, match="no flag"), page_at_an_early_end(metrics, page):
        raise ValueError("no flag")
    assert not page.exists()


def test_the_command_loads_neither_torch_nor_transformers(run_folder: Path) -> None:
    program = (
        "import sys; from ludic.report.__main__ import main; main(sys.argv[1:]); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run_folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_an_evaluation_of_another_task_has_its_own_rules_and_no_more(tmp_path: Path) -> None:
    one = {name: value for name, value in completion("7", True).items() if name not in ("strict", "flexible", "qwen")}
    records = [{"index": 0, "prompt": [{"role": "user", "content": "?"}], "target": "7", "completions": [one]}]
    figures = analysed(records, tmp_path / "e.jsonl")
    assert list(figures["rates"]) == ["correct"] and figures["kinds"] == [{"kind": "right", "count": 1}]
    assert evaluation_source(records, name="e", run=0).part_names == ["correct"]
