"""The further tasks: what becomes a sample, how it is put to the model, and by which rules it is scored."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from environments import aime, math500, svamp
from ludic.rollout.problems import rules_of
from ludic.task.environment import Environment

SVAMP_ROW = {"Body": "Each pack costs 76 dollars", "Question": "How much are two? ", "Answer": "152.0", "Type": "x"}
MATH_ROW = {"problem": "Convert $(0,3)$ to polar coordinates.", "answer": r"\left( 3, \frac{\pi}{2} \right)"}
AIME_ROW = {"problem": "Find $m+n$.", "solution": "...", "answer": "073"}
TASKS: dict[str, tuple[Any, type[Any], str, dict[str, str]]] = {
    "svamp": (svamp, svamp.SVAMP, "test", SVAMP_ROW),
    "math500": (math500, math500.MATH500, "test", MATH_ROW),
    "aime": (aime, aime.AIME, "train", AIME_ROW),
}


@pytest.mark.parametrize(
    ("name", "question", "target"),
    [
        ("svamp", "Each pack costs 76 dollars How much are two?", "152.0"),
        ("math500", "Convert $(0,3)$ to polar coordinates.", r"\left( 3, \frac{\pi}{2} \right)"),
        ("aime", "Find $m+n$.", "073"),
    ],
)
def test_a_row_of_a_file_becomes_a_question_and_a_target(name: str, question: str, target: str, tmp_path: Path) -> None:
    module, environment, split, row = TASKS[name]
    (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = module.load(split, dataset=tmp_path)
    made: Environment[Any] = environment()
    assert (sample.question, made.target(sample)) == (question, target)
    system, asked = made.messages(sample)
    assert (system["role"], asked) == ("system", {"role": "user", "content": question})
    assert environment(system_prompt="").messages(sample) == [asked]


@pytest.mark.parametrize("name", TASKS)
def test_a_field_that_is_missing_or_is_no_text_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    module, _, split, row = TASKS[name]
    path = tmp_path / "rows.jsonl"
    field = "Answer" if name == "svamp" else "answer"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, field: 7}) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: `{field}` must be a string, not int 7"):
        module.load(split, dataset=path)
    path.write_text(json.dumps({key: value for key, value in row.items() if key != field}) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: no `{field}`"):
        module.load(split, dataset=path)


@pytest.mark.parametrize(
    ("name", "hub_id"), [("svamp", "ChilleD/SVAMP"), ("math500", "HuggingFaceH4/MATH-500"), ("aime", "HuggingFaceH4/aime_2024")]
)  # fmt: skip
def test_without_a_dataset_the_hub_is_asked_for_a_split_that_it_has(
    name: str, hub_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, split, row = TASKS[name]
    asked = []

    def load_dataset(*given: object, split: str) -> list[dict[str, str]]:
        asked.append((*given, split))
        return [row]

    datasets = types.ModuleType("datasets")
    vars(datasets)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    said: list[str] = []
    assert len(module.load(split, say=said.append)) == 1
    assert asked == [(hub_id, None, split)] and said == [f"1 problems in {hub_id} (hub)"]


@pytest.mark.parametrize(
    ("name", "text", "verdicts"),
    [
        ("svamp", r"So \boxed{152}.", {"flexible": 1, "strict": 1}),
        ("svamp", "It is 152 dollars.", {"flexible": 1, "strict": 0}),
        ("svamp", r"\boxed{151}, though 152", {"flexible": 0, "strict": 0}),
        ("aime", r"\boxed{73}", {"flexible": 1, "strict": 1}),
        ("aime", "nothing", {"flexible": 0, "strict": 0}),
        ("math500", r"\boxed{(3, \frac{\pi}{2})}", {"correct": 1}),
        ("math500", r"\boxed{(3, \frac{\pi}{3})}", {"correct": 0}),
        ("math500", "3, pi over 2", {"correct": 0}),
    ],
)
async def test_the_box_is_the_reward_and_a_last_number_counts_where_answers_are_numbers(
    name: str, text: str, verdicts: dict[str, int], tmp_path: Path
) -> None:
    module, environment, split, row = TASKS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = module.load(split, dataset=tmp_path / "rows.jsonl")
    made = environment()
    try:
        score = await made.score(sample, text)
    finally:
        await made.aclose()
    given = {**score.parts, "correct": score.correct}
    assert {rule: given[rule] for rule in rules_of(made)} == verdicts
    assert score.reward == float(score.correct) == verdicts.get("strict", verdicts.get("correct"))
    assert score.parts["grader_failed"] == 0.0


async def test_a_boxed_text_without_a_number_gets_no_second_answer_from_its_prose(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"problem": "?", "answer": "5"}) + "\n")
    (sample,) = math500.load(dataset=tmp_path / "rows.jsonl")
    made = math500.MATH500()
    assert not (await made.score(sample, "It is 5.")).correct
    assert made.grader.num_graded == 0
    await made.aclose()
