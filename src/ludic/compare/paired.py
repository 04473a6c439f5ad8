"""The statistics of two sides that answered the same problems: won and lost, an exact p, the interval of the difference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pvariance

ALPHA, POWER = 0.05, 0.8
"""A difference counts below this p; so often a real one of the size that was seen would be found."""
Z_ALPHA, Z_POWER = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(POWER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """B against A on the same n problems. Rates are fractions of 1, the interval is (low, high) at 95%."""

    num_problems: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    """B's accuracy less A's."""
    difference_ci95: tuple[float, float]
    won: int
    """Problems of which B got a larger share right than A."""
    lost: int
    tied: int
    p_value: float
    """Of McNemar's exact test; with several completions a problem, of the sign test over problems."""
    num_more_problems: int | None
    """Further problems of this kind after which the difference would probably be seen; 0 where it is seen already, None
    where none was seen at all."""


def compare(a: Sequence[Sequence[bool]], b: Sequence[Sequence[bool]]) -> Paired:
    """`a` and `b`: for each of n problems, in the same order, the verdicts of its completions.

    Raises:
        ValueError: the sides have different problems, or none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"two sides of the same problems can be compared, not {len(a)} against {len(b)}")
    means_a, means_b = [fmean(verdicts) for verdicts in a], [fmean(verdicts) for verdicts in b]
    differences = [of_b - of_a for of_a, of_b in zip(means_a, means_b, strict=True)]
    won, lost = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    p_value = mcnemar_exact(won, lost)
    return Paired(
        num_problems=len(a),
        accuracy_a=fmean(means_a),
        accuracy_b=fmean(means_b),
        difference=fmean(differences),
        difference_ci95=difference_interval(differences),
        won=won,
        lost=lost,
        tied=len(a) - won - lost,
        p_value=p_value,
        num_more_problems=0 if p_value < ALPHA else more_problems(differences),
    )


def mcnemar_exact(won: int, lost: int) -> float:
    """The two-sided p of `won` against `lost` discordant pairs, if each was a fair coin (McNemar 1947, exact form).

    Example:
        >>> mcnemar_exact(9, 1)
        0.021484375
    """
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def difference_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of the problems' differences, each in [-1, 1].

    The adjusted Wald interval for paired proportions (Bonett and Price 2012, Journal of Educational and Behavioral Statistics
    37:479-488): one problem that was won and one that was lost are added, so that it keeps a width where all are tied. With
    several completions a problem a difference is a fraction, and its square takes the place of the discordant pair's 1.
    """
    with_two_more = [*differences, 1.0, -1.0]
    centre = fmean(with_two_more)
    half = Z_ALPHA * math.sqrt(pvariance(with_two_more, centre) / len(with_two_more))
    return max(-1.0, centre - half), min(1.0, centre + half)


def more_problems(differences: Sequence[float]) -> int | None:
    """How many further problems would show this mean difference, with this spread, at `ALPHA` with `POWER`."""
    seen = fmean(differences)
    if seen == 0:
        return None
    needed = (Z_ALPHA + Z_POWER) ** 2 * pvariance(differences) / seen**2
    return max(1, math.ceil(needed) - len(differences))
