"""maj@k against every draw counted one by one, and whose votes are the same."""

import itertools
import math
from typing import Any, cast

import pytest

from ludic.rollout import votes
from ludic.rollout.problems import ProblemRecord
from ludic.rollout.votes import maj_at_k, telling_ks, votes_of

BALLOTS = ["aab", "aabb", "abc-", "--", "bbb", "aaa", "aabbcc", "aaabbc-", "abbccd--", "aabbbccd", "a-------"]
"""A completion a letter: `a` is right, other letters are wrong answers, `-` is none."""


def majority_by_hand(drawn: tuple[str, ...]) -> float:
    votes = [letter for letter in drawn if letter != "-"]
    if not votes:
        return 0.0
    most = max(map(votes.count, votes))
    winners = {letter for letter in votes if votes.count(letter) == most}
    return 1 / len(winners) if "a" in winners else 0.0


@pytest.mark.parametrize("ballots", BALLOTS)
def test_maj_at_k_is_the_mean_over_every_draw_without_replacement(ballots: str) -> None:
    others = [ballots.count(letter) for letter in "bcd" if letter in ballots]
    for k in range(1, len(ballots) + 1):
        draws = list(itertools.combinations(ballots, k))
        by_hand = sum(map(majority_by_hand, draws)) / len(draws)
        assert maj_at_k(ballots.count("a"), others, ballots.count("-"), k) == pytest.approx(by_hand, abs=1e-12)


def test_a_hundred_samples_are_counted_exactly_too() -> None:
    # Two answers and an odd k: the majority is right where the hypergeometric draw has more than half of the right one.
    exact = sum(math.comb(60, i) * math.comb(40, 33 - i) for i in range(17, 34)) / math.comb(100, 33)
    assert maj_at_k(60, [40], 0, 33) == pytest.approx(exact, rel=1e-12)


def test_the_ways_of_the_rivals_are_counted_once_for_every_k() -> None:
    votes._maj_at_k.cache_clear()
    votes._ways_of_rivals.cache_clear()
    for k in telling_ks(64):
        maj_at_k(4, [5, 5, 50], 0, k)
    assert votes._ways_of_rivals.cache_info().misses == 4  # one for each number of votes of the right answer


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_beyond_the_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be between 1 and the 3 samples, not {k}"):
        maj_at_k(1, [1], 1, k)


def test_the_ks_that_are_shown_are_powers_of_two_and_the_samples() -> None:
    assert [telling_ks(n) for n in (1, 2, 8, 12)] == [[1], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def record(*completions: tuple[str | None, bool, str], rule: str = "flexible") -> ProblemRecord:
    given = [{"answer": answer, rule: right, "text": text} for answer, right, text in completions]
    return cast("ProblemRecord", cast(Any, {"completions": given}))


def test_equal_numbers_are_one_vote_and_all_that_is_right_is_one() -> None:
    given = record(("18", True, ""), ("17", False, ""), ("17.0", False, ""), (r"\$17", False, ""), ("$x$", False, ""),
                   ("x", False, ""), (r"\frac{36}{2}", True, ""))  # fmt: skip
    assert votes_of(given, "flexible") == (2, [3, 2], 0)


def test_without_a_box_the_flexible_rules_last_number_votes_and_another_rule_has_no_vote() -> None:
    texts = ((None, False, "so it is 17"), (None, False, "17."), (None, False, "I do not know"))
    assert votes_of(record(*texts), "flexible") == (0, [2], 1)
    assert votes_of(record(*texts, rule="strict"), "strict") == (0, [], 3)


def test_a_conversation_without_an_answer_votes_with_what_the_model_said_last() -> None:
    one = record(
        (None, False, "no idea\n\n[user] 7 is too high\n\n[assistant] hm"),
        (None, False, "5\n\n[user] 7\n\n[assistant] 6"),
    )
    for completion, last in zip(one["completions"], ("hm", "6"), strict=True):
        completion["turns"] = [{"role": "assistant", "content": last, "tokens": 1}]
    assert votes_of(one, "flexible") == (0, [1], 1)
