"""The demo's parts: right problems, splits that share nothing, a tokenizer that survives its folder, equal seeds equal files.

That the demo learns is tested where the training script is run.
"""

import importlib.util
import itertools
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from environments.gsm8k import GSM8K, GSM8KSample, load
from ludic.rollout.local import LocalEngine
from ludic.task.prompts import encode_prompt
from ludic.types import SamplingParams


def _load_demo() -> ModuleType:
    """`examples` is no package: the script's folder is on the path only while the script runs."""
    path = Path(__file__).parents[1] / "examples" / "gsm8k" / "demo.py"
    spec = importlib.util.spec_from_file_location("gsm8k_demo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


demo = _load_demo()
SIZES = {"num_train": 200, "num_test": 60, "num_warm_start": 160}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo.build_demo(folder, seed=3, **SIZES)
    return folder


def _draw(num: int, seed: int = 0) -> list[demo.Problem]:  # type: ignore[name-defined]
    return list(itertools.islice(demo.problems(random.Random(seed)), num))


def test_every_step_is_right_and_uses_only_numbers_that_are_known_by_then() -> None:
    for problem in _draw(3000):
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        for step, result in zip(problem.steps, problem.results, strict=True):
            match = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step)
            assert match is not None, step
            left, right = int(match[1]), int(match[3])
            assert {left, right} <= known, (problem.question, step)
            assert {"+": left + right, "-": left - right, "*": left * right}[match[2]] == int(match[4]) == result
            assert 1 <= result <= 99
            known.add(result)
        target = problem.row["answer"].split("#### ")
        assert target == ["".join(f"{step}\n" for step in problem.steps), str(problem.results[-1])]


def test_every_number_of_a_question_is_needed() -> None:
    for problem in _draw(3000, seed=1):
        used = {number for step in problem.steps for number in re.findall(r"\d+", step)}
        assert set(re.findall(r"\d+", problem.question)) <= used, problem


def test_problems_of_one_two_and_three_steps_all_occur_with_every_kind_and_wording() -> None:
    drawn = _draw(3000, seed=2)
    assert {len(problem.steps) for problem in drawn} == {1, 2, 3}
    assert {problem.key[0] for problem in drawn} == set(range(len(demo._KINDS)))
    assert not any("{" in problem.question for problem in drawn)


def test_no_held_out_problem_is_in_another_split_even_in_other_words() -> None:
    splits = demo.draw_problems(5, num_train=2000, num_test=256, num_warm_start=4000)
    held_out = {problem.key for problem in splits.test}
    others = [*splits.train, *splits.warm_start]
    assert len(held_out) == 256 and (len(splits.train), len(splits.warm_start)) == (2000, 4000)
    assert not held_out & {problem.key for problem in others}
    questions = [problem.question for problem in [*splits.test, *others]]
    assert len(set(questions)) == len(questions)


def test_students_finish_every_problem_of_one_step_and_the_stated_share_of_the_others() -> None:
    rng, finished, several = random.Random(0), 0, 0
    for problem in _draw(4000):
        solution = demo.student_solution(problem, rng)
        right = solution.endswith(f"\\boxed{{{problem.results[-1]}}}") and solution == problem.solution()
        if len(problem.steps) == 1:
            assert right
        else:
            finished, several = finished + right, several + 1
            assert right or solution == problem.solution(1)
    assert finished / several == pytest.approx(demo.FINISHED_SHARE, abs=0.04)


def test_the_folder_is_an_ordinary_one_and_its_tokenizer_writes_any_text(built: Path) -> None:
    # AutoTokenizer replaces the tokenizer of some model types with its own: it must be ours that comes back.
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    assert tokenizer.tokenize("8-3=15\n\\boxed{15}") == ["8", "-", "3", "=", "1", "5", "Ċ", "\\boxed{", "1", "5", "}"]
    for text in ["5+17=22\n\\boxed{22}", "Ada has 12 red ünïcode books 🎲.", " two  spaces\n\nand lines "]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and all(0 <= i < len(tokenizer) for i in ids)
    model = AutoModelForCausalLM.from_pretrained(built / "model")
    assert model.config.vocab_size == len(tokenizer) and model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_warm_start_sees_prompts_exactly_as_the_environment_puts_them(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    environment = GSM8K(system_prompt=demo.DEMO_FLAGS["--system-prompt"])
    problems = _draw(20)
    shown = [messages for messages, _ in demo.student_examples(problems, seed=0)]
    samples = [GSM8KSample(question=problem.question, answer="", target="") for problem in problems]
    assert shown == [environment.messages(sample) for sample in samples]
    assert encode_prompt(tokenizer, shown[0])[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_prompt_and_full_solution_fit_the_demos_limits(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    for problem in _draw(1000):
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": problem.question}])
        solution = tokenizer(problem.solution() + "<|end|>")["input_ids"]
        assert len(solution) <= int(demo.DEMO_FLAGS["--max-tokens"])
        assert len(prompt) + int(demo.DEMO_FLAGS["--max-tokens"]) <= int(demo.DEMO_FLAGS["--max-seq-len"])


async def test_the_environment_scores_a_finished_solution_right_and_a_hasty_one_wrong(built: Path) -> None:
    environment = GSM8K(system_prompt="")
    samples = load("test", dataset=built)
    assert len(samples) == SIZES["num_test"]
    for sample in samples[:20]:
        steps = sample.answer.split("\n")[:-1]
        results = [step.split("=")[1] for step in steps]
        score = await environment.score(sample, "\n".join([*steps, f"\\boxed{{{sample.target}}}"]))
        assert score.correct and score.reward == 1.0
        if results[0] != sample.target:
            hasty = await environment.score(sample, f"{steps[0]}\n\\boxed{{{results[0]}}}")
            assert not hasty.correct and hasty.reward == 0.0
    await environment.aclose()


def test_the_same_seed_writes_the_same_files_and_another_seed_others(built: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 3), ("other", 4)):
        demo.build_demo(tmp_path / name, seed=seed, **SIZES)
    for file in ("train.jsonl", "test.jsonl", "model/tokenizer.json", "model/model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (built / file).read_bytes(), file
    for file in ("train.jsonl", "test.jsonl", "model/model.safetensors"):
        assert (tmp_path / "other" / file).read_bytes() != (built / file).read_bytes(), file


async def test_the_engine_decodes_from_the_folder(built: Path) -> None:
    engine = LocalEngine.from_pretrained(built / "model")
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    question = json.loads((built / "test.jsonl").read_text().splitlines()[0])["question"]
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}])
    completions = await engine.generate(prompt, num_completions=3, sampling=SamplingParams(max_tokens=40, seed=0))
    await engine.aclose()
    for completion in completions:
        assert (completion.token_ids[-1] == tokenizer.eos_token_id) == (completion.finish_reason == "stop")
