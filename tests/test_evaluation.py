"""Evaluation: its figures against hand-made cases, its limits, and what is left of it when it fails."""

import asyncio
import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ludic.rollout.engine import Policy, WeightSyncReport
from ludic.rollout.evaluation import EvaluationProgress, evaluate
from ludic.rollout.intervals import clustered_interval, pass_at_k, wilson_interval
from ludic.rollout.problems import read_records
from ludic.storage.jsonl import JsonlWriter
from ludic.task.prompts import chat_template_fingerprint, decode_completion, encode_prompt, load_tokenizer
from ludic.types import ChatMessage, Completion, ParseResult, SamplingParams, Score
from tests.vllm_helpers import make_tiny_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


class StubEngine:
    """Answers every prompt with what `answer` says, after one turn of the event loop, and keeps count."""

    policy_version = 3
    overlaps_training = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answer: Callable[[str, int], str]) -> None:
        self.tokenizer, self.answer = tokenizer, answer
        self.calls: list[tuple[str, int, SamplingParams]] = []
        self.in_flight = self.most_in_flight = 0

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        question = decode_completion(self.tokenizer, prompt_token_ids)
        self.calls.append((question, num_completions, sampling))
        self.in_flight += num_completions
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0)
        texts = [self.answer(question, member) for member in range(num_completions)]
        self.in_flight -= num_completions
        return [self._completion(text, sampling.max_tokens) for text in texts]

    def _completion(self, text: str, max_tokens: int) -> Completion:
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        stopped = len(ids) <= max_tokens
        return Completion(
            token_ids=ids[:max_tokens],
            logprobs=None,
            finish_reason="stop" if stopped else "length",
            policy_version=self.policy_version,
        )

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        raise AssertionError("evaluation never updates weights")

    def counts(self) -> dict[str, float]:
        return {}

    async def aclose(self) -> None:
        raise AssertionError("evaluation does not close what it did not open")


class Addition:
    """`2+3`: right when the text is the sum. Three rules that differ: any mention, a box, the last digit."""

    rules: tuple[str, ...] = ("flexible", "strict", "qwen")

    def messages(self, sample: str, /) -> list[ChatMessage]:
        return [{"role": "user", "content": sample}]

    def target(self, sample: str, /) -> str:
        return str(eval(sample))

    async def score(self, sample: str, text: str, /) -> Score:
        target = self.target(sample)
        strict, flexible = text == f"[{target}]", target in text
        parse = ParseResult(answer=text) if text else ParseResult(error="empty")
        parts = {
            "strict": float(strict),
            "flexible": float(flexible),
            "qwen": float(text.endswith(target)),
            "grader_failed": float(text == "hostile"),
        }
        return Score(reward=float(strict), correct=strict, parse=parse, parts=parts)


class OneRule:
    """The same without named rules."""

    def messages(self, sample: str, /) -> list[ChatMessage]:
        return Addition().messages(sample)

    def target(self, sample: str, /) -> str:
        return Addition().target(sample)

    async def score(self, sample: str, text: str, /) -> Score:
        return Score(reward=0.0, correct=text == self.target(sample), parse=ParseResult(answer=text))


SUMS = ["1+1", "2+2", "3+3", "4+4"]


def scripted(answers: dict[str, list[str]]) -> Callable[[str, int], str]:
    return lambda question, member: answers[question][member]


async def test_every_figure_agrees_with_a_case_counted_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = {"1+1": ["[2]"], "2+2": ["so 4"], "3+3": ["6 or no"], "4+4": [""]}
    engine = StubEngine(tokenizer, scripted(answers))
    result = await evaluate(engine, Addition(), SUMS, tokenizer=tokenizer, sampling=GREEDY)
    assert (result.num_problems, result.num_completions) == (4, 4)
    assert {rule: figure.accuracy for rule, figure in result.rules.items()} == {
        "flexible": 0.75,
        "strict": 0.25,
        "qwen": 0.25,
    }
    assert result.accuracy == 0.75
    assert result.accuracy_ci95 == pytest.approx(wilson_interval(0.75, 4))
    assert result.correct_rate == 0.25
    assert result.parse_err_rate == 0.25
    # Tokens are bytes here: 3 + 4 + 7 + 0, and a stop token each.
    assert (result.total_completion_tokens, result.avg_completion_length) == (18, 4.5)
    assert result.truncation_rate == 0.0
    assert result.prompt_tokens == sum(len(encode_prompt(tokenizer, Addition().messages(sample))) for sample in SUMS)
    assert result.pass_at_k == {1: 0.75}
    assert result.tokens_per_s == pytest.approx(18 / result.seconds)


