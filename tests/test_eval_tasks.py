"""Evaluations from the command line: each task of `environments`, worked examples in the prompt, and prompts of plain text."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from environments.gsm8k import GSM8KSample, worked
from environments.gsm8k_lm_eval import STOPS
from environments.tasks import TASKS
from ludic.rollout.problems import read_records
from ludic.task.prompts import encode_prompt, load_tokenizer, stop_ids
from ludic.types import ChatMessage
from tests.vllm_helpers import make_tiny_model, make_tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS: dict[str, dict[str, str]] = {
    "gsm8k": {"question": "{n} + {n}?", "answer": "It is <<{n}+{n}={m}>>{m}.\n#### {m}"},
    "svamp": {"Body": "He has {n}.", "Question": "How many are {n} more?", "Answer": "{m}"},
    "math500": {"problem": "${n} + {n}$?", "answer": "{m}"},
    "aime": {"problem": "${n} + {n}$?", "answer": "{m}"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "model"
    make_tiny_model(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each task: test problems 0 to 4, and training problems from 3 on, so that two are in both."""
    folder = tmp_path_factory.mktemp("data")
    for task, row in ROWS.items():
        for split, numbers in (("test", range(5)), ("train", range(3, 11))):
            rows = [{key: text.format(n=n, m=2 * n) for key, text in row.items()} for n in numbers]
            (folder / task).mkdir(exist_ok=True)
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


async def evaluated(
    monkeypatch: pytest.MonkeyPatch, model: Path, data: Path, out_dir: Path, task: str, *more: str
) -> list[dict[str, Any]]:
    """The records of `evaluate.py` with the local engine, in the order of the problems."""
    words = ["evaluate.py", "--task", task, "--model", str(model), "--dataset", str(data / task), "--engine", "local"]
    monkeypatch.setattr(sys, "argv", [*words, "--max-tokens", "6", "--out-dir", str(out_dir), *more])
    assert await runpy.run_path(str(EXAMPLES / "evaluate.py"))["main"]() == 0
    records = read_records(out_dir / f"{task}_eval.jsonl")
    return sorted(map(dict, records), key=lambda record: record["index"])


