"""Which prompts an update gets: the order without settings is the old one, state resumes exactly, places are never lost."""

import dataclasses
import json
import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludic.config import GRPOConfig
from ludic.rollout.groups import Prompt
from ludic.train.prompt_source import RARELY, PromptRecord, PromptSource, chance
from ludic.train.schedule import DataOrder, rollout_prompts
from ludic.types import Completion, ParseResult, Rollout, RolloutGroup, Score

NUM_SAMPLES = 6
SAMPLES = list(range(NUM_SAMPLES))
TOKEN_IDS = [[index + 1] for index in SAMPLES]
CONFIG = GRPOConfig(rollouts_per_update=8, group_size=2, max_seq_len=64)
CLEVER = dataclasses.replace(CONFIG, dynamic_sampling=True, max_sampling_factor=3, drop_solved=2, curriculum=True)


def source(config: GRPOConfig = CONFIG, **kwargs: Any) -> PromptSource[int]:
    return PromptSource(config, SAMPLES, TOKEN_IDS, **kwargs)


def group(prompt: Prompt[int], *correct: bool) -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            group_id=prompt.group_id,
            rollout_id=member,
            prompt_token_ids=prompt.token_ids,
            completion=Completion(token_ids=[1], logprobs=None, finish_reason="stop", policy_version=0),
            text="",
            score=Score(reward=float(right), correct=right, parse=ParseResult(answer="1")),
        )
        for member, right in enumerate(correct)
    )
    return RolloutGroup(group_id=prompt.group_id, target="1", rollouts=rollouts)


def all_right(prompts: Sequence[Prompt[int]]) -> list[RolloutGroup]:
    return [group(prompt, True, True) for prompt in prompts]


# --- plain sampling ---------------------------------------------------------------------------------------------------


def test_plain_sampling_gives_the_prompts_seeds_and_numbers_that_it_always_gave() -> None:
    plain, order = source(), DataOrder(seed=0, num_samples=NUM_SAMPLES)
    for update in range(1, 12):
        ids = range((update - 1) * 4, update * 4)
        assert plain.take(update) == rollout_prompts(CONFIG, ids, order, SAMPLES, TOKEN_IDS)
        plain.count(update, all_right(plain.take(update)))
    again = [(prompt.group_id, prompt.sample, prompt.sampling.seed) for prompt in source(step=1).take(2)]
    assert again == SECOND_UPDATE


SECOND_UPDATE = [
    (4, 2, 2693753190945811367),
    (5, 1, 2992522750057549132),
    (6, 1, 1238849989888690705),
    (7, 4, 4038760602664984666),
]
"""Number, sample and seed of each prompt, written down with the code that had no source."""


def test_plain_sampling_resumes_where_a_checkpoint_without_a_state_of_prompts_ends() -> None:
    whole = source()
    for update in (1, 2):
        whole.count(update, all_right(whole.take(update)))
    assert source(step=2).take(3) == whole.take(3)


def test_an_update_that_is_asked_for_twice_has_the_same_prompts() -> None:
    one = source(CLEVER)
    assert one.take(1) == one.take(1) and one.take(2)[0].group_id == 4


# --- solve rates ------------------------------------------------------------------------------------------------------


def test_the_chance_is_one_until_a_prompt_was_seen_and_then_four_p_one_minus_p() -> None:
    config = dataclasses.replace(CONFIG, curriculum=True)
    assert chance(PromptRecord(), config) == 1
    rates = {rate: chance(PromptRecord().after(rate), config) for rate in (0.0, 0.25, 0.5, 0.75, 1.0)}
    assert rates == {0.0: RARELY, 0.25: 0.75, 0.5: 1.0, 0.75: 0.75, 1.0: RARELY}
    assert all(chance(PromptRecord().after(rate), CONFIG) == 1 for rate in rates), "plain sampling takes every place"


def test_a_prompt_is_solved_after_so_many_groups_in_a_row_and_recovers_with_one_mistake() -> None:
    config = dataclasses.replace(CONFIG, drop_solved=2)
    once = PromptRecord().after(1.0)
    assert [chance(record, config) for record in (once, once.after(1.0), once.after(1.0).after(0.5))] == [1, RARELY, 1]


