import builtins
import json
import sys
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from environments.gsm8k import DEFAULT_SYSTEM_PROMPT, GSM8K, GSM8KSample, load
from ludic.task.environment import Environment
from ludic.task.grading import Grader, Verdict

ROWS = [
    {"question": "How many eggs?", "answer": "16 - 3 - 4 = <<16-3-4=9>>9\n#### 9"},
    {"question": "How many dollars?", "answer": "9 * 2 = <<9*2=18>>18\n#### 1,080"},
    {"question": "How cold?", "answer": "Below zero.\n#### -10"},
]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(target: str) -> GSM8KSample:
    return GSM8KSample(question="How many?", answer=f"#### {target}", target=target)


@pytest.fixture
async def environment() -> AsyncIterator[GSM8K]:
    made = GSM8K()
    yield made
    await made.aclose()


def test_the_target_is_what_follows_the_hashes(tmp_path: Path) -> None:
    samples = load("train", dataset=write_jsonl(tmp_path / "some.jsonl", ROWS))
    assert [s.target for s in samples] == ["9", "1,080", "-10"]
    assert samples[0] == GSM8KSample(question=ROWS[0]["question"], answer=ROWS[0]["answer"], target="9")


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "test.jsonl", ROWS[1:])
    assert [s.target for s in load("train", dataset=tmp_path)] == ["9"]
    assert [s.target for s in load("test", dataset=str(tmp_path))] == ["1,080", "-10"]


def test_limit_takes_the_first_and_a_seed_shuffles_before_that(tmp_path: Path) -> None:
    rows = [{"question": f"Question {i}?", "answer": f"#### {i}"} for i in range(50)]
    path = write_jsonl(tmp_path / "test.jsonl", rows)
    assert [s.target for s in load("test", dataset=path, limit=3)] == ["0", "1", "2"]
    shuffled = [s.target for s in load("test", dataset=path, seed=1)]
    assert shuffled != [str(i) for i in range(50)]
    assert sorted(shuffled, key=int) == [str(i) for i in range(50)]
    assert [s.target for s in load("test", dataset=path, limit=5, seed=1)] == shuffled[:5]
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        load("test", dataset=path, limit=0)


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path: Path) -> None:
    row = {"question": "One\u2028two?", "answer": "#### 3"}
    path = tmp_path / "test.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n\n")
    assert [s.question for s in load("test", dataset=path)] == ["One\u2028two?"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "a", ', r"not JSON \(.* at column \d+\)"),
        (b"[" * 100_000, r"not a row \(nested too deeply\)"),
        (b'{"question": "\xff", "answer": "#### 1"}', r"not UTF-8 \(invalid start byte at byte 14\)"),
        (b"[1]", r"a row must be an object with `question` and `answer`, not list \[1\]"),
        (b'{"answer": "#### 1"}', "no `question`"),
        (b'{"question": "a"}', "no `answer`"),
        (b'{"question": 1, "answer": "#### 1"}', "`question` must be a string, not int 1"),
        (b'{"question": "a", "answer": null}', "`answer` must be a string, not null"),
        (b'{"question": " ", "answer": "#### 1"}', "`question` is empty"),
        (b'{"question": "a", "answer": "1"}', "no `####` before the final answer in `answer`"),
        (b'{"question": "a", "answer": "so #### "}', "nothing after `####` in `answer`"),
        (b'{"question": "\\ud800", "answer": "#### 1"}', "`question` holds half a surrogate pair at character 0"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "#### 1"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"^.*test\.jsonl:3: {reason}$") as caught:
        load("test", dataset=path)
    assert "\n" not in str(caught.value)


def test_data_that_is_not_there_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist; --dataset takes"):
        load("test", dataset=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no test\.jsonl"):
        load("test", dataset=tmp_path)
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds no rows for the split 'test'"):
        load("test", dataset=tmp_path)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., object]) -> None:
    module = types.ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_without_a_dataset_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str, *, split: str) -> list[dict[str, str]]:
        assert (name, config, split) == ("openai/gsm8k", "main", "test")
        return ROWS

    fake_datasets(monkeypatch, load_dataset)
    assert [s.target for s in load("test", limit=2)] == ["9", "1,080"]


def test_a_hub_out_of_reach_points_at_the_local_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> object:
        raise ConnectionError("Couldn't reach the Hub\nmany more lines")

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(ValueError, match=r"^cannot load .* \(Couldn't reach the Hub\); .* --dataset$"):
        load("test")


def test_a_missing_datasets_package_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_datasets(name: str, *args: object) -> object:
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return real_import(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ValueError, match=r"needs the package datasets: run `uv sync --extra examples`, .*--dataset$"):
        load("train")


def test_csv_files_are_read_where_there_is_no_jsonl(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "test-00000.csv").write_text('question,answer\nHow many?,"so\n#### 18"\nWhat?,18\n')
    with pytest.raises(ValueError, match=r"test-00000\.csv:2: no `####`"):
        load("test", dataset=tmp_path)


