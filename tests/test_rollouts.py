"""Rollouts: groups in the order of their prompts, complete records, and a failure that is never a shorter group."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ludic.rollout.engine import Policy, WeightSyncReport
from ludic.rollout.groups import GroupStream, Prompt, rollout_metrics, rollout_record
from ludic.rollout.seeds import derive_seed
from ludic.task.prompts import encode_prompt
from ludic.types import ChatMessage, Completion, FinishReason, ParseResult, Rollout, RolloutGroup, SamplingParams, Score
from tests.vllm_helpers import make_tiny_tokenizer

VERSION = 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()


class EchoEngine:
    """Completes every prompt with `<its question><member>`; later prompts are answered sooner."""

    policy_version = VERSION
    overlaps_training = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.sampling: list[SamplingParams] = []
        self.started = 0

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        self.sampling.append(sampling)
        self.started += 1
        for _ in range(20 - self.started):
            await asyncio.sleep(0)
        question = str(self.tokenizer.decode(list(prompt_token_ids), skip_special_tokens=True))
        return [self._completion(f"{question}{member}") for member in range(num_completions)]

    def _completion(self, text: str) -> Completion:
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), int(self.tokenizer.eos_token_id)]
        return Completion(token_ids=ids, logprobs=[-0.5] * len(ids), finish_reason="stop", policy_version=VERSION)

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        raise AssertionError("rollouts do not change weights")

    def counts(self) -> dict[str, float]:
        return {}

    async def aclose(self) -> None:
        raise AssertionError("rollouts do not close the engine")


class HoldsTheFirst(EchoEngine):
    """Answers the first prompt only when it is told to."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self.release = asyncio.Event()

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        if self.started == 0:
            self.started += 1
            await self.release.wait()
        return await super().generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)


class LastDigit:
    """The reward is the last character of the text; `boom` as a sample makes the score of member 1 fail."""

    def __init__(self) -> None:
        self.cancelled = 0

    def messages(self, sample: str, /) -> list[ChatMessage]:
        return [{"role": "user", "content": sample}]

    def target(self, sample: str, /) -> str:
        return f"target of {sample}"

    async def score(self, sample: str, text: str, /) -> Score:
        if sample == "boom":
            if text.endswith("1"):
                raise RuntimeError("the scorer broke")
            await self.wait_for_ever()
        if sample == "slow":
            await self.wait_for_ever()
        return Score(
            reward=float(text[-1]),
            correct=text[-1] == "1",
            parse=ParseResult(answer=text[-1]),
            parts={"format": 1.0, "flexible": 0.0},
        )

    async def wait_for_ever(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class ListWriter:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: Mapping[str, Any], /) -> None:
        self.records.append(dict(record))


def prompts(tokenizer: PreTrainedTokenizerFast, *samples: str) -> list[Prompt[str]]:
    return [
        Prompt(
            group_id=40 + index,
            sample=sample,
            token_ids=encode_prompt(tokenizer, [{"role": "user", "content": sample}]),
            sampling=SamplingParams(seed=derive_seed(0, 2, index)),
        )
        for index, sample in enumerate(samples)
    ]


def stream_of(engine: EchoEngine, *, group_size: int = 2, writer: ListWriter | None = None) -> GroupStream[str]:
    return GroupStream(
        engine, LastDigit(), group_size=group_size, tokenizer=engine.tokenizer, record=writer.write if writer else None
    )


async def test_groups_are_handed_out_as_they_are_scored_and_are_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = HoldsTheFirst(tokenizer)
    stream = stream_of(engine)
    stream.submit(1, prompts(tokenizer, "a", "b", "c"))
    groups = []
    async for ready in stream.groups(1):
        groups += ready
        if len(groups) == 2:
            engine.release.set()
    assert [group.group_id for group in groups][-1] == 40, "the others did not wait for the first"
    groups.sort(key=lambda group: group.group_id)
    assert [group.target for group in groups] == ["target of a", "target of b", "target of c"]
    texts = [[rollout.text for rollout in group.rollouts] for group in groups]
    assert texts == [["a0", "a1"], ["b0", "b1"], ["c0", "c1"]]
    assert [[rollout.rollout_id for rollout in group.rollouts] for group in groups] == [[0, 1]] * 3
    assert [[rollout.score.reward for rollout in group.rollouts] for group in groups] == [[0.0, 1.0]] * 3
    times = stream.timings(1)
    assert times.generation_s > 0 and times.grading_s >= 0