@pytest.mark.parametrize("task", TASKS)
async def test_every_task_is_evaluated_from_the_command_line_on_files(
    task: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = await evaluated(monkeypatch, model, data, tmp_path, task, "--limit", "3")
    start = 3 if task == "aime" else 0  # whose one split is called train
    assert [record["target"] for record in records] == [str(2 * n) for n in range(start, start + 3)]
    summary = json.loads((tmp_path / f"{task}_eval.jsonl.summary.json").read_text())
    assert summary["num_problems"] == 3 and summary["settings"]["split"] == TASKS[task].splits[0]
    assert ("strict_accuracy" in summary) is (task != "math500")


@pytest.mark.parametrize(
    ("task", "answer"), [("gsm8k", "It is 10.\n\\boxed{10}"), ("svamp", "\\boxed{10}")]
)  # fmt: skip
async def test_worked_examples_are_turns_and_are_the_first_training_problems_that_are_not_evaluated(
    task: str, answer: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = await evaluated(monkeypatch, model, data, tmp_path, task, "--few-shot", "2", "--system-prompt", "Add.")
    asked = {record["prompt"][-1]["content"] for record in records}
    for record in records:
        turns = record["prompt"]
        assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
        assert "5" in turns[1]["content"] and turns[2]["content"] == answer and "6" in turns[3]["content"]
        assert not asked & {turns[1]["content"], turns[3]["content"]}
    settings = json.loads((tmp_path / f"{task}_eval.jsonl.settings.json").read_text())
    assert settings["few_shot"] == 2


async def test_records_with_other_worked_examples_are_not_mixed(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (monkeypatch, model, data, tmp_path, "gsm8k", "--resume-eval")
    await evaluated(*given, "--few-shot", "2")
    with pytest.raises(ValueError, match="the records were made with other settings: few_shot 2, now 1"):
        await evaluated(*given, "--few-shot", "1")
    with pytest.raises(ValueError, match=r"the record of problem . was made with another question or system prompt"):
        await evaluated(*given)


async def test_a_split_that_is_trained_on_lends_the_examples_behind_those_that_are_evaluated(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--split", "train", "--few-shot", "1", "--limit", "3"]
    records = await evaluated(monkeypatch, model, data, tmp_path, "gsm8k", *more)
    assert [record["prompt"][-1]["content"] for record in records] == ["3 + 3?", "4 + 4?", "5 + 5?"]
    assert {record["prompt"][0]["content"] for record in records} == {"6 + 6?"}


@pytest.mark.parametrize(
    ("task", "more", "reason"),
    [
        ("gsm8k", ["--few-shot", "7"], "--few-shot 7 needs as many training problems .* there are 6"),
        ("gsm8k", ["--few-shot", "-1"], "--few-shot must be at least 0, not -1"),
        ("math500", ["--few-shot", "1"], "--few-shot 1: MATH-500 has no training problems"),
        ("math500", ["--split", "train"], "--split train: MATH-500 has test"),
        ("svamp", ["--prompt-format", "lm-eval"], "--prompt-format lm-eval is of gsm8k, not of svamp"),
        ("gsm8k", ["--prompt-format", "lm-eval", "--system-prompt", "Add."], "--system-prompt Add.: .* plain text"),
        ("gsm8k", ["--prompt-format", "lm-eval", "--split", "train"], "evaluates GSM8K's split test, not train"),
        ("gsm8k", ["--few-shot", "5", "--max-seq-len", "60"], "problem 0 has .* tokens, which leaves no room"),
        ("gsm8k", ["--few-shot", "6", "--max-tokens", "4000"], "a prompt of .* exceed the model's context"),
    ],
)
async def test_flags_that_do_not_fit_the_task_are_refused_in_one_line(
    task: str, more: list[str], reason: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        await evaluated(monkeypatch, model, data, tmp_path, task, *more)
    assert "\n" not in str(caught.value)
    assert not any(path.stat().st_size for path in tmp_path.glob("*.jsonl"))


async def test_what_a_policy_writes_to_the_harnesss_prompt_gets_the_harnesss_verdicts(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--prompt-format", "lm-eval", "--temperature", "1", "--samples", "8", "--max-tokens", "12"]
    records = await evaluated(monkeypatch, model, data, tmp_path, "gsm8k", *more)
    text = json.loads((tmp_path / "gsm8k_eval.jsonl.prompt.json").read_text())["text"]
    assert text == records[0]["prompt"][0]["content"] and text.endswith("\n\nQuestion: 0 + 0?\nAnswer:")
    assert text.count("Question: ") == 6 and "<|" not in text
    settings = json.loads((tmp_path / "gsm8k_eval.jsonl.settings.json").read_text())
    assert (settings["prompt_format"], settings["few_shot"]) == ("lm-eval", 5)
    pytest.importorskip("lm_eval", reason="the dependency group harness is not installed")
    from tests.test_gsm8k_lm_eval import harness_task, verdicts_of_harness

    task = harness_task(data / "gsm8k")
    completions = [(record["index"], one) for record in records for one in record["completions"]]
    assert len({one["text"] for _, one in completions}) > 30
    for place, one in completions:
        theirs = verdicts_of_harness(task, place, one["text"])
        assert {rule: one[rule] for rule in theirs} == {rule: right for rule, (_, right) in theirs.items()}


def test_plain_text_is_the_messages_alone_after_the_token_that_begins_every_text(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model, plain_text=True)
    chat = [ChatMessage(role="user", content="Question: 1\nAnswer:")]
    assert encode_prompt(tokenizer, chat) == tokenizer("Question: 1\nAnswer:")["input_ids"]

    from tokenizers.processors import TemplateProcessing

    begins = make_tiny_tokenizer()
    bos = begins.convert_tokens_to_ids("<|user|>")
    begins.bos_token = "<|user|>"
    backend: Any = begins._tokenizer
    backend.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", bos)])
    begins.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    tokenizer = load_tokenizer(tmp_path, plain_text=True)
    ids = encode_prompt(tokenizer, chat)
    assert ids == tokenizer("Question: 1\nAnswer:")["input_ids"] and ids[0] == bos and ids.count(bos) == 1


def test_stop_texts_that_are_special_tokens_end_a_completion_as_tokens() -> None:
    tokenizer = make_tiny_tokenizer()
    assert stop_ids(tokenizer, STOPS) == []
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert stop_ids(tokenizer, STOPS) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_worked_example_keeps_the_steps_and_puts_the_answer_where_the_rules_look() -> None:
    sample = GSM8KSample(question="", answer="2*500 = <<2*500=1000>>1,000.\nPlus 80.\n#### 1,080", target="1,080")
    assert worked(sample) == "2*500 = 1,000.\nPlus 80.\n\\boxed{1,080}"


async def test_a_name_of_ones_own_for_the_records_is_kept_whatever_is_in_it(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate.py", "--task", "gsm8k", "--model", str(model), "--dataset", str(data / "gsm8k"), "--limit", "1"]
    words += ["--engine", "local", "--max-tokens", "4", "--out-dir", str(tmp_path), "--out", "TASK_7.jsonl"]
    monkeypatch.setattr(sys, "argv", words)
    assert await runpy.run_path(str(EXAMPLES / "evaluate.py"))["main"]() == 0
    assert len(read_records(tmp_path / "TASK_7.jsonl")) == 1


@pytest.mark.parametrize(("few_shot", "advised"), [("0", True), ("2", False)])
async def test_no_training_is_advised_after_worked_examples_which_it_does_not_have(
    few_shot: str, advised: bool, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(EXAMPLES / "gsm8k"))
    script = runpy.run_path(str(EXAMPLES / "gsm8k" / "eval_gsm8k_vllm.py"))
    words = ["--model", str(model), "--dataset", str(data / "gsm8k"), "--limit", "1", "--engine", "local"]
    words += ["--max-tokens", "4", "--out-dir", str(tmp_path), "--few-shot", few_shot]
    assert await script["run"](script["build_parser"]().parse_args(words)) == 0
    assert ("next, to continue training" in capsys.readouterr().out) is advised
