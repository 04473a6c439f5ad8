"""DAPO's soft punishment of completions that come near their limit, as a part of the reward."""

import dataclasses
from collections.abc import Callable

from ludic.types import Completion, Score


def overlong_reward(length: int, *, max_tokens: int, buffer: int) -> float:
    """DAPO (arXiv 2503.14476, eq. 13): what is added to the reward of a completion of `length` tokens, from -1 to 0.

    0 up to max_tokens - buffer, then a straight line down to -1 at max_tokens, and -1 beyond.

    Example:
        >>> [overlong_reward(length, max_tokens=100, buffer=20) for length in (80, 85, 100)]
        [0.0, -0.25, -1.0]
    """
    return min(0.0, max(-1.0, (max_tokens - buffer - length) / buffer))


def overlong_shaping(buffer: int) -> Callable[[Score, Completion, int], Score]:
    """A `shape_reward` for `GroupStream`; with a buffer of 0 the score is left as it is. The part is called `overlong`.

    The length is that of what the model wrote: it is not punished for the environment's turns. A completion that was cut off
    has -1, also a conversation whose next turn had no room, however little the model had written.
    """

    def shaped(score: Score, completion: Completion, max_tokens: int) -> Score:
        if not buffer:
            return score
        cut_off = completion.finish_reason == "length"
        length = max_tokens if cut_off else completion.num_sampled_tokens
        part = overlong_reward(length, max_tokens=max_tokens, buffer=buffer)
        return dataclasses.replace(score, reward=score.reward + part, parts={**score.parts, "overlong": part})

    return shaped
