"""`--checkpoints`: several models in one call, each with the files of a call of its own, and one table."""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ludic.config_file import RunParser
from ludic.flags import add_evaluation_arguments
from ludic.rollout.problems import read_records
from ludic.run.checkpoints import checkpoint_calls, checkpoints_table, evaluate_all_from_flags
from ludic.run.task import Samples, Task
from ludic.types import ChatMessage, ParseResult, Score
from tests.vllm_helpers import make_tiny_model


class Length:
    """Right where a completion has more characters than the sample says, so that random models differ."""

    rules = ("flexible", "strict")

    def messages(self, sample: int, /) -> list[ChatMessage]:
        return [ChatMessage(role="user", content=f"more than {sample}?")]

    def target(self, sample: int, /) -> str:
        return str(sample)

    async def score(self, sample: int, text: str, /) -> Score:
        right = len(text) > sample
        parts = {"flexible": float(right), "strict": float(right and text[0] < "n")}
        return Score(reward=parts["strict"], correct=bool(parts["strict"]), parse=ParseResult(answer=text), parts=parts)


TASK = Task(environment=Length(), load_samples=lambda args: Samples(evaluation=list(range(4))))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An --out-dir with two finished checkpoints and one that was not finished."""
    folder = tmp_path_factory.mktemp("runs") / "run_a"
    for step in (10, 9):
        make_tiny_model(folder / "checkpoints_sums" / f"step_{step}", tie_word_embeddings=True, seed=step)
        (folder / "checkpoints_sums" / f"step_{step}" / "manifest.json").write_text("{}")
    (folder / "checkpoints_sums" / "step_11").mkdir()
    return folder


def arguments(out_dir: Path, *more: str, engine: str = "local") -> argparse.Namespace:
    parser = RunParser()
    parser.add_argument("--model", default="nobody/none")
    add_evaluation_arguments(parser, out="eval.jsonl")
    return parser.parse_args(["--out-dir", str(out_dir), "--engine", engine, "--max-tokens", "4", *more])


async def test_all_checkpoints_of_a_run_are_scored_in_turn_and_compared_with_the_first(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluations = await evaluate_all_from_flags(arguments(tmp_path, "--checkpoints", str(run_folder)), TASK)
    said = capsys.readouterr().out
    written = {path.name for path in tmp_path.glob("eval*")}
    each = {"", ".config.toml", ".report.html", ".settings.json", ".prompt.json", ".summary.json"}
    assert written == {f"eval_step_{n}.jsonl{kind}" for n in (9, 10) for kind in each} | {"eval_comparison.json"}
    rows = json.loads((tmp_path / "eval_comparison.json").read_text())["checkpoints"]
    assert [(row["name"], row["step"], Path(row["records"]).name) for row in rows] == [
        ("step_9", 9, "eval_step_9.jsonl"), ("step_10", 10, "eval_step_10.jsonl")
    ]  # fmt: skip
    for row, one in zip(rows, evaluations, strict=True):
        summary = json.loads(Path(row["records"] + ".summary.json").read_text())
        assert row["rules"]["flexible"]["accuracy"] == summary["accuracy"] == one.result.accuracy
        assert summary["model"] == row["model"]
    assert rows[0]["against_first"] == {}
    paired = rows[1]["against_first"]["strict"]
    strict = [row["rules"]["strict"]["accuracy"] for row in rows]
    assert paired["difference"] == pytest.approx(strict[1] - strict[0]) and 0 < paired["p_value"] <= 1
    table = said[said.index("vs. first") :]
    assert (
        len(re.findall(r"step_9 .*%", table)) == len(re.findall(r"step_10 .*%.*points|step_10 .*%.* to ", table)) == 2
    )


async def test_what_one_call_scores_is_what_a_call_for_each_scores(run_folder: Path, tmp_path: Path) -> None:
    await evaluate_all_from_flags(arguments(tmp_path / "all", "--checkpoints", str(run_folder)), TASK)
    for step in (9, 10):
        alone = arguments(tmp_path / f"{step}", "--model", str(run_folder / "checkpoints_sums" / f"step_{step}"))
        await evaluate_all_from_flags(alone, TASK)
        assert read_records(tmp_path / f"{step}" / "eval.jsonl") == read_records(
            tmp_path / "all" / f"eval_step_{step}.jsonl"
        )
        assert not (tmp_path / f"{step}" / "eval_comparison.json").exists()


async def test_records_of_a_later_checkpoint_are_found_before_the_first_is_evaluated_and_resumed(
    run_folder: Path, tmp_path: Path
) -> None:
    given = ["--checkpoints", str(run_folder)]
    await evaluate_all_from_flags(arguments(tmp_path, *given), TASK)
    for path in tmp_path.glob("eval_step_9*"):
        path.unlink()
    later = tmp_path / "eval_step_10.jsonl"
    with pytest.raises(ValueError, match=r"eval_step_10\.jsonl is there already: finish it with --resume-eval"):
        await evaluate_all_from_flags(arguments(tmp_path, *given), TASK)
    assert not list(tmp_path.glob("eval_step_9*"))
    kept = later.read_bytes()
    first, second = await evaluate_all_from_flags(arguments(tmp_path, *given, "--resume-eval"), TASK)
    assert (first.result.num_taken_over, second.result.num_taken_over) == (0, 4)
    assert later.read_bytes() == kept and len(read_records(tmp_path / "eval_step_9.jsonl")) == 4


async def test_a_later_model_that_is_not_there_is_found_before_the_first_is_evaluated(
    run_folder: Path, tmp_path: Path
) -> None:
    given = ["--checkpoints", str(run_folder / "checkpoints_sums" / "step_9"), str(run_folder / "step_l0")]
    with pytest.raises(ValueError, match="step_l0"):
        await evaluate_all_from_flags(arguments(tmp_path, *given), TASK)
    assert not list(tmp_path.glob("eval*"))


async def test_an_overwrite_that_is_cut_short_leaves_no_old_records_that_would_count_as_done(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--checkpoints", str(run_folder)]
    await evaluate_all_from_flags(arguments(tmp_path, *given), TASK)
    score = Length.score

    def no_engine(args: argparse.Namespace) -> None:
        raise ValueError("no engine")

    async def stops(self: Length, sample: int, text: str, /) -> Score:
        raise ValueError("cut short")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no engine"):
        patch.setattr("ludic.run.evaluation.weights_in_use", no_engine)
        await evaluate_all_from_flags(arguments(tmp_path, *given, "--overwrite"), TASK)
    assert len(read_records(tmp_path / "eval_step_10.jsonl")) == 4  # nothing is dropped before there is an engine
    monkeypatch.setattr(Length, "score", stops)
    with pytest.raises(ValueError, match="cut short"):
        await evaluate_all_from_flags(arguments(tmp_path, *given, "--overwrite"), TASK)
    assert not (tmp_path / "eval_step_10.jsonl.summary.json").exists()
    monkeypatch.setattr(Length, "score", score)
    results = await evaluate_all_from_flags(arguments(tmp_path, *given, "--resume-eval"), TASK)
    assert [one.result.num_taken_over for one in results] == [0, 0]


async def test_a_server_that_runs_is_refused_with_the_way_out(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add --start-server, which starts one for each, or --engine local"):
        await evaluate_all_from_flags(arguments(tmp_path, "--checkpoints", str(run_folder), engine="vllm"), TASK)


def test_names_tell_checkpoints_of_two_runs_apart_and_a_started_server_has_a_log_for_each(
    run_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_folder, other := tmp_path / "run_b")
    more = ["--start-server", "--checkpoints", "Qwen/Qwen2.5-0.5B", str(run_folder), str(other / "checkpoints_sums")]
    calls = checkpoint_calls(arguments(tmp_path, *more, engine="vllm"))
    assert list(calls) == ["Qwen_Qwen2.5-0.5B", *(f"run_{run}_step_{step}" for run in "ab" for step in (9, 10))]
    assert calls["run_b_step_9"].model == str(other / "checkpoints_sums" / "step_9")
    assert calls["run_b_step_9"].out == "eval_run_b_step_9.jsonl"
    assert len({call.server_log for call in calls.values()}) == 5


@pytest.mark.parametrize("given", ["empty", "twice"])
def test_a_folder_without_checkpoints_and_a_model_that_is_named_twice_are_refused(
    run_folder: Path, tmp_path: Path, given: str
) -> None:
    step = str(run_folder / "checkpoints_sums" / "step_9")
    more, reason = {
        "empty": ([str(tmp_path)], "neither a model folder .* nor a folder with finished checkpoints"),
        "twice": ([step, str(run_folder)], "step_9 twice"),
    }[given]
    with pytest.raises(ValueError, match=reason):
        checkpoint_calls(arguments(tmp_path, "--checkpoints", *more))


def test_a_name_in_the_table_does_nothing_to_the_terminal() -> None:
    result: Any = SimpleNamespace(rules={"strict": SimpleNamespace(accuracy=0.5, ci95=(0.25, 0.75))})
    one: Any = SimpleNamespace(name="step_1\x1b]0;owned\x07[red]", result=result, paired={})
    console = Console(width=100, force_terminal=True, color_system=None)
    with console.capture() as shown:
        console.print(checkpoints_table([one]))
    assert "\x1b]0" not in shown.get() and "[red]" in shown.get()


def test_the_module_of_several_checkpoints_is_read_without_torch() -> None:
    import subprocess

    code = "import ludic.run.checkpoints, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
