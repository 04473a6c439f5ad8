"""Intervals and estimators of an evaluation's figures, from verdicts alone."""

import math
from collections.abc import Sequence

_Z95 = 1.959963984540054  # the standard normal's 97.5% quantile


def wilson_interval(rate: float, num_trials: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion at 95% (Wilson 1927, JASA 22:209-212).

    Unlike the textbook `rate +- z * error` it stays inside [0, 1] and keeps its promise near 0 and 1.

    Example:
        >>> tuple(round(bound, 3) for bound in wilson_interval(0.0, 100))
        (0.0, 0.037)
    """
    spread = _Z95 * _Z95 / num_trials
    centre = (rate + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(rate * (1 - rate) / num_trials + spread / (4 * num_trials))
    low = 0.0 if rate == 0 else max(0.0, centre - half)
    high = 1.0 if rate == 1 else min(1.0, centre + half)
    return low, high


def clustered_interval(verdicts: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95% interval of the mean over completions, with problems (not completions) as what was sampled.

    Completions of one problem resemble each other, so n problems with K completions each are worth fewer than n * K
    independent answers (Miller 2024, arXiv 2411.00640, section 2.2). The spread of the per-problem means says how many
    they are worth, and Wilson's interval is taken at that effective number (Franco et al. 2019, Journal of Survey
    Statistics and Methodology 7:334-364). With one completion a problem this is Wilson's interval itself.

    Args:
        verdicts: n lists of K verdicts.
    """
    num_problems = len(verdicts)
    means = [sum(of_problem) / len(of_problem) for of_problem in verdicts]
    rate = mean(verdicts)
    variance = sum((mean - rate) ** 2 for mean in means) / num_problems
    most = float(sum(len(of_problem) for of_problem in verdicts))
    if rate in (0.0, 1.0):
        return wilson_interval(rate, num_problems)  # no spread to go by: the careful count
    effective = min(num_problems * rate * (1 - rate) / variance, most) if variance > 0 else most
    return wilson_interval(rate, effective)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that at least one of `k` draws, out of `num_samples` of which `num_correct` are right, is right.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1), in whole numbers:
    1 - C(n - c, k) / C(n, k).

    Example:
        >>> pass_at_k(4, 1, 2)
        0.5
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be between 1 and the {num_samples} samples, not {k}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean(verdicts: Sequence[Sequence[bool]]) -> float:
    return sum(map(sum, verdicts)) / sum(map(len, verdicts))