def write_table(path: Path, *rows: dict[str, str]) -> Path:
    from datasets import Dataset  # not in the environment of the tests marked `vllm`, which collect this file too

    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(list(rows))
    table.to_csv(path) if path.suffix == ".csv" else table.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_clone_of_the_hubs_data_set_is_read_once(tmp_path: Path, suffix: str) -> None:
    for folder in ("main", "socratic"):
        write_table(tmp_path / folder / f"train-00000-of-00001{suffix}", ROWS[0])
        write_table(tmp_path / folder / f"test-00000-of-00002{suffix}", ROWS[1])
        write_table(tmp_path / folder / f"test-00001-of-00002{suffix}", ROWS[2])
    write_table(tmp_path / "main" / ".ipynb_checkpoints" / f"test-00000-of-00002{suffix}", ROWS[1])
    write_table(tmp_path / f"training_args{suffix}", {"learning_rate": "1e-6"})
    write_table(tmp_path / f"test_predictions{suffix}", {"prediction": "9"})
    assert [s.target for s in load("train", dataset=tmp_path)] == ["9"]
    assert [s.target for s in load("test", dataset=tmp_path)] == ["1,080", "-10"]
    assert [s.target for s in load("test", dataset=tmp_path / "socratic")] == ["1,080", "-10"]


def test_several_folders_without_main_are_refused(tmp_path: Path) -> None:
    for folder in ("socratic", "platinum"):
        write_table(tmp_path / folder / "test.parquet", ROWS[0])
    with pytest.raises(ValueError, match=r"several folders \(platinum/, socratic/\): give one of them to --dataset$"):
        load("test", dataset=tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_single_table_is_read_and_a_broken_one_is_named(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"problems{suffix}", *ROWS)
    assert [s.target for s in load("train", dataset=path)] == ["9", "1,080", "-10"]
    path.write_bytes(b'question,answer\n"a","#### 1"\n"unclosed')
    with pytest.raises(ValueError, match=rf"problems\{suffix}: not a \w+ file that can be read \(.+\)$"):
        load("train", dataset=path)


@pytest.mark.parametrize("after", [" 18\nThat is all.", "18\r\n", "\n\n 18 \u2028and more"])
def test_the_target_is_one_line(tmp_path: Path, after: str) -> None:
    path = write_jsonl(tmp_path / "some.jsonl", [{"question": "How many?", "answer": f"9 * 2\n####{after}"}])
    assert [s.target for s in load("train", dataset=path)] == ["18"]


def test_what_was_read_is_said_with_questions_that_are_repeated(tmp_path: Path) -> None:
    said: list[str] = []
    for name, rows in (("train-00000-of-00002.csv", ROWS), ("train-00001-of-00002.csv", [*ROWS[:2], ROWS[1]])):
        write_table(tmp_path / name, *rows)
    first = tmp_path / "train-00000-of-00002.csv"
    assert len(load("train", dataset=tmp_path, say=said.append)) == 6
    assert said.pop(0) == f"6 problems in {first} and 1 more beside it"
    assert said == [
        "warning: 3 of these problems repeat the question of another (one is there 3 times: 'How many dollars?'), "
        "and count again: intervals are too narrow"
    ]
    said.clear()
    load("train", dataset=tmp_path, limit=3, say=said.append)
    assert said == [f"3 problems of the 6 in {first} and 1 more beside it"]
    said.clear()
    load("train", dataset=write_jsonl(tmp_path / "p.jsonl", [ROWS[0], ROWS[0] | {"question": " How many eggs?\n"}]),
         say=said.append)  # fmt: skip
    assert said[0] == f"2 problems in {tmp_path / 'p.jsonl'}" and said[1].startswith("warning: 1 of these")


@pytest.mark.parametrize("number", ["7" * 5_000, "-0." + "3" * 5_000, "1" + ",000" * 1_500])
async def test_a_number_of_thousands_of_digits_is_one_line_as_a_target_and_graded_as_wrong(
    environment: GSM8K, tmp_path: Path, number: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "some.jsonl", tmp_path / "some.csv", tmp_path / "some.parquet"):
        rows = [ROWS[0], {"question": number, "answer": f"#### {number}"}]
        write_jsonl(path, rows) if path.suffix == ".jsonl" else write_table(path, *rows)
        said: list[str] = []
        assert load("train", dataset=path, say=said.append)[1] == GSM8KSample(
            question=number, answer=f"#### {number}", target=number
        )
        assert said[1:] == [
            "warning: 1 of these problems have a target of more than 2000 characters, which is not graded: "
            "every answer to them counts as wrong"
        ]
        said.clear()
        load("train", dataset=path, limit=1, say=said.append)
        assert len(said) == 1
    for text in (
        number,
        rf"\boxed{{{number}}}",
        rf"\boxed{{\frac{{{number}}}{{3}}}}",
        rf"1e{number}",
        r"\boxed{7^{9000}}",
    ):
        for target in ("18", "7" * 1_999, r"\frac{1}{3}", number):
            score = await environment.score(sample(target), text)
            assert score.reward == score.parts["strict"] == score.parts["flexible"] == 0
    assert "Traceback" not in capfd.readouterr().err


def test_an_empty_system_prompt_is_left_out() -> None:
    question = {"role": "user", "content": "How many?"}
    assert GSM8K(system_prompt="").messages(sample("18")) == [question]
    assert GSM8K().messages(sample("18")) == [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}, question]