async def test_updates_are_generated_together_and_handed_out_each_on_its_own(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    engine = EchoEngine(tokenizer)
    stream = stream_of(engine)
    stream.submit(1, prompts(tokenizer, "a", "b"))
    stream.submit(2, prompts(tokenizer, "c"))
    stream.submit(2, prompts(tokenizer, "again"))
    first = [group async for groups in stream.groups(1) for group in groups]
    assert engine.started == 3, "the second update was generated with the first, and once"
    second = [group async for groups in stream.groups(2) for group in groups]
    assert {group.target for group in first} == {"target of a", "target of b"}
    assert [group.target for group in second] == ["target of c"]


async def test_every_prompt_is_sampled_with_its_own_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = EchoEngine(tokenizer)
    stream = stream_of(engine)
    stream.submit(1, prompts(tokenizer, "a", "b"))
    assert [groups async for groups in stream.groups(1)]
    assert [sampling.seed for sampling in engine.sampling] == [derive_seed(0, 2, 0), derive_seed(0, 2, 1)]


def test_a_seed_depends_on_every_part_and_on_their_order() -> None:
    parts = [(seed, step, prompt) for seed in range(3) for step in range(12) for prompt in range(12)]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)  # (1, 11, 0) is not (1, 1, 10)
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert derive_seed(7) != derive_seed(7, 0)
    assert derive_seed(0, 3, 1) == 267571849633092395  # written down: a run repeats with every release


async def test_every_rollout_is_recorded_with_all_that_is_needed_to_read_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    writer = ListWriter()
    stream = stream_of(EchoEngine(tokenizer), writer=writer)
    stream.submit(9, prompts(tokenizer, "a", "b"))
    assert [groups async for groups in stream.groups(9)]
    assert sorted((record["group"], record["rollout"]) for record in writer.records) == [
        (40, 0), (40, 1), (41, 0), (41, 1),
    ]  # fmt: skip
    record = next(record for record in writer.records if record["completion"] == "b1")
    assert record == {
        "step": 9,
        "group": 41,
        "rollout": 1,
        "prompt": "b",
        "completion": "b1",
        "completion_token_ids": [*tokenizer.encode("b1", add_special_tokens=False), tokenizer.eos_token_id],
        "answer": "1",
        "parse_error": None,
        "target": "target of b",
        "reward": 1.0,
        "reward_parts": {"format": 1.0, "flexible": 0.0},
        "correct": True,
        "finish_reason": "stop",
        "policy_version": VERSION,
        "prompt_tokens": len(encode_prompt(tokenizer, [{"role": "user", "content": "b"}])),
        "completion_tokens": 3,
    }
    assert json.loads(json.dumps(record)) == record