async def test_an_environment_without_named_rules_has_one_its_own_verdict(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    engine = StubEngine(tokenizer, lambda question, member: "2")
    with JsonlWriter(tmp_path / "r.jsonl") as writer:
        result = await evaluate(engine, OneRule(), SUMS, tokenizer=tokenizer, sampling=GREEDY, record_writer=writer)
        records = read_records(tmp_path / "r.jsonl")
    assert result.accuracy == result.correct_rate == 0.25 and list(result.rules) == ["correct"]
    summary = result.to_summary(model="m", settings={})
    assert [name for name in summary if "accuracy" in name] == ["accuracy", "accuracy_ci95"]
    assert not {"strict", "flexible", "qwen"} & records[0]["completions"][0].keys()


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ((), r"Addition has the rules \(\): name one at least"),
        (("strict", "strict"), "each once"),
        (("strict", "answer"), "none like a field of the records .*answer"),
        (("strict", "lenient"), "no verdict of the rule 'lenient', its parts are .*: give a part, 0 or 1"),
    ],
)
async def test_rules_that_cannot_be_recorded_are_refused(
    tokenizer: PreTrainedTokenizerFast, rules: tuple[str, ...], reason: str
) -> None:
    environment = Addition()
    environment.rules = rules
    engine = StubEngine(tokenizer, lambda question, member: "2")
    with pytest.raises(ValueError, match=reason):
        await evaluate(engine, environment, SUMS, tokenizer=tokenizer, sampling=GREEDY)


async def test_truncated_answers_and_failed_graders_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = {"1+1": ["far too long"], "2+2": ["hostile"], "3+3": ["6"], "4+4": ["8"]}
    engine = StubEngine(tokenizer, scripted(answers))
    result = await evaluate(engine, Addition(), SUMS, tokenizer=tokenizer, sampling=GREEDY)
    assert (result.truncation_rate, result.grader_failures) == (0.25, 1)