def test_it_is_an_environment() -> None:
    environment: Environment[GSM8KSample] = GSM8K()
    assert environment.target(sample("1,080")) == "1,080"


@pytest.mark.parametrize(
    ("text", "target", "strict", "flexible", "qwen"),
    [
        (r"It is \boxed{18}.", "18", 1, 1, 1),
        (r"It is \boxed{\$18.00}.", "18", 1, 1, 0),  # The last run of digits is 00.
        (r"So \boxed{18}, from 9 * 2", "18", 1, 1, 0),
        ("It is $18.", "18", 0, 1, 1),
        (r"\boxed{17}, though 18", "18", 0, 0, 1),
        (r"\boxed{18", "18", 0, 1, 1),
        ("I give up", "18", 0, 0, 0),
        ("", "18", 0, 0, 0),
        # Qwen's rule takes the target by its last run of digits too: 2,125 is 125, and 1,080 no number at all.
        (r"\boxed{2,125}", "2,125", 1, 1, 1),
        (r"\boxed{2125}", "2,125", 1, 1, 0),
        (r"\boxed{7,125}", "2,125", 0, 0, 1),
        (r"\boxed{276,000}", "276,000", 1, 1, 1),
        (r"\boxed{0}", "276,000", 0, 0, 1),
        (r"\boxed{1080}", "1,080", 1, 1, 0),
        (r"\boxed{1,080}", "1,080", 1, 1, 0),
        (r"\boxed{-10}", "-10", 1, 1, 1),
        (r"\boxed{10}", "-10", 0, 0, 1),
        ("It is 3.50", "50", 0, 0, 1),
        ("It is 018", "18", 0, 1, 0),
        (r"\boxed{18\%}", "18", 1, 1, 1),
        (r"\boxed{18}, inside \boxed{...} as asked", "18", 1, 1, 1),
        (r"<think>\boxed{17}</think> So it is 18.", "18", 0, 1, 1),
        ("\u0661\u0668", "18", 0, 0, 0),
    ],
)
async def test_three_rules_are_reported_and_the_strict_one_is_the_reward(
    environment: GSM8K, text: str, target: str, strict: int, flexible: int, qwen: int
) -> None:
    score = await environment.score(sample(target), text)
    failures = {"grader_failed": 0.0, "grader_timeout": 0.0}
    assert score.parts == {"strict": strict, "flexible": flexible, "qwen": qwen, **failures}
    assert (score.reward, score.correct) == (float(strict), bool(strict))
    assert (score.parse.answer is None) == ("boxed" not in text or text.endswith("{18") or "</think>" in text)


async def test_an_answer_is_graded_once_for_both_rules(environment: GSM8K) -> None:
    await environment.score(sample("18"), r"\boxed{18}")
    await environment.score(sample("18"), "no box, 18")
    assert environment.grader.num_graded == 2
    await environment.score(sample("18"), "nothing")
    assert environment.grader.num_graded == 2


@pytest.mark.parametrize(
    ("answer", "failed", "timeout"),
    [
        ("1" * 3_000, 1, 0),
        ("9^{9^{9}}", 1, 0),
        (r"\int_0^9 \frac{x^{99} \sin(x^3) e^{x^2}}{\sqrt{x^5 + 9}} dx", 1, 1),
        ("17", 0, 0),
    ],
)
async def test_an_answer_that_the_grader_gave_up_on_is_told_apart_and_a_time_out_from_the_rest(
    answer: str, failed: int, timeout: int
) -> None:
    grader = Grader(num_workers=1, timeout_s=0.5)
    score = await GSM8K(grader=grader).score(sample("18"), rf"\boxed{{{answer}}}")
    await grader.aclose()
    assert (score.reward, score.parts["grader_failed"], score.parts["grader_timeout"]) == (0.0, failed, timeout)


async def test_a_grader_that_was_handed_in_is_left_open() -> None:
    class Recorder(Grader):
        closed = False

        def close(self) -> None:
            self.closed = True
            super().close()

    grader = Recorder()
    await GSM8K(grader=grader).aclose()
    assert not grader.closed
    assert await grader.match("18", "18") == Verdict(matched=True)
    grader.close()