def test_solved_prompts_are_left_out_but_for_a_rare_visit() -> None:
    config = dataclasses.replace(CONFIG, drop_solved=1)
    drops, seen = source(config), []
    for update in range(1, 101):
        prompts = drops.take(update)
        seen += [prompt.sample for prompt in prompts if update > 3]
        figures = drops.count(update, [group(prompt, True, prompt.sample < 4) for prompt in prompts])
    assert figures["solved_prompts"] == 4 and figures["skipped_prompts"] > 0
    visits = [seen.count(sample) for sample in SAMPLES]
    assert all(0 < visits[sample] < 0.2 * visits[5] for sample in range(4)), visits
    assert visits[4] == pytest.approx(visits[5], abs=2)


def test_where_everything_is_solved_the_run_goes_on() -> None:
    config = dataclasses.replace(CONFIG, drop_solved=1)
    drops = source(config)
    for update in range(1, 20):
        assert len(drops.take(update)) == 4
        figures = drops.count(update, all_right(drops.take(update)))
    assert figures["solved_prompts"] == NUM_SAMPLES


# --- replacements -----------------------------------------------------------------------------------------------------


def test_a_group_with_variance_stays_and_one_without_is_replaced_up_to_the_bound(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dynamic = source(dataclasses.replace(CONFIG, dynamic_sampling=True, max_sampling_factor=2))
    first = dynamic.take(1)
    assert dynamic.replacement(1, group(first[0], True, False)) is None
    further = [dynamic.replacement(1, group(prompt, False, False)) for prompt in [*first, first[1]]]
    assert [prompt.group_id for prompt in further[:4] if prompt] == [4, 5, 6, 7] and further[4] is None
    assert not caplog.records
    figures = dynamic.count(1, all_right([*first, *(prompt for prompt in further if prompt)]))
    assert figures == {"generated_groups": 8, "replaced_groups": 4, "sampling_bound_reached": 1}
    (warning,) = caplog.messages
    assert warning.startswith("update 1: 1 of its 4 groups have no variance and stay: --max-sampling-factor 2 allows")
    assert warning.count("\n") == 0 and caplog.records[0].levelno == logging.WARNING


def test_a_replacement_belongs_to_its_update_and_takes_the_place_after_all_that_were_handed_out() -> None:
    dynamic = source(dataclasses.replace(CONFIG, dynamic_sampling=True))
    first, ahead = dynamic.take(1), dynamic.take(2)
    further = dynamic.replacement(1, group(first[2], True, True))
    assert further is not None and further.group_id == 8 == ahead[-1].group_id + 1
    order = DataOrder(seed=0, num_samples=NUM_SAMPLES)
    assert [further] == rollout_prompts(CONFIG, [8], order, SAMPLES, TOKEN_IDS, step=0)


def test_a_group_that_only_its_lengths_tell_apart_is_replaced_and_one_of_two_answers_stays() -> None:
    dynamic = source(dataclasses.replace(CONFIG, dynamic_sampling=True))

    def punished(prompt: Prompt[int], *correct: bool, lost: float) -> RolloutGroup:
        *others, last = group(prompt, *correct).rollouts
        score = dataclasses.replace(last.score, reward=last.score.reward - lost, parts={"overlong": -lost})
        return RolloutGroup(
            group_id=prompt.group_id, target="1", rollouts=(*others, dataclasses.replace(last, score=score))
        )

    wrong, right, mixed, level = dynamic.take(1)
    assert dynamic.replacement(1, punished(wrong, False, False, lost=0.3)) is not None
    assert dynamic.replacement(1, punished(right, True, True, lost=0.3)) is not None
    assert dynamic.replacement(1, punished(mixed, True, False, lost=0.3)) is None
    assert dynamic.replacement(1, punished(level, False, True, lost=1.0)) is None, "both have the reward 0"


def test_as_many_groups_that_stay_have_log_probs_whatever_is_replaced_and_passed_over() -> None:
    config = dataclasses.replace(CLEVER, logprob_share=0.5, max_sampling_factor=8)
    draws, clever = random.Random(0), source(config)
    for update in range(1, 30):
        staying = dict(enumerate(clever.take(update)))
        groups = []
        for slot, prompt in list(staying.items()):
            while True:
                groups.append(group(prompt, draws.random() < 0.8, draws.random() < 0.8))
                further = clever.replacement(update, groups[-1])
                if further is None:
                    break
                staying[slot] = prompt = further
        assert sum(prompt.sampling.logprobs for prompt in staying.values()) == 2
        clever.count(update, groups)


# --- any history ------------------------------------------------------------------------------------------------------


class History:
    """Updates that are handed out ahead and counted in order, with verdicts that depend on the group alone."""

    def __init__(self, config: GRPOConfig, seed: int, *, step: int = 0, state: dict[str, Any] | None = None) -> None:
        self.source = source(config, step=step, state=state)
        self.seed, self.step = seed, step
        self.log: list[Any] = []

    def verdict(self, prompt: Prompt[int]) -> RolloutGroup:
        draws = random.Random(f"{self.seed} {prompt.group_id}")
        return group(prompt, *(draws.random() < prompt.sample / (NUM_SAMPLES - 1) for _ in range(2)))

    def update(self, ahead: int) -> None:
        self.step += 1
        for update in range(self.step, self.step + ahead + 1):
            waiting = list(self.source.take(update))
        waiting, groups = list(self.source.take(self.step)), []
        while waiting:
            prompt = waiting.pop(0)
            groups.append(self.verdict(prompt))
            if self.source.config.dynamic_sampling:
                further = self.source.replacement(self.step, groups[-1])
                waiting += [] if further is None else [further]
        figures = self.source.count(self.step, groups[::-1])
        self.log.append(([one.group_id for one in groups], figures, self.source.state()))


CONFIGS = st.builds(
    dataclasses.replace,
    st.just(CONFIG),
    dynamic_sampling=st.booleans(),
    max_sampling_factor=st.integers(1, 3),
    drop_solved=st.integers(0, 2),
    curriculum=st.booleans(),
    seed=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, seed=st.integers(0, 9), ahead=st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_no_number_is_given_twice_none_is_lost_and_the_bound_holds(
    config: GRPOConfig, seed: int, ahead: list[int]
) -> None:
    history = History(config, seed)
    for number in ahead:
        history.update(number)
    ids = [group_id for groups, _, _ in history.log for group_id in groups]
    assert len(ids) == len(set(ids))
    for groups, figures, _ in history.log:
        assert 4 <= len(groups) <= config.max_groups_per_update
        assert figures.get("generated_groups", 4) == len(groups)
    state = history.source.state()
    gone = {*range(state["next_group"]), *state["done_after"]}
    assert set(ids) <= gone and state["next_group"] not in state["done_after"]
    if not config.drop_solved and not config.curriculum:
        assert set(ids) == gone, "a place was passed over"
    assert sum(record[0] for record in state["prompts"].values()) == len(ids)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, seed=st.integers(0, 9), cut=st.integers(0, 5), more=st.integers(1, 4))
def test_a_source_that_is_resumed_from_its_state_goes_on_as_the_one_that_was_not(
    config: GRPOConfig, seed: int, cut: int, more: int
) -> None:
    whole = History(config, seed)
    for _ in range(cut):
        whole.update(0)
    state = json.loads(json.dumps(whole.source.state()))
    resumed = History(config, seed, step=cut, state=state)
    for history in (whole, resumed):
        history.log.clear()
        for _ in range(more):
            history.update(0)
    assert resumed.log == whole.log


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, seed=st.integers(0, 9), cut=st.integers(1, 4), ahead=st.integers(1, 2), more=st.integers(1, 4))
def test_places_that_were_handed_out_ahead_of_a_checkpoint_come_again_after_it_and_no_other_does(
    config: GRPOConfig, seed: int, cut: int, ahead: int, more: int
) -> None:
    first = History(config, seed)
    for _ in range(cut):
        first.update(ahead)
    counted = [group_id for groups, _, _ in first.log for group_id in groups]
    resumed = History(config, seed, step=cut, state=json.loads(json.dumps(first.source.state())))
    for _ in range(more):
        resumed.update(ahead)
    again = [group_id for groups, _, _ in resumed.log for group_id in groups]
    assert not set(counted) & set(again)
    if not config.drop_solved and not config.curriculum and not config.dynamic_sampling:
        assert sorted(counted + again) == list(range(4 * (cut + more)))