async def test_a_stream_is_settled_once_nothing_of_any_update_is_in_flight(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = HoldsTheFirst(tokenizer)
    stream = stream_of(engine)
    await stream.settled()  # nothing was submitted
    stream.submit(1, prompts(tokenizer, "a", "b"))
    stream.submit(2, prompts(tokenizer, "c"))
    settled = asyncio.create_task(stream.settled())
    assert not (await asyncio.wait([settled], timeout=0.05))[0], "the first group is held"
    engine.release.set()
    await settled
    for step, count in ((1, 2), (2, 1)):
        assert [len(groups) async for groups in stream.groups(step)] == [count], "all are there at once"


async def test_a_score_that_fails_cancels_the_others_and_propagates(tokenizer: PreTrainedTokenizerFast) -> None:
    environment, writer = LastDigit(), ListWriter()
    engine = EchoEngine(tokenizer)
    stream = GroupStream(engine, environment, group_size=3, tokenizer=tokenizer, record=writer.write)
    stream.submit(1, prompts(tokenizer, "slow", "boom"))
    stream.submit(2, prompts(tokenizer, "slow"))
    with pytest.raises(RuntimeError, match="the scorer broke"):
        assert [groups async for groups in stream.groups(1)]
    assert environment.cancelled >= 6, "the scores of the other prompts still wait, in this update or the next"
    assert writer.records == [], "a group that is not whole was recorded"


async def test_further_fields_are_made_beside_the_event_loop_and_stand_in_the_records(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    engine, writer = EchoEngine(tokenizer), ListWriter()
    ran = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fields(group: RolloutGroup) -> list[dict[str, Any]]:
        asyncio.run_coroutine_threadsafe(ran.wait(), loop).result(5)  # the loop goes on meanwhile, or this fails
        return [{"place": place} for place in range(len(group.rollouts))]

    stream = GroupStream(
        engine,
        LastDigit(),
        group_size=2,
        tokenizer=tokenizer,
        record=writer.write,
        further_fields=fields,
        fields_take_long=True,
    )
    stream.submit(1, prompts(tokenizer, "b"))
    loop.call_later(0.05, ran.set)
    assert len([groups async for groups in stream.groups(1)]) == 1
    assert [record["place"] for record in writer.records] == [0, 1]


def rollout(
    *, group: int = 0, reward: float, tokens: int, correct: bool = False, parse_error: str | None = None,
    finish_reason: FinishReason = "stop", version: int = VERSION, grader_failed: float = 0.0, prompt_tokens: int = 5,
) -> Rollout:  # fmt: skip
    return Rollout(
        group_id=group,
        rollout_id=0,
        prompt_token_ids=list(range(prompt_tokens)),
        completion=Completion(
            token_ids=[1] * tokens, logprobs=None, finish_reason=finish_reason, policy_version=version
        ),
        text="",
        score=Score(
            reward=reward,
            correct=correct,
            parse=ParseResult(answer=None if parse_error else "1", error=parse_error),
            parts={"grader_failed": grader_failed},
        ),
    )


def test_the_metrics_of_an_update_are_those_counted_by_hand() -> None:
    first = (
        rollout(reward=1.0, tokens=10, correct=True),
        rollout(reward=0.0, tokens=20, finish_reason="length", parse_error="no box"),
    )
    second = (
        rollout(group=1, reward=0.5, tokens=3, version=VERSION - 2, prompt_tokens=7),
        rollout(group=1, reward=0.5, tokens=7, grader_failed=1.0, prompt_tokens=7),
    )
    groups = [RolloutGroup(group_id=i, target="1", rollouts=members) for i, members in enumerate((first, second))]
    assert rollout_metrics(groups, policy_version=VERSION) == {
        "reward_mean": 0.5,
        "reward_std": pytest.approx((0.5 / 4) ** 0.5),  # squares of 0.5, -0.5, 0 and 0
        "correct_rate": 0.25,
        "parse_err_rate": 0.25,
        "truncation_rate": 0.25,
        "avg_completion_length": 10.0,
        "total_completion_tokens": 40,
        "prompt_tokens": 24,
        "staleness": 0.5,
        "staleness_max": 2,
        "grader_timeouts": 0.0,
        "grader_failures": 1.0,
    }


def test_metrics_of_no_rollouts_are_refused() -> None:
    with pytest.raises(ValueError, match="no rollouts"):
        rollout_metrics([], policy_version=0)


def test_a_record_of_a_truncated_answer_without_a_box_says_both() -> None:
    record = rollout_record(
        rollout(reward=0.0, tokens=4, finish_reason="length", parse_error="no \\boxed{...}"),
        step=1,
        prompt="?",
        target="7",
    )
    assert record["answer"] is None and record["parse_error"] == "no \\boxed{...}"
    assert record["finish_reason"] == "length" and record["completion_tokens"] == 4
