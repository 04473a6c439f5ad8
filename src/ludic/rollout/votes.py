"""maj@k: how often the most frequent answer of k completions is right (Wang et al. 2022, arXiv 2203.11171, self-consistency)."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import cast

from ludic.rollout.problems import ProblemRecord, answering_text, verdicts
from ludic.task.numbers import MAX_ANSWER_CHARS, clean_answer, read_number
from ludic.task.parsers import last_number_parser


def telling_ks(num_samples: int) -> list[int]:
    """The k that tables show: the powers of two up to `num_samples`, and that itself.

    Example:
        >>> telling_ks(6)
        [1, 2, 4, 6]
    """
    return sorted({2**power for power in range(num_samples.bit_length())} | {num_samples})


def maj_at_k(num_right: int, others: Sequence[int], num_silent: int, k: int) -> float:
    """The chance that the majority of `k` of n completions, drawn without replacement, is right.

    Exact: every way to draw is counted, by how many votes the right answer gets. Where it ties with others for the most votes,
    one of the tied is taken, each as likely as the others. Where none that was drawn votes, the majority is wrong.

    Args:
        num_right: completions that vote for the right answer.
        others: how many vote for each wrong one.
        num_silent: completions without an answer, which do not vote. n is the sum of all three.

    Example:
        >>> maj_at_k(2, [1], 0, 2)  # of the three pairs one is right, two are ties
        0.6666666666666666
    """
    num_samples = num_right + sum(others) + num_silent
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be between 1 and the {num_samples} samples, not {k}")
    return _maj_at_k(num_right, tuple(sorted(others)), num_samples, k)


@lru_cache(maxsize=100_000)  # many problems have the same votes
def _maj_at_k(num_right: int, others: tuple[int, ...], num_samples: int, k: int) -> float:
    by_ties: Counter[int] = Counter()
    for votes in range(1, min(num_right, k) + 1):
        rivals = tuple(count for count in others if count >= votes)
        bystanders = num_samples - num_right - sum(rivals)  # never reach `votes`, however many of them are drawn
        for (num_tied, drawn), count in _ways_of_rivals(rivals, votes).items():
            if votes + drawn <= k:
                rest = math.comb(bystanders, k - votes - drawn)
                by_ties[num_tied] += math.comb(num_right, votes) * count * rest
    ways = sum((Fraction(count, num_tied + 1) for num_tied, count in by_ties.items()), Fraction(0))
    return float(ways / math.comb(num_samples, k))


@lru_cache(maxsize=1_000)  # one problem's, which serve every k
def _ways_of_rivals(rivals: tuple[int, ...], votes: int) -> Counter[tuple[int, int]]:
    """In how many ways some are drawn, none of the rivals above `votes`: by how many have `votes`, and were drawn."""
    ways = Counter({(0, 0): 1})
    for rival in rivals:
        choices = [math.comb(rival, more) for more in range(votes + 1)]
        longer: Counter[tuple[int, int]] = Counter()
        for (num_tied, drawn), count in ways.items():
            for more, choice in enumerate(choices):
                longer[num_tied + (more == votes), drawn + more] += count * choice
        ways = longer
    return ways


def votes_of(record: ProblemRecord, rule: str) -> tuple[int, list[int], int]:
    """The arguments of `maj_at_k` but k: right completions by `rule`, those of each wrong answer, and those without one.

    All that the rule calls right vote together. Wrong answers are the same vote where they are the same number or, cleaned of
    wrappings, the same text. Without a recorded answer a completion votes for its last number, where that is the rule's answer.
    """
    right = verdicts(record, rule)
    wrong = [one for one, is_right in zip(record["completions"], right, strict=True) if not is_right]
    answers = [
        last_number_parser(answering_text(one)).answer
        if one["answer"] is None and rule == "flexible"
        else one["answer"]
        for one in wrong
    ]
    counts = Counter(_vote(answer) for answer in answers if answer is not None)
    return sum(right), list(counts.values()), answers.count(None)


def _vote(answer: str) -> Hashable:
    if len(answer) > MAX_ANSWER_CHARS:
        return answer
    cleaned = clean_answer(answer)
    number = read_number(cleaned)
    return cleaned if number is None or number.value is None else cast(Hashable, number.value)
