"""Our records in lm-evaluation-harness's layout: the lines that it writes itself of the same completions, for its readers."""

import json
import math
import random
import runpy
from pathlib import Path
from typing import Any, cast

import pytest

from environments import gsm8k_lm_eval
from environments.gsm8k_lm_eval import GSM8KLMEval
from ludic.rollout.problems import Problem, ProblemRecord, read_records, rules_of
from ludic.run.lm_eval_files import HarnessView, write_lm_eval_files
from ludic.types import Completion

pytest.importorskip("lm_eval", reason="the dependency group harness is not installed")
from tests.test_gsm8k_lm_eval import dataset, harness_task

__all__ = ["dataset"]

evaluator, tracker, utils = (pytest.importorskip(f"lm_eval.{name}") for name in ("evaluator", "loggers", "utils"))
LM: Any = pytest.importorskip("lm_eval.api.model").LM
SCRIPT = Path(__file__).parents[1] / "examples" / "lm_eval_files.py"
SETTINGS = {"model": "runs/a/step_1", "temperature": 0.0, "samples": 1, "prompt_format": "lm-eval", "few_shot": 5}


class Replays(LM):  # type: ignore[misc]
    """A model of the harness that answers each prompt with a given text, cut as its own backends cut."""

    def __init__(self, texts: dict[str, str]) -> None:
        super().__init__()
        self.texts = texts

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [gsm8k_lm_eval.until_stop(self.texts[request.args[0]]) for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise AssertionError

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        raise AssertionError


async def records_of(folder: Path, out: Path, copies: int = 1) -> list[ProblemRecord]:
    """An evaluation of problems with answers that are right, wrong, nowhere and hostile; written to `out` too."""
    environment, draw = GSM8KLMEval(), random.Random(3)
    records = []
    for index, sample in enumerate(gsm8k_lm_eval.load(dataset=folder)):
        endings = ["", f"#### {sample.target}", f"it is {sample.target}", "#### 9\n\nQuestion: 5", "\x1b[31m ½ </s> 18"]
        answers = []
        for copy in range(copies):
            text = f" so {index} {draw.random():.3f} " + endings[(index + copy) % 5]
            completion = Completion(token_ids=[1, 2], logprobs=None, finish_reason="stop", policy_version=0)
            answers.append((completion, text, await environment.score(sample, text)))
        problem = Problem(
            index=index, question_id=str(index), messages=environment.messages(sample), prompt_token_ids=[1], target="?"
        )
        records.append(problem.record(answers, rules_of(environment)))
    out.write_text("".join(json.dumps(record) + "\n" for record in reversed(records)))
    Path(f"{out}.settings.json").write_text(json.dumps({**SETTINGS, "dataset": str(folder), "samples": copies}))
    return records


async def run_script(monkeypatch: pytest.MonkeyPatch, records: Path, out_dir: Path) -> tuple[Path, Path]:
    """What the script wrote: results and samples."""
    monkeypatch.setattr("sys.argv", ["lm_eval_files.py", str(records), "--out-dir", str(out_dir)])
    assert await runpy.run_path(str(SCRIPT))["main"]() == 0
    (results,), (samples,) = (list(out_dir.rglob(f"{kind}_*")) for kind in ("results", "samples"))
    return results, samples


async def test_the_files_are_those_that_the_harness_writes_of_the_same_completions(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = await records_of(dataset, tmp_path / "eval.jsonl")
    results_path, samples_path = await run_script(monkeypatch, tmp_path / "eval.jsonl", tmp_path / "ours")

    texts = {record["prompt"][0]["content"]: record["completions"][0]["text"] for record in records}
    found = evaluator.evaluate(lm=Replays(texts), task_dict={"gsm8k": harness_task(dataset)}, log_samples=True)
    theirs = tracker.EvaluationTracker(output_path=str(tmp_path / "theirs"))
    theirs.general_config_tracker.log_experiment_args("ludic", f"pretrained={SETTINGS['model']}", None, None, False)
    samples = found.pop("samples")
    theirs.save_results_aggregated(results=found, samples=samples)
    theirs.save_results_samples(task_name="gsm8k", samples=samples["gsm8k"])

    (written,) = (tmp_path / "theirs").rglob("samples_gsm8k_*.jsonl")
    assert written.parent.name == samples_path.parent.name == "runs__a__step_1"
    key = lambda sample: (sample["filter"], sample["doc_id"])  # noqa: E731
    ours, wanted = (
        sorted(map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=key)
        for path in (samples_path, written)
    )
    assert ours == wanted
    assert {sample["exact_match"] for sample in ours} == {0.0, 1.0}

    figures = json.loads(results_path.read_text())
    for name, value in found["results"]["gsm8k"].items():
        mine = figures["results"]["gsm8k"][name]
        assert mine == (pytest.approx(value) if isinstance(value, float) else value), name
    for name in ("versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks"):
        assert figures[name] == found[name], name
    assert figures["model_name_sanitized"] == "runs__a__step_1"


async def test_the_readers_of_the_harness_and_of_its_viewers_take_the_files(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await records_of(dataset, tmp_path / "eval.jsonl", copies=4)
    results_path, samples_path = await run_script(monkeypatch, tmp_path / "eval.jsonl", tmp_path / "ours")
    names = [str(results_path), str(samples_path)]
    assert utils.get_results_filenames(names) == names[:1] and utils.get_sample_results_filenames(names) == names[1:]
    assert utils.get_file_task_name(samples_path.name) == "gsm8k"
    assert utils.get_latest_filename([samples_path.name]) == samples_path.name

    figures = json.loads(results_path.read_text())
    table = utils.make_table(figures)
    assert all(f"|{rule}" in table.replace(" ", "") for rule in GSM8KLMEval.rules)

    rows = pytest.importorskip("datasets").load_dataset(
        "json", data_files=str(samples_path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(rows) == 2 * len(read_records(tmp_path / "eval.jsonl"))
    assert {len(row["resps"][0]) for row in rows} == {4} and {row["filter"] for row in rows} == set(GSM8KLMEval.rules)
    assert math.isclose(
        sum(row["exact_match"] for row in rows if row["filter"] == "strict-match") * 2 / len(rows),
        figures["results"]["gsm8k"]["exact_match,strict-match"],
    )

    wandb_logger = pytest.importorskip("lm_eval.loggers.wandb_logger")
    logger = object.__new__(wandb_logger.WandbLogger)  # what it makes of the files, without a run at W&B
    logger.post_init(figures)
    assert logger.task_names == ["gsm8k"] and logger._sanitize_results_dict()[1]
    lines = [json.loads(line) for line in samples_path.read_text().splitlines()]
    for line in lines:  # as they are in memory, before the harness writes them
        line["arguments"] = [tuple(line["arguments"]["gen_args_0"].values())]
    frame = logger._generate_dataset(lines, figures["configs"]["gsm8k"])
    assert list(frame["exact_match"]) == [line["exact_match"] for line in lines]


def test_records_of_another_task_are_written_with_its_own_rules(tmp_path: Path) -> None:
    completion = {"text": "\ud800 \\boxed{4}", "answer": "4", "strict": True, "flexible": True, "qwen": False}
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    record = {"index": 0, "prompt": prompt, "target": "4", "completions": [completion]}
    settings = {"model": "m", "temperature": 0.5, "samples": 1}
    view = HarnessView(task="sums")
    results, samples = write_lm_eval_files([cast("ProblemRecord", record)], settings, tmp_path, view)
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert [(line["filter"], line["exact_match"]) for line in lines] == [
        ("flexible", 1.0),
        ("strict", 1.0),
        ("qwen", 0.0),
    ]
    assert lines[0]["doc"] == {"question": "2 + 2?", "target": "4"} and lines[0]["filtered_resps"] == ["4"]
    assert json.loads(lines[0]["arguments"]["gen_args_0"]["arg_0"]) == prompt
    assert lines[0]["arguments"]["gen_args_0"]["arg_1"] == {"until": [], "do_sample": True, "temperature": 0.5}
    assert json.loads(results.read_text())["results"]["sums"]["exact_match_stderr,strict"] == "N/A"
    with pytest.raises(ValueError, match="no records to write"):
        write_lm_eval_files([], settings, tmp_path, view)


def test_the_answer_to_a_conversation_is_looked_for_in_what_the_model_said_last(tmp_path: Path) -> None:
    turns = [
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "7"},
        {"role": "assistant", "content": "hm"},
    ]
    completion = {"text": "5\n\n[user] 7\n\n[assistant] hm", "answer": None, "correct": False, "turns": turns}
    record = {"index": 0, "prompt": [{"role": "user", "content": "?"}], "target": "4", "completions": [completion]}
    view = HarnessView(task="sums", answer=lambda rule, text: f"{rule}: {text}")
    settings = {"model": "m", "temperature": 0.5, "samples": 1}
    _, samples = write_lm_eval_files([cast("ProblemRecord", record)], settings, tmp_path, view)
    assert json.loads(samples.read_text())["filtered_resps"] == ["correct: hm"]