async def test_several_samples_give_mean_accuracy_and_pass_at_k(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = {"1+1": ["2", "x", "x", "x"], "2+2": ["4", "4", "x", "x"], "3+3": ["x"] * 4, "4+4": ["8"] * 4}
    result = await evaluate(
        StubEngine(tokenizer, scripted(answers)),
        Addition(),
        SUMS,
        tokenizer=tokenizer,
        sampling=SamplingParams(temperature=1.0, max_tokens=8),
        samples_per_problem=4,
    )
    assert result.num_completions == 16
    assert result.accuracy == pytest.approx((0.25 + 0.5 + 0 + 1) / 4)
    # By hand, of 4 draws: one right gives k/4, two right 1 - C(2,k)/C(4,k).
    assert result.pass_at_k == pytest.approx(
        {1: 7 / 16, 2: (0.5 + 5 / 6 + 0 + 1) / 4, 3: (0.75 + 1 + 0 + 1) / 4, 4: 0.75}
    )
    # Of 4 draws: one right and three wrong that agree give 1/4, 1/4 (half of the ties) and 0; two right tie with two wrong.
    assert result.maj_at_k == pytest.approx({1: 7 / 16, 2: (1 / 4 + 1 / 2 + 0 + 1) / 4, 4: (0 + 1 / 2 + 0 + 1) / 4})
    low, high = result.accuracy_ci95
    independent = wilson_interval(result.accuracy, 16)
    assert low < independent[0] and high > independent[1]  # four problems are not sixteen


@pytest.mark.parametrize(("samples", "concurrency", "most"), [(1, 2, 2), (3, 7, 6), (5, 2, 2), (1, 100, 4)])
async def test_no_more_completions_than_allowed_are_in_flight_and_none_is_missing(
    tokenizer: PreTrainedTokenizerFast, samples: int, concurrency: int, most: int
) -> None:
    engine = StubEngine(tokenizer, lambda question, member: "1")
    result = await evaluate(
        engine,
        Addition(),
        SUMS,
        tokenizer=tokenizer,
        sampling=SamplingParams(max_tokens=4),
        samples_per_problem=samples,
        concurrency=concurrency,
    )
    assert engine.most_in_flight == most
    assert result.num_completions == samples * len(SUMS)


async def test_every_request_has_a_seed_of_its_own_that_repeats(tokenizer: PreTrainedTokenizerFast) -> None:
    async def seeds(seed: int | None) -> list[int | None]:
        engine = StubEngine(tokenizer, lambda question, member: "1")
        await evaluate(
            engine,
            Addition(),
            ["1+1", "1+1", "2+2"],
            tokenizer=tokenizer,
            sampling=SamplingParams(max_tokens=4, seed=seed),
            samples_per_problem=4,
            concurrency=2,
        )
        return [sampling.seed for _, _, sampling in engine.calls]

    first = await seeds(1)
    assert len(set(first)) == 6  # also for a question that is asked twice, and for a problem's second request
    assert sorted(map(str, first)) == sorted(map(str, await seeds(1)))
    assert not set(first) & set(await seeds(2))
    assert set(await seeds(None)) == {None}


async def test_completions_are_cut_down_to_fit_and_long_prompts_refused_before_anything_is_generated(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    engine = StubEngine(tokenizer, lambda question, member: "123456789")
    lengths = [len(encode_prompt(tokenizer, Addition().messages(sample))) for sample in ("1+1", "100+100")]
    result = await evaluate(
        engine, Addition(), ["1+1", "100+100"], tokenizer=tokenizer, sampling=GREEDY, max_seq_len=lengths[1] + 1
    )
    assert sorted(sampling.max_tokens for _, _, sampling in engine.calls) == [1, 5]
    assert result.truncation_rate == 1.0
    engine.calls.clear()
    with pytest.raises(ValueError, match=f"the prompt of problem 1 has {lengths[1]} tokens.* {lengths[1]}: raise"):
        await evaluate(
            engine, Addition(), ["1+1", "100+100"], tokenizer=tokenizer, sampling=GREEDY, max_seq_len=lengths[1]
        )
    assert engine.calls == []


async def test_records_hold_everything_and_the_summary_is_flat_json(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    engine = StubEngine(tokenizer, lambda question, member: "[2]")
    with JsonlWriter(tmp_path / "r.jsonl") as writer:
        result = await evaluate(
            engine, Addition(), ["1+1", "2+2"], tokenizer=tokenizer, sampling=GREEDY, record_writer=writer
        )
        first, second = read_records(tmp_path / "r.jsonl")  # flushed before evaluate returned
    assert first["completions"] == [
        {
            "text": "[2]",
            "num_tokens": 4,
            "finish_reason": "stop",
            "answer": "[2]",
            "parse_error": None,
            "strict": True,
            "flexible": True,
            "qwen": False,
            "correct": True,
            "grader_failed": False,
            "policy_version": 3,
        }
    ]
    assert (first["index"], first["target"]) == (0, "2")
    assert first["prompt"] == [{"role": "user", "content": "1+1"}]
    assert first["question_id"] != second["question_id"]
    summary = json.loads(json.dumps(result.to_summary(model="m", settings={"temperature": 0.0})))
    assert summary["accuracy"] == 0.5 and summary["accuracy_ci95"] == pytest.approx(list(wilson_interval(0.5, 2)))
    expected = {"model", "strict_accuracy", "strict_accuracy_ci95", "qwen_accuracy", "qwen_accuracy_ci95", "pass@1"}
    expected |= {"correct_rate", "parse_err_rate", "truncation_rate", "avg_completion_length", "seconds"}
    expected |= {"total_completion_tokens", "prompt_tokens", "tokens_per_s", "num_problems", "grader_failures"}
    assert expected <= summary.keys()
    assert summary["settings"] == {"temperature": 0.0}


async def test_a_resumed_evaluation_gives_the_figures_of_an_unbroken_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    answers = {"1+1": ["[2]"], "2+2": ["so 4"], "3+3": ["no"], "4+4": [""]}
    whole = await evaluate(
        StubEngine(tokenizer, scripted(answers)), Addition(), SUMS, tokenizer=tokenizer, sampling=GREEDY
    )
    path = tmp_path / "r.jsonl"
    with JsonlWriter(path) as writer:
        await evaluate(
            StubEngine(tokenizer, scripted(answers)),
            Addition(),
            SUMS[:2],
            tokenizer=tokenizer,
            sampling=GREEDY,
            record_writer=writer,
        )
    path.write_bytes(path.read_bytes() + b'{"index": 2, "quest')  # what a kill leaves
    engine = StubEngine(tokenizer, scripted(answers))
    with JsonlWriter(path) as writer:
        resumed = await evaluate(
            engine,
            Addition(),
            SUMS,
            tokenizer=tokenizer,
            sampling=GREEDY,
            record_writer=writer,
            done=read_records(path),
        )
    assert sorted(question for question, _, _ in engine.calls) == ["3+3", "4+4"]
    assert sorted(record["index"] for record in read_records(path)) == [0, 1, 2, 3]
    own = {"seconds", "tokens_per_s", "num_taken_over"}
    one, other = (result.to_summary(model="m", settings={}) for result in (whole, resumed))
    assert {key: one[key] for key in one if key not in own} == {key: other[key] for key in other if key not in own}
    assert resumed.num_taken_over == 2
    assert resumed.tokens_per_s == pytest.approx((3 + 1) / resumed.seconds)


@pytest.mark.parametrize("environment", [Addition(), OneRule()])
async def test_records_from_before_environments_named_their_rules_are_finished(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, environment: Addition | OneRule
) -> None:
    path = tmp_path / "r.jsonl"
    engine = StubEngine(tokenizer, lambda question, member: "2")
    with JsonlWriter(path) as writer:
        await evaluate(engine, environment, SUMS[:1], tokenizer=tokenizer, sampling=GREEDY, record_writer=writer)
    (record,) = read_records(path)
    old = {**record["completions"][0], "strict": False, "flexible": True, "qwen": True}  # whatever the environment
    path.write_text(json.dumps({**record, "completions": [old]}) + "\n")
    done = read_records(path)
    result = await evaluate(engine, environment, SUMS, tokenizer=tokenizer, sampling=GREEDY, done=done)
    assert (result.num_taken_over, result.accuracy) == (1, 0.25)


async def test_records_of_other_problems_or_other_sample_counts_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    engine = StubEngine(tokenizer, lambda question, member: "1")
    with JsonlWriter(tmp_path / "r.jsonl") as writer:
        await evaluate(engine, Addition(), SUMS, tokenizer=tokenizer, sampling=GREEDY, record_writer=writer)
    done = read_records(tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="problem 1 was made with another question"):
        await evaluate(engine, Addition(), ["1+1", "9+9"], tokenizer=tokenizer, sampling=GREEDY, done=done[:2])
    other_ids = copy.deepcopy(done[:1])
    other_ids[0]["question_id"] = "0" * 16
    with pytest.raises(ValueError, match="other token ids for the same messages"):
        await evaluate(engine, Addition(), SUMS, tokenizer=tokenizer, sampling=GREEDY, done=other_ids)
    other_ids[0]["target"] = "7"
    with pytest.raises(ValueError, match=r"another target \('7', now '2'\)"):
        await evaluate(engine, Addition(), SUMS, tokenizer=tokenizer, sampling=GREEDY, done=other_ids)
    with pytest.raises(ValueError, match="the records reach to problem 3, and only 3 problems"):
        await evaluate(engine, Addition(), SUMS[:3], tokenizer=tokenizer, sampling=GREEDY, done=done)
    environment = Addition()
    environment.rules = ("flexible", "lenient")
    with pytest.raises(ValueError, match="problem 0 has no verdict of the rule 'lenient': evaluate into another file"):
        await evaluate(engine, environment, SUMS, tokenizer=tokenizer, sampling=GREEDY, done=done)
    with pytest.raises(ValueError, match="has 1 completions, not 2"):
        await evaluate(engine, Addition(), SUMS, tokenizer=tokenizer, sampling=GREEDY, done=done, samples_per_problem=2)


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"index": 0, "prompt": [], "target": "2"}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl:1: not an evaluation record: it has no completions, prompt_tokens"):
        read_records(tmp_path / "r.jsonl")


async def test_a_failure_cancels_the_rest_comes_out_as_it_is_and_keeps_the_records(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def answer(question: str, member: int) -> str:
        if question == "3+3":
            raise ConnectionError("the server went away")
        return "1"

    engine = StubEngine(tokenizer, answer)
    with JsonlWriter(tmp_path / "r.jsonl") as writer:
        with pytest.raises(ConnectionError, match="the server went away"):
            await evaluate(
                engine,
                Addition(),
                SUMS * 50,
                tokenizer=tokenizer,
                sampling=GREEDY,
                concurrency=1,
                record_writer=writer,
            )
        # The first was finished; the second may have been in the middle of its scoring.
        assert [record["index"] for record in read_records(tmp_path / "r.jsonl")] in ([0], [0, 1])
    assert len(engine.calls) < 10  # of the 200


async def test_cancelling_keeps_the_records_that_are_finished(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    finished = asyncio.Event()

    def show(progress: EvaluationProgress) -> None:
        if progress.num_done == 2:
            finished.set()

    with JsonlWriter(tmp_path / "r.jsonl") as writer:
        task = asyncio.create_task(
            evaluate(
                StubEngine(tokenizer, lambda question, member: "1"),
                Addition(),
                SUMS * 50,
                tokenizer=tokenizer,
                sampling=GREEDY,
                concurrency=1,
                record_writer=writer,
                on_progress=show,
            )
        )
        await finished.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert 2 <= len(read_records(tmp_path / "r.jsonl")) < 200


async def test_a_disk_that_fills_up_ends_the_evaluation_with_its_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    writer = JsonlWriter("/dev/full")
    with pytest.raises(OSError, match="cannot write /dev/full: No space left on device"):
        await evaluate(
            StubEngine(tokenizer, lambda question, member: "1"),
            Addition(),
            SUMS,
            tokenizer=tokenizer,
            sampling=GREEDY,
            record_writer=writer,
        )
    with pytest.raises(OSError, match="No space left"):
        writer.close()


async def test_progress_starts_at_what_is_done_and_ends_at_all(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[EvaluationProgress] = []
    await evaluate(
        StubEngine(tokenizer, lambda question, member: "2"),
        Addition(),
        SUMS,
        tokenizer=tokenizer,
        sampling=GREEDY,
        on_progress=seen.append,
    )
    assert [progress.num_done for progress in seen] == [0, 1, 2, 3, 4]
    assert seen[-1].accuracy == 0.25 and seen[-1].completion_tokens == 8


async def test_nothing_to_evaluate_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = StubEngine(tokenizer, lambda question, member: "2")
    with pytest.raises(ValueError, match="the list of samples is empty"):
        await evaluate(engine, Addition(), [], tokenizer=tokenizer, sampling=GREEDY)
    with pytest.raises(ValueError, match="must be at least 1, not 0 and 64"):
        await evaluate(engine, Addition(), SUMS, tokenizer=tokenizer, sampling=GREEDY, samples_per_problem=0)


# -- estimators ----------------------------------------------------------------------------------------------------


def test_wilsons_interval_holds_the_rates_that_a_score_test_would_not_reject() -> None:
    """Its ends are where |observed - rate| is 1.96 standard errors of `rate`: the definition, not the closed form."""
    for right, trials in ((1, 10), (654, 1319), (9, 10)):
        for end in wilson_interval(right / trials, trials):
            error = math.sqrt(end * (1 - end) / trials)
            assert abs(right / trials - end) / error == pytest.approx(1.959964, abs=1e-5)
    assert wilson_interval(0.0, 50)[0] == 0.0 and wilson_interval(0.0, 50)[1] > 0.05
    assert wilson_interval(1.0, 50)[1] == 1.0


def test_the_clustered_interval_is_wilsons_for_one_sample_and_for_copies_of_it() -> None:
    verdicts = [[True]] * 30 + [[False]] * 70
    assert clustered_interval(verdicts) == pytest.approx(wilson_interval(0.3, 100))
    # Eight identical answers to each problem tell no more than one.
    assert clustered_interval([of_one * 8 for of_one in verdicts]) == pytest.approx(wilson_interval(0.3, 100))


def test_the_clustered_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Problems differ in difficulty: 95% intervals from 100 of them, with 4 answers each, over 2,000 repetitions."""
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.rand((2000, 100), generator=generator) ** 2  # mean 1/3
    verdicts = torch.rand((2000, 100, 4), generator=generator) < difficulty[..., None]
    intervals = [clustered_interval(repetition) for repetition in verdicts.tolist()]
    coverage = sum(low <= 1 / 3 <= high for low, high in intervals) / len(intervals)
    assert 0.935 < coverage < 0.965
    naive = [wilson_interval(float(repetition.float().mean()), 400) for repetition in verdicts]
    assert sum(low <= 1 / 3 <= high for low, high in naive) / len(naive) < 0.9


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    from itertools import combinations

    for num_correct in range(6):
        verdicts = [True] * num_correct + [False] * (5 - num_correct)
        for k in range(1, 6):
            subsets = list(combinations(verdicts, k))
            assert pass_at_k(5, num_correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="between 1 and the 5 samples, not 6"):
        pass_at_k(5, 1, 6)


# -- prompts -------------------------------------------------------------------------------------------------------


def test_a_prompt_ends_where_the_models_turn_begins_and_is_not_given_a_second_start(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = encode_prompt(tokenizer, [{"role": "system", "content": "S"}, {"role": "user", "content": "é?"}])
    assert tokenizer.decode(ids) == "<|system|>S<|end|><|user|>é?<|end|><|assistant|>"
    assert isinstance(ids, list) and all(type(token_id) is int for token_id in ids)


def test_decoding_leaves_out_special_tokens_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " 5 . It 's \\boxed{ 5 }\n"
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    assert decode_completion(tokenizer, ids) == text


def test_a_missing_chat_template_is_refused_with_the_flag_that_gives_one(tmp_path: Path) -> None:
    bare = make_tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template: give one with --chat-template FILE"):
        encode_prompt(bare, [{"role": "user", "content": "?"}])
    bare.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model has no chat template: give one with --chat-template FILE"):
        load_tokenizer(tmp_path / "model")
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}!")
    given = load_tokenizer(tmp_path / "model", tmp_path / "chat.jinja")
    assert given.decode(encode_prompt(given, [{"role": "user", "content": "hi"}])) == "hi!"
    assert chat_template_fingerprint(bare) == "none"
    assert chat_template_fingerprint(given) != chat_template_fingerprint(make_tiny_tokenizer())


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", r"the chat template of .*chat\.jinja is broken line 1"),
        ("{{ nothing.at.all }}", "is broken: 'nothing' is undefined"),
        ("Hello", "leaves out the user's message"),
        (" \n", "is empty"),
        (None, r"chat\.jinja cannot be read: No such file"),
    ],
)
def test_a_broken_chat_template_is_refused_in_one_line(tmp_path: Path, template: str | None, reason: str) -> None:
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    if template is not None:
        (tmp_path / "chat.jinja").write_text(template)
    with pytest.raises(ValueError, match=reason) as caught:
        load_tokenizer(tmp_path / "model", tmp_path / "chat.jinja")
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_the_messages_says_how_to_do_without_a_system_turn() -> None:
    strict = make_tiny_tokenizer()
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    with pytest.raises(ValueError, match=r"\(system, user\): System role not supported; .*--system-prompt ''"):
        encode_prompt(strict, [{"role": "system", "content": "S"}, {"role": "user", "content": "?"}])


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "checkpoints/run/step_5"])
def test_a_model_folder_that_is_not_there_is_refused_without_a_look_at_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=f"model folder {name} does not exist"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no tokenizer could be loaded for {tmp_path}") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
