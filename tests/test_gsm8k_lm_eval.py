"""`--prompt-format lm-eval` against lm-evaluation-harness's own code: the same prompts, and the same verdicts on everything."""

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest

from environments import gsm8k_lm_eval
from environments.gsm8k_lm_eval import RULES, GSM8KLMEval, LMEvalSample, extract, until_stop
from ludic.rollout.problems import rules_of

yaml = pytest.importorskip("yaml")
lm_eval = pytest.importorskip("lm_eval", reason="the dependency group harness is not installed")
api_task, api_instance, models_utils = (
    pytest.importorskip(f"lm_eval.{name}") for name in ("api.task", "api.instance", "models.utils")
)

ANSWERS = ["18", "1,080", "-3", "$40", "0.5", "7.", "3.50", "100,000", "12"]
"""What follows #### in the references."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and nine test problems, some with what a template or a regular expression could trip over."""
    folder = tmp_path_factory.mktemp("data")
    odd = [
        "{{ braces }}",
        "{% raw %}",
        "a \\ backslash",
        "two\nlines ",
        " Question: inside",
        "ünïcode ½",
        "#### 5 marks",
    ]

    def row(n: int, target: str) -> dict[str, str]:
        return {
            "question": f"What is {n}? {odd[n % 7]}",
            "answer": f"It's <<{n}+1={n + 1}>>{n + 1}, $5.\n#### {target}",
        }

    splits = {
        "train": [row(n, str(n)) for n in range(12)],
        "test": [row(n + 50, answer) for n, answer in enumerate(ANSWERS)],
    }
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def harness_task(folder: Path) -> Any:
    """The harness's own task, with its own settings, on the problems of a folder."""
    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    config.pop("tag")
    task = api_task.ConfigurableTask(config=config)
    task.set_fewshot_seed(seed=1234)  # as lm_eval.simple_evaluate does
    return task


def verdicts_of_harness(task: Any, place: int, text: str) -> dict[str, tuple[str, bool]]:
    """By its filters: the answer that is found in a raw completion, and whether that is an exact match."""
    doc = task.eval_docs[place]
    request = api_instance.Instance(request_type="generate_until", doc=doc, arguments=("", {}), idx=0)
    request.resps = [models_utils.postprocess_generated_text(text, task.config.generation_kwargs["until"], None)]
    task._instances = [request]
    task.apply_filters()
    return {
        name: (found, bool(task.process_results(doc, [found])["exact_match"]))
        for name, found in request.filtered_resps.items()
    }


HOSTILE = [
    "", " ", "\x00", "no number", "18", " 18.", "18 apples", "$18", "18$", "-18", "- 18", "#### 18", "####18", "####  18",
    "#### -3", "#### 1,080", "#### 1080", "#### 1,080.", "#### $40", "#### 40", "#### 0.50", "#### .5", "#### 7", "#### 7..",
    "#### 3.5", "#### 12\n#### 18", "#### 18\nQuestion: what is 5?", "Question: 18", "18</s>5", "18<|im_end|>5", "#### 18 Q",
    "so 18, 19", "18, 19,", "18 ... ", "...", "$$", "$.,", "1.2.3", "--5", "1e5", "１８", "٣", "#### ٣", "#### １８",  # noqa: RUF001
    "\\boxed{18}", "#### \\boxed{18}", "100000", "100,000.", "#### 100.000", "[invalid]", "#### [invalid]", "#### ,", "#### .",
    "5\u20287", "\ud800 18", "\x1b[31m18\x1b[0m", "#### 18\r\n", "18-", "-$18", "$-18", "#### -", "a" * 5000 + "18", "1" * 5000,
    "#### " * 300, "Answer: 18\n\nQuestion: 1", "Questio n: 5", "question: 5 18", "</s>", "< /s>18", "#### 18#### 12", "7.",
]  # fmt: skip


def fuzzed(count: int) -> list[str]:
    draw = random.Random(7)
    pieces = [
        *"0123456789.,$-# \n",
        "#### ",
        "Question:",
        "</s>",
        "<|im_end|>",
        *ANSWERS,
        "x",
        "é",
        *string.punctuation,
    ]
    return ["".join(draw.choices(pieces, k=draw.randint(0, 14))) for _ in range(count)]


def test_the_prompts_are_the_harnesss_own_with_its_seed_and_its_solved_problems(dataset: Path) -> None:
    for num_few_shot in (5, 0, 2):
        task = harness_task(dataset)
        theirs = [task.fewshot_context(doc, num_few_shot) for doc in task.eval_docs]
        samples = gsm8k_lm_eval.load(dataset=dataset, num_few_shot=num_few_shot)
        assert [sample.prompt for sample in samples] == theirs
        assert len(set(theirs)) == len(ANSWERS)
        fewer = gsm8k_lm_eval.load(dataset=dataset, limit=4, num_few_shot=num_few_shot)
        assert fewer == samples[:4]


async def test_every_hostile_completion_gets_the_verdicts_and_the_answers_of_the_harness(dataset: Path) -> None:
    task, environment = harness_task(dataset), GSM8KLMEval()
    samples = gsm8k_lm_eval.load(dataset=dataset)
    seen: dict[str, set[bool]] = {rule: set() for rule in RULES}
    for place, sample in enumerate(samples):
        for text in [*HOSTILE, *fuzzed(400), sample.answer, f"#### {ANSWERS[place]}", ANSWERS[place]]:
            theirs = verdicts_of_harness(task, place, text)
            score = await environment.score(sample, text)
            ours = {rule: (extract(rule, text), bool(score.parts[rule])) for rule in RULES}
            assert ours == theirs, (sample.target, text)
            assert score.correct == theirs["strict-match"][1]
            for rule, (_, right) in theirs.items():
                seen[rule].add(right)
    assert all(verdicts == {True, False} for verdicts in seen.values())


def test_the_names_and_the_texts_are_those_of_the_harnesss_file() -> None:
    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
    patterns = {one["name"]: one["filter"][0]["regex_pattern"] for one in config["filter_list"]}
    assert {rule: pattern.pattern for rule, pattern in RULES.items()} == patterns
    assert list(gsm8k_lm_eval.STOPS) == config["generation_kwargs"]["until"]
    assert config["num_fewshot"] == gsm8k_lm_eval.NUM_FEW_SHOT
    assert rules_of(GSM8KLMEval()) == tuple(RULES)


def test_a_completion_is_cut_at_the_first_stop_text() -> None:
    assert until_stop("a</s>b Question: c") == "a"
    assert until_stop("a Question: b</s>c") == "a "


def test_problems_that_are_evaluated_are_never_solved_in_the_prompt(dataset: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):  # the same problems twice, but for three
        rows = (dataset / "test.jsonl").read_text().splitlines(keepends=True)
        more = (dataset / "train.jsonl").read_text().splitlines(keepends=True)[: 3 if split == "train" else 0]
        (tmp_path / f"{split}.jsonl").write_text("".join([*rows, *more]))
    samples: list[LMEvalSample] = gsm8k_lm_eval.load(dataset=tmp_path, num_few_shot=3)
    for sample in samples:
        assert sum(sample.prompt.count(other.question) for other in samples) == 1
    with pytest.raises(ValueError, match=r"--few-shot 5 needs as many training problems .* there are 3: give a folder"):
        gsm8k_lm_eval.load(dataset=tmp_path)
    with pytest.raises(ValueError, match="evaluates GSM8K's split test, not train"):
        gsm8k_lm_eval.load("train", dataset=dataset)
