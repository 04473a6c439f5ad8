"""The recipe of examples/gsm8k/record.py: which problems it takes, where it stops, and its three phases end to end."""

import asyncio
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from environments.gsm8k import load

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "gsm8k"
SMALL = (
    "--rollouts-per-update 16 --group-size 8 --max-seq-len 160 --max-tokens 16 --micro-token-budget 640 "
    "--max-staleness 0 --lr 3e-3 --train-steps {}"
)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("record")


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Two of three training problems have few calculations; every answer is 7."""
    folder = tmp_path / "problems"
    folder.mkdir()
    for split, count in (("train", 18), ("test", 20)):
        rows = [
            {
                "question": f"{split} question {number}: which one?",
                "answer": "\n".join(["3+4=<<3+4=7>>7"] * (1 if number % 3 else 4)) + "\n#### 7",
            }
            for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


async def call(record: ModuleType, policy: Path, problems: Path, out: Path, *more: str, steps: int) -> None:
    """The script's own `main`, in this process, which has imported everything."""
    words = ["--engine", "local", "--model", str(policy), "--dataset", str(problems), "--out-dir", str(out)]
    words += ["--epochs", "1", "--warm-up-batch", "8", "--warm-up-lr", "1e-4", "--limit", "16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["record.py", *words, "--train-args", SMALL.format(steps), *more])
        assert await record.main() == 0


def parse(record: ModuleType, *words: str) -> Any:
    return record.build_parser().parse_args(words)


def test_grpo_trains_on_problems_of_few_calculations(record: ModuleType, problems: Path) -> None:
    chosen = record.grpo_problems(parse(record, "--dataset", str(problems), "--max-calculations", "3"))
    assert [one.question.split()[2] for one in chosen] == [f"{number}:" for number in range(18) if number % 3]


def test_a_test_problem_in_the_training_split_is_refused(record: ModuleType, problems: Path) -> None:
    with (problems / "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": load("test", dataset=problems)[3].question, "answer": "#### 7"}) + "\n")
    with pytest.raises(ValueError, match="1 test problems stand in the training split, one is 'test question 3"):
        record.grpo_problems(parse(record, "--dataset", str(problems)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--phases", "warm_up,train"], "there is no train, only warm_up, grpo, score"),
        (["--grpo-seconds", "0"], "--grpo-seconds must be above 0, not 0"),
        (["--max-calculations", "0"], "--max-calculations must be above 0"),
        (["--train-args", "--group-size 7"], "group-size"),
    ],
)
def test_a_wrong_flag_is_one_line(
    record: ModuleType, problems: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        record.prepare(parse(record, "--dataset", str(problems), "--out-dir", str(tmp_path / "out"), *words))


async def test_training_is_stopped_at_the_end_of_the_update_that_crosses_the_deadline(
    record: ModuleType, tmp_path: Path
) -> None:
    metrics, ended = tmp_path / "metrics.jsonl", list[int]()
    crosses = asyncio.Event()

    async def training() -> None:
        for step in range(3):
            if step == 1:
                await asyncio.wait_for(crosses.wait(), 60)
            with metrics.open("a") as file:
                file.write(f"{step}\n")
            ended.append(step)
            await asyncio.sleep(0 if step == 0 else 60)  # the next update takes long

    asyncio.get_running_loop().call_later(0.3, crosses.set)
    assert await record.until(0.1, metrics, training())
    assert ended == [0, 1]


async def test_training_that_ends_before_its_deadline_or_by_another_hand_was_not_stopped(
    record: ModuleType, tmp_path: Path
) -> None:
    async def short() -> None:
        await asyncio.sleep(0)

    assert not await record.until(60, tmp_path / "metrics.jsonl", short())
    assert not await record.until(None, tmp_path / "metrics.jsonl", short())
    waiting = asyncio.ensure_future(record.until(60, tmp_path / "metrics.jsonl", asyncio.sleep(60)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_all_phases_make_an_entry_that_a_second_scoring_repeats_and_a_seed_with_a_deadline_joins(
    record: ModuleType, digit_policy_dir: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    await call(record, digit_policy_dir, problems, out, steps=2)
    printed = capsys.readouterr().out
    first = json.loads((out / "seed_0" / "entry.json").read_text())
    assert first["updates"] == first["syncs"]["proven"] == 2 and first["rollouts"] == 32
    assert first["warm_up"]["problems"] == 12 and first["num_problems"] == 16  # six answers are longer than 16 tokens
    assert not first["stopped_at_a_deadline"] and first["seconds_from_warm_up_to_accuracy"] > 0
    assert [point["rollouts"] for point in first["curve"]] == [16, 32]
    assert f"| 0 | {100 * first['before']['strict']['accuracy']:.1f} (" in printed

    (out / "seed_0" / "entry.json").unlink()
    made = (out / "warm_up.json").stat().st_mtime_ns
    await call(record, digit_policy_dir, problems, out, "--phases", "score", steps=2)
    again = json.loads((out / "seed_0" / "entry.json").read_text())
    assert again["after"]["strict"] == first["after"]["strict"] and again["paired"] == first["paired"]

    flags = ["--seeds", "1", "--grpo-seconds", "0.01"]
    await call(record, digit_policy_dir, problems, out, *flags, steps=500)
    assert (out / "warm_up.json").stat().st_mtime_ns == made, "a warm-up that is there is not made again"
    second = json.loads((out / "seed_1" / "entry.json").read_text())
    assert second["stopped_at_a_deadline"] and 1 <= second["updates"] < 500
    assert Path(second["checkpoint"]).name == f"step_{second['updates']}"

    # What is there is not passed off as the result of other flags.
    for other, message in (
        (["--epochs", "2"], "was made with epochs 1.0, not 2.0"),
        (["--max-calculations", "4"], "has a record on other problems"),
        (["--seeds", "0"], "seed 0 in .* was made with other flags of GRPO"),
    ):
        with pytest.raises(ValueError, match=message):
            await call(record, digit_policy_dir, problems, out, *other, steps=500)
    capsys.readouterr()
    await call(record, digit_policy_dir, problems, out, "--seeds", "0", steps=2)
    assert "seed 0: GRPO was made already" in capsys.readouterr().out
